"""The `.cpd` container: what a decoder must know, the chunks of a codec, and the proof that both are intact.

    full     "cpd" | medium, version | header fields | extra and chunk table | CRC-32 | extras | chunks
    compact  "c"   | 0x80 + version  | header fields | the only chunk                          | CRC-16
    audio    "cpd" | medium, version | header fields | CRC-32 | frames | end frame
        frame   1 + length of the chunk (varint) | CRC-32 | chunk
        end     0 | samples (varint) | length of every chunk (varints) | size, backwards | CRC-32

The header is declared as lists of fields (`LAYOUTS`, `COMPACT`) that write and read themselves, so both
directions share one order. The table holds the length and the CRC-32 of every payload: a damaged chunk costs
that chunk alone. The compact form serves tiny pictures; its 16-bit checksum covers the whole file and finds
any damage within two adjacent bytes, and all but one in 65,536 of the rest. Integers are little-endian; a
varint has seven bits a byte, the lowest first, in its shortest form. No declared size is believed before it
is compared with the bytes present.

Audio is a stream: whoever writes it needs to know neither the number of samples nor that of chunks in
advance, and whoever reads it gets each chunk as soon as its last byte is there (`AudioFrameWriter`,
`AudioFrameReader`). The CRC of a frame begins with the header's CRC and the chunk's index, that of the end
with the header's, so frames that moved, or that belong to another file, are damaged ones. The size in the
end frame counts the bytes of `samples` and of the lengths; it is a varint whose bytes are in reverse, so that
the end is found from the end of the file. Then its lengths say where each frame lies, whatever the frames
say; without the end, the frames are followed as far as they are intact.
"""

from __future__ import annotations

import binascii
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, ClassVar, Protocol, TypeVar

from compand.errors import BitstreamError, CompandError, UsageError

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
    channels: int  # 1 (gray), 3 (RGB), or any other number of bands up to 255
    bit_depth: int = 8  # of the original: 8 or 16

    def __post_init__(self) -> None:
        _require(min(self.height, self.width) >= 1, f"{self.height} x {self.width} pixels: must be positive")
        _require(1 <= self.channels <= 255, f"{self.channels} channels: must be 1 to 255")
        _require(self.bit_depth in (8, 16), f"bit depth {self.bit_depth}: must be 8 or 16")


