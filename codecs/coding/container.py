"""The `.cpd` container: what a decoder must know, the chunks of a codec, and the proof that both are intact.

    full     "cpd" | medium, version | header fields | extra and chunk table | CRC-32 | extras | chunks
    compact  "c"   | 0x80 + version  | header fields | the only chunk                          | CRC-16

The header is declared as lists of fields (`LAYOUTS`, `COMPACT`) that write and read themselves, so both
directions share one order. The table holds the length and the CRC-32 of every payload: a damaged chunk costs
that chunk alone. The compact form serves tiny pictures; its 16-bit checksum covers the whole file and finds
any damage within two adjacent bytes, and all but one in 65,536 of the rest. Integers are little-endian; a
varint has seven bits a byte, the lowest first, in its shortest form. No declared size is believed before it
is compared with the bytes present.
"""

from __future__ import annotations

import binascii
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, ClassVar, Protocol, TypeVar

from compand.errors import BitstreamError, UsageError

MAGIC = b"cpd"
FORMAT_VERSION = 1
# The second byte cannot follow "c" in UTF-8 or ASCII, so no text file looks like the compact form.
COMPACT_MAGIC = bytes((MAGIC[0], 0x80 | FORMAT_VERSION))
COMPACT_PAYLOAD = 2048  # bytes; `write` chooses the compact form by itself for payloads below this
COMPACT_CRC_BYTES = 2

Record = dict[str, Any]  # flat header: field name -> value
T = TypeVar("T")


# What a file says -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageGeometry:
    """Size and samples of the original picture. Raises `UsageError` on values that no picture has."""

    medium: ClassVar[str] = "image"
    height: int  # pixels
    width: int  # pixels
    channels: int  # 1 (gray) or 3 (RGB)
    bit_depth: int = 8  # of the original: 8 or 16

    def __post_init__(self) -> None:
        _require(min(self.height, self.width) >= 1, f"{self.height} x {self.width} pixels: must be positive")
        _require(self.channels in (1, 3), f"{self.channels} channels: must be 1 or 3")
        _require(self.bit_depth in (8, 16), f"bit depth {self.bit_depth}: must be 8 or 16")


@dataclass(frozen=True)
class AudioGeometry:
    """Length and layout of the original audio. Raises `UsageError` on values that no recording has."""

    medium: ClassVar[str] = "audio"
    samples: int  # per channel
    sample_rate: int  # Hz
    channels: int

    def __post_init__(self) -> None:
        _require(min(vars(self).values()) >= 1, f"{self}: every value must be positive")


