"""Integer probability tables: what an entropy coder needs to know about each symbol, and nothing else.

Tables are made once, in float64, when a checkpoint is exported, and travel in it as integers. No
floating-point number stands between the bytes of a file and its symbols, so the file decodes alike on every
machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compand.errors import CheckpointError, UsageError

PRECISION = 24
"""Every table sums to 2**PRECISION."""

MAX_TABLES = 1 << 16
MAX_SYMBOLS = 1 << 16
"""The most values one table may hold, its escape not counted."""

ESCAPE_LENGTH_BITS = 6
"""Width of the field that says how many bits of an escaped value follow."""

UNIFORM_SHARE = 10
"""Of the rows that `share_out` makes, at least 2**-10 is shared evenly: no symbol costs much more than log2 K."""

_TOTAL = 1 << PRECISION
_INT32 = np.iinfo(np.int32)


class TableSet:
    """T frequency tables: table t codes the values lows[t] .. lows[t] + sizes[t] - 1 and, last, an escape.

    The escape stands for every other int32; the value itself follows in the stream, see `coding.ans`.
    Sets are immutable, compared by identity, and safe to share between threads.

    Args:
        frequencies: T arrays; array t has sizes[t] + 1 integers >= 1 with sum 2**24, the last for the escape.
        lows: the smallest value of each table, T integers.

    Raises:
        UsageError: wrong sums, sizes, ranges or types.
    """

    frequencies: tuple[NDArray[np.uint32], ...]
    lows: NDArray[np.int32]
    sizes: NDArray[np.int32]

    def __init__(self, frequencies: Sequence[ArrayLike], lows: ArrayLike) -> None:
        self.frequencies = tuple(_checked_frequencies(t, table) for t, table in enumerate(frequencies))
        if not 1 <= len(self.frequencies) <= MAX_TABLES:
            raise UsageError(f"a table set has {len(self.frequencies)} tables: give 1 to {MAX_TABLES}")
        first = np.asarray(lows)
        if first.shape != (len(self.frequencies),) or first.dtype.kind not in "iu":
            raise UsageError(
                f"lows are {first.dtype}{list(first.shape)}: give {len(self.frequencies)} integers"
            )
        sizes = np.array([table.size - 1 for table in self.frequencies], dtype=np.int64)
        last = first.astype(np.int64) + sizes - 1
        if first.min() < _INT32.min or first.max() > _INT32.max or last.max() > _INT32.max:
            raise UsageError("a table reaches beyond the 32-bit integers: choose lows nearer to zero")
        self.lows = first.astype(np.int32)
        self.sizes = sizes.astype(np.int32)
        for array in (*self.frequencies, self.lows, self.sizes):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.frequencies)

    def __repr__(self) -> str:
        return f"TableSet({len(self)} tables, {int(self.sizes.sum())} symbols)"

    @classmethod
    def from_masses(
        cls, masses: Sequence[ArrayLike], lows: ArrayLike, escape_masses: Sequence[float]
    ) -> TableSet:
        """Round probability masses to tables by the method of largest remainders, to 1 at least.

        Args:
            masses: T arrays of float64 >= 0, the mass of each value without the escape, of any sum.
            lows: the value that masses[t][0] belongs to, T integers.
            escape_masses: mass of all other values together, T floats >= 0 on the same scale as masses[t].

        Raises:
            UsageError: NaN, negative or infinite masses, an empty table, or nothing but zeros.
        """
        if len(masses) != len(escape_masses):
            raise UsageError(f"{len(masses)} tables but {len(escape_masses)} escape masses: give one a table")
        tables = []
        for t, (mass, escape) in enumerate(zip(masses, escape_masses, strict=True)):
            values = np.asarray(mass, dtype=np.float64)
            if values.ndim != 1 or not 1 <= values.size <= MAX_SYMBOLS:
                raise UsageError(
                    f"masses of table {t} have shape {values.shape}: give a row of 1 to {MAX_SYMBOLS}"
                )
            tables.append(_round_masses(t, np.append(values, float(escape))))
        return cls(tables, lows)

    @classmethod
    def gaussian(cls, scales: Sequence[float], tail: float = 2.0**-20) -> TableSet:
        """Tables of zero-mean normal densities integrated over [k - 1/2, k + 1/2].

        Args:
            scales: standard deviations > 0, in quantisation steps.
            tail: values are listed out to the first +-k beyond which at most this mass lies.

        Raises:
            UsageError: a scale is not positive, not finite or needs over 2**16 values; tail not in (0, 1).
        """
        if not 0 < tail < 1:
            raise UsageError(f"tail is {tail}: give a probability between 0 and 1")
        masses, lows, escapes = [], [], []
        for scale in scales:
            if not (math.isfinite(scale) and scale > 0):
                raise UsageError(f"scale is {scale}: give a positive standard deviation")
            unit = 1 / (scale * math.sqrt(2))
            beyond = [
                1.0
            ]  # beyond[k] is the mass with |x| > k - 1/2, to full relative precision thanks to erfc
            while beyond[-1] > tail:
                if 2 * len(beyond) > MAX_SYMBOLS:
                    raise UsageError(
                        f"scale {scale} needs more than {MAX_SYMBOLS} values: raise tail or lower it"
                    )
                beyond.append(math.erfc((len(beyond) - 0.5) * unit))
            reach = len(beyond) - 2
            side = np.array([(beyond[k] - beyond[k + 1]) / 2 for k in range(1, reach + 1)])
            masses.append(np.concatenate([side[::-1], [beyond[0] - beyond[1]], side]))
            lows.append(-reach)
            escapes.append(beyond[-1])
        return cls.from_masses(masses, np.array(lows, dtype=np.int32), escapes)

    def arrays(self) -> dict[str, NDArray[np.int32]]:
        """Int32 rows for a checkpoint: frequencies (all tables in turn), sizes [T] (no escape), lows [T]."""
        return {
            "frequencies": np.concatenate(self.frequencies).astype(np.int32),
            "sizes": self.sizes.copy(),
            "lows": self.lows.copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> TableSet:
        """Inverse of `arrays`.

        Raises:
            CheckpointError: an array is missing, not a row of int32, or does not describe valid tables.
        """
        parts = {}
        for name in ("frequencies", "sizes", "lows"):
            array = arrays.get(name)
            if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != 1:
                raise CheckpointError(
                    f"probability tables lack 32-bit {name} in a row: get the checkpoint again"
                )
            parts[name] = array
        frequencies, sizes = parts["frequencies"], parts["sizes"].astype(np.int64)
        if not 1 <= sizes.size <= MAX_TABLES or sizes.min() < 1 or int((sizes + 1).sum()) != frequencies.size:
            raise CheckpointError("sizes of the probability tables do not fit them: get the checkpoint again")
        try:
            return cls(np.split(frequencies, np.cumsum(sizes + 1)[:-1]), parts["lows"])
        except UsageError as error:
            raise CheckpointError(
                f"damaged probability tables ({error}): get the checkpoint again"
            ) from error

    def bits(self, values: ArrayLike, indexes: ArrayLike) -> NDArray[np.float64]:
        """Information content of each value under its table, what follows an escape included, in bits.

        Args:
            values: int32-ranged integers [N].
            indexes: table of each value [N], 0 .. T - 1.

        Raises:
            UsageError: lengths differ or an index names no table.
        """
        value, table = np.asarray(values, dtype=np.int64), np.asarray(indexes, dtype=np.int64)
        if value.ndim != 1 or value.shape != table.shape:
            raise UsageError(f"values {value.shape} and indexes {table.shape}: give two rows of one length")
        if table.size and (table.min() < 0 or table.max() >= len(self)):
            raise UsageError(f"indexes reach {table.min()} .. {table.max()}: there are {len(self)} tables")
        low, size = self.lows[table].astype(np.int64), self.sizes[table].astype(np.int64)
        symbol = value - low
        outside = (symbol < 0) | (symbol >= size)
        content, starts = self._information
        result: NDArray[np.float64] = content[starts[table] + np.where(outside, size, symbol)]
        codes = escape_codes(value[outside], low[outside], size[outside])
        result[outside] += ESCAPE_LENGTH_BITS + code_lengths(codes)
        return result

    @cached_property
    def least_bits(self) -> NDArray[np.float64]:
        """Information content of each table's likeliest symbol in bits, [T]: no symbol costs less."""
        return np.array([-np.log2(table.max() / _TOTAL) for table in self.frequencies])

    @cached_property
    def _information(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        shares = np.concatenate(self.frequencies).astype(np.float64) / _TOTAL
        content: NDArray[np.float64] = -np.log2(shares)
        ends = np.cumsum(self.sizes.astype(np.int64) + 1)
        return content, ends - self.sizes - 1


def escape_codes(
    values: NDArray[np.int64], lows: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Number values outside their tables from 1, nearest first: above and below the table in turn."""
    above = values - (lows + sizes)
    below = lows - 1 - values
    return np.where(above >= 0, 2 * above, 2 * below + 1) + 1


def escaped_values(
    codes: NDArray[np.int64], lows: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Inverse of `escape_codes`."""
    distance = (codes - 1) >> 1
    return np.where((codes - 1) & 1, lows - 1 - distance, lows + sizes + distance)


def code_lengths(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bits of each code below its leading one, 0 .. 33 for values and tables in int32."""
    return np.frexp(codes.astype(np.float64))[1].astype(np.int64) - 1


def least_share(symbols: int) -> int:
    """What each of so many symbols has at least in the rows of `share_out`, 2 or more."""
    return max(_TOTAL >> (UNIFORM_SHARE + (symbols - 1).bit_length()), 2)


def share_out(weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Frequencies of rows of symbols by their weights, in integer arithmetic.

    Every symbol has `least_share(K)`; the rest is shared by weight, rounded down, and what rounding leaves goes to the
    first of the heaviest. No product reaches 2**53, below which the floor of a float64 quotient is the integer one.

    Args:
        weights: integers 0 .. 2**24, [n, K], 2 <= K <= 2**12, none of the rows all 0.

    Returns:
        Integers >= 2, [n, K]; the sum of each row is 2**PRECISION.
    """
    least = least_share(weights.shape[1])
    free = _TOTAL - weights.shape[1] * least
    shared = weights * float(free)
    shared /= weights.sum(1, keepdims=True)
    np.floor(shared, out=shared)
    rest = free - shared.sum(1)
    shared += least
    shared[np.arange(len(shared)), weights.argmax(1)] += rest
    return shared.astype(np.float32)


def _checked_frequencies(t: int, table: ArrayLike) -> NDArray[np.uint32]:
    given = np.asarray(table)
    if given.dtype.kind not in "iu" or given.ndim != 1 or not 2 <= given.size <= MAX_SYMBOLS + 1:
        raise UsageError(
            f"table {t} is {given.dtype}{list(given.shape)}: give 2 to {MAX_SYMBOLS + 1} integers in a row"
        )
    if given.min() < 1 or given.max() >= _TOTAL or int(given.sum(dtype=np.int64)) != _TOTAL:
        raise UsageError(f"frequencies of table {t} are not >= 1 with sum 2**{PRECISION}: use from_masses")
    return given.astype(np.uint32)


def _round_masses(t: int, masses: NDArray[np.float64]) -> NDArray[np.uint32]:
    if not np.isfinite(masses).all() or (masses < 0).any() or not masses.any():
        raise UsageError(
            f"masses of table {t} are not finite, >= 0 and positive somewhere: check the density"
        )
    # Dividing by the largest first keeps the sums below exact in range for subnormal and for huge masses.
    masses = masses / masses.max()
    # Frequencies below 1 are raised to 1 at the expense of all others, which may push further ones below 1.
    raised = np.zeros(masses.size, dtype=bool)
    while True:
        share = (_TOTAL - int(raised.sum())) / masses[~raised].sum()
        scaled = np.where(raised, 1.0, masses * share)
        below = (scaled < 1) & ~raised
        if not below.any():
            break
        raised |= below
    frequencies: NDArray[np.int64] = np.floor(scaled).astype(np.int64)
    missing = _TOTAL - int(frequencies.sum())
    by_remainder = np.argsort(np.where(raised, np.inf, frequencies - scaled), kind="stable")
    frequencies[by_remainder[:missing]] += 1
    return frequencies.astype(np.uint32)
