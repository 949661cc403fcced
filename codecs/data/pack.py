"""Packing: records of a source -> shards of a packed set, chunk by chunk, safe against a kill at any moment.

A chunk is the records of `rows_per_shard` rows. `pack_chunk` writes its shards, then its report below `.packing/`; a
chunk with a report is finished, one without is packed again, to the same files with the same bytes. When every chunk
has its report, `Packing.finish` writes `packed.json`, and removes what only packing needed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from compand import files
from compand.data import encoder, storage
from compand.data.encoder import Block, Row
from compand.data.info import SetInfo, shown
from compand.data.packed import INDEX, ShardWriter
from compand.data.sources import Record, Source, list_source
from compand.errors import MediaError, PackedSetError, UsageError

Progress = Callable[[int, int, float, int], None]
"""Called with rows, payload bytes, pixels or seconds, and failures that have been added."""

PLAN = "packing.json"
"""Settings of a packing that is not finished."""

JOURNAL = ".packing"
"""Folder of the reports of finished chunks."""

FAILURES = "failures.csv"

FITTED = 512
"""Inputs, at most, on which the tables of the archive profile are fitted."""

FITTED_INTEGERS = 1 << 26
"""Integers, about at most, of these inputs: long sounds would fill the memory."""


@dataclass(frozen=True)
class PackSpec:
    """All that `pack_chunk` needs beside the records; picklable.

    Attributes:
        target: folder or URL of the set.
        codec: checkpoint to load, a name or a folder.
        info: what every shard says of the set.
        columns: label and further columns, an Arrow schema in its serialised form.
        device: as of `compand.load`.
        shard_bytes: payload bytes above which a chunk goes on in another shard.
        fail_fast: raise at the first input that cannot be packed, instead of listing it.
        plan: fingerprint of all settings and inputs; reports of another packing do not count.
    """

    target: str
    codec: str
    info: SetInfo
    columns: bytes
    device: str = "auto"
    shard_bytes: int = 256 << 20
    fail_fast: bool = False
    plan: str = ""


@dataclass(frozen=True)
class ChunkReport:
    """What has become of a chunk.

    Attributes:
        index: number of the chunk.
        shards: name, rows and bytes of each of its shards.
        rows: rows written.
        payload_bytes: of all payloads.
        source_bytes: of all media files that were packed.
        extent: pixels, or seconds.
        failures: key and reason of each input that was left out.
        plan: see `PackSpec`.
    """

    index: int
    shards: tuple[tuple[str, int, int], ...] = ()
    rows: int = 0
    payload_bytes: int = 0
    source_bytes: int = 0
    extent: float = 0.0
    failures: tuple[tuple[str, str], ...] = ()
    plan: str = ""


# ------------------------------------------------------------------------------------------------ the whole


@dataclass(frozen=True)
class Packing:
    """A packing that has begun: what is to be done, and by which settings.

    An engine calls `pack_chunk(packing.spec, index, records)` for all `todo()`, in any order and any number of
    processes, and then `finish()`.
    """

    spec: PackSpec
    source: Source
    rows_per_shard: int
    settings: Mapping[str, Any]
    complete: bool = False  # the set is there already

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-len(self.source.records) // self.rows_per_shard)

    def records(self, index: int) -> Sequence[Record]:
        """The records of a chunk."""
        return self.source.records[index * self.rows_per_shard : (index + 1) * self.rows_per_shard]

    def todo(self) -> list[tuple[int, Sequence[Record]]]:
        """Number and records of the chunks that are not finished."""
        if self.complete or self._finished():
            return []
        reports = _reports(self.spec)
        return [(index, self.records(index)) for index in range(self.chunks) if index not in reports]

    def finish(self) -> Summary:
        """Completes the set.

        Raises:
            PackedSetError: a chunk is not finished, or no input could be packed.
        """
        target = self.spec.target
        if self.complete or self._finished():
            summary = _read_summary(target)
            _clean(target, summary)
            return summary
        reports = _reports(self.spec)
        missing = [index for index in range(self.chunks) if index not in reports]
        if missing:
            raise PackedSetError(f"{target}: chunk {missing[0]} was not packed: run the same command again")
        ordered = [reports[index] for index in range(self.chunks)]
        summary = Summary(
            shards=tuple(shard for report in ordered for shard in report.shards),
            rows=sum(report.rows for report in ordered),
            payload_bytes=sum(report.payload_bytes for report in ordered),
            source_bytes=sum(report.source_bytes for report in ordered),
            extent=math.fsum(report.extent for report in ordered),
            failures=sum(len(report.failures) for report in ordered),
        )
        if summary.failures:
            storage.write(storage.join(target, FAILURES), _failures_csv(ordered))
        if not summary.rows:
            reason = ordered[0].failures[0][1]
            raise PackedSetError(
                f"{target}: none of {summary.failures} inputs could be packed; the first: {reason}"
            )
        index = {
            "format": 1,
            "shards": [{"name": name, "rows": rows, "bytes": size} for name, rows, size in summary.shards],
            "rows": summary.rows,
            "payload_bytes": summary.payload_bytes,
            "source_bytes": summary.source_bytes,
            "extent": summary.extent,
            "failures": summary.failures,
            "plan": self.spec.plan,
            "settings": self.settings,
            "compand": self.spec.info.to_json(),
        }
        storage.write(storage.join(target, INDEX), _json(index))
        _clean(target, summary)
        return summary

    def _finished(self) -> bool:
        """Whether the set has been completed since it was begun."""
        target = self.spec.target
        index = (
            None if storage.exists(storage.join(target, PLAN)) else _read_json(storage.join(target, INDEX))
        )
        return index is not None and index.get("plan") == self.spec.plan


@dataclass(frozen=True)
class Summary:
    """A complete set in numbers; attributes as of `ChunkReport`, `failures` their number."""

    shards: tuple[tuple[str, int, int], ...]
    rows: int
    payload_bytes: int
    source_bytes: int
    extent: float
    failures: int

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(size for _, _, size in self.shards)


def start(
    source: str,
    target: str,
    *,
    codec: str,
    quality: float,
    profile: str = "train",
    compression: str = "zstd",
    shard_mb: float = 256,
    rows_per_shard: int = 4096,
    order: str = "hashed",
    label: str | None = None,
    media: str | None = None,
    key: str | None = None,
    device: str = "auto",
    allow_empty_class: bool = False,
    fail_fast: bool = False,
    force: bool = False,
) -> Packing:
    """Begins a packing, or goes on with one of the same settings and inputs that was interrupted.

    Args:
        source, order, label, media, key, allow_empty_class: see `list_source`.
        target: folder or URL of the set.
        codec: checkpoint, a name or a folder.
        quality: of the checkpoint, in steps of 1/32.
        profile: "train", "archive" or "cpd".
        compression: "zstd" or "lz4", of the profile train.
        shard_mb: megabytes (2^20) of payload in a shard, about.
        rows_per_shard: rows of a chunk, and of a shard at most.
        device: as of `compand.load`.
        fail_fast: raise at the first input that cannot be packed.
        force: begin anew, whatever set the target holds.

    Raises:
        UsageError: a value is out of range; the target holds something else, or a set with other settings.
        CheckpointError: no such checkpoint.
    """
    from compand.checkpoint import find

    if order not in ("hashed", "sorted"):
        raise UsageError(f"order {order} does not exist: choose hashed or sorted")
    if not shard_mb > 0 or rows_per_shard < 1:
        raise UsageError(f"shards of {shard_mb:g} MB and {rows_per_shard} rows cannot be written: give more")
    target = storage.normal(target)
    checkpoint = find(codec)
    info = SetInfo.of(
        checkpoint, quality=quality, profile=profile, compression=compression if profile == "train" else None
    )
    listed = list_source(
        source,
        _accept(info.medium),
        label=label,
        media=media,
        key=key,
        order=order,
        allow_empty_class=allow_empty_class,
    )
    info = info.with_classes(listed.classes)
    settings = {
        "compand": info.to_json(),
        "order": order,
        "rows_per_shard": rows_per_shard,
        "shard_mb": shard_mb,
        "inputs": listed.digest(),
    }
    plan = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    spec = PackSpec(
        target=target,
        codec=str(codec),
        info=info,
        columns=listed.columns.serialize().to_pybytes(),
        device=device,
        shard_bytes=int(shard_mb * (1 << 20)),
        fail_fast=fail_fast,
        plan=plan,
    )
    return _begin(spec, listed, rows_per_shard, settings, force)


def _begin(
    spec: PackSpec, listed: Source, rows_per_shard: int, settings: Mapping[str, Any], force: bool
) -> Packing:
    target = spec.target
    present = storage.names(target)
    begun = _read_json(storage.join(target, PLAN)) if PLAN in present else None
    if not force:
        earlier = begun or (_read_json(storage.join(target, INDEX)) if INDEX in present else None)
        if earlier is not None and earlier.get("plan") != spec.plan:
            raise UsageError(
                f"{target} holds {_difference(earlier, settings)}: name another folder, or overwrite it with -f"
            )
        if earlier is not None and begun is None:
            return Packing(_with_tables(spec, earlier), listed, rows_per_shard, settings, complete=True)
    foreign = [name for name in present if not _is_ours(name)]
    if foreign and not {PLAN, INDEX} & set(present):
        raise UsageError(f"{target} holds other files ({foreign[0]}): name a new folder")
    if begun is not None and not force:
        return Packing(_with_tables(spec, begun), listed, rows_per_shard, settings)
    if spec.info.profile == "archive" and not spec.info.vocabulary:
        spec = _fitted(spec, listed.records[:FITTED])
    content = {"plan": spec.plan, "settings": settings, "compand": spec.info.to_json()}
    # The plan first: from now on what is here belongs to it, and an older set counts as unfinished.
    storage.write(storage.join(target, PLAN), _json(content))
    storage.remove(storage.join(target, INDEX))
    for name in storage.names(storage.join(target, JOURNAL)):
        storage.remove(storage.join(target, JOURNAL, name))
    return Packing(spec, listed, rows_per_shard, settings)


def _fitted(spec: PackSpec, records: Sequence[Record]) -> PackSpec:
    """With the tables of the archive profile, learned from the first inputs."""
    from compand.data.payload import learn_tables

    def some() -> Iterator[NDArray[np.int32]]:
        count = 0
        with closing(encoder.integers(spec, records)) as rows:
            for item in rows:
                yield item
                count += item.size
                if count >= FITTED_INTEGERS:
                    return

    tables = learn_tables(some(), axes=spec.info.latent["axes"])
    return replace(spec, info=spec.info.with_tables(tables))


def _with_tables(spec: PackSpec, earlier: Mapping[str, Any]) -> PackSpec:
    return replace(spec, info=SetInfo.from_json(earlier["compand"]))


def _difference(earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What an earlier packing has that this one has not."""
    before, now = earlier.get("settings", {}), dict(settings)
    for name, value in {**now, **now["compand"]}.items():
        other = {**before, **before.get("compand", {})}.get(name)
        if name == "inputs" and other != value:
            return "a set of other inputs"
        if name not in ("compand", "inputs") and other != value:
            fact = f"{name} {shown(name, other)}, not {shown(name, value)}"
            return f"a set with {fact if len(fact) < 90 else f'another {name}'}"
    return "another set"


