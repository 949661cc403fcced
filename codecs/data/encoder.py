"""Records -> coded rows: what a worker of a packing does, in whatever process it runs."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from compand import files
from compand.data.sources import Record
from compand.errors import CheckpointError, CompandError, MediaError

if TYPE_CHECKING:
    from compand.codec import Codec
    from compand.data.pack import PackSpec
    from compand.data.payload import RowCodec
    from compand.image_codec import ImageCodec

T = TypeVar("T")
R = TypeVar("R")
Row = dict[str, Any]

BLOCK = 64
"""Records that are coded at a time. Batches are cut within a block, whoever works on it."""

BATCH_PIXELS = 1 << 24
"""Most pixels that wait for a batch of their size."""

CPU_BATCH_PIXELS = 1 << 20
"""Most pixels of a batch on a CPU, whose caches more would not fit in."""


@dataclass
class Block:
    """Coded rows, in the order of their records, and key and reason of the records that could not be."""

    rows: list[Row] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Item:
    """A record that was read: the size of its file and a `Picture` or `Sound`; or None, and why."""

    record: Record
    size: int = 0
    media: Any = None
    reason: str = ""


@dataclass(frozen=True)
class _Coder:
    codec: Codec
    rows: RowCodec


_coders: dict[tuple[str, str, str, bytes | None], _Coder] = {}
"""The last codec of this process, by checkpoint, device, packing and tables."""


def _coder(spec: PackSpec) -> _Coder:
    """The codec, loaded once a process. Raises CheckpointError if it is not the one that packing began with."""
    name = (spec.codec, spec.device, spec.plan, spec.info.tables)
    if name not in _coders:
        import compand
        from compand.allocator import tune_allocator
        from compand.data.payload import RowCodec

        earlier = next((coder for known, coder in _coders.items() if known[:3] == name[:3]), None)
        tune_allocator()
        codec = compand.load(spec.codec, device=spec.device) if earlier is None else earlier.codec
        info = codec.info
        found = None if info is None else (info.symbols.hex(), info.synthesis.hex())
        if found != (spec.info.symbols, spec.info.synthesis):
            fact = f"{spec.codec} is another checkpoint here than where packing began"
            raise CheckpointError(f"{fact}: install the same version of compand everywhere")
        _coders.clear()
        _coders[name] = _Coder(codec, RowCodec(spec.info, codec))
    return _coders[name]


def code_blocks(spec: PackSpec, records: Sequence[Record], readers: int = 4) -> Iterator[Block]:
    """Codes records, block by block. Where the codec runs on a GPU, `readers` threads read ahead of it."""
    ahead = _coder(spec).codec.device.type != "cpu"
    items = _read_ahead(spec, records, readers) if ahead else (_read(spec, record) for record in records)
    with closing(items):
        for first in range(0, len(records), BLOCK):
            yield _code(spec, islice(items, min(BLOCK, len(records) - first)))


def _read_ahead(spec: PackSpec, records: Iterable[Record], readers: int) -> Generator[_Item, None, None]:
    with ThreadPoolExecutor(readers) as pool:
        yield from in_order(pool, partial(_read, spec), records, 4 * readers)


def in_order(
    pool: Executor, work: Callable[[T], R], inputs: Iterable[T], ahead: int
) -> Generator[R, None, None]:
    """`pool.map`, with at most `ahead` inputs under way."""
    pending: deque[Future[R]] = deque()
    try:
        for item in inputs:
            pending.append(pool.submit(work, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _read(spec: PackSpec, record: Record) -> _Item:
    from compand.pictures import read_picture
    from compand.sounds import read_sound

    try:
        data = record.read()
        if spec.info.medium == "audio":
            sound = read_sound(io.BytesIO(data))
            if not sound.length:
                raise MediaError("the sound has no samples: leave it out")
            return _Item(record, len(data), sound)
        # Latents know neither transparency nor color profiles; a .cpd file keeps both.
        return _Item(record, len(data), read_picture(io.BytesIO(data), strip=spec.info.profile != "cpd"))
    except Exception as error:  # one bad input, whatever is wrong with it, does not end the packing
        return _Item(record, reason=files.explain(error, record.name))


def _code(spec: PackSpec, items: Iterable[_Item]) -> Block:
    """Codes what was read; pictures of equal size together."""
    coder = _coder(spec)
    made: dict[str, Row | str] = {}
    waiting: dict[tuple[int, ...], list[_Item]] = {}
    pixels = 0
    for item in items:
        made[item.record.key] = item.reason
        if item.media is None:
            continue
        if spec.info.medium == "audio" or spec.info.profile == "cpd":
            made[item.record.key] = _coded_alone(spec, coder, item)
            continue
        shape = item.media.pixels.shape
        waiting.setdefault(shape, []).append(item)
        pixels += shape[0] * shape[1]
        if pixels >= BATCH_PIXELS:
            made.update(_coded_together(spec, coder, waiting))
            waiting, pixels = {}, 0
    made.update(_coded_together(spec, coder, waiting))
    block = Block()
    for key, result in made.items():
        if isinstance(result, str):
            block.failures.append((key, result))
        else:
            block.rows.append(result)
    return block


def _coded_together(
    spec: PackSpec, coder: _Coder, waiting: Mapping[tuple[int, ...], Sequence[_Item]]
) -> Iterator[tuple[str, Row | str]]:
    import torch

    codec, quality = cast("ImageCodec", coder.codec), spec.info.level
    limit = CPU_BATCH_PIXELS if coder.codec.device.type == "cpu" else BATCH_PIXELS
    for items in _batches(waiting, limit):
        batch = torch.from_numpy(np.stack([item.media.pixels for item in items])).permute(0, 3, 1, 2)
        try:
            integers = codec.quantise_batch(batch, quality=quality).cpu().numpy()
        except CompandError as error:
            for item in items:
                yield item.record.key, files.explain(error, item.record.name)
            continue
        for item, symbols in zip(items, integers, strict=True):
            yield item.record.key, _row(item, coder.rows.encode(symbols))


def _batches(waiting: Mapping[tuple[int, ...], Sequence[_Item]], limit: int) -> Iterator[Sequence[_Item]]:
    for (height, width, _), items in waiting.items():
        count = max(1, limit // (height * width))
        yield from (items[first : first + count] for first in range(0, len(items), count))


def _coded_alone(spec: PackSpec, coder: _Coder, item: _Item) -> Row | str:
    quality = spec.info.level
    try:
        if spec.info.profile == "cpd":
            return _row(item, coder.codec.encode(item.media, quality=quality))
        return _row(item, coder.rows.encode(coder.codec.quantise(item.media, quality=quality)))
    except CompandError as error:
        return files.explain(error, item.record.name)


def _row(item: _Item, payload: bytes) -> Row:
    media = item.media
    row: Row = {"key": item.record.key, "payload": payload}
    if hasattr(media, "pixels"):
        row |= {"height": media.height, "width": media.width, "channels": media.pixels.shape[2]}
    else:
        row |= {"samples": media.length, "rate": media.rate, "channels": media.channels}
    return row | {"source_bytes": item.size} | dict(item.record.columns)


def code_list(spec: PackSpec, records: Sequence[Record]) -> Block:
    """Codes the records of a block."""
    return _code(spec, (_read(spec, record) for record in records))


def integers(spec: PackSpec, records: Sequence[Record]) -> Generator[NDArray[np.int32], None, None]:
    """The integers of the records that can be read and coded."""
    codec = _coder(spec).codec
    with closing(_read_ahead(spec, records, 1)) as items:
        for item in items:
            if item.media is not None:
                try:
                    made = codec.quantise(item.media, quality=spec.info.level)
                except CompandError:
                    continue  # it is listed when its chunk is packed
                yield made
