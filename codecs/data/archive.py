"""The profile archive: integers of latents, coded with tables that were learned from the set.

```
integers --difference from the left, in channels where it pays--> residuals
residuals --cut--> cells of 16, four blocks of 4 neighbours along a row
all channels of a cell place share a class; (class, channel) --> table --> one symbol for each block
```

What the classes tell, how busy a place is, is what a hyperprior tells with a network; here a look-up does. Blocks of
neighbours as one symbol take their joint statistics into account and make decoding fast, see
`compand.data.archive_decoder`.

Tables hold integers alone, so that a payload decodes alike on every machine.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compand.coding.ans import AnsWriter, stack_of
from compand.coding.tables import PRECISION, TableSet
from compand.errors import BitstreamError, PackedSetError, UsageError

if TYPE_CHECKING:
    from compand.data.archive_decoder import Decoder

CLASSES = 32
TABLES = 12
CELL = 16
BLOCK = 4
BLOCKS = CELL // BLOCK
CELL_ROWS = {1: 1, 2: 4}
"""Rows of a cell, by the axes of the latents; it has 16 places in all."""

SHAPES = ((1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4), (3, 5))
"""What a symbol may stand for: 4 residuals without some of their lowest bits, all within +- a reach, (reach, bits).
Symbol 0 is the escape. Low bits of wide distributions are nearly random: to keep them as they are costs little and
takes no time."""

FITTED_BLOCKS = 1 << 20
"""About so many blocks are looked at when tables are learned."""

PASSES = 5
PRIOR_STRENGTH = 300.0
"""Blocks that the product of its marginal distributions counts for in a table."""

TIME_COST = 0.05
"""Bits that a nanosecond of decoding is worth, when a table chooses its shape."""

ESCAPE_TIME = 40
"""Nanoseconds that an escaped residual takes."""

COST_STEPS = 8
"""Probabilities are kept as their logarithms, in this part of a bit."""

MAX_TABLES_BYTES = 1 << 24

SLACK_BITS = 64
"""How many bits a payload may be shorter than the sum of its symbols' contents, by the coder's rounding."""

_PLAIN = 0
"""First byte of a payload that is coded with the tables; the number of bytes of low bits follows, these bytes, and what
the entropy coder makes of the classes, of the symbols of each table and of the residuals that escaped."""

_WIDE: dict[int, np.dtype[Any]] = {1: np.dtype("<i2"), 2: np.dtype("<i4")}
"""First byte of a payload of integers beyond 8 bits, which zlib compresses."""

Integers = NDArray[np.signedinteger[Any]]


class Layout(NamedTuple):
    """How latents of one shape are cut into cells."""

    groups: int
    channels: int
    rows: int
    columns: int
    down: int  # cells
    across: int
    cell_rows: int

    @property
    def places(self) -> int:
        """Cells of a channel, of all groups."""
        return self.groups * self.down * self.across


@lru_cache(maxsize=256)
def layout_of(shape: tuple[int, ...], axes: int) -> Layout:
    """Shape: [M, h, w], [M, n] or [groups, M, n]."""
    spatial = shape[-axes:]
    rows, columns = (1, *spatial) if axes == 1 else spatial
    groups = shape[0] if len(shape) == axes + 2 else 1
    high = CELL_ROWS[axes]
    return Layout(
        groups, shape[-axes - 1], rows, columns, -(-rows // high), -(-columns // (CELL // high)), high
    )


class ArchiveTables:
    """Codes the integers of a set. Made by `learn_tables`, and read from its bytes.

    Args:
        axes: of the latents, 1 or 2.
        predicted: channels that are coded as differences from the left.
        assigned: table of each class and channel, uint8 [classes, M].
        shapes: place in SHAPES of each table, ascending.
        costs: information content of each symbol of each table, then of the classes, then of the residuals of escaped
            blocks, in steps of 1 / COST_STEPS bit, uint8.
    """

    def __init__(
        self,
        axes: int,
        predicted: Sequence[int],
        assigned: NDArray[np.uint8],
        shapes: Sequence[int],
        costs: Sequence[NDArray[np.uint8]],
    ) -> None:
        self.axes, self.predicted, self.shapes = axes, tuple(predicted), tuple(shapes)
        self.assigned, self.costs = assigned, tuple(costs)
        self.classes, self.channels = assigned.shape
        orders = [_order(cost) for cost in costs[: len(shapes)]]
        orders += [np.arange(cost.size) for cost in costs[len(shapes) :]]
        frequencies = [_frequencies(cost[order]) for cost, order in zip(costs, orders, strict=True)]
        self._tables = TableSet(frequencies, np.zeros(len(costs), dtype=np.int32))
        self._ranks = [order.argsort().astype(np.int32) for order in orders]
        self._values = [_values(shape, order) for shape, order in zip(shapes, orders, strict=False)]
        least = self._tables.least_bits
        self._least_bits = float(least[len(shapes)] + BLOCKS * least[assigned].sum(1).min())  # of a place
        shifts = [SHAPES[shape][1] for shape in shapes]
        # Tables in a row that leave away as many bits, [first, last), and these bits.
        self._shifted = [(start, stop, shifts[start]) for start, stop in _equal_runs(shifts) if shifts[start]]

    # ------------------------------------------------------------------------------------------------- coding

    def encode(self, integers: Integers) -> bytes:
        """The payload of integers of 32 bits at most. Raises UsageError if they have other channels."""
        reach = max(int(integers.max(initial=0)), -int(integers.min(initial=0)))
        if reach > 127:
            kind = 1 if reach <= 32767 else 2
            content = np.ascontiguousarray(integers, dtype=_WIDE[kind]).tobytes()
            return bytes((kind,)) + zlib.compress(content, 9)
        layout = layout_of(integers.shape, self.axes)
        if layout.channels != self.channels:
            raise UsageError(
                f"integers have {layout.channels} channels, the tables of the set {self.channels}"
            )
        blocks = _to_blocks(self._residuals(integers, layout), layout)
        classes = self._classify(blocks)
        tables = self.assigned.T[:, classes].ravel()
        order = tables.argsort(kind="stable")
        counts = np.bincount(tables, minlength=len(self.shapes))
        ends = np.concatenate([[0], np.cumsum(counts)])
        cells = blocks.reshape(-1, CELL)[order]
        symbols, escaped = [], []
        for table, shape in enumerate(self.shapes):
            parts = cells[ends[table] : ends[table + 1]].reshape(-1, BLOCK)
            found = _symbols(parts, shape)
            escaped.append(parts[found == 0].ravel())
            symbols.append(self._ranks[table][found])
        low = [
            (cells[ends[start] : ends[stop]].ravel() >> plane & 1).astype(bool)
            for start, stop, shift in self._shifted
            for plane in reversed(range(shift))
        ]
        low_bits = np.packbits(np.concatenate(low)).tobytes() if low else b""
        rest = np.concatenate(escaped).astype(np.int32) + 128
        runs = list(enumerate((counts * BLOCKS).tolist()))
        writer = AnsWriter()
        writer.push_runs(classes.astype(np.int32), [(len(self.shapes), classes.size)], self._tables)
        writer.push_runs(np.concatenate(symbols), runs, self._tables)
        writer.push_runs(rest, [(len(self.shapes) + 1, rest.size)], self._tables)
        return bytes((_PLAIN, *_varint(len(low_bits)))) + low_bits + writer.finish()

    def decode(self, payload: bytes | memoryview, shape: tuple[int, ...]) -> Integers:
        """Inverse of `encode`. Raises BitstreamError on a damaged payload."""
        if not len(payload):
            raise BitstreamError("the payload is empty")
        if payload[0] in _WIDE:
            return _inflated(payload[1:], _WIDE[payload[0]], shape)
        layout = layout_of(shape, self.axes)
        if payload[0] != _PLAIN or layout.channels != self.channels:
            raise BitstreamError("the payload does not fit the tables of the set")
        if 8 * len(payload) + SLACK_BITS < layout.places * self._least_bits:
            raise BitstreamError(f"{len(payload)} bytes cannot hold {math.prod(shape)} integers")
        length, place = _read_varint(payload, 1)
        low_bits, words = payload[place : place + length], stack_of(payload[place + length :])
        cells = layout.groups, layout.down, layout.across, layout.cell_rows
        whole = self._decoder.decode(words, low_bits, *cells)
        return whole[..., : layout.rows, : layout.columns].reshape(shape)

    @cached_property
    def _decoder(self) -> Decoder:
        # Not at the top of the module, as it loads a compiler.
        from compand.data.archive_decoder import Decoder

        # Damaged data may decode to a class after the last.
        assigned = np.vstack([self.assigned, self.assigned[-1:]])
        shifts = [SHAPES[shape][1] for shape in self.shapes]
        return Decoder(self._tables, assigned, self._values, shifts, self.predicted)

    # -------------------------------------------------------------------------------------------- prediction

    def _residuals(self, integers: Integers, layout: Layout) -> NDArray[np.int8]:
        """[groups, M, rows, columns]; differences wrap around in 8 bits."""
        x = integers.astype(np.int8).reshape(layout[:4])
        return _predicted(x, self.predicted)

    # ---------------------------------------------------------------------------------------------- classes

    def _classify(self, blocks: NDArray[np.int8]) -> NDArray[np.intp]:
        """The class of each place under which its cells take the fewest bits; blocks: [M, places, CELL]."""
        costs = self.cell_costs(blocks)
        channels = np.arange(self.channels)[:, None]
        total = costs[self.assigned.T, channels].sum(0)
        total += self._bits[len(self.shapes)][: self.classes, None]
        return total.argmin(0)

    def cell_costs(self, blocks: NDArray[np.int8]) -> NDArray[np.float32]:
        """Bits of every cell under every table, [tables, M, places]."""
        channels, places, _ = blocks.shape
        single = self._bits[len(self.shapes) + 1][blocks.view(np.uint8) ^ 128].ravel()
        result = np.empty((len(self.shapes), channels * places), dtype=np.float32)
        known: dict[int, tuple[NDArray[np.int32], NDArray[Any]]] = {}
        for table, shape in enumerate(self.shapes):
            if shape not in known:
                symbols = _symbols(blocks.reshape(-1, BLOCK), shape)
                escapes = np.flatnonzero(symbols == 0)
                values = single.reshape(-1, BLOCK)[escapes].sum(1)
                spare = np.bincount(escapes // BLOCKS, values, minlength=channels * places)
                known[shape] = symbols, spare + CELL * SHAPES[shape][1]
            symbols, others = known[shape]
            bits: NDArray[Any] = self._bits[table].take(symbols).reshape(-1, BLOCKS)
            np.add(bits @ np.ones(BLOCKS, dtype=np.float32), others, out=result[table], casting="same_kind")
        return result.reshape(len(self.shapes), channels, places)

    @cached_property
    def _bits(self) -> list[NDArray[np.float32]]:
        return [cost.astype(np.float32) / COST_STEPS for cost in self.costs]

    # -------------------------------------------------------------------------------------------------- bytes

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads: a line of JSON and, compressed, `assigned` and `costs`."""
        head = {
            "axes": self.axes,
            "channels": self.channels,
            "classes": self.classes,
            "predicted": list(self.predicted),
            "shapes": list(self.shapes),
        }
        body = b"".join([self.assigned.tobytes(), *(cost.tobytes() for cost in self.costs)])
        return json.dumps(head).encode() + b"\n" + zlib.compress(body, 9)

    @classmethod
    def from_bytes(cls, content: bytes) -> ArchiveTables:
        """Raises PackedSetError if `to_bytes` did not write it."""
        try:
            line, _, packed = content.partition(b"\n")
            head = json.loads(line)
            axes, channels, classes = int(head["axes"]), int(head["channels"]), int(head["classes"])
            predicted, shapes = [int(c) for c in head["predicted"]], [int(shape) for shape in head["shapes"]]
            sizes = [_alphabet(shape) for shape in shapes] + [classes, 256]
            sound = (
                axes in CELL_ROWS
                and 1 <= channels <= 1 << 16
                and 1 <= classes <= 256
                and 1 <= len(shapes) <= 256
                and all(0 <= channel < channels for channel in predicted)
                and all(0 <= shape < len(SHAPES) for shape in shapes)
                and shapes == sorted(shapes)
            )
            length = classes * channels + sum(sizes)
            if not sound or length > MAX_TABLES_BYTES:
                raise ValueError("impossible sizes")
            body = zlib.decompressobj().decompress(packed, length + 1)
            if len(body) != length:
                raise ValueError("another length")
            assigned = np.frombuffer(body, dtype=np.uint8, count=classes * channels).reshape(
                classes, channels
            )
            if assigned.max() >= len(shapes):
                raise ValueError("a table that is not there")
            costs = np.split(np.frombuffer(body, np.uint8, offset=classes * channels), np.cumsum(sizes)[:-1])
            return cls(axes, predicted, assigned, shapes, costs)
        except (ValueError, KeyError, TypeError, IndexError, zlib.error, UsageError) as error:
            raise PackedSetError(f"the tables of the set are damaged ({error}): pack it again") from None


