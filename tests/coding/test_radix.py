"""Equally probable symbols: exact sizes, round trips and damage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compand.coding import radix
from compand.errors import BitstreamError


@given(
    rows=st.lists(st.tuples(st.integers(0, 300), st.integers(2, 5000)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_round_trip_and_size(rows, seed):
    generator = np.random.default_rng(seed)
    symbols = [generator.integers(0, base, count) for count, base in rows]
    data = radix.pack(symbols, [base for _, base in rows])
    assert len(data) == radix.size(rows)
    for row, found in zip(symbols, radix.unpack(data, rows), strict=True):
        assert np.array_equal(row, found)
    assert 8 * len(data) < sum(count * math.log2(base) for count, base in rows) + len(rows) + 8


@pytest.mark.parametrize(("base", "count"), [(2, 9000), (1000, 9000), (1024, 4097), (4095, 1)])
def test_log2_bits_a_symbol(base, count):
    pieces = -(-count // radix.PIECE)
    symbols = np.full(count, base - 1)
    assert np.array_equal(radix.unpack(radix.pack([symbols], [base]), [(count, base)])[0], symbols)
    assert radix.size([(count, base)]) <= (count * math.log2(base) + pieces) / 8 + 1


def test_powers_of_two_are_plain_bits():
    assert radix.pack([np.array([1, 2, 3, 0])], [4]) == bytes([0b00111001])


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b"\xff", [(2, 10)]),  # 127 of 100 numbers, and a bit behind them
        (b"\x7f", [(2, 10)]),
        (b"\xf0", [(2, 4)]),
        (b"", [(1, 2)]),
        (b"\x00\x00", [(1, 2)]),
    ],
)
def test_what_no_packer_wrote_is_refused(data, rows):
    with pytest.raises(BitstreamError, match="damaged"):
        radix.unpack(data, rows)
