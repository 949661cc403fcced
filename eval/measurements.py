"""Rows of measurements: how they are kept, averaged and written.

A row is a flat dictionary, one for each item, codec and quality; README.md beside this file documents the columns.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from compand.errors import MediaError, UsageError
from compand.eval.items import Problem
from compand.files import atomic_write

SCHEMA = 1
"""Version of run.json, measurements.jsonl and results.json."""

RATES = {"image": "bpp", "audio": "kbps"}
"""The column of the rate, by medium."""

RUN, MEASUREMENTS, RESULTS, TABLE = "run.json", "measurements.jsonl", "results.json", "results.csv"
EXAMPLES = "examples"

# What a run may gain when it is continued; all else decides whether results belong together.
_EXTENSIBLE = frozenset({"codecs", "data", "metrics", "origins", "plugins", "written"})

_COLUMNS = (
    "item", "medium", "codec", "identity", "quality", "bytes", "overhead_bytes", "bpp", "kbps", "kbps_payload",
    "height", "width", "seconds", "rate", "channels", "encode_seconds", "decode_seconds",
)  # fmt: skip
"""Columns of the table that stand first, in this order; metrics and others follow."""
_LAST = ("outcome", "notes", "problems")

_REQUIRED = frozenset({"item", "medium", "codec", "identity", "quality", "bytes"})
"""Columns, with that of the rate, without which a row cannot be used."""
_FACTS = frozenset({"title", "kind", "note", "identity"})

MISSING_SHARE = 0.1
"""A point that lacks more than this share of the items does not count."""

Row = dict[str, Any]


class Key(NamedTuple):
    """What makes two measurements the same."""

    item: str
    codec: str
    identity: str
    quality: float


class Point(NamedTuple):
    """Means over the items of one codec and quality."""

    quality: float
    items: int
    rate: float  # bpp or kbps
    value: float  # of the metric


def bits_per_pixel(size: int, height: int, width: int) -> float:
    """Rate of an image file of `size` bytes.

    >>> bits_per_pixel(1000, 100, 100)
    0.8
    """
    return 8 * size / (height * width)


def kilobits_per_second(size: int, seconds: float) -> float:
    """Rate of a sound file of `size` bytes.

    >>> kilobits_per_second(2000, 2.0)
    8.0
    """
    return 8 * size / (1000 * seconds)


def key_of(row: Row) -> Key:
    """The key of a row."""
    return Key(row["item"], row["codec"], row["identity"], row["quality"])


# ----------------------------------------------------------------------------------------------- storage


class Store:
    """A folder of results that a run adds rows to, and that a later run continues.

    `run.json` says what the run is; `measurements.jsonl` has a row a line, each written as soon as it is measured. A
    line that a killed process left unfinished is dropped. Made by `Store.open`; a context manager.
    """

    def __init__(self, out: Path, description: dict[str, Any], rows: list[Row], stream: BinaryIO) -> None:
        self.out = out
        self.description = description
        self._rows = {key_of(row): row for row in rows}
        self._stream = stream
        self._origin: dict[str, Any] | None = None

    @classmethod
    def open(cls, out: Path, description: Mapping[str, Any], *, force: bool = False) -> Store:
        """Start a run in a folder, or go on with the one it holds.

        Args:
            out: the folder; made if need be.
            description: JSON's types. A run that is continued must agree in everything but `metrics`, `plugins` and
                `data` (the folder's name), which it may add to. `items` maps names to hashes of their content.
            force: discard the run that the folder holds; files that it did not write stay.

        Raises:
            UsageError: the folder holds another run, or files and no run; it is in use, or damaged.
            MediaError: it cannot be written.
        """
        wanted = {"schema": SCHEMA, "codecs": {}, "written": [], "origins": [], **description}
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not (out / RUN).exists() and any(map(_is_foreign, out.iterdir())):
                raise UsageError(f"{out} holds files but no run: choose another -o")
            stream = open(out / MEASUREMENTS, "a+b")  # noqa: SIM115 (the store keeps it open)
        except OSError as error:
            raise MediaError(f"{out} cannot be written ({error.strerror}): choose another -o") from None
        try:
            _lock(stream, out)
            if force:
                _discard(out, stream)
            if (out / RUN).exists():
                wanted = _continued(out, wanted)
            store = cls(out, wanted, _read_rows(stream, out), stream)
            store._describe()
        except BaseException:
            stream.close()
            raise
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    @property
    def codecs(self) -> dict[str, dict[str, Any]]:
        """Facts of every codec that has been measured here (title, kind, note, identity), by name."""
        codecs: dict[str, dict[str, Any]] = self.description["codecs"]
        return codecs

    def add_codecs(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Note what codecs are; rows of one that had another identity no longer count."""
        self.codecs.update({name: dict(fact) for name, fact in facts.items()})
        self._describe()

    def add_written(self, names: Iterable[str]) -> None:
        """Note files, or folders of examples, that the run writes; names are relative to its folder."""
        self.description["written"] = list(dict.fromkeys([*self.description["written"], *names]))
        self._describe()

    @property
    def measured(self) -> bool:
        """Whether this run, not an earlier one that it continues, has an origin and so has measured something."""
        return self._origin is not None

    def add_origin(self, origin: Mapping[str, Any]) -> None:
        """Note where the rows of this run come from, in place of what was noted of it before.

        Args:
            origin: what `compand.eval.provenance.provenance` returned.
        """
        origins = self.description["origins"]
        if self._origin is not None:
            origins.remove(self._origin)
        self._origin = dict(origin)
        origins.append(self._origin)
        self._describe()

    def rows(self) -> list[Row]:
        """All rows whose codec is still the one measured, in order of codec, quality and item."""
        current = {name: fact["identity"] for name, fact in self.codecs.items()}
        order = {name: place for place, name in enumerate(current)}
        rows = [row for row in self._rows.values() if current.get(row["codec"]) == row["identity"]]
        return sorted(rows, key=lambda row: (order[row["codec"]], row["quality"], row["item"]))

    def done(self, key: Key, metrics: Iterable[str] = ()) -> bool:
        """Whether there is a row of that key with these columns."""
        row = self._rows.get(key)
        return row is not None and all(name in row for name in metrics)

    def append(self, row: Row, metrics: Collection[str] = ()) -> None:
        """Keep a row, in place of one of the same key.

        It is handed to the operating system before this returns: it survives the end of this process, not that of the
        machine.

        Args:
            row: see the module.
            metrics: those that were to be measured. The run's others stay as the row before had them, if the file is
                the same: what cannot be computed here is not lost.
        """
        before = self._rows.get(key_of(row), {})
        if before.get("bytes") == row["bytes"]:
            kept = [name for name in self.description["metrics"] if name in before and name not in metrics]
            row = {name: before[name] for name in kept} | row
        self._stream.write(json.dumps(_encoded(row), allow_nan=False).encode() + b"\n")
        self._stream.flush()
        self._rows[key_of(row)] = row

    def _describe(self) -> None:
        text = json.dumps(self.description, indent=2) + "\n"
        with atomic_write(self.out / RUN, force=True) as stream:
            stream.write(text.encode())


def _continued(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The description of the run in a folder with what `wanted` adds. Raises UsageError if they do not agree."""
    try:
        found: dict[str, Any] = json.loads((out / RUN).read_text(encoding="utf-8"))
        if not all(fact.keys() >= _FACTS for fact in found["codecs"].values()):
            raise ValueError("a codec without its facts")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fact = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{out / RUN} is damaged ({fact}): choose another -o, or --force") from None
    for name in sorted((found.keys() | wanted.keys()) - _EXTENSIBLE):
        old, new = found.get(name), wanted.get(name)
        if old != new:
            fact = _changes(old, new) if name == "items" else f"{name} {old} there, {new} here"
            raise UsageError(f"{out} holds another run ({fact}): choose another -o, or --force to discard it")
    added = {
        name: list(dict.fromkeys([*found.get(name, ()), *wanted.get(name, ())]))
        for name in ("metrics", "plugins", "written")
    }
    return wanted | added | {"codecs": found["codecs"], "origins": found.get("origins", [])}


def _changes(old: Any, new: Any) -> str:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return "other items"
    changed = sum(new[name] != content for name, content in old.items() if name in new)
    return f"items: {len(new.keys() - old)} more, {len(old.keys() - new)} fewer, {changed} changed"


def _read_rows(stream: BinaryIO, out: Path) -> list[Row]:
    stream.seek(0)
    content = stream.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        stream.truncate(whole)  # the next row must not be glued to what a killed process left
    rows = []
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            row = _decoded(json.loads(line))
            if not _REQUIRED | {RATES[row["medium"]]} <= row.keys():
                raise ValueError("columns are missing")
            rows.append(row)
        except (ValueError, LookupError, TypeError, AttributeError):
            path = out / MEASUREMENTS
            raise UsageError(f"{path}, line {number}, is damaged: choose another -o, or --force") from None
    return rows


def _lock(stream: BinaryIO, out: Path) -> None:
    """Keep a second run out of the folder, where the system has locks that end with their process."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"{out} is in use by another run: wait for it, or choose another -o") from None


def _is_foreign(path: Path) -> bool:
    """Whether a file is more than what a run leaves that was killed before it could describe itself."""
    return path.name != MEASUREMENTS or path.stat().st_size > 0


def _discard(out: Path, stream: BinaryIO) -> None:
    """Remove what the run in a folder wrote, and nothing else."""
    stream.truncate(0)
    try:
        written = json.loads((out / RUN).read_text(encoding="utf-8"))["written"]
    except (OSError, ValueError, KeyError, TypeError):
        written = []  # no run, or one whose description is damaged
    for path in [(out / name).resolve() for name in (*written, RUN)]:
        if out.resolve() not in path.parents:
            continue
        if path.is_dir():
            for example in (*path.glob("*.png"), *path.glob("*.flac")):
                example.unlink()
        else:
            path.unlink(missing_ok=True)


def _encoded(value: Any) -> Any:
    """A value in JSON's types: infinities and not-a-number become strings, which `float` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _encoded(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(entry) for entry in value]
    return value


def _decoded(value: Any) -> Any:
    """What `_encoded` was given; no other column has such a text."""
    if value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, dict):
        return {name: _decoded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    return value


# ------------------------------------------------------------------------------------------------- means


def complete_items(rows: Iterable[Row], metric: str | None = None) -> dict[str, list[str]]:
    """For each codec the items that were measured at every one of its qualities.

    Args:
        rows: of one or more codecs.
        metric: the items also have this metric at every quality.
    """
    qualities: dict[str, set[float]] = {}
    found: dict[str, dict[str, set[float]]] = {}
    for row in rows:
        items = found.setdefault(row["codec"], {})
        if metric is None or row.get(metric) is not None:
            qualities.setdefault(row["codec"], set()).add(row["quality"])
            items.setdefault(row["item"], set()).add(row["quality"])
    return {
        codec: sorted(item for item, measured in items.items() if measured == qualities.get(codec))
        for codec, items in found.items()
    }


def mean_points(
    rows: Sequence[Row], metric: str, items: Collection[str] | None = None
) -> dict[str, list[Point]]:
    """Mean rate and metric of every codec and quality, in order of quality.

    All points of a codec are means over the same items: those of `complete_items`. A metric that no item has gives
    no point.

    Args:
        rows: measurements of one medium.
        metric: a column.
        items: count these items alone.
    """
    complete = {codec: set(names) for codec, names in complete_items(rows, metric).items()}
    groups: dict[str, dict[float, list[Row]]] = {codec: {} for codec in complete}
    for row in rows:
        if row["item"] in complete[row["codec"]] and (items is None or row["item"] in items):
            groups[row["codec"]].setdefault(row["quality"], []).append(row)
    return {
        codec: [
            Point(
                quality,
                len(group),
                fmean(row[RATES[row["medium"]]] for row in group),
                fmean(row[metric] for row in group),
            )
            for quality, group in sorted(qualities.items())
        ]
        for codec, qualities in groups.items()
    }


def counted_rows(
    store: Store, selected: Mapping[str, Collection[float]] | None = None
) -> tuple[list[Row], list[str]]:
    """The rows of all points that count, so that one which failed, or was never finished, does not shrink the others.

    A point counts unless it lacks more than `MISSING_SHARE` of the items that were measured at all. One that was not
    selected now must also have all items that the codec's selected points share (those of its fullest point, where
    none is selected), since the means of a codec are over the same items.

    Args:
        store: the measurements.
        selected: the qualities of this run by name of the codec; None: all that the store has.

    Returns:
        The rows, and a notice for each point that is left out.
    """
    points: dict[str, dict[float, list[Row]]] = {}
    for row in store.rows():
        points.setdefault(row["codec"], {}).setdefault(row["quality"], []).append(row)
    measured = {row["item"] for own in points.values() for group in own.values() for row in group}
    counted, notices = [], []
    for codec, own in points.items():
        names = {quality: {row["item"] for row in group} for quality, group in own.items()}
        asked = {quality for quality in own if selected is None or quality in selected.get(codec, ())}
        enough = {quality for quality in own if len(names[quality]) >= (1 - MISSING_SHARE) * len(measured)}
        shared = [names[quality] for quality in asked & enough]
        needed = set.intersection(*shared) if shared else max(names.values(), key=len)
        for quality, group in own.items():
            if quality in enough and (quality in asked or needed <= names[quality]):
                counted += group
                continue
            remedy = "see the problems" if quality in asked else "select it to have it measured wholly"
            notices.append(
                f"{store.codecs[codec]['title']}: quality {quality:g} is left out, it has {len(group)} of "
                f"{len(measured)} items: {remedy}"
            )
    return counted, notices


def summary_codecs(
    store: Store, metrics: Sequence[str], rows: Sequence[Row]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What the summary says of every codec, and notices about items that its means leave out.

    A point has `quality`, `items` and the means of `bytes`, the rate (`bpp` or `kbps`; `kbps_payload` where the
    container's share is known) and the metrics, over the items measured at all qualities of the codec. Where a metric
    has fewer of them, its mean is over those and `<metric>_items` says how many.

    Args:
        store: the measurements.
        metrics: their columns.
        rows: those that count, of `counted_rows`.
    """
    total = len(store.description["items"])
    codecs: dict[str, dict[str, Any]] = {}
    notices = []
    means = {name: mean_points(rows, name) for name in metrics}
    for codec, fact in store.codecs.items():
        own = [row for row in rows if row["codec"] == codec]
        items = set(complete_items(own).get(codec, ()))
        if len(items) < total:
            notices.append(
                f"{fact['title']}: means are over {len(items)} of {total} items, those measured at every point"
            )
        points: dict[float, dict[str, Any]] = {}
        columns = [
            name for name in ("bytes", "bpp", "kbps", "kbps_payload") if all(name in row for row in own)
        ]
        for quality in sorted({row["quality"] for row in own}):
            group = [row for row in own if row["quality"] == quality and row["item"] in items]
            if group:
                averages = {name: fmean(row[name] for row in group) for name in columns}
                points[quality] = {"quality": quality, "items": len(group), **averages}
        for name in metrics:
            fewer = None
            for point in means[name].get(codec, ()):
                if point.quality not in points:
                    continue
                points[point.quality][name] = point.value
                if point.items < points[point.quality]["items"]:
                    points[point.quality][f"{name}_items"] = fewer = point.items
            if fewer is not None:
                notices.append(f"{fact['title']}: {name} is the mean over {fewer} of {len(items)} items")
        codecs[codec] = {
            "title": fact["title"],
            "kind": fact["kind"],
            "note": fact["note"],
            "published": False,
            "points": list(points.values()),
        }
    return codecs, notices


def row_problems(rows: Iterable[Row]) -> list[Problem]:
    """What could not be measured of items that were coded and decoded: metrics that do not take them."""
    return [
        Problem(row["item"], row["codec"], row["quality"], message)
        for row in rows
        for message in row.get("problems", ())
    ]


def row_notices(rows: Iterable[Row]) -> list[str]:
    """What was converted on reading, with the items that it concerns."""
    concerned: dict[str, dict[str, None]] = {}
    for row in rows:
        for note in row.get("notes", ()):
            concerned.setdefault(note, {})[row["item"]] = None
    return [
        f"{note}: {', '.join(list(names)[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for note, names in concerned.items()
    ]


# ---------------------------------------------------------------------------------------------- results


def write_results(store: Store, summary: Mapping[str, Any], origin: Mapping[str, Any]) -> list[Path]:
    """Write results.json and results.csv of a finished run, each whole or not at all.

    Args:
        store: the measurements.
        summary: what plots and the page are drawn from.
        origin: what `compand.eval.provenance.provenance` returned. Where this run has measured nothing, that of the
            last one which has stands in its place. Those of the runs before it are listed as `earlier`.

    Returns:
        The two files.
    """
    rows = store.rows()
    if store.measured:
        store.add_origin(origin)
    *earlier, last = store.description["origins"] or [origin]
    origin = {**last, "earlier": earlier} if earlier else last
    head = json.dumps(
        _encoded({"provenance": origin, "schema": SCHEMA, "summary": summary}), indent=1, allow_nan=False
    ).removesuffix("\n}")
    # A row a line: thousands of them, of which some hold long lists, stay readable and small.
    lines = ",\n".join(json.dumps(_encoded(row), allow_nan=False) for row in rows)
    written = {
        store.out / RESULTS: f'{head},\n "rows": [\n{lines}\n ]\n}}\n',
        store.out / TABLE: as_csv(rows),
    }
    store.add_written(path.name for path in written)
    for path, text in written.items():
        with atomic_write(path, force=True) as stream:
            stream.write(text.encode())
    return list(written)


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as comma-separated values with a header; lists are joined by spaces or, where they are texts, by "; "."""
    present = dict.fromkeys(name for row in rows for name in row)
    first = [name for name in _COLUMNS if name in present]
    last = [name for name in _LAST if name in present]
    columns = [*first, *(name for name in present if name not in {*first, *last}), *last]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ("; " if any(isinstance(entry, str) for entry in value) else " ").join(map(str, value))
    return value
