"""The order of an epoch: every row exactly once over ranks, reproducible, resumable after any batch."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compand.data.sampling import BLOCK, EpochOrder, PackedSampler
from compand.errors import UsageError


@pytest.mark.parametrize("window", [0, 1, 700, 2048])
@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, 4 * BLOCK + 17])
def test_an_order_is_a_permutation_however_it_is_cut(length: int, window: int) -> None:
    order = EpochOrder(length, 3, 5, window=window)
    whole = order.rows(0, length)
    assert sorted(whole.tolist()) == list(range(length))
    again = EpochOrder(length, 3, 5, window=window)
    cuts = [*range(0, length, 37), length]
    np.testing.assert_array_equal(
        np.concatenate([again.rows(a, b) for a, b in pairwise(cuts)]) if length else whole, whole
    )


@pytest.mark.parametrize("window", [0, 1024])
def test_orders_differ_between_epochs_and_seeds(window: int) -> None:
    orders = [EpochOrder(5000, *pair, window=window).rows(0, 5000) for pair in ((0, 0), (0, 1), (1, 0))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(orders[first] == orders[second]) < 0.02


def test_an_order_does_not_depend_on_the_release_of_numpy() -> None:
    assert EpochOrder(10, 1, 2).rows(0, 10).tolist() == [5, 6, 9, 3, 2, 1, 0, 8, 4, 7]


def test_a_windowed_order_reads_few_blocks_at_a_time_and_mixes_within_them() -> None:
    rows = EpochOrder(100 * BLOCK, 0, 0, window=8 * BLOCK).rows(0, 100 * BLOCK)
    for window in rows[: 96 * BLOCK].reshape(12, -1):
        assert len(np.unique(window // BLOCK)) == 8
    assert np.mean(np.abs(np.diff(rows)) <= 1) < 0.01


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(0, 700),
    batch_size=st.integers(1, 70),
    world_size=st.integers(1, 9),
    window=st.sampled_from([0, 300]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_ranks_share_every_row_exactly_once(
    length: int, batch_size: int, world_size: int, window: int, shuffle: bool, epoch: int
) -> None:
    def batches(**options: bool) -> list[list[list[int]]]:
        return [
            list(
                PackedSampler(
                    length,
                    batch_size=batch_size,
                    rank=rank,
                    world_size=world_size,
                    window=window,
                    shuffle=shuffle,
                    epoch=epoch,
                    **options,
                )
            )
            for rank in range(world_size)
        ]

    ranks = batches()
    rows = [row for rank in ranks for batch in rank for row in batch]
    assert sorted(rows) == list(range(length))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    assert all(len(batch) == batch_size for rank in ranks for batch in rank[:-1])

    even = batches(even=True)
    assert len({tuple(map(len, rank)) for rank in even}) == 1
    padded = [row for rank in even for batch in rank for row in batch]
    assert set(padded) == set(range(length)) and len(padded) - length < world_size

    full = batches(drop_last=True)
    assert len(set(map(len, full))) == 1
    kept = [row for rank in full for batch in rank for row in batch]
    assert len(set(kept)) == len(kept) > length - world_size * batch_size - world_size
    assert all(len(batch) == batch_size for rank in full for batch in rank)


@pytest.mark.parametrize("window", [0, 512])
@pytest.mark.parametrize("stop", [0, 1, 7, 15, 16, 17, 31])
def test_resuming_after_any_batch_goes_on_exactly(stop: int, window: int) -> None:
    """16 batches an epoch; `stop` of them are used, across the end of an epoch too."""

    def sampler(epoch: int = 0) -> PackedSampler:
        return PackedSampler(1000, batch_size=32, rank=1, world_size=2, window=window, epoch=epoch)

    whole = [(epoch, batch) for epoch in range(3) for batch in sampler(epoch)]
    first, used = sampler(), []
    while len(used) < stop:
        for batch in first:
            used.append((batch.stream[1], batch))
            if len(used) == stop:
                break
    second = sampler()
    second.load_state_dict(first.state_dict())
    rest = []
    while second.epoch < 3:
        rest += [(batch.stream[1], batch) for batch in second]
    assert used + rest == whole


def test_a_loaded_state_is_given_back_and_used_once() -> None:
    sampler = PackedSampler(100, batch_size=10)
    state = sampler.state_at(4, 3)
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state
    assert len(list(sampler)) == 7
    assert len(list(sampler)) == 10
    sampler.load_state_dict(state)
    sampler.set_epoch(4)
    assert len(list(sampler)) == 7
    sampler.load_state_dict(state)
    sampler.set_epoch(5)
    assert len(list(sampler)) == 10


def test_leaving_an_epoch_early_begins_it_again() -> None:
    sampler = PackedSampler(100, batch_size=10)
    first = next(iter(sampler))
    assert next(iter(sampler)) == first


def test_whoever_takes_the_last_batch_gets_the_next_epoch_then() -> None:
    sampler = PackedSampler(100, batch_size=10)
    epochs = [[next(batches) for _ in range(10)] for batches in (iter(sampler), iter(sampler))]
    assert epochs == [list(PackedSampler(100, batch_size=10, epoch=epoch)) for epoch in range(2)]


@pytest.mark.parametrize(
    "change", [{"length": 99}, {"batch_size": 11}, {"seed": 1}, {"world_size": 2}, {"window": 256}]
)
def test_a_state_of_other_batches_is_refused(change: dict[str, int]) -> None:
    state = PackedSampler(100, batch_size=10).state_dict()
    name = next(iter(change))
    arguments = {"length": 100, "batch_size": 10, **change}
    with pytest.raises(UsageError, match=f"saved with {name}"):
        PackedSampler(**arguments).load_state_dict(state)


@pytest.mark.parametrize("damage", [{"epoch": -1}, {"batches": None}, {"epoch": "1"}])
def test_a_state_that_is_no_position_is_refused(damage: dict[str, object]) -> None:
    sampler = PackedSampler(100, batch_size=10)
    with pytest.raises(UsageError, match="no position"):
        sampler.load_state_dict({**sampler.state_dict(), **damage})


@pytest.mark.parametrize(
    "arguments", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"batch_size": 0}, {"seed": -1}]
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        PackedSampler(**{"length": 10, "batch_size": 2, **arguments})


def test_a_million_rows_over_eight_ranks() -> None:
    seen = np.zeros(1_000_000, dtype=np.uint8)
    for rank in range(8):
        sampler = PackedSampler(1_000_000, batch_size=256, rank=rank, world_size=8)
        for batch in sampler:
            seen[batch] += 1
    assert (seen == 1).all()


def test_a_sampler_travels_without_its_order() -> None:
    sampler = PackedSampler(100_000, batch_size=100)
    first = sampler.batch(3)
    data = pickle.dumps(sampler)
    assert len(data) < 1000
    assert pickle.loads(data).batch(3) == first
    assert pickle.loads(pickle.dumps(first)).stream == first.stream == (0, 0, 3)
