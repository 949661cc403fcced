"""Entropy coder: integers and the tables they are coded with <-> bytes.

The stream is asymmetric numeral systems (Duda, arXiv:1311.2540) as in constriction's `AnsCoder`: 32-bit
words, 64-bit state, 24-bit probabilities. In the order in which a reader meets them:

    for each push, for each block of 65,536 symbols (the last may be shorter):
        for each table that occurs in the block, in ascending order:
            its symbols, in order of position
        for the values of the block that lie outside their table (escapes), in order of position:
            length of the code, in 6 equally probable bits    (code: see `tables.escape_codes`)
            bits 0-15 of the code below its leading one, then bits 16-31, then bits 32-33

A push of runs is its symbols alone, in the order given, and so is one of ranges, whose symbols have frequencies of
their own.

Symbols of one table are coded in one call, which is what makes the coder fast; blocks keep the grouping
within the processor's cache. Words are little-endian and the zero bytes that end the last one are left out.
The writer starts from FIRST_STATE, so that is where a reader must end; no bytes at all mean this state.

constriction does the work where it is installed, `compand.coding.ans_reference` elsewhere, on the same bytes;
`compand.coding.ans_compiled` reads runs of many short streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compand.coding import ans_reference
from compand.coding.tables import (
    ESCAPE_LENGTH_BITS,
    PRECISION,
    TableSet,
    code_lengths,
    escape_codes,
    escaped_values,
)
from compand.errors import BitstreamError, UsageError

try:
    import constriction
except ImportError:
    constriction = None

BLOCK = 1 << 16
"""Symbols that are grouped together. Part of the format."""

FIRST_STATE = 0x5EED
"""What remains when all symbols are read. Part of the format.

