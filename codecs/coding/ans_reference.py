"""The stream of `compand.coding.ans` in plain Python: what the bytes mean, written to be read.

Asymmetric numeral systems in the streaming form of Duda (arXiv:1311.2540): a 64-bit state, spilled to a stack
of 32-bit words, and probabilities of PRECISION bits. A symbol that owns the quantiles from start to
start + frequency turns the state x into (x // frequency) * 2**PRECISION + start + x % frequency. The state is
at least 2**32 whenever words lie on the stack. Word for word this is the `AnsCoder` of constriction (Bamler,
arXiv:2201.01741), so it codes files where constriction cannot be installed, slowly.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from compand.coding.tables import PRECISION

_MASK = (1 << PRECISION) - 1
_WORD = 32
_SPILL = 64 - PRECISION

Model = list[int]
"""Start of each symbol's quantiles, and 2**PRECISION at the end."""


def build_model(frequencies: NDArray[np.uint32]) -> Model:
    """Cumulative frequencies of one table."""
    return [0, *accumulate(frequencies.tolist())]


class Coder:
    """A stack of symbols: the last one encoded is the first one decoded.

    Args:
        words: the stack with the state on top, as `words` returns it, uint32 [W]; the last word is not zero.
    """

    def __init__(self, words: NDArray[np.uint32]) -> None:
        self._stack: list[int] = words.tolist()
        self._state = 0
        self._refill()
        self._refill()

    def encode_reverse(self, symbols: NDArray[np.int32], model: Model) -> None:
        """Push symbols so that `decode` returns them in the order given."""
        for symbol in reversed(symbols.tolist()):
            self._push(model[symbol], model[symbol + 1] - model[symbol])

    def decode(self, model: Model, count: int) -> NDArray[np.int32]:
        """Pop count symbols."""
        symbols = np.empty(count, dtype=np.int32)
        for i in range(count):
            symbol = bisect_right(model, self._state & _MASK) - 1
            self._pop(model[symbol], model[symbol + 1] - model[symbol])
            symbols[i] = symbol
        return symbols

    def encode_ranges_reverse(self, starts: NDArray[np.float32], frequencies: NDArray[np.float32]) -> None:
        """Push symbols by the quantiles that they own, so that `decode_rows` returns them in the order given."""
        ranges = zip(reversed(starts.tolist()), reversed(frequencies.tolist()), strict=True)
        for start, frequency in ranges:
            self._push(int(start), int(frequency))

    def decode_rows(self, rows: NDArray[np.float32]) -> NDArray[np.int32]:
        """Pop one symbol for each row of frequencies, [n, K]."""
        symbols = np.empty(len(rows), dtype=np.int32)
        for i, row in enumerate(rows):
            symbols[i] = self.decode(build_model(row.astype(np.uint32)), 1)[0]
        return symbols

    def encode_bits_reverse(self, values: NDArray[np.int32], widths: NDArray[np.int32]) -> None:
        """Push values, each equally probable among 2**width (width 1 .. 16)."""
        for value, width in zip(reversed(values.tolist()), reversed(widths.tolist()), strict=True):
            self._push(value << (PRECISION - width), 1 << (PRECISION - width))

    def decode_bits(self, widths: NDArray[np.int32]) -> NDArray[np.int32]:
        """Pop one value for each width."""
        values = np.empty(widths.size, dtype=np.int32)
        for i, width in enumerate(widths.tolist()):
            values[i] = (self._state & _MASK) >> (PRECISION - width)
            self._pop(int(values[i]) << (PRECISION - width), 1 << (PRECISION - width))
        return values

    def words(self) -> NDArray[np.uint32]:
        """The stack with the state on top, without leading zero words."""
        words = [*self._stack]
        state = self._state
        while state:
            words.append(state & 0xFFFFFFFF)
            state >>= _WORD
        return np.array(words, dtype=np.uint32)

    def _push(self, start: int, frequency: int) -> None:
        if self._state >> _SPILL >= frequency:
            self._stack.append(self._state & 0xFFFFFFFF)
            self._state >>= _WORD
        quotient, remainder = divmod(self._state, frequency)
        self._state = (quotient << PRECISION) + start + remainder

    def _pop(self, start: int, frequency: int) -> None:
        self._state = (self._state >> PRECISION) * frequency + (self._state & _MASK) - start
        self._refill()

    def _refill(self) -> None:
        if self._stack and self._state >> _WORD == 0:
            self._state = (self._state << _WORD) | self._stack.pop()
