"""Symbols with frequencies of their own: integer shares, and both coders on the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from compand.coding import ans
from compand.coding.tables import PRECISION, least_share, share_out

SIZES = [2, 3, 8, 1000, 1024, 4096]


def weights(rows: int, symbols: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    drawn = np.floor(generator.exponential(size=(rows, symbols)) ** 4 * 1000)
    drawn = np.minimum(drawn, 1 << 24)
    drawn[:, 0] += 1
    return drawn


@pytest.mark.parametrize("symbols", SIZES)
def test_shares_are_those_of_integer_arithmetic(symbols):
    given = np.concatenate([weights(5, symbols), np.eye(symbols)[:2] * (1 << 24), np.ones((1, symbols))])
    least = least_share(symbols)
    free = (1 << PRECISION) - symbols * least
    for row, found in zip(given, share_out(given), strict=True):
        exact = [int(weight) * free // int(row.sum()) + least for weight in row]
        exact[int(row.argmax())] += (1 << PRECISION) - sum(exact)
        assert found.astype(int).tolist() == exact
        assert found.min() >= max(least, 2) and int(found.astype(np.int64).sum()) == 1 << PRECISION


@pytest.mark.parametrize("symbols", SIZES)
def test_least_share_bounds_the_cost(symbols):
    bits = PRECISION - np.log2(share_out(np.eye(symbols)[:1] * (1 << 24)))
    assert bits.max() <= max(11 + np.log2(symbols), 23) and bits.min() < 0.002


@pytest.mark.parametrize("symbols", SIZES)
def test_both_coders_read_and_write_the_same(symbols):
    rows = share_out(weights(60, symbols))
    generator = np.random.default_rng(1)
    # The ends of the quantiles are cases of their own.
    drawn = np.concatenate([[0, symbols - 1, 0, symbols - 1], generator.integers(0, symbols, 56)])
    own = np.take_along_axis(rows, drawn[:, None], 1)[:, 0]
    starts = np.take_along_axis(rows.cumsum(1), drawn[:, None], 1)[:, 0] - own
    written = set()
    for backend in ans._BACKENDS:
        writer = ans.AnsWriter(backend)
        writer.push_ranges(starts[:25], own[:25])
        writer.push_ranges(starts[25:], own[25:])
        written.add(writer.finish())
    (data,) = written
    for backend in ans._BACKENDS:
        reader = ans.AnsReader(data, backend)
        found = [reader.pull_rows(rows[:7]), reader.pull_rows(rows[7:])]
        reader.finish()
        assert np.array_equal(np.concatenate(found), drawn)
    assert 8 * len(data) == pytest.approx(-np.log2(own / (1 << PRECISION)).sum(), abs=32)
