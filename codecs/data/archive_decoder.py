"""Decoding of the profile archive, compiled by numba; `compand.data.archive` describes the format.

Compiled code does not look whether an index lies within its array: whatever a stream may hold leads to one that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compand.coding.ans_compiled import compiled, model_of, opened, pop_run, used_up
from compand.coding.tables import TableSet
from compand.errors import BitstreamError


class Tables(NamedTuple):
    """What `_decode` needs of the tables of a set.

    Attributes:
        starts, places, look: as in `ans_compiled.Model`, of the tables of blocks, of classes, of escaped residuals.
        assigned: table of each channel and class, [M, classes].
        values: blocks that the symbols of all tables stand for, 4 bytes each as one number.
        firsts: where those of each table begin.
        shifts: low bits that the symbols of each table leave away.
        predicted: channels that are differences, [M].
    """

    starts: NDArray[np.uint32]
    places: NDArray[np.int64]
    look: NDArray[np.int32]
    assigned: NDArray[np.uint8]
    values: NDArray[np.uint32]
    firsts: NDArray[np.int64]
    shifts: NDArray[np.int64]
    predicted: NDArray[np.bool_]


class Decoder:
    """Decodes rows of a set.

    Args:
        tables: of blocks, of the classes, and of escaped residuals.
        assigned: table of each class and channel, [classes, M]; for every class that a stream may name.
        values: what the symbols of each table of blocks stand for, [symbols, BLOCK]; for every symbol likewise.
        shifts: how many low bits symbols of each table leave away, ascending.
        predicted: channels that are coded as differences.
    """

    def __init__(
        self,
        tables: TableSet,
        assigned: NDArray[np.uint8],
        values: Sequence[NDArray[np.int8]],
        shifts: Sequence[int],
        predicted: Sequence[int],
    ) -> None:
        differences = np.zeros(assigned.shape[1], dtype=bool)
        differences[list(predicted)] = True
        blocks = [each << shift for each, shift in zip(values, shifts, strict=True)]
        self._tables = Tables(
            *model_of(tables.frequencies),
            assigned=np.ascontiguousarray(assigned.T),
            values=np.concatenate(blocks).view(np.uint32)[:, 0],
            firsts=np.cumsum([0, *map(len, values)])[:-1],
            shifts=np.array(shifts, dtype=np.int64),
            predicted=differences,
        )

    def decode(
        self,
        words: NDArray[np.uint32],
        low_bits: bytes | memoryview,
        groups: int,
        down: int,
        across: int,
        high: int,
    ) -> NDArray[np.int8]:
        """A row, [groups, M, rows of all cells, columns of all cells].

        Args:
            words: the stack of the entropy coder.
            low_bits: the bits that symbols leave away.
            groups: of channels.
            down, across: cells of a channel.
            high: rows of a cell.

        Raises:
            BitstreamError: there are too few or too many low bits, or symbols.
        """
        low = np.frombuffer(low_bits, dtype=np.uint8)
        channels = len(self._tables.assigned)
        # A cell is 4 blocks, which lie side by side or below each other.
        result = np.empty((groups, channels, down * high, across * (4 // high)), dtype=np.uint32)
        wanted, ended = _decode(words, low, self._tables, down, across, high, result, result.view(np.int8))
        if wanted != low.size:
            raise BitstreamError(f"the payload has {low.size} bytes of low bits where {wanted} are due")
        if not ended:
            raise BitstreamError("entropy-coded data does not end with its last symbol: the file is damaged")
        return result.view(np.int8)


@compiled
def _decode(
    words: NDArray[np.uint32],
    low_bits: NDArray[np.uint8],
    tables: Any,
    down: int,
    across: int,
    high: int,
    result: NDArray[np.uint32],
    residuals: NDArray[np.int8],
) -> tuple[int, bool]:
    """Fills the result, which residuals are a view of. Returns the number of bytes of low bits that are due, and
    whether the stream ends where it should; if either is not as it is to be, the result is of no use."""
    groups, channels, rows, _ = result.shape
    number = len(tables.shifts)
    state, top = opened(words)
    classes = np.empty(groups * down * across, np.int32)
    place = tables.places[number]
    state, top = pop_run(words, state, top, tables.starts[place:], tables.look[number], classes)
    counts = np.zeros(number, np.int64)
    for channel in range(channels):
        for each in classes:
            counts[tables.assigned[channel, each]] += 1
    ends = 4 * np.cumsum(counts)
    symbols = np.empty(ends[-1], np.int32)
    for table in range(number):
        mine = symbols[ends[table] - 4 * counts[table] : ends[table]]
        place = tables.places[table]
        state, top = pop_run(words, state, top, tables.starts[place:], tables.look[table], mine)

    blocks = np.empty(len(symbols), np.uint32)
    start, escaped = 0, 0
    for table in range(number):
        first = tables.firsts[table]
        for i in range(start, ends[table]):
            escaped += symbols[i] == 0
            blocks[i] = tables.values[first + symbols[i]]
        start = ends[table]
    due = _add_low_bits(blocks, ends, low_bits, tables.shifts)
    if due != len(low_bits):
        return due, False

    single = np.empty(4 * escaped, np.int32)
    place = tables.places[number + 1]
    state, top = pop_run(words, state, top, tables.starts[place:], tables.look[number + 1], single)
    if not used_up(state, top):
        return due, False
    if escaped:
        taken, parts = 0, blocks.view(np.int8)
        for i in range(len(symbols)):
            if symbols[i] == 0:
                for k in range(4):
                    parts[4 * i + k] = np.int8(single[taken] - 128)
                    taken += 1

    cursors = ends - 4 * counts
    wide = 4 // high
    for channel in range(channels):
        for group in range(groups):
            for y in range(down):
                for x in range(across):
                    table = tables.assigned[channel, classes[(group * down + y) * across + x]]
                    block = cursors[table]
                    cursors[table] += 4
                    for line in range(high):
                        for i in range(wide):
                            result[group, channel, y * high + line, x * wide + i] = blocks[block]
                            block += 1
            if tables.predicted[channel]:
                plane = residuals[group, channel]
                for y in range(rows):
                    value = plane[y - 1, 0] if y else np.int8(0)
                    for x in range(plane.shape[1]):
                        value += plane[y, x]
                        plane[y, x] = value
    return due, True


_PLACES = np.arange(3, -1, -1, dtype=np.uint8)
_SPREAD = (np.arange(16, dtype=np.uint8)[:, None] >> _PLACES & 1).view(np.uint32)[:, 0]
"""The bits of a number below 16, the highest first, as the lowest of 4 bytes."""


@compiled
def _add_low_bits(
    blocks: NDArray[np.uint32],
    ends: NDArray[np.int64],
    low_bits: NDArray[np.uint8],
    shifts: NDArray[np.int64],
) -> int:
    """Puts the bits that symbols leave away into their blocks, those of each table up to an end; returns the number of
    bytes that they take, of which there may be others.

    Tables that leave away as many bits follow each other, and their low bits lie together: the highest of all blocks,
    then the next. The cells of a table have 16 residuals, so that these parts begin with a byte.
    """
    offset, begin, table = 0, 0, 0  # offset: in half bytes
    while table < len(ends):
        shift = shifts[table]
        while table + 1 < len(ends) and shifts[table + 1] == shift:
            table += 1
        end = ends[table]
        if offset + (end - begin) * shift > 2 * len(low_bits):
            offset += (end - begin) * shift
        else:
            for weight in range(shift - 1, -1, -1):
                for i in range(begin, end):
                    half = low_bits[offset >> 1] >> (0 if offset & 1 else 4) & 15
                    blocks[i] |= _SPREAD[half] << np.uint32(weight)
                    offset += 1
        begin = end
        table += 1
    return (offset + 1) >> 1