def _is_ours(name: str) -> bool:
    """Whether packing gives files such names."""
    shard = name.startswith("part-") and name.endswith(".parquet")
    return shard or name in (PLAN, INDEX, JOURNAL, FAILURES) or name.startswith(files.TEMPORARY_PREFIX)


def _clean(target: str, summary: Summary) -> None:
    """Removes what a complete set does not need: first what would make it count as unfinished."""
    storage.remove(storage.join(target, PLAN))
    journal = storage.join(target, JOURNAL)
    for name in storage.names(journal):
        storage.remove(storage.join(journal, name))
    storage.remove(journal)
    kept = {INDEX, *(name for name, _, _ in summary.shards), *([FAILURES] if summary.failures else [])}
    for name in storage.names(target):
        if _is_ours(name) and name not in kept:
            storage.remove(storage.join(target, name))


def _failures_csv(reports: Iterable[ChunkReport]) -> bytes:
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("key", "reason"))
    for report in reports:
        table.writerows(report.failures)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _read_json(place: str) -> dict[str, Any] | None:
    """An object of JSON; None where it is damaged or there is none."""
    try:
        content = json.loads(storage.read(place))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _read_summary(target: str) -> Summary:
    index = _read_json(storage.join(target, INDEX)) or {}
    try:
        return Summary(
            tuple((shard["name"], shard["rows"], shard["bytes"]) for shard in index["shards"]),
            index["rows"], index["payload_bytes"], index["source_bytes"], index["extent"], index["failures"],
        )  # fmt: skip
    except (KeyError, TypeError):
        raise PackedSetError(f"{target}/{INDEX} is damaged: pack again with -f") from None


