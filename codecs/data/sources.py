"""What is packed: folders, manifests, Parquet and Hugging Face data sets, as one list of records.

A record names a picture or a sound and the columns that travel with it; nothing is read until it is packed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from compand.data import storage
from compand.errors import MediaError, UsageError

RESERVED = frozenset(
    {"key", "payload", "crc", "height", "width", "channels", "samples", "rate", "source_bytes"}
)
"""Columns that a packed set has by itself; a column of the source of such a name becomes "source_" and the name."""

HUB = "hf:"
"""Begins a source that is a data set of the Hugging Face hub: "hf:owner/name" or "hf:owner/name:split"."""

PATH_COLUMNS = ("path", "file_name")
KEY_COLUMNS = ("key", "__key__")
MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Record:
    """One input.

    Attributes:
        key: its name, unique in the set.
        place: the media file; or the Parquet or Arrow file that holds it, then with `row`, `group` and `media`.
        row: its row, in its row group of a Parquet file or in an Arrow file; -1: `place` is the media file.
        group: the row group; -1: `place` is not a Parquet file.
        media: the column that holds it.
        columns: label and further columns of the source.
    """

    key: str
    place: str
    row: int = -1
    group: int = -1
    media: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Where it is, for a reader of messages."""
        if self.row < 0:
            return self.place
        return f"{self.place}, {f'row group {self.group}, ' if self.group >= 0 else ''}row {self.row}"

    def read(self) -> bytes:
        """The bytes of the media file. Raises OSError or MediaError."""
        if self.row < 0:
            return storage.read(self.place)
        value = _held.value(self)
        folder = self.place.rpartition("/")[0]
        if isinstance(value, dict):
            content, path = value.get("bytes"), value.get("path")
            value = content if content is not None else path
        if isinstance(value, str):
            return storage.read(storage.join(folder, value))
        if not isinstance(value, bytes):
            raise MediaError(f"{self.name}: column {self.media} holds nothing; fill it or drop the row")
        return value


@dataclass(frozen=True)
class Source:
    """Records in the order in which they are packed.

    Attributes:
        records: the inputs.
        classes: names of the labels 0, 1, ...; None where labels have no names or there are none.
        columns: names and types of `Record.columns`.
    """

    records: Sequence[Record]
    classes: tuple[str, ...] | None
    columns: pa.Schema

    def digest(self) -> str:
        """A fingerprint of keys, places, order and columns: whether an interrupted packing goes on with the same
        inputs."""
        state = hashlib.sha256(repr((self.classes, str(self.columns))).encode())
        for record in self.records:
            place = (storage.absolute(record.place), record.group, record.row)
            state.update(repr((record.key, place, sorted(record.columns.items()))).encode())
        return state.hexdigest()[:16]


def list_source(
    source: str,
    accept: Callable[[str], bool],
    *,
    label: str | None = None,
    media: str | None = None,
    key: str | None = None,
    order: str = "hashed",
    allow_empty_class: bool = False,
) -> Source:
    """The records of whatever can be packed.

    - A folder of folders: their names, sorted, are the classes. Keys are paths below the folder, without suffix where
      that leaves them unique.
    - A flat folder: its files. One that holds files beside folders with files is refused.
    - A manifest (.csv, .tsv, .jsonl): column `path` (or `file_name`, or what `media` names), relative to the manifest;
      all other columns are kept.
    - A Parquet file, or a folder of them: a column of bytes, or of structs of bytes and path.
    - A folder of Hugging Face `datasets.save_to_disk`, or "hf:NAME[:SPLIT]" (needs the package `datasets`).

    Args:
        source: a path or URL.
        accept: whether a file is one, by its name; for folders.
        label: column of the labels, integers or names of classes; None: `label`, where there is one.
        media: column of the media.
        key: column of the keys; None: `key` where there is one, else path or file and row number.
        order: "hashed": by a hash of the key, which mixes classes; rows of a Parquet file stay within their row groups,
            and these are mixed. "sorted": by key.
        allow_empty_class: leave class folders without a file out; else they are an error.

    Raises:
        UsageError: no such source or column, no record, an empty class, a key that two records have.
    """
    if source.startswith(HUB):
        found = _from_hub(source, label, media, key)
    elif storage.is_folder(place := storage.normal(source)):
        found = _from_folder(place, accept, label, media, key, allow_empty_class)
    elif not storage.exists(place):
        raise UsageError(f"{source} does not exist: check the path")
    elif place.lower().endswith(".parquet"):
        found = _from_parquet([(place, PurePosixPath(place).name)], label, media, key)
    elif place.lower().endswith(MANIFESTS):
        found = _from_manifest(place, label, media, key)
    else:
        kinds = ", ".join((*MANIFESTS, ".parquet"))
        raise UsageError(f"{source} is no folder and no list of inputs ({kinds}): name one")
    if not found.records:
        raise UsageError(f"{source} holds nothing to pack: check the path and the medium of --codec")
    _refuse_duplicates(found.records)
    return Source(_ordered(found.records, order), found.classes, found.columns)


