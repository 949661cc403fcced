"""Payloads of packed rows: integers of latents <-> bytes, without a network in between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from compand.data.archive import ArchiveTables
from compand.data.archive import learn_tables as learn_tables
from compand.data.info import SetInfo
from compand.errors import BitstreamError, CheckpointError, CompandError, PackedSetError, UsageError

if TYPE_CHECKING:
    from compand.codec import Codec
    from compand.pictures import Picture
    from compand.sounds import Sound

Integers = NDArray[np.signedinteger[Any]]

_KINDS = (np.dtype("<i1"), np.dtype("<i2"), np.dtype("<i4"))
_CODECS = {"zstd": ("zstd", 9), "lz4": ("lz4_raw", 6)}
"""Compressors of Arrow, and the levels that are worth the time of packing. zstd from 9 on finds fewer and longer
repetitions, which decompress faster too."""

_HEADER = 5
"""Bytes before the compressed integers: their type, and their number."""


class RowCodec:
    """Turns payloads of a set into integers and latents, and integers into payloads.

    Args:
        info: of the set.
        codec: the codec that made its integers; None: the checkpoint that the set names is loaded when it is needed,
            on the CPU. The profiles train and archive need it for `latents` and `samples`, cpd for everything, and so
            does archive where rows hold tokens, which the codec's own prior codes.

    Raises:
        PackedSetError: the codec is another than the set's, or the tables of the set are damaged.
    """

    def __init__(self, info: SetInfo, codec: Codec | None = None) -> None:
        self.info = info
        self._codec = codec
        self._values: NDArray[np.float32] | None = None
        if codec is not None:
            _check_codec(info, codec)
        self._prepare()

    def _prepare(self) -> None:
        self._edge = int(self.info.latent.get("edge", 0)) // int(self.info.latent["stride"])
        self._compressor: pa.Codec | None = None
        self._tables: ArchiveTables | None = None
        if self.info.compression is not None:
            name, level = _CODECS[self.info.compression]
            self._compressor = pa.Codec(name, level)
        if self.info.tables is not None:
            tables = ArchiveTables.from_bytes(self.info.tables)
            latent = self.info.latent
            if (tables.channels, tables.axes) != (int(latent["channels"]), int(latent["axes"])):
                raise PackedSetError("the tables of the set are for other latents: pack it again")
            self._tables = tables

    def __getstate__(self) -> dict[str, Any]:
        return {"info": self.info, "_codec": self._codec, "_values": self._values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @property
    def codec(self) -> Codec:
        """The codec. Raises PackedSetError if the checkpoint of the set is not installed, or is another."""
        if self._codec is None:
            from compand.checkpoint import load

            try:
                codec = load(self.info.checkpoint, device="cpu")
            except CheckpointError as error:
                fact = f"the set was packed with {self.info.checkpoint}, which cannot be loaded ({error})"
                raise PackedSetError(f"{fact}: install it, or give its codec") from None
            _check_codec(self.info, codec)
            self._codec = codec
        return self._codec

    @property
    def values(self) -> NDArray[np.float32]:
        """What the 8-bit integers stand for, see `Codec.level_values`: float32 [M, 256]."""
        if self._values is None:
            self._values = self.codec.level_values(self.info.level).cpu().numpy()
        return self._values

    @property
    def has_tokens(self) -> bool:
        """Whether integers are tokens [codebooks, ...], not amounts [M, ...]."""
        return bool(self.info.vocabulary)

    def encode(self, integers: Integers) -> bytes:
        """The payload of integers as `Codec.quantise` gives them.

        Raises:
            UsageError: the set keeps .cpd files, or its tables are not learned yet.
        """
        if self._compressor is not None:
            kind = _kind(integers)
            content = np.ascontiguousarray(integers, dtype=_KINDS[kind]).tobytes()
            head = bytes((kind,)) + integers.size.to_bytes(4, "little")
            return head + self._compressor.compress(content, asbytes=True)
        if self.has_tokens and self.info.profile == "archive":
            return self._encode_tokens(integers)
        return self._archive().encode(integers)

    def decode(self, payload: bytes | memoryview, shape: Sequence[int]) -> Integers:
        """The integers of a row.

        Args:
            payload: of the row.
            shape: `SetInfo.latent_shape` of the row.

        Returns:
            int8, or int16 or int32 where they need it; of the profile train it may be read-only. Of the given shape, or
            with codebooks in place of channels where they are tokens.

        Raises:
            PackedSetError: the payload is damaged.
            UsageError: the set keeps .cpd files of a codec without tokens, which have no such integers.
        """
        integers = self.grid(payload, shape)
        return integers[..., self._edge : integers.shape[-1] - self._edge] if self._edge else integers

    def grid(self, payload: bytes | memoryview, shape: Sequence[int]) -> Integers:
        """As `decode`, with what is coded beyond the ends of a sound: what `Codec.quantise` gave."""
        whole = (*shape[:-1], shape[-1] + 2 * self._edge)
        if self.has_tokens:
            axes = int(self.info.latent["axes"])
            return self._tokens(payload, (*whole[: -axes - 1], len(self.info.vocabulary), *whole[-axes:]))
        if self._compressor is not None:
            return _unpacked(payload, math.prod(whole), self._compressor).reshape(whole)
        try:
            return self._archive().decode(payload, whole)
        except BitstreamError as error:
            raise _damaged(str(error)) from None

    def latents(self, payload: bytes | memoryview, shape: Sequence[int]) -> NDArray[np.float32]:
        """The dequantised latents of a row, float32 of the given shape.

        Raises:
            PackedSetError: the payload is damaged, or the codec is missing.
        """
        if self.info.profile != "cpd" or self.has_tokens:
            return self.dequantise(self.decode(payload, shape))
        try:
            latents = self.codec.latents(bytes(payload)).cpu().numpy()
        except CompandError as error:
            raise PackedSetError(f"the payload does not decode ({error})") from None
        if latents.shape != tuple(shape):
            raise _damaged(f"it has latents {list(latents.shape)}, its row says {list(shape)}")
        return latents

    def dequantise(self, integers: Integers) -> NDArray[np.float32]:
        """The latents that integers stand for, [M, h, w], [M, n] or [groups, M, n]; tokens may have a dimension of rows
        before these."""
        if integers.dtype != np.int8 or self.has_tokens:
            wide = self.codec.dequantise(integers.astype(np.int32), quality=self.info.level)
            latents: NDArray[np.float32] = wide.cpu().numpy()
            return latents
        values = self.values
        offsets = np.arange(128, values.size, 256, dtype=np.int32)
        return values.ravel().take(offsets.reshape(-1, *[1] * int(self.info.latent["axes"])) + integers)

    def samples(self, payload: bytes | memoryview, row: Mapping[str, Any]) -> Picture | Sound:
        """The decoded picture or sound of a row; row: its geometry columns.

        Raises:
            PackedSetError: the payload is damaged, or the codec is missing.
        """
        shape = self.info.latent_shape(row)
        if self.info.profile == "cpd":
            try:
                signal: Picture | Sound = self.codec.decode(bytes(payload))
            except CompandError as error:
                raise PackedSetError(f"the payload does not decode ({error})") from None
            return signal
        latents = self.codec.dequantise(self.grid(payload, shape).astype(np.int32), quality=self.info.level)
        size = {name: int(row[name]) for name in self.info.geometry}
        codec: Any = self.codec
        rebuilt: Picture | Sound = codec.reconstruct(latents, quality=self.info.level, **size)
        return rebuilt

    def _encode_tokens(self, tokens: Integers) -> bytes:
        """The payload of tokens in the profile archive. Groups of channels follow each other in time."""
        import torch

        grid = tokens
        if int(self.info.latent["axes"]) == 1:
            grid = np.moveaxis(tokens, -2, 0).reshape(tokens.shape[-2], 1, -1)
        grid = np.ascontiguousarray(grid, dtype=np.int64)
        return self.codec.bottleneck.compress_indices(torch.from_numpy(grid), self.info.quality)

    def _tokens(self, payload: bytes | memoryview, whole: tuple[int, ...]) -> Integers:
        """Tokens of a row, [codebooks, h, w], [codebooks, n] or [groups, codebooks, n]."""
        if self._compressor is not None:
            tokens = _unpacked(payload, math.prod(whole), self._compressor).reshape(whole)
        else:
            try:
                tokens = self._decoded_tokens(bytes(payload), whole)
            except CompandError as error:
                raise PackedSetError(f"the payload does not decode ({error})") from None
            tokens = tokens.astype(_KINDS[_kind(tokens)])
        axes = int(self.info.latent["axes"])
        for plane, size in zip(np.moveaxis(tokens, -axes - 1, 0), self.info.vocabulary, strict=True):
            if plane.size and not 0 <= int(plane.min()) <= int(plane.max()) < size:
                raise _damaged(f"it has tokens beyond 0 to {size - 1}")
        return tokens

    def _decoded_tokens(self, payload: bytes, whole: tuple[int, ...]) -> Integers:
        """What the codec makes of a payload of the profile archive or cpd."""
        if self.info.profile == "cpd":
            found = self.codec.tokens(payload).numpy()
            if found.size != math.prod(whole):
                raise _damaged(f"it has tokens {list(found.shape)}, its row says {list(whole)}")
            return found.reshape(whole)
        bottleneck, level = self.codec.bottleneck, self.info.quality
        if int(self.info.latent["axes"]) == 2:
            return bottleneck.decompress_indices(payload, (whole[1], whole[2]), level).cpu().numpy()
        groups = whole[0] if len(whole) == 3 else 1
        grid = bottleneck.decompress_indices(payload, (1, groups * whole[-1]), level).cpu().numpy()
        return np.moveaxis(grid.reshape(whole[-2], groups, whole[-1]), 0, 1).reshape(whole)

    def _archive(self) -> ArchiveTables:
        if self._tables is None:
            if self.info.profile == "cpd":
                raise UsageError("a set of profile cpd has no integers: ask for latents or samples")
            raise UsageError("the tables of the set are not learned yet: give SetInfo.tables")
        return self._tables


def _kind(integers: Integers) -> int:
    """Place in _KINDS of the narrowest type that holds the integers."""
    reach = max(int(integers.max(initial=0)), -int(integers.min(initial=0)))
    return 0 if reach <= 127 else 1 if reach <= 32767 else 2


def _unpacked(payload: bytes | memoryview, count: int, compressor: pa.Codec) -> Integers:
    if len(payload) < _HEADER or payload[0] >= len(_KINDS):
        raise _damaged("it has no header")
    announced = int.from_bytes(payload[1:_HEADER], "little")
    if announced != count:
        raise _damaged(f"it holds {announced} integers, its row says {count}")
    dtype = _KINDS[payload[0]]
    try:
        content = compressor.decompress(payload[_HEADER:], count * dtype.itemsize)
    except (OSError, ValueError, pa.ArrowException):
        raise _damaged("it does not decompress") from None
    return np.frombuffer(content, dtype=dtype)


def _damaged(fact: str) -> PackedSetError:
    return PackedSetError(f"the payload is damaged, {fact}: restore the shard or pack the set again")


def _check_codec(info: SetInfo, codec: Codec) -> None:
    found = codec.info
    if found is None or (found.symbols.hex(), found.synthesis.hex()) != (info.symbols, info.synthesis):
        own = "this codec was not loaded from a checkpoint"
        if found is not None:
            own = f"{found.name} here has {found.symbols.hex()} and {found.synthesis.hex()}"
        fact = (
            f"the set was packed with {info.checkpoint} of fingerprints {info.symbols} and {info.synthesis}"
        )
        raise PackedSetError(f"{fact}, {own}: install the checkpoint that the set names, or pack it again")