@dataclass(frozen=True)
class Header:
    """Everything that a decoder must know before it meets a chunk.

    A header read from the compact form has `compact=True`, the first two bytes of `symbols` and an empty
    `synthesis`. Raises `UsageError` when the values contradict each other.
    """

    codec_id: int  # 0: a third-party codec, known by its name
    codec_name: str  # "" unless codec_id is 0; at most 255 bytes of UTF-8
    symbols: bytes  # fingerprint of prior and tables (what decides the symbols): 4 bytes
    synthesis: bytes  # fingerprint of the synthesis: 4 bytes
    settings: tuple[int, ...]  # defined by the codec, each 0 or more; at most seven
    geometry: ImageGeometry | AudioGeometry
    chunk_size: int  # tile edge in pixels, a multiple of 64, or samples per segment; 0: one chunk
    compact: bool = False
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        sizes = (2, 0) if self.compact else (4, 4)
        unit = 64 if isinstance(self.geometry, ImageGeometry) else 1
        _require(self.version == FORMAT_VERSION, f"format version {self.version}: must be {FORMAT_VERSION}")
        _require(self.codec_id >= 0, f"codec id {self.codec_id}: must not be negative")
        _require((self.codec_id == 0) == (self.codec_name != ""), "codec id 0 needs a name, others have none")
        _require(self.codec_name.isprintable(), "the codec name has unprintable characters")
        _require((len(self.symbols), len(self.synthesis)) == sizes, f"fingerprints must have {sizes} bytes")
        _require(min(self.settings, default=0) >= 0, f"settings {self.settings}: none may be negative")
        _require(self.chunk_size >= 0, f"chunk size {self.chunk_size}: must not be negative")
        _require(self.chunk_size % unit == 0, f"chunk size {self.chunk_size}: must be a multiple of {unit}")

    def chunk_count(self) -> int:
        """Number of chunks: tiles row by row, or segments in time."""
        if self.chunk_size == 0:
            return 1
        if isinstance(self.geometry, ImageGeometry):
            return -(-self.geometry.height // self.chunk_size) * -(-self.geometry.width // self.chunk_size)
        return -(-self.geometry.samples // self.chunk_size)

    def compacted(self) -> Header:
        """This header as the compact form tells it; a chunk size that leaves one chunk becomes 0."""
        chunk_size = self.chunk_size if self.chunk_count() > 1 else 0
        return replace(self, symbols=self.symbols[:2], synthesis=b"", chunk_size=chunk_size, compact=True)


class ExtraKind(IntEnum):
    """What travels beside the chunks. Readers keep and ignore the kinds that they do not know."""

    ALPHA = 1  # the alpha plane, coded without loss
    ICC = 2  # the color profile
    OPAQUE_ALPHA = 3  # the original had an alpha plane that was opaque everywhere; no payload


@dataclass(frozen=True)
class Extra:
    kind: int  # an `ExtraKind`, or a kind that a newer version defines
    payload: bytes


@dataclass
class Container:
    """The content of a file. In a partial read, a damaged chunk is None, a damaged extra is absent."""

    header: Header
    chunks: list[bytes | None]  # header.chunk_count() of them
    extras: list[Extra]  # at most seven
    damage: list[BitstreamError]  # empty unless the read was partial
    header_bytes: int  # bytes of the file that are payload of neither a chunk nor an extra
    offsets: list[int]  # where in the file each chunk begins, in bytes
    extra_offsets: list[int]  # and each extra


@dataclass(frozen=True)
class Limits:
    """What a reader accepts: bounds the memory that decoding can ask for."""

    max_pixels: int = 1 << 29  # height x width
    max_samples: int = 1 << 36  # samples x channels
    max_chunks: int = 1 << 20


# Fields that write and read themselves ----------------------------------------------------------------------


class Source:
    """Reads header bytes in order; every fault is a `BitstreamError` with its offset."""

    def __init__(self, view: memoryview, offset: int) -> None:
        self.view = view
        self.offset = offset

    def take(self, size: int) -> bytes:
        if size > len(self.view) - self.offset:
            raise self.fault("it is cut off")
        self.offset += size
        return bytes(self.view[self.offset - size : self.offset])

    def fault(self, fact: str) -> BitstreamError:
        return BitstreamError(f"the header is damaged, {fact}: get an intact copy", offset=self.offset)


class Field(Protocol):
    """Moves its part of a record to bytes and back. Raises `UsageError` on a value that it cannot store."""

    def write(self, record: Record, sink: bytearray) -> None: ...

    def read(self, record: Record, source: Source) -> None: ...


@dataclass(frozen=True)
class Value(ABC):
    """A field that is one named value."""

    name: str

    @abstractmethod
    def pack(self, value: Any) -> bytes: ...

    @abstractmethod
    def unpack(self, source: Source) -> Any: ...

    def write(self, record: Record, sink: bytearray) -> None:
        sink += self.pack(record[self.name])

    def read(self, record: Record, source: Source) -> None:
        record[self.name] = self.unpack(source)


@dataclass(frozen=True)
class Varint(Value):
    """A multiple of `unit`, stored as 0 to `limit` - 1 units."""

    unit: int = 1
    limit: int = 1 << 63

    def pack(self, value: int) -> bytes:
        rest, remainder = divmod(value, self.unit)
        _require(remainder == 0 and 0 <= rest < self.limit, f"{self.name} {value} cannot be stored")
        packed = bytearray()
        while rest > 0x7F:
            packed.append(rest & 0x7F | 0x80)
            rest >>= 7
        packed.append(rest)
        return bytes(packed)

    def unpack(self, source: Source) -> int:
        value = 0
        for shift in range(0, self.limit.bit_length(), 7):
            byte = source.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte <= 0x7F:
                if value >= self.limit or (byte == 0 and shift):
                    break
                return value * self.unit
        raise source.fault(f"{self.name} is not a valid number")


@dataclass(frozen=True)
class Uint(Value):
    """An integer of `size` bytes, counted from `lowest`."""

    size: int
    lowest: int = 0

    def pack(self, value: int) -> bytes:
        _require(0 <= value - self.lowest < 256**self.size, f"{self.name} {value} cannot be stored")
        return (value - self.lowest).to_bytes(self.size, "little")

    def unpack(self, source: Source) -> int:
        return int.from_bytes(source.take(self.size), "little") + self.lowest


@dataclass(frozen=True)
class Raw(Value):
    """Exactly `size` bytes."""

    size: int

    def pack(self, value: bytes) -> bytes:
        _require(len(value) == self.size, f"{self.name} has {len(value)} bytes: must be {self.size}")
        return value

    def unpack(self, source: Source) -> bytes:
        return source.take(self.size)


@dataclass(frozen=True)
class Text(Value):
    """Up to 255 bytes of UTF-8, after their number."""

    def pack(self, value: str) -> bytes:
        text = value.encode()
        _require(len(text) < 256, f"{self.name} has {len(text)} bytes: at most 255 can be stored")
        return bytes((len(text),)) + text

    def unpack(self, source: Source) -> str:
        try:
            return source.take(source.take(1)[0]).decode()
        except UnicodeDecodeError:
            raise source.fault(f"{self.name} is not UTF-8") from None


@dataclass(frozen=True)
class Implied(Value):
    """A value that takes no bytes, because its layout allows no other."""

    value: Any

    def pack(self, value: Any) -> bytes:
        _require(value == self.value, f"this form of header needs {self.name} {self.value!r}, not {value!r}")
        return b""

    def unpack(self, source: Source) -> Any:
        return self.value


class Bits:
    """One byte for several values, each stored as its position among those allowed; the first is highest."""

    def __init__(self, **allowed: Sequence[Any]) -> None:
        self.allowed = allowed

    def write(self, record: Record, sink: bytearray) -> None:
        byte = 0
        for name, values in self.allowed.items():
            _require(record[name] in values, f"{name} {record[name]} cannot be stored")
            byte = byte * len(values) + values.index(record[name])
        sink.append(byte)

    def read(self, record: Record, source: Source) -> None:
        byte = source.take(1)[0]
        for name, values in reversed(self.allowed.items()):
            byte, position = divmod(byte, len(values))
            record[name] = values[position]
        if byte:
            raise source.fault(f"{' or '.join(self.allowed)} is unknown (a newer compand may know it)")


@dataclass(frozen=True)
class Many:
    """A tuple of values, each stored as `item`; their number is the value called `count`."""

    item: Value
    count: str

    def write(self, record: Record, sink: bytearray) -> None:
        sink += b"".join(map(self.item.pack, record[self.item.name]))

    def read(self, record: Record, source: Source) -> None:
        record[self.item.name] = tuple(self.item.unpack(source) for _ in range(record[self.count]))


@dataclass(frozen=True)
class When:
    """`field` where the value called `key` equals `equals`, otherwise `instead`."""

    key: str
    equals: Any
    field: Field
    instead: Field

    def write(self, record: Record, sink: bytearray) -> None:
        self._chosen(record).write(record, sink)

    def read(self, record: Record, source: Source) -> None:
        self._chosen(record).read(record, source)

    def _chosen(self, record: Record) -> Field:
        return self.field if record[self.key] == self.equals else self.instead


# The format -------------------------------------------------------------------------------------------------

OPENING: tuple[Field, ...] = (Bits(medium=("image", "audio"), version=range(16)), Implied("compact", False))
CODEC: tuple[Field, ...] = (
    Varint("codec_id"),
    When("codec_id", 0, Text("codec_name"), instead=Implied("codec_name", "")),
    Raw("symbols", 4),
    Raw("synthesis", 4),
    Many(Varint("settings"), count="setting_count"),
)
LAYOUTS: dict[str, tuple[Field, ...]] = {  # follows OPENING; one layout a medium
    "image": (
        Bits(channels=(3, 1), bit_depth=(8, 16), setting_count=range(8), extra_count=range(8)),
        *CODEC,
        Varint("height"),
        Varint("width"),
        Varint("chunk_size", unit=64),
    ),
    "audio": (
        Bits(setting_count=range(8), extra_count=range(8)),
        *CODEC,
        Varint("samples"),
        Varint("sample_rate"),
        Varint("channels"),
        Varint("chunk_size"),
    ),
}
COMPACT: tuple[Field, ...] = (  # follows COMPACT_MAGIC
    Implied("medium", "image"),
    Implied("version", FORMAT_VERSION),
    Implied("compact", True),
    Implied("bit_depth", 8),
    Implied("setting_count", 1),
    Implied("extra_count", 0),
    Implied("codec_name", ""),
    Implied("synthesis", b""),
    Implied("chunk_size", 0),
    Bits(channels=(3, 1), codec_id=range(128)),
    Many(Uint("settings", 1, lowest=32), count="setting_count"),
    Raw("symbols", 2),
    Varint("height", limit=1 << 14),
    Varint("width", limit=1 << 14),
)
CHUNK_ENTRY: tuple[Field, ...] = (Varint("length"), Uint("crc", 4))
EXTRA_ENTRY: tuple[Field, ...] = (Varint("kind"), *CHUNK_ENTRY)
CHUNK_ENTRY_BYTES = 5  # at least
HEADER_CRC = Uint("header checksum", 4)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _write_fields(layout: Sequence[Field], record: Record) -> bytes:
    sink = bytearray()
    for field in layout:
        field.write(record, sink)
    return bytes(sink)


def _read_fields(layout: Sequence[Field], source: Source, record: Record) -> Record:
    for field in layout:
        field.read(record, source)
    return record


def _flatten(header: Header, extra_count: int) -> Record:
    counts = {"setting_count": len(header.settings), "extra_count": extra_count}
    return vars(header) | vars(header.geometry) | {"medium": header.geometry.medium} | counts


def _unflatten(record: Record, source: Source) -> Header:
    def build(kind: type[T]) -> T:
        return kind(**{field.name: record[field.name] for field in fields(kind)})  # type: ignore[arg-type]

    try:
        record["geometry"] = build(ImageGeometry) if record["medium"] == "image" else build(AudioGeometry)
        return build(Header)
    except UsageError as error:
        raise source.fault(str(error)) from None


# Writing ----------------------------------------------------------------------------------------------------


def write(
    header: Header, chunks: Sequence[bytes], extras: Sequence[Extra] = (), *, compact: bool | None = None
) -> bytes:
    """Returns the bytes of a `.cpd` file.

    Args:
        header: its `chunk_count()` says how many chunks there are.
        chunks: payloads, in the order of `Header.chunk_count`.
        extras: at most seven.
        compact: True or False to choose the form; None for the compact form where `header` allows it and the
            payload is below 2048 bytes. A header that was read from a compact file fits no other form.

    Raises:
        UsageError: the number of chunks is wrong, or the form cannot store a value.
    """
    expected = header.chunk_count()
    _require(len(chunks) == expected, f"{len(chunks)} chunks given: the header describes {expected}")
    if compact is None:
        small = sum(map(len, chunks)) < COMPACT_PAYLOAD
        compact = header.compact or (small and fits_compact(header, extras))
    if compact:
        return _write_compact(header, chunks[0], len(extras))
    return _write_full(header, chunks, extras)


def fits_compact(header: Header, extras: Sequence[Extra] = ()) -> bool:
    """Whether the compact form can store this header: one chunk of an 8-bit picture with edges below 16384
    pixels, codec id 1 to 127, a single setting of 32 to 287, no extras."""
    try:
        _write_fields(COMPACT, _flatten(header.compacted(), len(extras)))
    except UsageError:
        return False
    return True


def _write_compact(header: Header, chunk: bytes, extra_count: int) -> bytes:
    body = COMPACT_MAGIC + _write_fields(COMPACT, _flatten(header.compacted(), extra_count)) + chunk
    return body + _compact_crc(body)


def _write_full(header: Header, chunks: Sequence[bytes], extras: Sequence[Extra]) -> bytes:
    def summary(payload: bytes) -> Record:
        return {"length": len(payload), "crc": zlib.crc32(payload)}

    record = _flatten(header, len(extras))
    head = MAGIC + _write_fields((*OPENING, *LAYOUTS[record["medium"]]), record)
    head += b"".join(
        _write_fields(EXTRA_ENTRY, {"kind": extra.kind} | summary(extra.payload)) for extra in extras
    )
    head += b"".join(_write_fields(CHUNK_ENTRY, summary(chunk)) for chunk in chunks)
    head += HEADER_CRC.pack(zlib.crc32(head))
    return b"".join((head, *(extra.payload for extra in extras), *chunks))


def _compact_crc(body: bytes | memoryview) -> bytes:
    # Inverted, so that zero bytes appended to a file are noticed; the high byte first, the order in which
    # this CRC shifts, so that damage astride the end of the body is noticed like any other.
    return (binascii.crc_hqx(body, 0xFFFF) ^ 0xFFFF).to_bytes(COMPACT_CRC_BYTES, "big")


# Reading ----------------------------------------------------------------------------------------------------


def _view(data: bytes | bytearray | memoryview) -> memoryview:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise UsageError(
            f"a .cpd file is given as its bytes, not as {type(data).__name__}: read the file first"
        )
    return memoryview(data).cast("B")


def read_header(data: bytes | bytearray | memoryview, limits: Limits = Limits()) -> Header:
    """Returns the header of a `.cpd` file. A full form needs no more of `data` than header and table.

    Raises:
        BitstreamError: not a `.cpd` file, of a newer version, damaged, or beyond `limits`.
    """
    view = _view(data)
    return _read_compact(view, limits).header if _is_compact(view) else _read_table(view, limits).header


def read(
    data: bytes | bytearray | memoryview, *, partial: bool = False, limits: Limits = Limits()
) -> Container:
    """Returns the content of a `.cpd` file, checksums verified.

    Args:
        data: the whole file.
        partial: keep what is intact, and list damaged or missing payloads and bytes after the end in
            `Container.damage`. Damage to a header remains an error, as does any damage to the compact form.
        limits: what to accept.

    Raises:
        BitstreamError: not a `.cpd` file, of a newer version, beyond `limits`, or damaged (naming chunk and
            offset).
    """
    view = _view(data)
    if _is_compact(view):
        return _read_compact(view, limits)

    table = _read_table(view, limits)
    container = Container(table.header, [], [], [], table.header_bytes, [], [])
    offset = table.header_bytes

    def report(fact: str, chunk: int | None = None) -> None:
        message = f"{fact}: get an intact copy, or decode the rest with --partial"
        error = BitstreamError(message, chunk=chunk, offset=offset)
        if not partial:
            raise error
        container.damage.append(error)

    for entry in table.entries:
        payload = bytes(view[offset : offset + entry.length])
        intact = len(payload) == entry.length and zlib.crc32(payload) == entry.crc
        if not intact:
            name = "the chunk" if entry.kind is None else f"the extra of kind {entry.kind}"
            report(f"{name} is {'damaged' if len(payload) == entry.length else 'cut off'}", entry.chunk)
        if entry.kind is None:
            container.chunks.append(payload if intact else None)
            container.offsets.append(offset)
        elif intact:
            container.extras.append(Extra(entry.kind, payload))
            container.extra_offsets.append(offset)
        offset += entry.length
    if offset < len(view):
        report(f"{len(view) - offset} bytes follow the last chunk")
    return container


@dataclass(frozen=True)
class _Entry:
    """What the table says of one payload."""

    length: int
    crc: int
    kind: int | None = None  # of an extra
    chunk: int | None = None  # index of a chunk


@dataclass(frozen=True)
class _Table:
    header: Header
    entries: list[_Entry]  # in the order of the payloads
    header_bytes: int


def _is_compact(view: memoryview) -> bool:
    """Tells the two forms apart; raises `BitstreamError` on anything else and on newer versions."""
    opening = bytes(view[: len(MAGIC) + 1])
    compact = opening[:1] == COMPACT_MAGIC[:1] and len(opening) > 1 and opening[1] & 0xF0 == 0x80
    full = opening.startswith(MAGIC) and len(opening) > len(MAGIC)
    version = opening[1 if compact else -1] & 0x0F if compact or full else 0
    if version == 0:
        raise BitstreamError("not a .cpd file", offset=0)
    if version > FORMAT_VERSION:
        raise BitstreamError(
            f"format version {version} is newer than this compand reads: upgrade compand",
            offset=1 if compact else 3,
        )
    return compact


def _read_compact(view: memoryview, limits: Limits) -> Container:
    body = view[:-COMPACT_CRC_BYTES]
    if view[-COMPACT_CRC_BYTES:] != _compact_crc(body):
        raise BitstreamError("the file does not match its checksum: get an intact copy", offset=0)
    source = Source(body, len(COMPACT_MAGIC))
    header = _unflatten(_read_fields(COMPACT, source, {}), source)
    _check_limits(header, limits)
    chunk = bytes(body[source.offset :])
    return Container(header, [chunk], [], [], source.offset + COMPACT_CRC_BYTES, [source.offset], [])


def _read_table(view: memoryview, limits: Limits) -> _Table:
    source = Source(view, len(MAGIC))
    record = _read_fields(OPENING, source, {})
    header = _unflatten(_read_fields(LAYOUTS[record["medium"]], source, record), source)
    extras = [_Entry(**_read_fields(EXTRA_ENTRY, source, {})) for _ in range(record["extra_count"])]
    count = header.chunk_count()
    if count > (len(view) - source.offset) // CHUNK_ENTRY_BYTES:
        raise source.fault(f"it announces {count} chunks and has no room for their table")
    if count > limits.max_chunks:
        raise _beyond("chunks", count, limits.max_chunks)
    chunks = [_Entry(**_read_fields(CHUNK_ENTRY, source, {"chunk": index})) for index in range(count)]
    expected = zlib.crc32(view[: source.offset])
    if HEADER_CRC.unpack(source) != expected:
        raise source.fault("it does not match its checksum")
    _check_limits(header, limits)
    return _Table(header, extras + chunks, source.offset)


def _check_limits(header: Header, limits: Limits) -> None:
    geometry = header.geometry
    if isinstance(geometry, ImageGeometry):
        name, count, limit = "pixels", geometry.height * geometry.width, limits.max_pixels
    else:
        name, count, limit = "samples", geometry.samples * geometry.channels, limits.max_samples
    if count > limit:
        raise _beyond(name, count, limit)


def _beyond(name: str, count: int, limit: int) -> BitstreamError:
    return BitstreamError(
        f"{count} {name} are more than the limit of {limit}: raise Limits.max_{name}", offset=0
    )