def _accept(medium: str) -> Callable[[str], bool]:
    from compand.pictures import is_image_path
    from compand.sounds import is_sound_path

    return is_sound_path if medium == "audio" else is_image_path


# ------------------------------------------------------------------------------------------------- a chunk


def pack_chunk(
    spec: PackSpec,
    index: int,
    records: Sequence[Record],
    blocks: Iterable[Block] | None = None,
    progress: Progress | None = None,
) -> ChunkReport:
    """Packs a chunk: writes its shards, then its report, which is what makes it count.

    May be run again, after a kill or at the same time elsewhere: it writes the same files. A chunk that is finished is
    left as it is.

    Args:
        index: number of the chunk.
        records: its records.
        blocks: its coded rows, where they are made elsewhere; None: they are made here, by a codec that is loaded once
            a process.
        progress: called after each block.

    Raises:
        MediaError: with `spec.fail_fast`, an input that cannot be packed.
        CheckpointError, UsageError: the checkpoint or the device cannot be used here.
    """
    earlier = _report(spec, index)
    if earlier is not None:
        return earlier
    failures: list[tuple[str, str]] = []
    packed: list[tuple[int, int, float]] = []

    def coded() -> Iterator[Row]:
        for block in encoder.code_blocks(spec, records) if blocks is None else blocks:
            failures.extend(block.failures)
            if spec.fail_fast and failures:
                raise MediaError("{}: {}".format(*failures[0]))
            yield from block.rows
            payload = sum(len(row["payload"]) for row in block.rows)
            sources = sum(row["source_bytes"] for row in block.rows)
            packed.append((payload, sources, math.fsum(map(_extent, block.rows))))
            if progress is not None:
                progress(len(block.rows), payload, packed[-1][2], len(block.failures))

    shards: list[tuple[str, int, int]] = []
    rows = coded()
    first = next(rows, None)
    while first is not None:
        name = f"part-{index:05d}-{len(shards)}.parquet"
        count, first = _write_shard(spec, name, first, rows)
        size = storage.size(storage.join(spec.target, name))
        if size is None:
            raise PackedSetError("the shard vanished while the set was packed: pack again", shard=name)
        shards.append((name, count, size))
    report = ChunkReport(
        index,
        tuple(shards),
        rows=sum(count for _, count, _ in shards),
        payload_bytes=sum(payload for payload, _, _ in packed),
        source_bytes=sum(sources for _, sources, _ in packed),
        extent=math.fsum(extent for _, _, extent in packed),
        failures=tuple(failures),
        plan=spec.plan,
    )
    storage.write(_report_place(spec, index), _json(asdict(report)))
    return report