def _refuse_duplicates(records: Iterable[Record]) -> None:
    seen: dict[str, Record] = {}
    for record in records:
        other = seen.setdefault(record.key, record)
        if other is not record:
            names = (
                f"{other.name} and {record.name}" if other.name != record.name else f"{record.name}, twice"
            )
            raise UsageError(f"key {record.key} is that of {names}: give each its own key")


def _ordered(records: Sequence[Record], order: str) -> list[Record]:
    if order == "sorted":
        return sorted(records, key=lambda record: record.key)
    groups: dict[tuple[str, int], int] = {}

    def place(record: Record) -> tuple[bytes, int, bytes]:
        # Rows of a row group are read together, so they are packed together.
        together = record.group >= 0
        first = groups.setdefault((record.place, record.group), len(groups)) if together else 0
        return (_hash(f"group {first}") if together else b"", first, _hash(record.key))

    return sorted(records, key=place)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()


# ------------------------------------------------------------------------------------------------ folders


def _from_folder(
    folder: str,
    accept: Callable[[str], bool],
    label: str | None,
    media: str | None,
    key: str | None,
    allow_empty_class: bool,
) -> Source:
    present = set(storage.names(folder))
    if {"packed.json", "packing.json"} & present:
        raise UsageError(f"{folder} is a packed set: name what it was made of, or unpack it first")
    if "dataset_dict.json" in present:
        splits = ", ".join(storage.folders(folder))
        raise UsageError(f"{folder} holds several splits ({splits}): name one, as in {folder}/train")
    if "state.json" in present and "dataset_info.json" in present:
        return _from_saved_dataset(folder, label, media, key)
    paths = sorted(storage.walk(folder))
    chosen = [path for path in paths if accept(path)]
    tables = [path for path in paths if path.lower().endswith(".parquet")]
    if tables and not chosen:
        return _from_parquet([(storage.join(folder, path), path) for path in tables], label, media, key)
    given = [f"--{name}" for name, value in (("label", label), ("media", media), ("key", key)) if value]
    if given:
        raise UsageError(f"{folder} is a folder of files, without columns: leave {given[0]} out")
    names = _short_keys(chosen)
    classes = None
    columns: dict[str, Any] = {}
    loose = [path for path in chosen if "/" not in path]
    if loose and len(loose) < len(chosen):
        # Neither a folder of classes nor a flat one: to guess would lose labels, or make some up.
        raise UsageError(
            f"{folder} holds {loose[0]} beside folders with files: move it into a folder, or list what is meant in a "
            "manifest (.csv with a column path)"
        )
    if chosen and not loose:
        classes = _classes(folder, chosen, allow_empty_class)
        labels = {name: {"label": number} for number, name in enumerate(classes)}
        columns = {path: labels[path.partition("/")[0]] for path in chosen}
    records = [
        Record(name, storage.join(folder, path), columns=columns.get(path, {}))
        for path, name in zip(chosen, names, strict=True)
    ]
    schema = pa.schema([("label", pa.int64())] if classes is not None else [])
    return Source(records, classes, schema)


def _classes(folder: str, chosen: Sequence[str], allow_empty: bool) -> tuple[str, ...]:
    filled = {path.partition("/")[0] for path in chosen}
    empty = [name for name in storage.folders(folder) if name not in filled]
    if empty and not allow_empty:
        fact = f"class folder {storage.join(folder, empty[0])} holds no fitting file"
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UsageError(f"{fact}{more}: fill or remove it, or leave it out with --allow-empty-class")
    return tuple(sorted(filled))


