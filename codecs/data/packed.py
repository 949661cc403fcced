"""Packed sets on disk: Parquet shards whose payloads are read from a memory map, without copies.

```
SET/packed.json              the index, written last: names, rows and bytes of the shards
SET/part-00000-0.parquet     rows in groups; schema metadata "compand": what all shards of a set agree on
SET/failures.csv             inputs that were left out
```

A shard is ordinary Parquet and any reader opens it. What makes it fast here: payloads are stored plain, so that a row
is found by the lengths before it, and columns of numbers are read page by page.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from compand.data.info import FORMAT
from compand.data.info import SetInfo as SetInfo
from compand.data.payload import RowCodec as RowCodec
from compand.data.payload import learn_tables as learn_tables
from compand.data.storage import is_remote
from compand.errors import CompandError, PackedSetError, UsageError

INDEX = "packed.json"
METADATA = b"compand"
"""Key in the schema metadata of a shard."""

ROW_GROUP = 256
"""Rows of a row group."""

OPEN_SHARDS = 256
"""Most shards that a reader keeps open."""

_READS_A_RELEASE = 256
"""Payloads that are read before the pages of the shards are handed back to the system, which keeps them in its cache.
Each read brings in what lies around it too, up to 64 KiB, and as much for every column of a new row group."""


# ------------------------------------------------------------------------------------------------ writing


def set_schema(info: SetInfo, columns: pa.Schema | None = None) -> pa.Schema:
    """Schema of the shards of a set; columns: label and whatever else the source has."""
    geometry = [
        pa.field(name, pa.int64() if name == "samples" else pa.int32(), nullable=False)
        for name in info.geometry
    ]
    own = [
        pa.field("key", pa.string(), nullable=False),
        pa.field("payload", pa.binary(), nullable=False),
        pa.field("crc", pa.uint32(), nullable=False),
        *geometry,
        pa.field("source_bytes", pa.int64(), nullable=False),
    ]
    metadata = {METADATA: json.dumps(info.to_json(), sort_keys=True).encode()}
    return pa.schema([*own, *(columns or [])], metadata=metadata)


class ShardWriter:
    """Writes the rows of one shard; a context manager. Whoever opens the stream makes the file appear whole or not.

    Args:
        stream: where to.
        info: of the set.
        columns: label and further columns, an Arrow schema.
        group_rows: rows of a row group.

    Attributes:
        rows: written so far.
        payload_bytes: of these rows.
    """

    def __init__(
        self,
        stream: BinaryIO,
        info: SetInfo,
        columns: pa.Schema | None = None,
        *,
        group_rows: int = ROW_GROUP,
    ) -> None:
        self.rows = self.payload_bytes = 0
        self._schema = set_schema(info, columns)
        self._group_rows = group_rows
        self._held: list[Mapping[str, Any]] = []
        numbers = [field.name for field in self._schema if pa.types.is_primitive(field.type)]
        self._writer = pq.ParquetWriter(
            stream,
            self._schema,
            compression={
                name: "none" if name in ("payload", "crc") else "zstd" for name in self._schema.names
            },
            use_dictionary=[name for name in self._schema.names if name not in ("key", "payload", *numbers)],
            write_statistics=False,
            data_page_size=1 << 30,
            data_page_version="1.0",
            write_page_checksum=True,
        )

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows: key, payload, the geometry, source_bytes and the further columns by name; a further column that
        is not there is null. The checksum is added."""
        for row in rows:
            self._held.append(row)
            self.rows += 1
            self.payload_bytes += len(row["payload"])
            if len(self._held) == self._group_rows:
                self._flush()

    def close(self) -> None:
        """Writes what is held and the footer; the stream stays open."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._held:
            return
        columns = [
            [zlib.crc32(row["payload"]) for row in self._held]
            if field.name == "crc"
            else [row[field.name] if not field.nullable else row.get(field.name) for row in self._held]
            for field in self._schema
        ]
        arrays = [
            pa.array(values, type=field.type) for values, field in zip(columns, self._schema, strict=True)
        ]
        self._writer.write_table(
            pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=len(self._held)
        )
        self._held = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # Else it would close itself when it is collected, into a stream that is closed by then.
            with suppress(OSError, pa.ArrowException):
                self._writer.close()


# ------------------------------------------------------------------------------------------------ reading


class _Page(NamedTuple):
    """A data page of plain values."""

    start: int  # in the file
    stop: int
    size: int  # bytes when decompressed
    values: int
    crc: int | None  # of the bytes from start to stop, with a sign


class _Column(NamedTuple):
    """What there is to know of a column to read its pages."""

    number: int  # among the leaves of the schema
    dtype: np.dtype[Any] | None  # of numbers; None: of bytes
    plain: bool  # whether pages of it are values, and before them at most levels that tell which are null
    nullable: bool


class Shard:
    """One shard. Raises PackedSetError, here and in every method, where it is damaged.

    Attributes:
        name: of the file.
        info: of the set it belongs to.
        rows: number of rows.
        columns: names of its columns.
        starts: first row of each row group, and the number of rows.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        try:
            with open(path, "rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._view = memoryview(self._map)
            self._file = pq.ParquetFile(
                pa.BufferReader(self._view), pre_buffer=False, page_checksum_verification=True
            )
            schema = self._file.schema_arrow
        except FileNotFoundError:
            raise PackedSetError(
                f"{path} is missing: restore it or pack the set again", shard=self.name
            ) from None
        except (OSError, ValueError, pa.ArrowException) as error:
            fact = f"{path} cannot be read, it is cut short or damaged ({_line(error)})"
            raise PackedSetError(f"{fact}: restore it or pack the set again", shard=self.name) from None
        described = (schema.metadata or {}).get(METADATA)
        if described is None:
            raise PackedSetError(f"{path} is Parquet but no shard of a packed set", shard=self.name)
        try:
            self.info = SetInfo.from_json(json.loads(described))
        except (ValueError, PackedSetError) as error:
            raise PackedSetError(_line(error), shard=self.name) from None
        needed = {"key": pa.string(), "payload": pa.binary(), "crc": pa.uint32()} | {
            name: pa.int64() if name == "samples" else pa.int32() for name in self.info.geometry
        }
        for name, kind in needed.items():
            if name not in schema.names or schema.field(name).type != kind:
                raise PackedSetError(
                    f"column {name} is missing or not {kind}: pack the set again", shard=self.name
                )
        self._footer = self._file.metadata
        self.rows, self.columns = self._footer.num_rows, list(schema.names)
        counts = [self._footer.row_group(group).num_rows for group in range(self._footer.num_row_groups)]
        self.starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        if self.starts[-1] != self.rows or min(counts, default=1) < 1:
            raise self._damage("its row groups do not add up")
        self._columns = {name: self._column(name, schema) for name in self.columns}
        self._numbers: dict[tuple[str, int], NDArray[Any] | pa.ChunkedArray] = {}
        self._spans: dict[int, tuple[list[int], list[int]]] = {}

    def group_of(self, row: int) -> tuple[int, int]:
        """Row group of a row, and its place in it."""
        group = bisect_right(self.starts, row) - 1
        return group, row - self.starts[group]

    def payload(self, row: int) -> memoryview:
        """The payload of a row, in the mapped file; its checksum is not looked at."""
        group, place = self.group_of(row)
        spans = self._spans.get(group)
        if spans is None:
            spans = self._spans[group] = self._payload_spans(group)
        return self._view[spans[0][place] : spans[1][place]]

    def values(self, name: str, group: int) -> NDArray[Any] | pa.ChunkedArray:
        """A column of a row group: an array of numbers where it is one without nulls, else of Arrow."""
        found = self._numbers.get((name, group))
        if found is None:
            found = self._read_values(name, group)
            if len(found) != self.starts[group + 1] - self.starts[group]:
                raise self._damage(f"row group {group} has {len(found)} values in column {name}")
            self._numbers[name, group] = found
        return found

    def value(self, name: str, row: int) -> Any:
        """A value as Python has it."""
        group, place = self.group_of(row)
        return _item(self.values(name, group), place)

    def whole(self, name: str) -> NDArray[Any] | pa.ChunkedArray:
        """A whole column, as `values`; it is not kept."""
        if name not in self._columns:
            raise UsageError(f"the set has no column {name}: it has {', '.join(self.columns)}")
        parts = [self._read_values(name, group) for group in range(len(self.starts) - 1)]
        self.release()
        if all(isinstance(part, np.ndarray) for part in parts) and parts:
            return np.concatenate(parts)
        kind = self._file.schema_arrow.field(name).type
        chunks = ([pa.array(part, kind)] if isinstance(part, np.ndarray) else part.chunks for part in parts)
        return pa.chunked_array(list(chain.from_iterable(chunks)), kind)

    def check(self, row: int, payload: memoryview) -> None:
        """Raises PackedSetError unless the payload of a row has its checksum."""
        if zlib.crc32(payload) != self.value("crc", row):
            raise PackedSetError(
                "the payload does not match its checksum: restore the shard or pack the set again",
                shard=self.name,
                key=self.key(row),
            )

    def key(self, row: int) -> str | int:
        """The key of a row; its number where the key cannot be read."""
        try:
            return str(self.value("key", row))
        except CompandError:
            return row

    def release(self) -> None:
        """Lets the system take back the pages of the file that were read; they are read again when needed."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _damage(self, fact: str) -> PackedSetError:
        return PackedSetError(
            f"the shard is damaged, {fact}: restore it or pack the set again", shard=self.name
        )

    def _column(self, name: str, schema: pa.Schema) -> _Column:
        names = self._footer.schema.names
        kind = schema.field(name).type
        if name not in names or pa.types.is_nested(kind):
            return _Column(-1, None, False, True)
        index = names.index(name)
        described = self._footer.schema.column(index)
        plain = described.max_definition_level <= 1 and not described.max_repetition_level
        nullable = described.max_definition_level > 0
        stored = {"INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8}.get(described.physical_type)
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            dtype = np.dtype(kind.to_pandas_dtype()).newbyteorder("<")
            return _Column(index, dtype, plain and dtype.itemsize == stored, nullable)
        return _Column(index, None, plain and described.physical_type == "BYTE_ARRAY", nullable)

    def _pages(self, name: str, group: int) -> list[_Page] | None:
        """The pages of a column in a row group; None unless they are plain, which `ShardWriter` makes them."""
        column = self._columns[name]
        if not column.plain:
            return None
        chunk = self._footer.row_group(group).column(column.number)
        if chunk.has_dictionary_page or chunk.compression not in ("UNCOMPRESSED", "ZSTD"):
            return None
        place, values = chunk.data_page_offset, chunk.num_values
        stop = place + chunk.total_compressed_size
        if not 0 < place < stop <= len(self._view):
            raise self._damage(f"column {name} lies beyond its end")
        pages = []
        while place < stop and values > 0:
            try:
                header, start = _read_struct(self._view, place, stop)
                kind, size, stored = header[1], header[2], header[3]
                count, encoding = header[5][1], header[5][2]
                crc = header.get(4)
            except (IndexError, KeyError, TypeError, RecursionError):
                raise self._damage(f"column {name} has no page header at {place}") from None
            if kind != 0 or encoding != 0 or (chunk.compression == "UNCOMPRESSED" and size != stored):
                return None
            if not (0 < count <= values and 0 <= stored <= stop - start and size >= 0):
                raise self._damage(f"column {name} has a page of impossible size at {place}")
            pages.append(_Page(start, start + stored, size, count, crc))
            place, values = start + stored, values - count
        if values:
            raise self._damage(f"column {name} lacks {values} values")
        return pages

    def _read_values(self, name: str, group: int) -> NDArray[Any] | pa.ChunkedArray:
        if name not in self._columns:
            raise UsageError(f"the set has no column {name}: it has {', '.join(self.columns)}")
        dtype = self._columns[name].dtype
        pages = None if dtype is None else self._pages(name, group)
        try:
            if pages is None or dtype is None:
                return self._file.read_row_group(group, columns=[name], use_threads=False).column(0)
            compressed = (
                self._footer.row_group(group).column(self._columns[name].number).compression == "ZSTD"
            )
            parts = []
            for page in pages:
                size = page.values * dtype.itemsize
                levels = _all_present(page.values) if self._columns[name].nullable else b""
                if page.size != len(levels) + size:
                    if not self._columns[name].nullable:
                        raise self._damage(f"column {name} has a page of impossible size at {page.start}")
                    return self._file.read_row_group(group, columns=[name], use_threads=False).column(0)
                content: Any = self._view[page.start : page.stop]
                if page.crc is not None and zlib.crc32(content) != page.crc & 0xFFFFFFFF:
                    raise self._damage(f"column {name} does not match its checksum at {page.start}")
                if compressed:
                    content = pa.decompress(content, page.size, codec="zstd")
                if bytes(content[: len(levels)]) != levels:
                    return self._file.read_row_group(group, columns=[name], use_threads=False).column(0)
                parts.append(np.frombuffer(content, dtype=dtype, offset=len(levels)))
            # A copy: a few numbers must not keep pages of the file mapped.
            return np.concatenate(parts)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._damage(f"column {name} does not decode ({_line(error)})") from None

    def _payload_spans(self, group: int) -> tuple[list[int], list[int]]:
        """Where the payloads of a row group begin and end in the file."""
        pages = self._pages("payload", group)
        chunk = self._footer.row_group(group).column(self._columns["payload"].number)
        if pages is None or chunk.compression != "UNCOMPRESSED" or self._columns["payload"].nullable:
            raise PackedSetError(
                "payloads are not stored plain, another program has rewritten the shard: pack the set again",
                shard=self.name,
            )
        starts, stops = [], []
        read = struct.Struct("<I").unpack_from
        for page in pages:
            place = page.start
            for _ in range(page.values):
                begin = place + 4
                if begin > page.stop:
                    raise self._damage(f"the payloads of row group {group} lie beyond its end")
                place = begin + read(self._view, place)[0]
                starts.append(begin)
                stops.append(place)
            if place != page.stop:
                raise self._damage(f"the payloads of row group {group} do not fill their page")
        if len(starts) != self.starts[group + 1] - self.starts[group]:
            raise self._damage(f"row group {group} lacks payloads")
        return starts, stops


class PackedReader:
    """Rows of a packed set by number; picklable, and safe to use in processes that were forked or spawned.

    Shards are opened when a row of theirs is asked for; what they say of the set is compared then.

    Args:
        path: folder of a set, one shard, or several.
        verify: compare every payload with its checksum.

    Attributes:
        info: what the shards agree on.
        rows: number of rows.
        columns: names of the columns, "payload" among them.
        shards: paths of the shards.
        starts: first row of each shard, and the number of rows.

    Raises:
        PackedSetError: no set, an unfinished one, or a shard that is missing, cut short or of another set.
    """

    def __init__(self, path: str | Path | Sequence[str | Path], *, verify: bool = True) -> None:
        self.verify = verify
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._reads = 0
        self._read_from: set[int] = set()
        self._counts: list[int] | None = None
        described: SetInfo | None = None
        places = [path] if isinstance(path, (str, Path)) else [*path]
        for place in places:
            if is_remote(str(place)):
                fact = f"{place} is not on this machine, where rows are read from mapped files"
                raise PackedSetError(f"{fact}: copy the folder here, and name the copy")
        self.shards = [Path(place) for place in places]
        if isinstance(path, (str, Path)) and self.shards[0].is_dir():
            self.shards, self._counts, described = _read_index(self.shards[0])
        if not self.shards:
            raise PackedSetError("no shard was named: give the folder of a packed set")
        first = Shard(self.shards[0])
        self.info, self.columns = described or first.info, first.columns
        if self._counts is None:
            self._counts = [first.rows, *(self._opened(index).rows for index in range(1, len(self.shards)))]
        self.starts: list[int] = [0, *np.cumsum(self._counts, dtype=np.int64).tolist()]
        self.rows = self.starts[-1]
        self._shard(0)

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_reads": 0, "_read_from": set()}

    def place(self, index: int) -> tuple[str, str | int]:
        """Shard and key of a row, for messages."""
        number, row = self._locate(index)
        shard = self._shard(number)
        return shard.name, shard.key(row)

    def payload(self, index: int) -> memoryview:
        """The payload of a row, in the mapped file. Raises PackedSetError if its checksum is another."""
        number, row = self._locate(index)
        return self._payload(number, self._shard(number), row)

    def _payload(self, number: int, shard: Shard, row: int) -> memoryview:
        payload = shard.payload(row)
        if self.verify:
            shard.check(row, payload)
        self._reads += 1
        self._read_from.add(number)
        if self._reads >= _READS_A_RELEASE:
            self._release()
        return payload

    def value(self, index: int, name: str) -> Any:
        """One value of a column."""
        number, row = self._locate(index)
        return self._shard(number).value(name, row)

    def row(self, index: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """A row by column name, the payload as a view of the file; columns: None is all.

        Raises:
            IndexError: there is no such row.
            PackedSetError: the row is damaged.
        """
        number, row = self._locate(index)
        shard = self._shard(number)
        group, place = shard.group_of(row)
        record: dict[str, Any] = {}
        for name in self.columns if columns is None else columns:
            if name == "payload":
                record[name] = self._payload(number, shard, row)
            else:
                record[name] = _item(shard.values(name, group), place)
        return record

    def take(self, indices: Iterable[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """`row` of several."""
        return [self.row(int(index), columns) for index in indices]

    def column(self, name: str) -> NDArray[Any] | list[Any]:
        """A whole column but the payloads: an array where it is one of numbers without nulls, else a list."""
        if name == "payload":
            raise UsageError("payloads are read row by row: use PackedReader.payload")
        parts = [self._shard(number).whole(name) for number in range(len(self.shards))]
        if all(isinstance(part, np.ndarray) for part in parts):
            return np.concatenate(parts)
        lists = (part.tolist() if isinstance(part, np.ndarray) else part.to_pylist() for part in parts)
        return list(chain.from_iterable(lists))

    def shard_rows(self) -> list[tuple[str, range]]:
        """Name and rows of every shard."""
        return [
            (path.name, range(start, stop))
            for path, (start, stop) in zip(self.shards, pairwise(self.starts), strict=True)
        ]

    def groups(self) -> list[tuple[int, int]]:
        """First row and row behind the last of every row group, which lie together in a file."""
        spans = []
        for number, start in enumerate(self.starts[:-1]):
            inner = self._shard(number).starts
            spans += [(start + a, start + b) for a, b in pairwise(inner)]
        return spans

    def _release(self) -> None:
        for number in self._read_from & self._open.keys():
            self._open[number].release()
        self._read_from.clear()
        self._reads = 0

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        number = bisect_right(self.starts, index) - 1
        return number, index - self.starts[number]

    def _shard(self, number: int) -> Shard:
        shard = self._open.get(number)
        if shard is None:
            shard = self._opened(number)
            self._open[number] = shard
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def _opened(self, number: int) -> Shard:
        shard = Shard(self.shards[number])
        difference = shard.info.difference(self.info)
        if difference is None and set(shard.columns) != set(self.columns):
            difference = f"columns {', '.join(shard.columns)}"
        if difference is not None:
            fact = f"{shard.path} belongs to another set ({difference})"
            raise PackedSetError(f"{fact}: keep shards of one packing together", shard=shard.name)
        if self._counts is not None and shard.rows != self._counts[number]:
            fact = f"{shard.path} has {shard.rows} rows, the index says {self._counts[number]}"
            raise PackedSetError(f"{fact}: restore it or pack the set again", shard=shard.name)
        return shard


def _item(values: NDArray[Any] | pa.ChunkedArray, place: int) -> Any:
    """A value of `Shard.values` as Python has it."""
    return values.item(place) if isinstance(values, np.ndarray) else values[place].as_py()


def check_set(path: str | Path | Sequence[str | Path]) -> list[PackedSetError]:
    """The faults of a set, each naming shard and key: damaged payloads, integers that do not decode, keys that occur
    twice, shards of another set. Empty where it is intact."""
    try:
        reader = PackedReader(path)
        # What a codec's own prior codes is left to the checksums.
        by_itself = reader.info.profile == "train" or reader.info.tables is not None
        codec = RowCodec(reader.info) if by_itself else None
    except PackedSetError as error:
        return [error]
    faults: list[PackedSetError] = []
    seen: dict[str | int, int] = {}
    for name, rows in reader.shard_rows():
        for index in rows:
            try:
                shard, key = reader.place(index)
            except PackedSetError as error:  # of the whole shard
                faults.append(error if error.shard else PackedSetError(str(error), shard=name))
                break
            first = seen.setdefault(key, index)
            if first != index:
                fact = f"the key occurs in {reader.place(first)[0]} too"
                faults.append(PackedSetError(f"{fact}: pack the set again", shard=shard, key=key))
            try:
                row = reader.row(index, ("payload", *reader.info.geometry))
                shape = reader.info.latent_shape(row)
                if codec is not None:
                    codec.decode(row["payload"], shape)
            except PackedSetError as error:
                faults.append(error if error.shard else PackedSetError(str(error), shard=shard, key=key))
    return faults


def _read_index(folder: Path) -> tuple[list[Path], list[int], SetInfo | None]:
    """Shards of a set, their rows, and what the shards should agree on, from its index."""
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise PackedSetError(
                f"{path}: format {content['format']} is not known here: a newer compand may read it"
            )
        entries = [
            (str(entry["name"]), int(entry["rows"]), int(entry["bytes"])) for entry in content["shards"]
        ]
        if any("/" in name or "\\" in name or rows < 1 for name, rows, _ in entries):
            raise ValueError("a shard lies elsewhere or has no rows")
        described = SetInfo.from_json(content["compand"]) if "compand" in content else None
    except FileNotFoundError:
        fact = f"{folder} is no finished packed set, it has no {INDEX}"
        raise PackedSetError(f"{fact}: run compand pack again, which goes on where it stopped") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackedSetError(
            f"{path} is damaged ({_line(error)}): restore it or pack the set again"
        ) from None
    if not entries:
        raise PackedSetError(f"{folder} has no rows: pack something else")
    for name, _, size in entries:
        shard = folder / name
        try:
            found = shard.stat().st_size
        except OSError as error:
            fact = f"{shard} cannot be read: {error.strerror}"
            raise PackedSetError(f"{fact}; restore it or pack the set again", shard=name) from None
        if found != size:
            fact = f"{shard} has {found} bytes, the index says {size}: it is cut short or was changed"
            raise PackedSetError(f"{fact}; restore it or pack the set again", shard=name)
    return [folder / name for name, _, _ in entries], [rows for _, rows, _ in entries], described


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# Thrift's compact protocol, as far as headers of Parquet's data pages use it ---------------------------------


def _read_struct(view: memoryview, place: int, stop: int) -> tuple[dict[int, Any], int]:
    """Fields of a struct by their ids, and where it ends. Raises IndexError or KeyError where there is none."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        if place >= stop:
            raise IndexError(place)
        head = view[place]
        place += 1
        if head == 0:
            return fields, place
        kind = head & 15
        if head >> 4:
            number += head >> 4
        else:
            number, place = _read_integer(view, place, stop)
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            fields[number], place = _read_integer(view, place, stop)
        elif kind == 8:
            size, place = _read_varint(view, place, stop)
            place += size
        elif kind == 12:
            fields[number], place = _read_struct(view, place, stop)
        else:
            raise KeyError(kind)


def _all_present(count: int) -> bytes:
    """The levels that begin a page of `count` values none of which is null: one run of ones, after its length."""
    run, rest = bytearray(), count << 1
    while rest > 127:
        run.append(rest & 127 | 128)
        rest >>= 7
    run += bytes((rest, 1))
    return len(run).to_bytes(4, "little") + run


def _read_integer(view: memoryview, place: int, stop: int) -> tuple[int, int]:
    value, place = _read_varint(view, place, stop)
    return (value >> 1) ^ -(value & 1), place


def _read_varint(view: memoryview, place: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while place < stop and shift < 64:
        byte = view[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise IndexError(place)