def _write_shard(spec: PackSpec, name: str, first: Row, rows: Iterator[Row]) -> tuple[int, Row | None]:
    """Writes `first` and what follows, up to the size of a shard. The number of rows, and the first that was left."""
    row: Row | None = first
    columns = pa.ipc.read_schema(pa.py_buffer(spec.columns))
    with (
        storage.writing(storage.join(spec.target, name)) as stream,
        ShardWriter(stream, spec.info, columns) as writer,
    ):
        while row is not None and (
            not writer.rows or writer.payload_bytes + len(row["payload"]) <= spec.shard_bytes
        ):
            writer.write((row,))
            row = next(rows, None)
    return writer.rows, row


def _extent(row: Row) -> float:
    """Pixels of a picture, seconds of a sound."""
    return row["height"] * row["width"] if "height" in row else row["samples"] / row["rate"]


def _report_place(spec: PackSpec, index: int) -> str:
    return storage.join(spec.target, JOURNAL, f"{index:05d}.json")


def _report(spec: PackSpec, index: int) -> ChunkReport | None:
    """The report of a chunk, if it is of this packing and its shards are there."""
    content = _read_json(_report_place(spec, index))
    if content is None or content.get("plan") != spec.plan:
        return None
    content["shards"] = tuple((name, rows, size) for name, rows, size in content["shards"])
    content["failures"] = tuple((key, reason) for key, reason in content["failures"])
    report = ChunkReport(**content)
    there = all(storage.size(storage.join(spec.target, name)) == size for name, _, size in report.shards)
    return report if there else None


def _reports(spec: PackSpec) -> dict[int, ChunkReport]:
    """The reports of all finished chunks."""
    names = storage.names(storage.join(spec.target, JOURNAL))
    numbers = [
        int(stem)
        for stem, _, suffix in (name.partition(".") for name in names)
        if suffix == "json" and stem.isdigit()
    ]
    found = ((number, _report(spec, number)) for number in numbers)
    return {number: report for number, report in found if report is not None}