def _short_keys(paths: Sequence[str]) -> list[str]:
    """Paths without suffix; with it where two differ by nothing else."""
    short = [path[: len(path) - len(PurePosixPath(path).suffix)] for path in paths]
    counts: dict[str, int] = {}
    for name in short:
        counts[name] = counts.get(name, 0) + 1
    chosen = (name if counts[name] == 1 else path for name, path in zip(short, paths, strict=True))
    # Names of files need not be UTF-8; keys are.
    return [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in chosen]


# ---------------------------------------------------------------------------------------------- manifests


def _from_manifest(place: str, label: str | None, media: str | None, key: str | None) -> Source:
    try:
        text = storage.read(place).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{place} is not text in UTF-8 ({error.reason}): save it as such") from None
    lines = (
        _json_lines(place, text) if place.lower().endswith(("jsonl", "ndjson")) else _csv_lines(place, text)
    )
    rows = list(lines)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    paths = _choose(place, names, media, PATH_COLUMNS, "media", "the paths of the files")
    if paths is None:
        raise UsageError(
            f"{place} has no column path ({', '.join(names)}): name the one that is with --media"
        )
    folder = place.rpartition("/")[0] or "."
    for number, row in rows:
        if not isinstance(row.get(paths), str) or not row[paths]:
            raise UsageError(f"{place}, line {number}: no {paths}; fill it or remove the line")
    table = {name: [row.get(name) for _, row in rows] for name in names if name != paths}
    chosen_key = _choose(place, names, key, KEY_COLUMNS, "key", "the keys")
    keys = table.pop(chosen_key) if chosen_key else _short_keys([_relative(row[paths]) for _, row in rows])
    columns, classes, schema = _columns(place, _typed(table), len(rows), label)
    records = [
        Record(str(name), storage.join(folder, row[paths]), columns=extra)
        for name, (_, row), extra in zip(keys, rows, columns, strict=True)
    ]
    return Source(records, classes, schema)


def _relative(path: str) -> str:
    parts = path.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _csv_lines(place: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if place.lower().endswith(".tsv") else ","
    )
    try:
        for row in reader:
            if None in row or None in row.values():
                fact = (
                    "more fields than the first line" if None in row else "fewer fields than the first line"
                )
                raise UsageError(f"{place}, line {reader.line_num}: {fact}; correct it")
            yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(f"{place}, line {reader.line_num}: {error}; correct it") from None


