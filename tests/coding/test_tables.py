"""Integer probability tables: rounding, validation, storage and information content."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compand.coding.tables import (
    MAX_SYMBOLS,
    PRECISION,
    TableSet,
    code_lengths,
    escape_codes,
    escaped_values,
)
from compand.errors import CheckpointError, UsageError

TOTAL = 1 << PRECISION
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

masses_arrays = hnp.arrays(
    np.float64, st.integers(1, 300), elements=st.floats(0, 1e300, allow_nan=False, allow_subnormal=True)
)


@given(masses=masses_arrays, escape=st.floats(1e-300, 1e300))
def test_rounded_masses_sum_exactly_and_leave_nothing_at_zero(masses: np.ndarray, escape: float) -> None:
    (table,) = TableSet.from_masses([masses], [0], [escape]).frequencies
    assert table.dtype == np.uint32
    assert table.size == masses.size + 1
    assert int(table.sum(dtype=np.int64)) == TOTAL
    assert table.min() >= 1


@given(counts=st.lists(st.integers(1, 1000), min_size=1, max_size=50))
def test_masses_that_are_frequencies_already_are_kept(counts: list[int]) -> None:
    frequencies = np.array([*counts, TOTAL - sum(counts)])
    (table,) = TableSet.from_masses([frequencies[:-1] / TOTAL], [0], [frequencies[-1] / TOTAL]).frequencies
    assert table.tolist() == frequencies.tolist()


def test_largest_remainders_receive_what_rounding_down_leaves() -> None:
    unit = 1 / TOTAL
    masses = np.array([10.2, 20.7, 30.6, 0.1]) * unit
    (table,) = TableSet.from_masses([masses], [0], [1 - masses.sum()]).frequencies
    # The fourth is raised from 0.1 to 1; the others pay in proportion, which moves no remainder past another.
    assert table.tolist() == [10, 21, 31, 1, TOTAL - 63]


def test_a_mass_far_below_all_others_is_raised_without_harm_to_the_sum() -> None:
    masses = np.full(MAX_SYMBOLS, 1e-12)
    masses[100] = 1.0
    (table,) = TableSet.from_masses([masses], [0], [0.0]).frequencies
    assert table[100] == TOTAL - MAX_SYMBOLS
    assert (np.delete(table, 100) == 1).all()


@pytest.mark.parametrize(
    ("masses", "escape"),
    [
        ([], 1.0),
        ([np.nan], 0.0),
        ([np.inf], 0.0),
        ([-0.1, 1.0], 0.0),
        ([1.0], -1.0),
        ([1.0], math.nan),
        ([0.0, 0.0], 0.0),
        ([[0.5, 0.5]], 0.0),
        (np.ones(MAX_SYMBOLS + 1), 0.0),
    ],
)
def test_unusable_masses_are_refused(masses: object, escape: float) -> None:
    with pytest.raises(UsageError):
        TableSet.from_masses([np.array(masses)], [0], [escape])


def test_each_table_needs_its_escape_mass() -> None:
    with pytest.raises(UsageError, match="2 tables but 1 escape"):
        TableSet.from_masses([np.ones(2), np.ones(2)], [0, 0], [0.0])


@pytest.mark.parametrize("scale", [0.05, 0.11, 0.5, 1.0, 7.3, 300.0])
def test_gaussian_tables_are_the_integrated_density(scale: float) -> None:
    tail = 2.0**-20
    tables = TableSet.gaussian([scale], tail)
    (table,) = tables.frequencies
    reach = -int(tables.lows[0])
    assert int(tables.sizes[0]) == 2 * reach + 1
    assert np.abs(table[:-1].astype(int) - table[-2::-1]).max() <= 1
    edges = np.arange(-reach, reach + 2) - 0.5
    # The distribution function by erf is an oracle of its own near the middle, where erfc - erfc cancels.
    distribution = np.array([0.5 * (1 + math.erf(edge / scale / math.sqrt(2))) for edge in edges])
    assert np.abs(table[:-1] / TOTAL - np.diff(distribution)).max() < (2 * reach + 3) / TOTAL
    beyond = math.erfc((reach + 0.5) / scale / math.sqrt(2))
    assert beyond <= tail
    assert reach == 0 or math.erfc((reach - 0.5) / scale / math.sqrt(2)) > tail
    assert abs(table[-1] - beyond * TOTAL) <= 1


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e6])
def test_unusable_scales_are_refused(scale: float) -> None:
    with pytest.raises(UsageError, match="scale"):
        TableSet.gaussian([1.0, scale])


@pytest.mark.parametrize("tail", [0.0, 1.0, -1.0, math.nan])
def test_unusable_tails_are_refused(tail: float) -> None:
    with pytest.raises(UsageError, match="tail"):
        TableSet.gaussian([1.0], tail)


@pytest.mark.parametrize(
    ("frequencies", "lows"),
    [
        ([], []),
        ([[TOTAL]], [0]),
        ([[TOTAL, 0]], [0]),
        ([[TOTAL - 1, 2]], [0]),
        ([[TOTAL + 1, -1]], [0]),
        ([[2**63 - 1, 2**63 - 1, TOTAL + 2]], [0]),
        ([[0.5, 0.5]], [0]),
        ([[[1, TOTAL - 1]]], [0]),
        ([[1, TOTAL - 1]], [0, 0]),
        ([[1, TOTAL - 1]], [0.0]),
        ([[1, TOTAL - 1]], [2**31]),
        ([[1, TOTAL - 1]], [-(2**31) - 1]),
        ([[1, 1, TOTAL - 2]], [INT32_MAX]),
    ],
)
def test_inconsistent_tables_are_refused(frequencies: list[list[int]], lows: list[int]) -> None:
    with pytest.raises(UsageError):
        TableSet(frequencies, np.array(lows))


def test_tables_may_touch_both_ends_of_the_integers() -> None:
    tables = TableSet([[1, TOTAL - 1]] * 2, [INT32_MIN, INT32_MAX])
    assert tables.lows.tolist() == [INT32_MIN, INT32_MAX]


def test_tables_cannot_be_changed() -> None:
    given_frequencies = np.array([1, TOTAL - 1])
    tables = TableSet([given_frequencies], [0])
    given_frequencies[0] = 7
    assert tables.frequencies[0].tolist() == [1, TOTAL - 1]
    for array in (*tables.frequencies, tables.lows, tables.sizes):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_arrays_and_pickle_bring_back_the_same_tables() -> None:
    tables = TableSet.gaussian([0.1, 1.0, 20.0])
    arrays = tables.arrays()
    assert set(arrays) == {"frequencies", "sizes", "lows"}
    assert all(array.dtype == np.int32 and array.ndim == 1 for array in arrays.values())
    for again in (TableSet.from_arrays(arrays), pickle.loads(pickle.dumps(tables))):
        assert len(again) == 3
        assert again.lows.tolist() == tables.lows.tolist()
        assert again.sizes.tolist() == tables.sizes.tolist()
        assert all((a == b).all() for a, b in zip(again.frequencies, tables.frequencies, strict=True))


def damaged_arrays() -> dict[str, dict[str, np.ndarray]]:
    intact = TableSet.gaussian([0.1, 1.0, 20.0]).arrays()

    def change(name: str, place: int, by: int) -> dict[str, np.ndarray]:
        array = intact[name].copy()
        array[place] += by
        return {**intact, name: array}

    return {
        "missing": {"sizes": intact["sizes"], "lows": intact["lows"]},
        "empty": {name: array[:0] for name, array in intact.items()},
        "wrong type": {**intact, "lows": intact["lows"].astype(np.int64)},
        "a list": {**intact, "lows": intact["lows"].tolist()},
        "wrong rank": {**intact, "lows": intact["lows"][None]},
        "too few lows": {**intact, "lows": intact["lows"][:-1]},
        "truncated": {**intact, "frequencies": intact["frequencies"][:-1]},
        "wrong sum": change("frequencies", 1, 1),
        "negative": change("frequencies", 1, -TOTAL),
        "size off by one": change("sizes", 0, 1),
        "huge size": change("sizes", 0, 2**31 - 1 - int(intact["sizes"][0])),
        "negative size": change("sizes", 0, -(10**6)),
        "beyond int32": change("lows", 2, INT32_MAX),
    }


@pytest.mark.parametrize("damage", damaged_arrays())
def test_damaged_arrays_are_a_checkpoint_error(damage: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        TableSet.from_arrays(damaged_arrays()[damage])
    assert "\n" not in str(caught.value)


def test_bits_is_the_information_content_with_escapes() -> None:
    tables = TableSet(
        [[TOTAL // 2, TOTAL // 4, TOTAL // 4], [TOTAL - 2, 1, 1]],
        [10, -3],
    )
    # Four listed values, the nearest above and below each table (codes 1 and 2), one farther above (code 3).
    values = [10, 11, -3, -2, 12, 9, -1, -4, 13]
    indexes = [0, 0, 1, 1, 0, 0, 1, 1, 0]
    rare = 24 - math.log2(TOTAL - 2)
    expected = [1, 2, rare, 24, 2 + 6, 2 + 6 + 1, 24 + 6, 24 + 6 + 1, 2 + 6 + 1]
    assert tables.bits(values, np.array(indexes, dtype=np.uint8)) == pytest.approx(expected)
    assert tables.bits([], []).shape == (0,)


@pytest.mark.parametrize("index", [-1, 2])
def test_bits_refuses_an_unknown_table(index: int) -> None:
    with pytest.raises(UsageError, match="2 tables"):
        TableSet([[1, TOTAL - 1]] * 2, [0, 0]).bits([0], [index])


def test_bits_refuses_rows_of_different_lengths() -> None:
    with pytest.raises(UsageError):
        TableSet([[1, TOTAL - 1]], [0]).bits([0, 1], [0])


@settings(max_examples=300)
@given(
    low=st.one_of(st.integers(INT32_MIN, INT32_MAX), st.sampled_from([INT32_MIN, INT32_MAX])),
    size=st.integers(1, MAX_SYMBOLS),
    value=st.one_of(st.integers(INT32_MIN, INT32_MAX), st.sampled_from([INT32_MIN, INT32_MAX])),
)
def test_escape_codes_are_positive_short_and_invertible(low: int, size: int, value: int) -> None:
    size = min(size, INT32_MAX - low + 1)
    if low <= value < low + size:
        value = low + size if low + size <= INT32_MAX else low - 1
    lows, sizes, values = (np.array([number], dtype=np.int64) for number in (low, size, value))
    codes = escape_codes(values, lows, sizes)
    assert codes[0] >= 1
    assert escaped_values(codes, lows, sizes)[0] == value
    assert code_lengths(codes)[0] == int(codes[0]).bit_length() - 1 <= 33
