"""From a packed set back to files: decoded media under their keys, or tar shards as webdataset reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from compand import files
from compand.data import storage
from compand.data.info import SetInfo
from compand.data.packed import PackedReader
from compand.data.payload import RowCodec
from compand.errors import CompandError, UsageError

PAYLOAD, INTEGERS, CPD = "payload", "npy", "cpd"
"""Formats beside those of media: what the set holds, as it is; the integers of the latents; `.cpd` files."""

Row = Mapping[str, Any]


def unpack(
    source: str,
    target: str,
    *,
    media_format: str | None = None,
    webdataset: bool = False,
    device: str = "auto",
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> tuple[int, list[tuple[str, str]]]:
    """Writes every row of a packed set to a file, or to webdataset's tar shards.

    Files are named by their keys below `target`; characters that would lead elsewhere are escaped as in URLs. A tar
    shard has, for each row, the media or payload and a JSON of its columns; `set.json` beside says what the payloads
    are.

    Args:
        source: folder of the set, or a shard.
        target: folder or URL.
        media_format: "png", "wav", ... (decoded), "cpd" (of the profile cpd), "npy" (integers of the latents),
            "payload" (for webdataset); None: png or wav, and for webdataset the payload.
        device: as of `compand.load`.
        force: overwrite what is there.
        progress: called with the key of each row that is done.

    Returns:
        The number of rows written; key and reason of each row that is damaged.

    Raises:
        UsageError: the set has no such format.
        PackedSetError: the set cannot be read.
        MediaError: a file exists or cannot be written.
    """
    reader = PackedReader(source)
    chosen = _format(reader.info, media_format, webdataset)
    target = storage.normal(target)
    damaged: list[tuple[str, str]] = []
    if webdataset:
        count = _to_tars(reader, target, chosen, device, force, damaged, progress)
        return count, damaged
    count = 0
    for row, content in _contents(reader, range(len(reader)), chosen, device, damaged):
        _write(storage.join(target, f"{file_name(row['key'])}.{chosen}"), content, force)
        count += 1
        if progress is not None:
            progress(row["key"])
    return count, damaged


def _format(info: SetInfo, wanted: str | None, webdataset: bool) -> str:
    chosen = (wanted or "").lower().lstrip(".")
    if not chosen:
        chosen = PAYLOAD if webdataset else "wav" if info.medium == "audio" else "png"
    if chosen == PAYLOAD and not webdataset:
        raise UsageError("payloads mean nothing outside a set: choose another --format, or --to webdataset")
    if chosen == CPD and info.profile != "cpd":
        raise UsageError(
            f"the set has the profile {info.profile}, without .cpd files: pack with --profile cpd"
        )
    if chosen == INTEGERS and info.profile == "cpd":
        raise UsageError("the set has the profile cpd, without integers: choose another --format")
    if chosen not in (PAYLOAD, CPD, INTEGERS):
        from compand.pictures import is_image_path
        from compand.sounds import is_sound_path

        fits = is_sound_path if info.medium == "audio" else is_image_path
        if not fits(f"name.{chosen}"):
            usual = "wav" if info.medium == "audio" else "png"
            raise UsageError(
                f"{chosen} is no format that {info.medium} can be written in: use --format {usual}"
            )
    return chosen


def _contents(
    reader: PackedReader,
    rows: range,
    chosen: str,
    device: str,
    damaged: list[tuple[str, str]],
) -> Iterator[tuple[Row, bytes]]:
    coder: RowCodec | None = None
    for index in rows:
        key = str(index)
        try:
            row = reader.row(index)
            key = row["key"]
            if chosen in (PAYLOAD, CPD):
                content = bytes(row["payload"])
            else:
                coder = coder or _row_codec(reader.info, chosen, device)
                content = _converted(coder, row, chosen)
        except CompandError as error:
            if isinstance(error, UsageError):
                raise
            damaged.append((key, files.explain(error, key)))
            continue
        yield row, content


def _row_codec(info: SetInfo, chosen: str, device: str) -> RowCodec:
    if chosen == INTEGERS:
        return RowCodec(info)
    from compand.checkpoint import load

    return RowCodec(info, load(info.checkpoint, device=device))


def _converted(coder: RowCodec, row: Row, chosen: str) -> bytes:
    stream = io.BytesIO()
    if chosen == INTEGERS:
        np.save(stream, coder.decode(row["payload"], coder.info.latent_shape(row)), allow_pickle=False)
    else:
        coder.samples(row["payload"], row).save(stream, format=chosen)
    return stream.getvalue()


def _write(place: str, content: bytes, force: bool) -> None:
    if not force and storage.exists(place):
        raise UsageError(f"{place} exists: overwrite it with -f, or name another folder")
    storage.write(place, content)


def file_name(key: str) -> str:
    """A key as a path that stays below its folder on every system; different keys have different paths.

    >>> file_name("tench/n01"), file_name("../a"), file_name("/etc/a:b")
    ('tench/n01', '%2E%2E/a', '%2Fetc/a%3Ab')
    """
    if key.startswith("/"):
        first, key = "%2F", key[1:]
    else:
        first = ""
    parts = []
    for part in key.split("/"):
        escaped = "".join(f"%{ord(c):02X}" if c in '%\\\\:*?"<>|' or ord(c) < 32 else c for c in part)
        if not escaped.strip("."):
            escaped = escaped.replace(".", "%2E") or "%00"
        parts.append(escaped)
    return first + "/".join(parts)


# ------------------------------------------------------------------------------------------------- webdataset


def _to_tars(
    reader: PackedReader,
    target: str,
    chosen: str,
    device: str,
    force: bool,
    damaged: list[tuple[str, str]],
    progress: Callable[[str], None] | None,
) -> int:
    suffix = chosen if chosen != PAYLOAD else CPD if reader.info.profile == "cpd" else "latents"
    count = 0
    _write(storage.join(target, "set.json"), json.dumps(reader.info.to_json(), indent=1).encode(), force)
    for shard, first, end in zip(reader.shards, reader.starts, reader.starts[1:], strict=False):
        place = storage.join(target, f"{shard.stem}.tar")
        if not force and storage.exists(place):
            raise UsageError(f"{place} exists: overwrite it with -f, or name another folder")
        with storage.writing(place) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
            for row, content in _contents(reader, range(first, end), chosen, device, damaged):
                # Up to its first dot, a name is the key by which webdataset puts files together.
                stem = file_name(row["key"]).replace(".", "%2E")
                _add(tar, f"{stem}.{suffix}", content)
                facts = {column: value for column, value in row.items() if column != "payload"}
                classes = reader.info.classes
                if classes and "label" in facts:
                    facts["class"] = classes[facts["label"]]
                _add(tar, f"{stem}.json", json.dumps(facts, default=str, ensure_ascii=False).encode())
                count += 1
                if progress is not None:
                    progress(row["key"])
    return count


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