@dataclass(frozen=True)
class AudioGeometry:
    """Length and layout of the original audio. Raises `UsageError` on values that no recording has."""

    medium: ClassVar[str] = "audio"
    samples: int  # per channel; 0: not known, because the stream goes on or its end is missing
    sample_rate: int  # Hz
    channels: int
    segments: int = 1  # number of chunks; as far as they are known where `samples` is 0

    def __post_init__(self) -> None:
        positive = self.sample_rate >= 1 and self.channels >= 1 and min(self.samples, self.segments) >= 0
        _require(positive, f"{self}: rate and channels must be positive, nothing may be negative")


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
    chunk_size: (
        int  # a multiple of 64: tile edge in pixels, or samples a segment at the codec's rate; 0: one chunk
    )
    compact: bool = False
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        sizes = (2, 0) if self.compact else (4, 4)
        _require(self.version == FORMAT_VERSION, f"format version {self.version}: must be {FORMAT_VERSION}")
        _require(self.codec_id >= 0, f"codec id {self.codec_id}: must not be negative")
        _require((self.codec_id == 0) == (self.codec_name != ""), "codec id 0 needs a name, others have none")
        _require(self.codec_name.isprintable(), "the codec name has unprintable characters")
        _require((len(self.symbols), len(self.synthesis)) == sizes, f"fingerprints must have {sizes} bytes")
        _require(min(self.settings, default=0) >= 0, f"settings {self.settings}: none may be negative")
        _require(self.chunk_size >= 0, f"chunk size {self.chunk_size}: must not be negative")
        _require(self.chunk_size % 64 == 0, f"chunk size {self.chunk_size}: must be a multiple of 64")

    def chunk_count(self) -> int:
        """Number of chunks: tiles row by row, or segments in time."""
        if isinstance(self.geometry, AudioGeometry):
            return self.geometry.segments
        if self.chunk_size == 0:
            return 1
        return -(-self.geometry.height // self.chunk_size) * -(-self.geometry.width // self.chunk_size)

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
    extras: list[Extra]  # at most seven; audio has none
    damage: list[BitstreamError]  # empty unless the read was partial
    header_bytes: int  # bytes of the file that are payload of neither a chunk nor an extra
    offsets: list[int]  # where in the file each chunk begins, in bytes
    extra_offsets: list[int]  # and each extra
    lengths: list[int]  # how many bytes the file says that each chunk has, a damaged one too


@dataclass(frozen=True)
class Limits:
    """What a reader accepts: bounds the memory that decoding can ask for."""

    max_pixels: int = 1 << 29  # height x width, times a third of the channels where there are more than three
    max_samples: int = 1 << 36  # samples x channels
    max_chunks: int = 1 << 20


# Fields that write and read themselves ----------------------------------------------------------------------


class _CutOffError(BitstreamError):
    """The bytes end where a header does not: in a stream, more may come."""


class Source:
    """Reads header bytes in order; every fault is a `BitstreamError` with its offset."""

    def __init__(self, view: memoryview, offset: int) -> None:
        self.view = view
        self.offset = offset

    def take(self, size: int) -> bytes:
        if size > len(self.view) - self.offset:
            raise self.fault("it is cut off", _CutOffError)
        self.offset += size
        return bytes(self.view[self.offset - size : self.offset])

    def fault(self, fact: str, kind: type[BitstreamError] = BitstreamError) -> BitstreamError:
        return kind(f"the header is damaged, {fact}: get an intact copy", offset=self.offset)


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

    def size(self, value: int) -> int:
        """How many bytes the value takes."""
        return max(-(-(value // self.unit).bit_length() // 7), 1)


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

OPENING: tuple[Field, ...] = (
    Bits(medium=("image", "audio", "bands"), version=range(16)),
    Implied("compact", False),
)
CODEC: tuple[Field, ...] = (
    Varint("codec_id"),
    When("codec_id", 0, Text("codec_name"), instead=Implied("codec_name", "")),
    Raw("symbols", 4),
    Raw("synthesis", 4),
    Many(Varint("settings"), count="setting_count"),
)
LAYOUTS: dict[
    str, tuple[Field, ...]
] = {  # follows OPENING; "bands": images of neither one nor three channels
    "image": (
        Bits(channels=(3, 1), bit_depth=(8, 16), setting_count=range(8), extra_count=range(8)),
        *CODEC,
        Varint("height"),
        Varint("width"),
        Varint("chunk_size", unit=64),
    ),
    "bands": (
        Bits(bit_depth=(8, 16), setting_count=range(8), extra_count=range(8)),
        *CODEC,
        Uint("channels", 1),
        Varint("height"),
        Varint("width"),
        Varint("chunk_size", unit=64),
    ),
    "audio": (
        Bits(setting_count=range(8), extra_count=(0,)),
        *CODEC,
        Implied("samples", 0),  # it stands in the end frame, and the number of chunks with it
        Implied("segments", 0),
        Varint("sample_rate"),
        Varint("channels"),
        Varint("chunk_size", unit=64),
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
FRAME = Varint("frame length", limit=1 << 28)  # 1 + length; 0 announces the end
FRAME_CRC = Uint("frame checksum", 4)
SAMPLES = Varint("samples")
LENGTH = Varint("length", limit=FRAME.limit - 1)
END_SIZE = Varint("end size")
END_MARK = b"\0"
LONGEST_VARINT = 9  # bytes
MOST_MISSING = 4  # a file whose end announces frames of more than this many times its bytes is refused


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


def _layout_of(geometry: ImageGeometry | AudioGeometry) -> str:
    multiband = isinstance(geometry, ImageGeometry) and geometry.channels not in (1, 3)
    return "bands" if multiband else geometry.medium


def _flatten(header: Header, extra_count: int) -> Record:
    counts = {"setting_count": len(header.settings), "extra_count": extra_count}
    return vars(header) | vars(header.geometry) | {"medium": _layout_of(header.geometry)} | counts


def _unflatten(record: Record, source: Source) -> Header:
    def build(kind: type[T]) -> T:
        return kind(**{field.name: record[field.name] for field in fields(kind)})  # type: ignore[arg-type]

    try:
        geometry = build(AudioGeometry) if record["medium"] == "audio" else build(ImageGeometry)
        record["geometry"] = geometry
        header = build(Header)
    except UsageError as error:
        raise source.fault(str(error)) from None
    if _layout_of(geometry) != record["medium"]:
        raise source.fault(f"{record['channels']} channels have another form")
    return header


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
    if isinstance(header.geometry, AudioGeometry):
        _require(not extras, f"{len(extras)} extras given: audio has none")
        writer = AudioFrameWriter(header)
        return b"".join((writer.head, *map(writer.frame, chunks), writer.end(header.geometry.samples)))
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


class AudioFrameWriter:
    """Writes an audio file piece by piece: `head`, then `frame` for every chunk, then `end`.

    Args:
        header: `samples` and `segments` of its geometry need not be known yet and are ignored.

    Attributes:
        head: the bytes that begin the file.

    Raises:
        UsageError: the header is not that of audio, or has a value that cannot be stored.
    """

    def __init__(self, header: Header) -> None:
        _require(isinstance(header.geometry, AudioGeometry), "only audio is written frame by frame")
        record = _flatten(header, 0) | {"samples": 0, "segments": 0}
        fields_written = MAGIC + _write_fields((*OPENING, *LAYOUTS["audio"]), record)
        self._seed = zlib.crc32(fields_written)
        self.head = fields_written + HEADER_CRC.pack(self._seed)
        self._lengths: list[int] = []

    def frame(self, chunk: bytes) -> bytes:
        """The bytes of the next chunk's frame. Raises UsageError on chunks of 256 MiB and more."""
        opening = FRAME.pack(1 + len(chunk)) + FRAME_CRC.pack(
            _frame_crc(chunk, len(self._lengths), self._seed)
        )
        self._lengths.append(len(chunk))
        return opening + chunk

    def end(self, samples: int) -> bytes:
        """The bytes that end the file. `samples`: of the whole sound, a channel."""
        _require(samples >= 1, f"{samples} samples: must be positive")
        body = SAMPLES.pack(samples) + b"".join(map(LENGTH.pack, self._lengths))
        end = END_MARK + body + END_SIZE.pack(len(body))[::-1]
        return end + FRAME_CRC.pack(zlib.crc32(end, self._seed))


def _frame_crc(chunk: bytes | memoryview, index: int, seed: int) -> int:
    return zlib.crc32(chunk, zlib.crc32(index.to_bytes(8, "little"), seed))


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


def read_header(
    data: bytes | bytearray | memoryview, limits: Limits = Limits(), *, partial: bool = False
) -> Header:
    """Returns the header of a `.cpd` file.

    Args:
        data: the file; of an image in the full form, header and table are enough.
        limits: what to accept.
        partial: do without the end of an audio file if it is missing or damaged; the header then has no number
            of samples (0) and of segments (0).

    Raises:
        BitstreamError: not a `.cpd` file, of a newer version, damaged, or beyond `limits`.
    """
    view = _view(data)
    if _is_compact(view):
        return _read_compact(view, limits).header
    if not _is_audio(view):
        return _read_table(view, limits).header
    head = _read_head(view)
    end = _find_end(view, head, limits)
    if end is None:
        if not partial:
            raise _end_is_missing(len(view))
        return head.header
    return _with_end(head.header, end.samples, len(end.lengths), limits)


def read(
    data: bytes | bytearray | memoryview, *, partial: bool = False, limits: Limits = Limits()
) -> Container:
    """Returns the content of a `.cpd` file, checksums verified.

    Args:
        data: the whole file.
        partial: keep what is intact, and list damaged or missing payloads and bytes after the end in
            `Container.damage`. Damage to a header remains an error, as does any damage to the compact form. An
            audio file without its end gives the chunks up to the last intact one, and 0 samples in its geometry.
        limits: what to accept.

    Raises:
        BitstreamError: not a `.cpd` file, of a newer version, beyond `limits`, or damaged (naming chunk and
            offset).
    """
    view = _view(data)
    if _is_compact(view):
        return _read_compact(view, limits)
    if _is_audio(view):
        return _read_audio(view, partial, limits)

    table = _read_table(view, limits)
    container = Container(table.header, [], [], [], table.header_bytes, [], [], [])
    offset = table.header_bytes

    def report(fact: str, chunk: int | None = None) -> None:
        _report(container, partial, fact, offset, chunk)

    for entry in table.entries:
        payload = bytes(view[offset : offset + entry.length])
        intact = len(payload) == entry.length and zlib.crc32(payload) == entry.crc
        if not intact:
            name = "the chunk" if entry.kind is None else f"the extra of kind {entry.kind}"
            report(f"{name} is {'damaged' if len(payload) == entry.length else 'cut off'}", entry.chunk)
        if entry.kind is None:
            container.chunks.append(payload if intact else None)
            container.offsets.append(offset)
            container.lengths.append(entry.length)
        elif intact:
            container.extras.append(Extra(entry.kind, payload))
            container.extra_offsets.append(offset)
        offset += entry.length
    if offset < len(view):
        report(f"{len(view) - offset} bytes follow the last chunk")
    return container


def _report(container: Container, partial: bool, fact: str, offset: int, chunk: int | None = None) -> None:
    """Lists a fault of a partial read; raises it otherwise."""
    message = f"{fact}: get an intact copy, or decode the rest with --partial"
    error = BitstreamError(message, chunk=chunk, offset=offset)
    if not partial:
        raise error
    container.damage.append(error)


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
    header_bytes = source.offset + COMPACT_CRC_BYTES
    return Container(header, [chunk], [], [], header_bytes, [source.offset], [], [len(chunk)])


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


# Reading audio ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Head:
    header: Header  # without the number of samples
    seed: int  # of the other checksums
    size: int  # bytes, checksum included


@dataclass(frozen=True)
class _End:
    samples: int
    lengths: list[int]  # of the chunks
    offset: int  # where in the file it begins


def _is_audio(view: memoryview) -> bool:
    return view[len(MAGIC)] >> 4 == 1


def _read_head(view: memoryview) -> _Head:
    source = Source(view, len(MAGIC))
    record = _read_fields(OPENING, source, {})
    header = _unflatten(_read_fields(LAYOUTS["audio"], source, record), source)
    seed = zlib.crc32(view[: source.offset])
    if HEADER_CRC.unpack(source) != seed:
        raise source.fault("it does not match its checksum")
    return _Head(header, seed, source.offset)


def _find_end(view: memoryview, head: _Head, limits: Limits) -> _End | None:
    """The end frame that ends `view`; None if there is none, or it is damaged."""
    stop = len(view) - FRAME_CRC.size
    backwards = Source(memoryview(bytes(view[max(stop - LONGEST_VARINT, 0) : max(stop, 0)])[::-1]), 0)
    try:
        body = END_SIZE.unpack(backwards)
    except BitstreamError:
        return None
    begin = stop - backwards.offset - body - len(END_MARK)
    if begin < head.size or view[begin : begin + len(END_MARK)] != END_MARK:
        return None
    if zlib.crc32(view[begin:stop], head.seed) != FRAME_CRC.unpack(Source(view, stop)):
        return None
    source = Source(view[: stop - backwards.offset], begin + len(END_MARK))
    samples = SAMPLES.unpack(source)
    if samples == 0:
        raise source.fault("it announces no samples")
    lengths: list[int] = []
    while source.offset < len(source.view):
        lengths.append(LENGTH.unpack(source))
        if len(lengths) > limits.max_chunks:
            raise _beyond("chunks", len(lengths), limits.max_chunks)
    return _End(samples, lengths, begin)


def _end_is_missing(offset: int) -> BitstreamError:
    fact = "the end of the file is missing or damaged"
    return BitstreamError(f"{fact}: get an intact copy, or decode the rest with --partial", offset=offset)


def _with_end(header: Header, samples: int, segments: int, limits: Limits) -> Header:
    geometry = header.geometry
    assert isinstance(geometry, AudioGeometry)
    whole = replace(header, geometry=replace(geometry, samples=samples, segments=segments))
    _check_limits(whole, limits)
    return whole


def _read_frame(
    view: memoryview, offset: int, index: int, seed: int, length: int | None = None
) -> tuple[int, bytes | None] | None:
    """Where the chunk of a frame begins, and the chunk if it is intact; None where no whole frame can be, or none
    with a chunk of `length` bytes."""
    source = Source(view, offset)
    try:
        size = FRAME.unpack(source) - 1
        crc = FRAME_CRC.unpack(source)
    except BitstreamError:
        return None
    # Before a byte of the chunk is looked at: frames that claim the rest of the file would make it quadratic work.
    if not 0 <= size <= len(view) - source.offset or length not in (None, size):
        return None
    chunk = bytes(view[source.offset : source.offset + size])
    return source.offset, chunk if _frame_crc(chunk, index, seed) == crc else None


def _read_audio(view: memoryview, partial: bool, limits: Limits) -> Container:
    head = _read_head(view)
    container = Container(head.header, [], [], [], 0, [], [], [])
    end = _find_end(view, head, limits)
    if end is not None:
        _read_frames(view, head, end, container, partial)
        samples = end.samples
    else:
        samples = _follow_frames(view, head, container, partial, limits)
    container.header = _with_end(head.header, samples, len(container.chunks), limits)
    container.header_bytes = len(view) - sum(container.lengths)
    return container


def _read_frames(view: memoryview, head: _Head, end: _End, container: Container, partial: bool) -> None:
    """Reads the frames where the end says that they are, counted from the head and, where bytes were lost or
    inserted, from the end."""
    openings = [FRAME.size(1 + length) + FRAME_CRC.size for length in end.lengths]
    announced = sum(openings) + sum(end.lengths)
    if announced > MOST_MISSING * len(view):
        fact = f"{announced} bytes of chunks are announced and the file has {len(view)}"
        raise BitstreamError(f"{fact}: get an intact copy", offset=end.offset)
    shift = end.offset - head.size - announced
    frames = view[: end.offset]
    offset = head.size
    for index, (opening, length) in enumerate(zip(openings, end.lengths, strict=True)):
        # A chunk that is nowhere is looked for, and told of, where it should be.
        place, chunk = min(offset + opening, end.offset), None
        for start in (offset, offset + shift) if shift and offset + shift >= head.size else (offset,):
            found = _read_frame(frames, start, index, head.seed, length)
            if found is not None and found[1] is not None:
                place, chunk = found
                break
        if chunk is None:
            _report(container, partial, "the chunk is damaged", place, index)
        container.chunks.append(chunk)
        container.offsets.append(place)
        container.lengths.append(length)
        offset += opening + length
    if shift and not container.damage:
        _report(container, partial, f"{abs(shift)} bytes are out of place", end.offset)


def _follow_frames(view: memoryview, head: _Head, container: Container, partial: bool, limits: Limits) -> int:
    """Reads the frames of a file that does not end as it should, up to the last intact one.

    Returns:
        The number of samples (0: not known).
    """
    samples, intact = 0, 0
    stop = offset = head.size  # stop: of the last intact frame
    lengths = container.lengths
    faults: list[tuple[int, int]] = []
    while offset < len(view) and len(lengths) < limits.max_chunks:
        if view[offset : offset + len(END_MARK)] == END_MARK:
            end = _end_after(view, head, offset, lengths, limits)
            if end is not None:
                samples, intact, stop = end.samples, len(lengths), end.offset
            break
        found = _read_frame(view, offset, len(lengths), head.seed)
        if found is None:
            break
        begin, chunk = found
        size = FRAME.unpack(Source(view, offset)) - 1
        if chunk is None:
            faults.append((len(lengths), begin))
        container.chunks.append(chunk)
        container.offsets.append(begin)
        lengths.append(size)
        offset = begin + size
        if chunk is not None:
            intact, stop = len(lengths), offset
    del container.chunks[intact:], container.offsets[intact:], lengths[intact:]
    for index, begin in faults:
        if index < intact:
            _report(container, partial, "the chunk is damaged", begin, index)
    if samples:
        _report(container, partial, f"{len(view) - stop} bytes follow the end", stop)
    else:
        fact = "the rest is damaged or missing" if stop < len(view) else "the file is cut off"
        _report(container, partial, fact, stop, intact)
    return samples


def _end_after(
    view: memoryview, head: _Head, begin: int, lengths: Sequence[int], limits: Limits
) -> _End | None:
    """The end frame at `begin`, after chunks of these lengths; its `offset` is where it ends."""
    try:
        body = SAMPLES.size(SAMPLES.unpack(Source(view, begin + len(END_MARK)))) + sum(
            map(LENGTH.size, lengths)
        )
    except BitstreamError:
        return None
    stop = begin + len(END_MARK) + body + END_SIZE.size(body) + FRAME_CRC.size
    end = _find_end(view[:stop], head, limits) if stop <= len(view) else None
    return None if end is None or end.offset != begin else replace(end, offset=stop)


class AudioFrameReader:
    """Reads an audio file as its bytes come: `push` gives the chunks that they complete, `finish` the whole header.

    It holds no more than the bytes of a frame that is not complete yet, or of the end. A fault that follows intact
    chunks in the same bytes is raised by the next call, so that what a file gives does not depend on how it is cut.

    Args:
        limits: what to accept.
        accept: called once with the header; returns the most bytes that a chunk of such a file has. What it raises
            comes out of `push`. None: a chunk may have 256 MiB.

    Attributes:
        header: None until its bytes are there; without the number of samples until `finish`.

    Raises:
        BitstreamError: by `push` and `finish`, and by every call after it: not a `.cpd` file of audio, of a newer
            version, beyond the limits, or damaged (naming chunk and offset).
    """

    def __init__(self, limits: Limits = Limits(), accept: Callable[[Header], int] | None = None) -> None:
        self.header: Header | None = None
        self._limits = limits
        self._accept = accept
        self._longest = LENGTH.limit  # bytes of a chunk
        self._head: _Head | None = None
        self._rest = bytearray()
        self._offset = 0  # of the rest, in the file
        self._lengths: list[int] = []
        # Most bytes of the end after the chunks so far.
        self._end_limit = len(END_MARK) + 2 * LONGEST_VARINT + FRAME_CRC.size
        self._error: CompandError | None = None

    def push(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """Takes the next bytes of the file; returns the chunks that are complete with them."""
        if self._error is not None:
            raise self._error
        self._rest += _view(data)
        chunks: list[bytes] = []
        try:
            if self._begun():
                self._take(chunks)
        except CompandError as error:
            self._error = error
            self._rest.clear()
            if not chunks:
                raise
        return chunks

    def finish(self) -> Header:
        """The header with the number of samples, once the file has ended."""
        if self._error is not None:
            raise self._error
        if self._head is None:
            if len(self._rest) <= len(MAGIC):
                raise BitstreamError("not a .cpd file", offset=0)
            raise BitstreamError("the header is damaged, it is cut off: get an intact copy", offset=0)
        head = replace(self._head, size=0)
        end = _find_end(memoryview(bytes(self._rest)), head, self._limits)
        if end is None or end.offset != 0 or end.lengths != self._lengths:
            raise _end_is_missing(self._offset)
        self.header = _with_end(self._head.header, end.samples, len(end.lengths), self._limits)
        return self.header

    def _begun(self) -> bool:
        """Whether the header is there, which it reads."""
        if self._head is None:
            if len(self._rest) <= len(MAGIC):
                return False
            with memoryview(self._rest) as view:
                if _is_compact(view) or not _is_audio(view):
                    raise BitstreamError("the file holds a picture: decode it with an image codec", offset=0)
                try:
                    head = _read_head(view)
                except _CutOffError:
                    return False
            if self._accept is not None:
                self._longest = self._accept(head.header)
            self._head, self.header = head, head.header
            self._drop(head.size)
        return True

    def _take(self, chunks: list[bytes]) -> None:
        """Moves the chunks that are complete from the rest to `chunks`, up to the first fault."""
        offset = 0
        with memoryview(self._rest) as view:
            while len(view) - offset >= len(END_MARK) + FRAME_CRC.size and view[offset] != END_MARK[0]:
                found = self._next(view, offset)
                if found is None:
                    break
                chunk, offset = found
                self._lengths.append(len(chunk))
                self._end_limit += LENGTH.size(len(chunk))
                chunks.append(chunk)
        self._drop(offset)
        if self._rest.startswith(END_MARK) and len(self._rest) > self._end_limit:
            raise _end_is_missing(self._offset)

    def _next(self, view: memoryview, offset: int) -> tuple[bytes, int] | None:
        """The chunk of the frame at `offset`, and where it ends; None while it is not complete."""
        assert self._head is not None
        index = len(self._lengths)
        source = Source(view, offset)
        try:
            size = FRAME.unpack(source) - 1
            crc = FRAME_CRC.unpack(source)
            begin = source.offset
            if len(view) - begin < size <= self._longest:
                return None
            # A copy: a view that the error's traceback keeps would lock the buffer.
            chunk = bytes(view[begin : begin + size]) if size <= self._longest else b""
            intact = size <= self._longest and _frame_crc(chunk, index, self._head.seed) == crc
        except _CutOffError:
            return None
        except BitstreamError:
            intact, begin = False, source.offset
        if not intact:
            raise BitstreamError(
                "the chunk is damaged: get an intact copy, or decode the rest with --partial",
                chunk=index,
                offset=self._offset + begin,
            )
        if index >= self._limits.max_chunks:
            raise _beyond("chunks", index + 1, self._limits.max_chunks)
        return chunk, begin + size

    def _drop(self, size: int) -> None:
        del self._rest[:size]
        self._offset += size


def _check_limits(header: Header, limits: Limits) -> None:
    geometry = header.geometry
    if isinstance(geometry, ImageGeometry):
        pixels = geometry.height * geometry.width
        name, count, limit = "pixels", -(-pixels * max(geometry.channels, 3) // 3), limits.max_pixels
    else:
        name, count, limit = "samples", geometry.samples * geometry.channels, limits.max_samples
    if count > limit:
        raise _beyond(name, count, limit)


def _beyond(name: str, count: int, limit: int) -> BitstreamError:
    return BitstreamError(
        f"{count} {name} are more than the limit of {limit}: raise Limits.max_{name}", offset=0
    )
