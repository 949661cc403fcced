"""Runs of symbols from the stream of `compand.coding.ans`, as parts of functions that numba compiles.

Where constriction bisects a table for every symbol, the first bits of a quantile are looked up here, which leave one
or a few symbols to choose from. `compand.coding.ans_reference` says what the bytes mean. Loading numba takes longer
than reading a file does, so this is for those who read many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from compand.coding.ans import FIRST_STATE
from compand.coding.tables import PRECISION

LOOK_UP_BITS = 11
"""Bits of a quantile that are looked up: what they give, and the likeliest symbols, stay in the fastest cache."""

_REST = np.uint64(PRECISION - LOOK_UP_BITS)
_PRECISION = np.uint64(PRECISION)
_MASK = np.uint64((1 << PRECISION) - 1)
_WORD = np.uint64(32)
_ONE = np.uint64(1)
_LEAST = np.uint64(1 << 32)
"""What a state is at least while words lie on the stack."""


def compiled(function: Callable[..., Any]) -> Any:
    """The function as machine code, made when it is first called, and kept on disk where there is a folder for it."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


class Model(NamedTuple):
    """The tables of a set.

    Attributes:
        starts: first quantile of the symbols of each table in turn, each with 2**PRECISION at its end.
        places: where those of each table begin.
        look: symbol of the first quantile that has such first bits, [tables, 2**LOOK_UP_BITS + 1].
    """

    starts: NDArray[np.uint32]
    places: NDArray[np.int64]
    look: NDArray[np.int32]


def model_of(frequencies: Sequence[NDArray[np.uint32]]) -> Model:
    """The tables of a set by the frequencies of their symbols."""
    sums = [np.concatenate([[0], table.cumsum(dtype=np.int64)]) for table in frequencies]
    firsts = np.arange((1 << LOOK_UP_BITS) + 1) << (PRECISION - LOOK_UP_BITS)
    firsts[-1] -= 1  # there is no quantile behind the last one, whose symbol bounds the search
    look = np.stack([each.searchsorted(firsts, side="right") - 1 for each in sums])
    places = np.cumsum([0, *(each.size for each in sums[:-1])])
    return Model(np.concatenate(sums).astype(np.uint32), places, look.astype(np.int32))


@compiled
def opened(words: NDArray[np.uint32]) -> tuple[np.uint64, int]:
    """The state that lies on a stack of words, and the number of words below it."""
    top = max(len(words) - 2, 0)
    state = np.uint64(0)
    for place in range(len(words) - 1, top - 1, -1):
        state = (state << _WORD) | np.uint64(words[place])
    return state, top


@compiled
def used_up(state: np.uint64, top: int) -> bool:
    """Whether state and words are what remains when all symbols are read."""
    return bool(top == 0 and state == np.uint64(FIRST_STATE))


@compiled
def pop_run(
    words: NDArray[np.uint32],
    state: np.uint64,
    top: int,
    starts: NDArray[np.uint32],
    look: NDArray[np.int32],
    symbols: NDArray[np.int32],
) -> tuple[np.uint64, int]:
    """Fills symbols with the next ones.

    Args:
        words: the stack.
        state, top: as `opened` gives them.
        starts: first quantile of each symbol of the table, and 2**PRECISION; what follows does not matter.
        look: its row of `Model.look`.
        symbols: to be filled.

    Returns:
        State and number of words then.
    """
    for i in range(len(symbols)):
        quantile = state & _MASK
        bucket = quantile >> _REST
        symbol, last = np.int64(look[bucket]), np.int64(look[bucket + _ONE])
        while symbol < last:
            middle = (symbol + last + 1) >> 1
            if np.uint64(starts[middle]) <= quantile:
                symbol = middle
            else:
                last = middle - 1
        start = np.uint64(starts[symbol])
        frequency = np.uint64(starts[symbol + 1]) - start
        state = (state >> _PRECISION) * frequency + (quantile - start)
        if state < _LEAST and top > 0:
            top -= 1
            state = (state << _WORD) | np.uint64(words[top])
        symbols[i] = symbol
    return state, top