# ------------------------------------------------------------------------------------------------ learning


def learn_tables(integers: Iterable[Integers], *, axes: int = 2) -> bytes:
    """Tables of the profile archive, learned from some rows.

    Classes and tables are found together by descent: every cell place takes the class, and every class and channel the
    table, under which its symbols need the fewest bits; tables are counted anew.

    Args:
        integers: as `Codec.quantise` gives them.
        axes: of the latents.

    Raises:
        UsageError: no rows, or rows of different channels.
    """
    layouts: list[Layout] = []
    planes: list[NDArray[np.int8]] = []
    for item in integers:
        if item.size:
            layouts.append(layout_of(item.shape, axes))
            planes.append(np.clip(item, -127, 127).astype(np.int8).reshape(layouts[-1][:4]))
    if not planes:
        raise UsageError("there are no rows to learn tables from: pack something that can be read")
    if len({layout.channels for layout in layouts}) > 1:
        raise UsageError("rows have different numbers of channels: pack one medium and codec at a time")
    predicted = _choose_predicted(planes)
    blocks = np.concatenate(
        [_to_blocks(_predicted(x, predicted), each) for x, each in zip(planes, layouts, strict=True)], axis=1
    )
    step = -(-blocks.shape[0] * blocks.shape[1] * BLOCK // FITTED_BLOCKS)
    blocks = np.ascontiguousarray(blocks[:, ::step])
    channels, places, _ = blocks.shape
    activity = np.abs(blocks.astype(np.int16)).sum(2, dtype=np.float64)
    # Channels count alike, however large they are.
    weight = activity / (activity.mean(1, keepdims=True) + 1)
    classes: NDArray[Any] = _ranked(weight.sum(0), CLASSES)
    mean = np.stack([_mean(activity[:, classes == k]) for k in range(CLASSES)])
    assigned = _ranked(mean.ravel(), TABLES).reshape(CLASSES, channels)
    for _ in range(PASSES):
        tables = _counted(axes, predicted, blocks, classes, assigned)
        costs = tables.cell_costs(blocks)
        onehot = np.zeros((CLASSES, places), dtype=np.float32)
        onehot[classes, np.arange(places)] = 1
        total = np.einsum("tmp,kp->kmt", costs, onehot, optimize=True)
        assigned = np.argmin(total, axis=2).astype(np.uint8)
        tables = ArchiveTables(axes, predicted, assigned, tables.shapes, tables.costs)
        classes = tables._classify(blocks)
    return _counted(axes, predicted, blocks, classes, assigned).to_bytes()


def _choose_predicted(planes: Sequence[NDArray[np.int8]]) -> list[int]:
    """Channels whose differences hold less information than their values."""

    def information(channel: int, parts: Sequence[NDArray[np.int8]]) -> float:
        each = [np.bincount(x[:, channel].ravel().view(np.uint8), minlength=256) for x in parts]
        counts = np.sum(each, axis=0)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log2(shares)).sum())

    every = range(planes[0].shape[1])
    differences = [_predicted(x, every) for x in planes]
    return [
        channel
        for channel in every
        if information(channel, differences) < information(channel, planes) - 0.05
    ]


