"""The compiled reader of runs against the coder that everything else is read with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compand.coding.ans import FIRST_STATE, AnsReader, AnsWriter, stack_of
from compand.coding.ans_compiled import LOOK_UP_BITS, compiled, model_of, opened, pop_run, used_up
from compand.coding.tables import TableSet
from compand.errors import BitstreamError


def masses(generator: np.random.Generator, size: int) -> np.ndarray:
    return generator.dirichlet(np.full(size, 0.2))


def table_set() -> TableSet:
    """Small and large tables, likely symbols first, last or anywhere, one of a symbol that is nearly certain."""
    generator = np.random.default_rng(0)
    parts = [masses(generator, size) for size in (1, 3, 40, 5000)]
    parts += [np.sort(parts[3]), np.sort(parts[3])[::-1], np.array([1.0, 1e-9, 1e-9])]
    return TableSet.from_masses(parts, np.zeros(len(parts), np.int32), [1e-6] * len(parts))


TABLES = table_set()


def read(data: bytes, runs: list[tuple[int, int]]) -> tuple[np.ndarray, bool]:
    """Symbols of runs, and whether the stream ends with them."""
    model, words = model_of(TABLES.frequencies), stack_of(data)
    state, top = opened(words)
    parts = [np.zeros(0, np.int32)]
    for table, count in runs:
        parts.append(np.empty(count, np.int32))
        starts, look = model.starts[model.places[table] :], model.look[table]
        # Between calls that are not compiled together, a state is an integer of Python.
        state, top = pop_run(words, np.uint64(state), top, starts, look, parts[-1])
    return np.concatenate(parts), used_up(np.uint64(state), top)


runs_of = st.lists(st.tuples(st.integers(0, len(TABLES) - 1), st.integers(0, 40)), max_size=8)


@settings(max_examples=150, deadline=None)
@given(runs=runs_of, seed=st.integers(0, 1 << 30))
def test_what_was_written_is_read(runs, seed):
    generator = np.random.default_rng(seed)
    symbols = np.concatenate(
        [
            np.zeros(0, np.int64),
            *(generator.integers(0, TABLES.sizes[table] + 1, count) for table, count in runs),
        ]
    )
    writer = AnsWriter()
    writer.push_runs(symbols.astype(np.int32), runs, TABLES)
    data = writer.finish()
    found, ended = read(data, runs)
    np.testing.assert_array_equal(found, symbols)
    assert ended
    assert not read(data + b"\1\2\3\4", runs)[1]


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=300), runs=runs_of)
def test_noise_is_read_as_by_the_other_coder(data, runs):
    data = data.rstrip(b"\0")
    reader = AnsReader(data)
    expected = reader.pull_runs(runs, TABLES)
    found, ended = read(data, runs)
    np.testing.assert_array_equal(found, expected)
    try:
        reader.finish()
    except BitstreamError:
        assert not ended
    else:
        assert ended


def test_every_quantile_finds_its_symbol():
    model = model_of(TABLES.frequencies)
    for table, frequencies in enumerate(TABLES.frequencies):
        ends = frequencies.cumsum(dtype=np.int64)
        quantiles = np.unique(np.concatenate([ends - 1, ends[:-1], [0], np.arange(1, 1 << 24, 99991)]))
        bucket = quantiles >> (24 - LOOK_UP_BITS)
        owner = ends.searchsorted(quantiles, side="right")
        assert (model.look[table][bucket] <= owner).all()
        assert (owner <= model.look[table][bucket + 1]).all()


def test_without_a_folder_for_machine_code_it_is_made_anew():
    names: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x\n", names)  # of no file, so that there is no place beside it
    assert compiled(names["double"])(21) == 42


def test_an_empty_stream_is_at_its_end():
    state, top = opened(stack_of(b""))
    assert (state, top) == (FIRST_STATE, 0)
    assert used_up(np.uint64(state), top)


def test_a_stream_that_ends_in_zero_is_refused():
    with pytest.raises(BitstreamError, match="zero byte"):
        stack_of(b"ab\0")