def _json_lines(place: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{place}, line {number}: not JSON ({error}); correct it") from None
        if not isinstance(row, dict):
            raise UsageError(f"{place}, line {number}: no object; give one as in " + '{"path": "a.png"}')
        yield number, row


def _typed(table: Mapping[str, list[Any]]) -> dict[str, pa.Array]:
    """Columns of a manifest with the narrowest type that holds every value: integers, numbers, text, JSON."""
    return {name: _typed_column(values) for name, values in table.items()}


def _typed_column(values: list[Any]) -> pa.Array:
    if all(isinstance(value, str) for value in values):
        converters: tuple[tuple[Callable[[str], float], pa.DataType], ...]
        converters = ((_integer, pa.int64()), (_number, pa.float64()))
        for convert, kind in converters:
            try:
                return pa.array([convert(value) if value else None for value in values], kind)
            except (ValueError, OverflowError):
                continue
        return pa.array(values, pa.string())
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        texts = [value if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        return pa.array(texts, pa.string())


def _integer(text: str) -> int:
    value = int(text)
    if str(value) != text:  # 007 is a name
        raise ValueError(text)
    return value


def _number(text: str) -> float:
    if (text[:1] == "0" and text[1:2].isdigit()) or "_" in text:  # 84_1211 is a name too
        raise ValueError(text)
    return float(text)


# ---------------------------------------------------------------------------- Parquet and Hugging Face data sets


def _from_parquet(
    places: Sequence[tuple[str, str]], label: str | None, media: str | None, key: str | None
) -> Source:
    """places: files and the names that begin the keys of their rows."""
    tables, owners = [], []
    chosen = chosen_key = None
    for place, name in places:
        try:
            with storage.open_input(place) as stream:
                file = pq.ParquetFile(stream)
                schema = file.schema_arrow
                if b"compand" in (schema.metadata or {}):
                    raise UsageError(f"{place} is a shard of a packed set: name what it was made of")
                chosen = _media_column(place, schema, media)
                chosen_key = _choose(place, schema.names, key, KEY_COLUMNS, "key", "the keys")
                tables.append(file.read(columns=[column for column in schema.names if column != chosen]))
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{place} cannot be read ({_first_line(error)}): check the file") from None
        stem = name[: -len(PurePosixPath(name).suffix)]
        rows = ((group, row) for group, size in enumerate(sizes) for row in range(size))
        owners += [
            (f"{stem}/{number:07d}", place, group, row, chosen) for number, (group, row) in enumerate(rows)
        ]
        if not tables[-1].schema.equals(tables[0].schema):
            raise UsageError(f"{place} has other columns than {places[0][0]}: pack them on their own")
    table = pa.concat_tables(tables)
    return _from_table(places[0][0], table, owners, chosen_key, label)


def _from_saved_dataset(folder: str, label: str | None, media: str | None, key: str | None) -> Source:
    try:
        state = json.loads(storage.read(storage.join(folder, "state.json")))
        info = json.loads(storage.read(storage.join(folder, "dataset_info.json")))
        files = [str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} is a damaged data set ({error!r}): save it to the disk again") from None
    if state.get("_indices_data_files"):
        raise UsageError(f"{folder} holds a selection: call flatten_indices() before save_to_disk")
    return _from_arrow(
        [storage.join(folder, name) for name in files], label, media, key, info.get("features")
    )


def _from_hub(source: str, label: str | None, media: str | None, key: str | None) -> Source:
    try:
        import datasets
    except ModuleNotFoundError:
        raise UsageError(f"{source} needs the package datasets: pip install datasets") from None
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of the network, the hub and the data set's own code
        raise UsageError(f"{source} cannot be loaded: {_first_line(error)}") from None
    features = {
        column: {"names": list(feature.names)}
        for column, feature in dataset.features.items()
        if hasattr(feature, "names")
    }
    return _from_arrow([entry["filename"] for entry in dataset.cache_files], label, media, key, features)


def _from_arrow(
    places: Sequence[str],
    label: str | None,
    media: str | None,
    key: str | None,
    features: Mapping[str, Any] | None,
) -> Source:
    """features: what `datasets` says of the columns; names of classes are taken from it."""
    tables, owners = [], []
    chosen = chosen_key = None
    for number, place in enumerate(places):
        table = _held.table(place)
        chosen = _media_column(place, table.schema, media)
        chosen_key = _choose(place, table.column_names, key, KEY_COLUMNS, "key", "the keys")
        tables.append(table.drop_columns([chosen]))
        owners += [(f"{number:05d}/{row:07d}", place, -1, row, chosen) for row in range(table.num_rows)]
    if not tables:
        raise UsageError("the data set has no file of data: save it to the disk again")
    names = {
        column: [str(name) for name in feature["names"]]
        for column, feature in (features or {}).items()
        if isinstance(feature, dict) and isinstance(feature.get("names"), list)
    }
    return _from_table(places[0], pa.concat_tables(tables), owners, chosen_key, label, names)


def _from_table(
    place: str,
    table: pa.Table,
    owners: Sequence[tuple[str, str, int, int, str | None]],
    key: str | None,
    label: str | None,
    class_names: Mapping[str, list[str]] | None = None,
) -> Source:
    """owners: default key, file, row group, row and media column of each row."""
    keys = [str(value) for value in table[key].to_pylist()] if key else [owner[0] for owner in owners]
    others = {name: table[name].combine_chunks() for name in table.column_names if name != key}
    columns, classes, schema = _columns(place, others, len(keys), label, class_names)
    records = [
        Record(name, file, row, group, column or "", extra)
        for name, (_, file, group, row, column), extra in zip(keys, owners, columns, strict=True)
    ]
    return Source(records, classes, schema)


def _media_column(place: str, schema: pa.Schema, wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in schema.names:
            raise UsageError(f"{place} has no column {wanted} ({', '.join(schema.names)}): correct --media")
        return wanted
    found = [entry.name for entry in schema if _holds_media(entry.type)]
    if len(found) != 1:
        fact = f"several columns of bytes ({', '.join(found)})" if found else "no column of bytes"
        raise UsageError(f"{place} has {fact}: name the one of pictures or sounds with --media")
    return found[0]


def _holds_media(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _choose(
    place: str, names: Sequence[str], wanted: str | None, usual: Sequence[str], option: str, what: str
) -> str | None:
    """A column that was named, or one of a usual name; None where there is none."""
    if wanted is not None and wanted not in names:
        raise UsageError(f"{place} has no column {wanted} ({', '.join(names)}): correct --{option}, {what}")
    return wanted or next((name for name in usual if name in names), None)


def _columns(
    place: str,
    table: Mapping[str, pa.Array],
    count: int,
    wanted: str | None,
    class_names: Mapping[str, list[str]] | None = None,
) -> tuple[list[dict[str, Any]], tuple[str, ...] | None, pa.Schema]:
    """Labels and further columns of each row, the names of classes, and the columns' types."""
    others = dict(table)
    label = _choose(place, list(others), wanted, ("label",), "label", "the labels")
    classes = None
    named: dict[str, pa.Array] = {}
    if label is not None:
        given = (class_names or {}).get(label)
        named["label"], classes = _labels(place, label, others.pop(label), given)
    for name, column in others.items():
        final = f"source_{name}" if name in RESERVED or name == "label" else name
        if final in named or (final != name and final in others) or final in RESERVED:
            raise UsageError(f"{place}: column {name} would be named {final}, as another is: rename it")
        named[final] = column
    schema = pa.schema([(name, column.type) for name, column in named.items()])
    values = [column.to_pylist() for column in named.values()]
    rows = zip(*values, strict=True) if values else iter([()] * count)
    return [dict(zip(named, row, strict=True)) for row in rows], classes, schema


def _labels(
    place: str, name: str, column: pa.Array, given: list[str] | None
) -> tuple[pa.Array, tuple[str, ...] | None]:
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise UsageError(
            f"{place}: row {row} has no {name}; fill it, or rename the column to do without labels"
        )
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return column.cast(pa.int64()), tuple(given) if given else None
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise UsageError(f"{place}: column {name} is {column.type}: labels are integers or names")
    names = sorted(set(column.to_pylist()))
    numbers = {value: number for number, value in enumerate(names)}
    return pa.array([numbers[value] for value in column.to_pylist()], pa.int64()), tuple(names)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


class _Held:
    """What this process has opened of Parquet and Arrow files: the media of the last row groups, mapped tables."""

    GROUPS = 2
    TABLES = 256

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int, str], pa.Array] = OrderedDict()
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()

    def value(self, record: Record) -> Any:
        """The media of a record's row, as Python's type."""
        try:
            with self._lock:
                if record.group < 0:
                    return self._table(record.place)[record.media][record.row].as_py()
                return self._group(record.place, record.group, record.media)[record.row].as_py()
        except (pa.ArrowException, IndexError, KeyError) as error:
            raise MediaError(f"{record.name} cannot be read ({_first_line(error)}): check the file") from None

    def table(self, place: str) -> pa.Table:
        """An Arrow file of `datasets`. Raises UsageError."""
        try:
            with self._lock:
                return self._table(place)
        except (pa.ArrowException, OSError) as error:
            raise UsageError(
                f"{place} cannot be read ({_first_line(error)}): save the data set again"
            ) from None

    def _table(self, place: str) -> pa.Table:
        if place not in self._tables:
            source = pa.py_buffer(storage.read(place)) if storage.is_remote(place) else pa.memory_map(place)
            self._tables[place] = pa.ipc.open_stream(source).read_all()
            if len(self._tables) > self.TABLES:
                self._tables.popitem(last=False)
        return self._tables[place]

    def _group(self, place: str, group: int, media: str) -> pa.Array:
        key = (place, group, media)
        if key not in self._groups:
            with storage.open_input(place) as stream:
                self._groups[key] = pq.ParquetFile(stream).read_row_group(group, columns=[media])[media]
            if len(self._groups) > self.GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


_held = _Held()