A reader that runs out of data drifts towards state 0 and stays there: were 0 the right end, one damaged
stream in a hundred would reach it. Sixteen bits stop that and cost 0.1 bytes, as the first symbol fills 24
in any case.
"""

BACKEND = "reference" if constriction is None else "constriction"
"""What codes the symbols unless a writer or reader is told otherwise."""

LONGEST_WALK = 10
"""Symbols that are gone through as fast as the right one is found by bisection."""

_PIECE = 16
_PIECE_STARTS = (0, 16, 32)
_MAX_CODE_LENGTH = 33
_INT32 = np.iinfo(np.int32)
_TOTAL = np.float32(1 << PRECISION)


Runs = Sequence[tuple[int, int]]
"""Tables, and how many symbols of each follow one another."""


class AnsWriter:
    """Collects symbols, in the order in which they will be read, and turns them into bytes.

    Args:
        backend: "constriction" or "reference".
    """

    def __init__(self, backend: str = BACKEND) -> None:
        self._backend = _backend(backend)
        self._blocks: list[_Block | _Ranges] = []

    def push(self, values: ArrayLike, indexes: ArrayLike, tables: TableSet) -> None:
        """Append values [N] (integers in the range of int32), coded with the tables that indexes [N] name.

        Raises:
            UsageError: lengths or types do not fit, a value is no int32, or an index names no table.
        """
        value, index = _as_values(values), _as_indexes(indexes, tables)
        if value.shape != index.shape:
            raise UsageError(f"{value.size} values but {index.size} indexes: give one index for each value")
        self._blocks += [_prepare(value[block], index[block], tables) for block in _blocks(index.size)]

    def push_runs(self, symbols: NDArray[np.int32], runs: Runs, tables: TableSet) -> None:
        """Append symbols [N] of tables in turn, in the order given: places in a table, none of them its escape.

        Args:
            symbols: all runs one after the other.
            runs: table and number of symbols of each run; together N.
        """
        ranges, start = [], 0
        for table, count in runs:
            ranges.append((table, start, start + count))
            start += count
        if start != symbols.size:
            raise UsageError(f"{symbols.size} symbols but runs of {start}: give as many")
        self._blocks.append(_Block(tables, ranges, np.ascontiguousarray(symbols, dtype=np.int32), None))

    def push_ranges(self, starts: NDArray[np.float32], frequencies: NDArray[np.float32]) -> None:
        """Append symbols by the quantiles that they own, in the order given.

        Args:
            starts: sum of the frequencies of the symbols before each one, integers [N].
            frequencies: its own, integers [N] from 1 to 2**PRECISION - 2.
        """
        self._blocks.append(_Ranges(starts, frequencies))

    def finish(self) -> bytes:
        """Encode everything that was pushed."""
        coder = self._backend.coder(np.array([FIRST_STATE], dtype=np.uint32))
        for block in reversed(self._blocks):
            if isinstance(block, _Ranges):
                coder.encode_ranges_reverse(*block)
                continue
            tables, ranges, symbols, codes = block
            models = self._backend.models(tables)
            if codes is not None:
                _encode_escapes(coder, codes)
            for table, start, stop in reversed(ranges):
                coder.encode_reverse(symbols[start:stop], models(table))
        words = coder.words()
        if words.size == 1 and words[0] == FIRST_STATE:
            return b""
        return words.astype("<u4", copy=False).tobytes().rstrip(b"\0")


class AnsReader:
    """Reads back what an `AnsWriter` was given, push by push.

    Damaged data yields wrong values or BitstreamError, never more values than asked for. `finish` notices
    truncation, other tables and most damage. It cannot notice bits of escaped values that were flipped, which
    hold no redundancy: checksums belong to the container.

    Args:
        data: the bytes that `AnsWriter.finish` returned.
        backend: "constriction" or "reference".

    Raises:
        BitstreamError: data ends in a zero byte, which no writer leaves.
    """

    def __init__(self, data: bytes | bytearray | memoryview, backend: str = BACKEND) -> None:
        self._backend = _backend(backend)
        self._coder = self._backend.coder(stack_of(data))

    def pull(self, indexes: ArrayLike, tables: TableSet) -> NDArray[np.int32]:
        """Return the next values, int32 [N], which the writer pushed with the same indexes [N] and tables.

        Raises:
            UsageError: indexes are not a row of integers that name tables.
            BitstreamError: an escaped value is impossible.
        """
        index = _as_indexes(indexes, tables)
        models = self._backend.models(tables)
        decode = self._coder.decode
        values = np.empty(index.size, dtype=np.int32)
        for block in _blocks(index.size):
            groups = _group(index[block])
            grouped = np.concatenate([decode(models(table), b - a) for table, a, b in groups.ranges])
            escaped = groups.reach(grouped.view(np.uint32), tables)
            places = np.flatnonzero(grouped == groups.spread(tables.sizes)) if escaped else None
            grouped += groups.spread(tables.lows)
            if places is not None:
                places = places[np.argsort(groups.order[places])]
                grouped[places] = _decode_escapes(self._coder, *groups.extents(places, tables))
            values[block][groups.order] = grouped
        return values

    def pull_runs(self, runs: Runs, tables: TableSet) -> NDArray[np.int32]:
        """Return the next symbols as `AnsWriter.push_runs` took them; of damaged data, escapes may be among them."""
        models, decode = self._backend.models(tables), self._coder.decode
        parts = [decode(models(table), count) for table, count in runs]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def pull_rows(self, rows: NDArray[np.float32]) -> NDArray[np.int32]:
        """Return the next symbols, int32 [n], of which `AnsWriter.push_ranges` took the quantiles.

        Args:
            rows: frequencies of the K symbols that each may be, integers >= 1 with sum 2**PRECISION, [n, K].
        """
        return self._coder.decode_rows(rows)

    def finish(self) -> None:
        """Check that the data is used up.

        Raises:
            BitstreamError: it is not, so the values are wrong or were read with other tables.
        """
        words = self._coder.words()
        if words.size != 1 or words[0] != FIRST_STATE:
            raise BitstreamError("entropy-coded data does not end with its last symbol: the file is damaged")


def stack_of(data: bytes | bytearray | memoryview) -> NDArray[np.uint32]:
    """The words of a stream. Raises BitstreamError if it ends in a zero byte, which no writer leaves."""
    content = bytes(data)
    if content.endswith(b"\0"):
        raise BitstreamError("entropy-coded data ends in a zero byte: the file is damaged")
    if not content:
        content = FIRST_STATE.to_bytes(4, "little")
    return np.frombuffer(content + bytes(-len(content) % 4), dtype="<u4").astype(np.uint32)


class _Groups(NamedTuple):
    """Positions of one block, gathered by table."""

    order: NDArray[np.intp]  # position of each grouped symbol in the block
    used: NDArray[np.intp]  # tables that occur, ascending
    counts: NDArray[np.intp]  # symbols of each used table
    ranges: list[tuple[int, int, int]]  # (table, start, stop) in grouped order

    def spread(self, per_table: NDArray[np.int32]) -> NDArray[np.int32]:
        """One entry of per_table [T] for each grouped symbol."""
        return np.repeat(per_table[self.used], self.counts)

    def reach(self, symbols: NDArray[np.uint32], tables: TableSet) -> bool:
        """Whether any of the grouped symbols is its table's escape or lies beyond it."""
        starts = self.counts.cumsum() - self.counts
        return bool((np.maximum.reduceat(symbols, starts) >= tables.sizes[self.used]).any())

    def extents(
        self, places: NDArray[np.intp], tables: TableSet
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lows and sizes of the tables at some places of the grouped order."""
        table = np.repeat(self.used, self.counts)[places]
        return tables.lows[table].astype(np.int64), tables.sizes[table].astype(np.int64)


class _Block(NamedTuple):
    tables: TableSet
    ranges: list[tuple[int, int, int]]  # as in _Groups
    symbols: NDArray[np.int32]  # grouped; escapes included
    codes: NDArray[np.int64] | None  # of the escaped values in order of position; None where there is none


class _Ranges(NamedTuple):
    """Symbols by the quantiles that they own."""

    starts: NDArray[np.float32]
    frequencies: NDArray[np.float32]


def _blocks(size: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, size, BLOCK)]


def _prepare(
    values: NDArray[np.int32], indexes: NDArray[np.unsignedinteger[Any]], tables: TableSet
) -> _Block:
    """Group one block and turn its values into symbols."""
    groups = _group(indexes)
    grouped = values.take(groups.order, mode="wrap")  # no index needs wrapping; this mode is the fastest
    # In unsigned arithmetic a value below its table is a huge symbol: one maximum finds all escapes.
    symbols = np.subtract(grouped, groups.spread(tables.lows)).view(np.uint32)
    codes = None
    if groups.reach(symbols, tables):
        escape = groups.spread(tables.sizes).view(np.uint32)
        np.minimum(symbols, escape, out=symbols)
        places = np.flatnonzero(symbols == escape)
        places = places[np.argsort(groups.order[places])]
        codes = escape_codes(grouped[places].astype(np.int64), *groups.extents(places, tables))
    return _Block(tables, groups.ranges, symbols.view(np.int32), codes)


def _group(indexes: NDArray[np.unsignedinteger[Any]]) -> _Groups:
    order = np.argsort(indexes, kind="stable")  # a radix sort, as indexes have 8 or 16 bits
    # Bounds by bisection through the order, with keys of the same type: cheaper than to bring the indexes into it.
    tables = np.arange(int(indexes[order[-1]]) + 1, dtype=np.int64).astype(indexes.dtype)
    bounds = np.append(indexes.searchsorted(tables, sorter=order), indexes.size)
    used = np.flatnonzero(bounds[1:] > bounds[:-1])
    starts, stops = bounds[used], bounds[used + 1]
    ranges = list(zip(used.tolist(), starts.tolist(), stops.tolist(), strict=True))
    return _Groups(order, used, stops - starts, ranges)


def _as_values(values: ArrayLike) -> NDArray[np.int32]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(f"values are {array.dtype}{list(array.shape)}: give one row of integers")
    narrow = not array.size or np.can_cast(array.dtype, np.int32)
    if not narrow and (array.min() < _INT32.min or array.max() > _INT32.max):
        raise UsageError(f"values reach {array.min()} .. {array.max()}: give 32-bit integers")
    return array.astype(np.int32, copy=False)


def _as_indexes(indexes: ArrayLike, tables: TableSet) -> NDArray[np.unsignedinteger[Any]]:
    array = np.asarray(indexes)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(f"indexes are {array.dtype}{list(array.shape)}: give one row of integers")
    if array.size and (array.max() >= len(tables) or (array.dtype.kind == "i" and array.min() < 0)):
        raise UsageError(f"indexes reach {array.min()} .. {array.max()}: there are {len(tables)} tables")
    return array.astype(np.uint8 if len(tables) <= 256 else np.uint16, copy=False)


def _encode_escapes(coder: _Coder, codes: NDArray[np.int64]) -> None:
    lengths = code_lengths(codes)
    for shift in reversed(_PIECE_STARTS):
        widths = np.clip(lengths - shift, 0, _PIECE)
        present = widths > 0
        pieces = (codes[present] >> shift) & ((1 << widths[present]) - 1)
        coder.encode_bits_reverse(pieces.astype(np.int32), widths[present].astype(np.int32))
    coder.encode_bits_reverse(lengths.astype(np.int32), np.full(lengths.size, ESCAPE_LENGTH_BITS, np.int32))


def _decode_escapes(coder: _Coder, lows: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    lengths = coder.decode_bits(np.full(lows.size, ESCAPE_LENGTH_BITS, np.int32)).astype(np.int64)
    if lengths.max() > _MAX_CODE_LENGTH:
        raise BitstreamError(f"an escaped value claims {lengths.max()} bits: the file is damaged")
    codes = np.int64(1) << lengths
    for shift in _PIECE_STARTS:
        widths = np.clip(lengths - shift, 0, _PIECE)
        present = widths > 0
        codes[present] += coder.decode_bits(widths[present].astype(np.int32)).astype(np.int64) << shift
    values = escaped_values(codes, lows, sizes)
    if values.min() < _INT32.min or values.max() > _INT32.max:
        raise BitstreamError("an escaped value lies beyond the 32-bit integers: the file is damaged")
    return values


class _Coder(Protocol):
    """What a backend's coder does; `ans_reference.Coder` documents each method."""

    def encode_reverse(self, symbols: NDArray[np.int32], model: Any) -> None: ...

    def decode(self, model: Any, count: int) -> NDArray[np.int32]: ...

    def encode_ranges_reverse(
        self, starts: NDArray[np.float32], frequencies: NDArray[np.float32]
    ) -> None: ...

    def decode_rows(self, rows: NDArray[np.float32]) -> NDArray[np.int32]: ...

    def encode_bits_reverse(self, values: NDArray[np.int32], widths: NDArray[np.int32]) -> None: ...

    def decode_bits(self, widths: NDArray[np.int32]) -> NDArray[np.int32]: ...

    def words(self) -> NDArray[np.uint32]: ...


class _ConstrictionCoder:
    """`ans_reference.Coder` made of constriction's parts."""

    def __init__(self, words: NDArray[np.uint32]) -> None:
        ans = constriction.stream.stack.AnsCoder(words)
        self._ans = ans
        self._uniform = constriction.stream.model.Uniform()
        self._rows = constriction.stream.model.Categorical(perfect=False)
        self.encode_reverse = ans.encode_reverse
        self.decode = ans.decode
        self.words = ans.get_compressed

    def encode_ranges_reverse(self, starts: NDArray[np.float32], frequencies: NDArray[np.float32]) -> None:
        # Models of three symbols: what lies before the range, the range, and what lies behind it. None of them may be
        # empty, so that at either end of the quantiles the range comes first or last and the other side is cut in two.
        before, behind = starts, _TOTAL - starts - frequencies
        one = np.ones_like(starts)
        first = np.stack([frequencies, one, behind - 1], 1)
        last = np.stack([one, before - 1, frequencies], 1)
        ranges = np.stack([before, frequencies, behind], 1)
        at_start, at_end = before == 0, behind == 0
        ranges = np.where(at_start[:, None], first, np.where(at_end[:, None], last, ranges))
        symbols = np.where(at_start, 0, np.where(at_end, 2, 1)).astype(np.int32)
        # As weights, frequencies less 1 are taken over unrounded: see `_build_constriction_model`.
        self._ans.encode_reverse(symbols, self._rows, ranges - 1)

    def decode_rows(self, rows: NDArray[np.float32]) -> NDArray[np.int32]:
        symbols: NDArray[np.int32] = self._ans.decode(self._rows, rows - 1)
        return symbols

    def encode_bits_reverse(self, values: NDArray[np.int32], widths: NDArray[np.int32]) -> None:
        self._ans.encode_reverse(values, self._uniform, np.left_shift(1, widths, dtype=np.int32))

    def decode_bits(self, widths: NDArray[np.int32]) -> NDArray[np.int32]:
        values: NDArray[np.int32] = self._ans.decode(self._uniform, np.left_shift(1, widths, dtype=np.int32))
        return values


def _build_constriction_model(frequencies: NDArray[np.uint32]) -> Any:
    # The fast quantiser gives each of n symbols 1 and shares the remaining 2**24 - n by weight. Weights that
    # sum to just that are taken over as they are, without rounding.
    weights = frequencies.astype(np.float64) - 1
    # A lazy model goes through the symbols from the first to the one that is looked for, the other one bisects.
    walk = float(weights @ np.arange(weights.size)) / float(weights.sum())
    return constriction.stream.model.Categorical(weights, perfect=False, lazy=walk < LONGEST_WALK)


class _Models:
    """Models of one table set, each built when it is first used."""

    def __init__(
        self, build: Callable[[NDArray[np.uint32]], Any], frequencies: tuple[NDArray[np.uint32], ...]
    ) -> None:
        self._build = build
        self._frequencies = frequencies
        self._built: dict[int, Any] = {}

    def __call__(self, table: int) -> Any:
        model = self._built.get(table)
        if model is None:
            model = self._built[table] = self._build(self._frequencies[table])
        return model


class _Backend:
    """A coder and the models it takes, which are kept for as long as their table set lives."""

    def __init__(
        self, coder: Callable[[NDArray[np.uint32]], _Coder], build_model: Callable[[NDArray[np.uint32]], Any]
    ) -> None:
        self.coder = coder
        self._build_model = build_model
        self._models: WeakKeyDictionary[TableSet, _Models] = WeakKeyDictionary()

    def models(self, tables: TableSet) -> _Models:
        models = self._models.get(tables)
        if models is None:
            models = self._models[tables] = _Models(self._build_model, tables.frequencies)
        return models


def _backend(name: str) -> _Backend:
    if name not in _BACKENDS:
        raise UsageError(
            f"entropy coder {name!r} is not available: use one of {', '.join(sorted(_BACKENDS))}"
        )
    return _BACKENDS[name]


_BACKENDS = {"reference": _Backend(ans_reference.Coder, ans_reference.build_model)}
if constriction is not None:
    _BACKENDS["constriction"] = _Backend(_ConstrictionCoder, _build_constriction_model)