def _ranked(values: NDArray[np.float64], number: int) -> NDArray[np.uint8]:
    """Values by rank, in `number` classes of equal size."""
    ranks = values.argsort(kind="stable").argsort(kind="stable")
    return (ranks * number // values.size).astype(np.uint8)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = values.sum(1) / max(values.shape[1], 1)
    return result


def _counted(
    axes: int,
    predicted: Sequence[int],
    blocks: NDArray[np.int8],
    classes: NDArray[Any],
    assigned: NDArray[np.uint8],
) -> ArchiveTables:
    """Tables counted on the blocks [M, places, CELL] of known classes; only those that are used."""
    tables = assigned.T[:, classes]
    used = np.unique(assigned).tolist()
    found = []
    for table in used:
        mine = blocks[tables == table]
        shape, masses = _best_shape(mine)
        found.append((shape, table, masses, mine))
    found.sort(key=lambda entry: entry[:2])
    renamed = np.zeros(max(used) + 1, dtype=np.uint8)
    escaped = [np.zeros(0, dtype=np.int8)]
    for place, (shape, table, _, mine) in enumerate(found):
        renamed[table] = place
        parts = mine.reshape(-1, BLOCK)
        escaped.append(parts[_symbols(parts, shape) == 0].ravel())
    number = np.bincount(classes, minlength=len(assigned)) + 0.5
    every = [masses for _, _, masses, _ in found] + [number, _marginal(np.concatenate(escaped))]
    shapes = [shape for shape, _, _, _ in found]
    return ArchiveTables(axes, predicted, renamed[assigned], shapes, [_costs(masses) for masses in every])


def _best_shape(blocks: NDArray[np.int8]) -> tuple[int, NDArray[np.float64]]:
    """The shape of the symbols that blocks [n, CELL] cost least in, and how often each symbol is to be expected."""
    marginal = _marginal(blocks.ravel())
    marginal /= marginal.sum()
    bits = -np.log2(marginal)
    best: tuple[float, int, NDArray[np.float64]] | None = None
    parts = blocks.reshape(-1, BLOCK)
    for shape, (reach, shift) in enumerate(SHAPES):
        symbols = _symbols(parts, shape)
        coarse = marginal.reshape(-1, 1 << shift).sum(1)
        middle = coarse.size // 2
        inner = coarse[max(middle - reach, 0) : middle + reach + 1]
        inner = np.pad(inner, (max(reach - middle, 0), 0))
        inner = np.pad(inner, (0, 2 * reach + 1 - inner.size))
        product = inner
        for _ in range(BLOCK - 1):
            product = np.multiply.outer(inner, product).ravel()  # the first residual counts fastest
        prior = np.concatenate([[max(1 - product.sum(), 1e-6)], product])
        masses = np.bincount(symbols, minlength=prior.size) + PRIOR_STRENGTH * prior + 1e-6
        shares = masses / masses.sum()
        falling = np.append(shares[0], -np.sort(-shares[1:]))
        walk = float(falling @ np.arange(falling.size))
        time = min(6 + 1.5 * walk, 10 + 1.7 * math.log2(falling.size))
        cost = -float((masses * np.log2(shares)).sum()) + TIME_COST * symbols.size * time + shift * parts.size
        rest = parts[symbols == 0].ravel()
        cost += float(bits[rest.view(np.uint8) ^ 128].sum()) + TIME_COST * ESCAPE_TIME * rest.size
        if best is None or cost < best[0]:
            best = cost, shape, masses
    assert best is not None
    return best[1], best[2]


def _marginal(residuals: NDArray[np.int8]) -> NDArray[np.float64]:
    """How often each residual -128 .. 127 is to be expected: as often as it was seen, and a little wider."""
    seen = np.bincount(residuals.view(np.uint8) ^ 128, minlength=256).astype(np.float64)
    spread = np.exp2(-np.abs(np.arange(-128, 128)) / 8)
    return seen + 2 * spread / spread.sum() + 1e-4


# ------------------------------------------------------------------------------------------------ parts of these


def _predicted(x: NDArray[np.int8], channels: Iterable[int]) -> NDArray[np.int8]:
    """x [groups, M, rows, columns] with differences from the left, in the first column from above, in some channels."""
    residuals = x.copy()
    for channel in channels:
        plane = x[:, channel]
        residuals[:, channel, :, 1:] = plane[:, :, 1:] - plane[:, :, :-1]
        residuals[:, channel, 1:, 0] = plane[:, 1:, 0] - plane[:, :-1, 0]
    return residuals


def _to_blocks(residuals: NDArray[np.int8], layout: Layout) -> NDArray[np.int8]:
    """[groups, M, rows, columns] -> cells [M, places, CELL], with zeros beyond the edges."""
    high = layout.cell_rows
    wide = CELL // high
    padding = (layout.down * high - layout.rows, layout.across * wide - layout.columns)
    x = np.pad(residuals, ((0, 0), (0, 0), (0, padding[0]), (0, padding[1])))
    x = x.reshape(layout.groups, layout.channels, layout.down, high, layout.across, wide)
    return np.ascontiguousarray(x.transpose(1, 0, 2, 4, 3, 5)).reshape(layout.channels, layout.places, CELL)


def _equal_runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """Where runs of equal values begin and end."""
    borders = [place for place in range(1, len(values)) if values[place] != values[place - 1]]
    return list(zip([0, *borders], [*borders, len(values)], strict=True))


def _alphabet(shape: int) -> int:
    """Symbols of a table of a shape."""
    return 1 + (2 * SHAPES[shape][0] + 1) ** BLOCK


@lru_cache(maxsize=len(SHAPES))
def _pair_symbols(shape: int) -> NDArray[np.int32]:
    """For the bytes of two residuals, their place among all pairs within reach; very negative beyond."""
    reach, shift = SHAPES[shape]
    both = (np.arange(1 << 16, dtype="u2").view("i1") >> shift).reshape(-1, 2).astype(np.int32)
    inside = (np.abs(both) <= reach).all(1)
    return np.where(inside, both[:, 0] + reach + (2 * reach + 1) * (both[:, 1] + reach), -(1 << 24)).astype(
        np.int32
    )


def _symbols(parts: NDArray[np.int8], shape: int) -> NDArray[np.int32]:
    """Symbols of blocks [n, BLOCK] in a table of a shape, [n]; 0 where they escape."""
    pairs = _pair_symbols(shape)[np.ascontiguousarray(parts).view("u2")]
    places = pairs[:, 0] + (2 * SHAPES[shape][0] + 1) ** 2 * pairs[:, 1]
    return np.maximum(places + 1, 0)


def _order(costs: NDArray[np.uint8]) -> NDArray[np.intp]:
    """The symbols of a table as they are numbered in the stream, likely ones first, which decodes fastest; the escape
    stays where it is found soonest."""
    return np.concatenate([[0], 1 + costs[1:].argsort(kind="stable")])


def _values(shape: int, order: NDArray[np.intp]) -> NDArray[np.int8]:
    """What the symbols of a table stand for, [symbols + 1, BLOCK], in an order. The escape, and the place after the
    last symbol, stand for zeros."""
    reach = SHAPES[shape][0]
    width = 2 * reach + 1
    number = np.arange(width**BLOCK)
    blocks = np.stack([number // width**place % width - reach for place in range(BLOCK)], axis=1)
    values = np.pad(blocks, ((1, 0), (0, 0)))[order]
    return np.pad(values, ((0, 1), (0, 0))).astype(np.int8)


def _costs(masses: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Information content in steps of 1 / COST_STEPS bit."""
    bits = -np.log2(masses / masses.sum())
    return np.clip(np.rint(bits * COST_STEPS), 0, 255).astype(np.uint8)


def _mass(cost: int) -> int:
    """2**32 times the probability of an information content, rounded down; by integers, so that it is the same
    everywhere."""
    octaves, part = divmod(cost, COST_STEPS)
    if part:
        octaves, part = octaves + 1, COST_STEPS - part
    root = 2 ** (part + 32 * COST_STEPS)
    for _ in range(COST_STEPS.bit_length() - 1):
        root = math.isqrt(root)
    return root >> octaves


_MASSES = np.array([_mass(cost) for cost in range(256)], dtype=np.int64)


def _frequencies(costs: NDArray[np.uint8]) -> NDArray[np.int64]:
    """A table of symbols of known information content and, last, one that does not occur; integers throughout."""
    masses = np.append(_MASSES[costs], 1)
    total = 1 << PRECISION
    frequencies = np.maximum(masses * (total - masses.size) // int(masses.sum()), 0) + 1
    frequencies[int(frequencies.argmax())] += total - int(frequencies.sum())
    return frequencies


def _inflated(content: bytes | memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Integers:
    length = math.prod(shape) * dtype.itemsize
    try:
        body = zlib.decompressobj().decompress(content, length + 1)
    except zlib.error as error:
        raise BitstreamError(f"the integers do not decompress ({error})") from None
    if len(body) != length:
        raise BitstreamError(f"the payload does not hold {math.prod(shape)} integers")
    return np.frombuffer(body, dtype=dtype).reshape(shape)


def _varint(value: int) -> bytes:
    """7 bits a byte, low ones first; the last byte is below 128."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes((*parts, value))


def _read_varint(content: bytes | memoryview, place: int) -> tuple[int, int]:
    """Inverse of `_varint`, and where it ends. Raises BitstreamError where there is none."""
    value = 0
    for shift in range(0, 35, 7):
        if place + 1 > len(content):
            break
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise BitstreamError("the payload has no header")
