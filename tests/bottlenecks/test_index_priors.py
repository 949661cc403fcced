"""Index priors: exact round trips, lengths against information, what they learn, and malformed arrays."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from compand.bottlenecks import index_context, indices
from compand.bottlenecks.index_context import (
    ContextPrior,
    IndexNetworks,
    contexts,
    integers,
    powers,
)
from compand.bottlenecks.indices import (
    CLASSES,
    ConditionalPrior,
    Frame,
    IndexPrior,
    ModelledPrior,
    Near,
    StaticPrior,
    UniformPrior,
    Vocabulary,
    clusters,
    schedule,
)
from compand.errors import BitstreamError, CheckpointError, UsageError

NESTED = Vocabulary(((4,), (9,), (32,)), True)
RESIDUAL = Vocabulary(((16,), (16, 16), (16, 16, 16)), False)
PRODUCT = Vocabulary(((12, 7),), True)

PRIORS: list[type[IndexPrior]] = [UniformPrior, StaticPrior, ConditionalPrior, ContextPrior]
every_prior = pytest.mark.parametrize("kind", PRIORS)
modelled = pytest.mark.parametrize("kind", PRIORS[1:])


def chain(vocabulary: Vocabulary, depth: int, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Indices that follow those on their left and above, and in later planes those of the plane before."""
    generator = np.random.default_rng(seed)
    sizes = vocabulary.sizes[depth - 1]
    grid = np.zeros((len(sizes), *shape), np.int64)
    for plane, codes in enumerate(sizes):
        for row, column in np.ndindex(*shape):
            left, up = grid[plane, row, column - 1] * (column > 0), grid[plane, row - 1, column] * (row > 0)
            told = grid[plane - 1, row, column] if plane else generator.choice([left, up])
            grid[plane, row, column] = (3 * told + generator.integers(0, 2)) % codes
    return grid


def tables_of(vocabulary: Vocabulary, number: int = 30) -> tuple[list[np.ndarray], Callable]:
    """Counts of indices, and of pairs, of some chains at every depth."""
    slots = range(len(vocabulary.slots))
    counts = [np.zeros(vocabulary.codes(slot)) for slot in slots]
    candidates = ConditionalPrior.candidates(vocabulary)
    pairs: list[list[np.ndarray]] = [
        [
            np.zeros(((vocabulary.codes_before(s, near.back) or 0) + 1, vocabulary.codes(s)))
            for near in candidates
        ]
        for s in slots
    ]
    starts = [indices.pair_starts(vocabulary, near) for near in candidates]
    for depth in range(1, len(vocabulary.sizes) + 1):
        first = vocabulary.shared(depth)
        for seed in range(number):
            grid = chain(vocabulary, depth, (6, 8) if vocabulary.planar else (1, 40), seed + 100)
            for plane in range(first, len(grid)):
                np.add.at(counts[vocabulary.slot(depth, plane)], grid[plane].ravel(), 1)
            for number_, (tables, symbols) in enumerate(
                ConditionalPrior.pairs(vocabulary, grid, depth, first)
            ):
                for table, symbol in zip(tables.tolist(), symbols.tolist(), strict=True):
                    slot = int(np.searchsorted(starts[number_], table, "right")) - 1
                    pairs[slot][number_][table - starts[number_][slot], symbol] += 1
    return counts, lambda slot, candidate: pairs[slot][candidate]


@cache
def networks(vocabulary: Vocabulary, steps: int = 120) -> IndexNetworks:
    """Networks trained on chains."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = IndexNetworks(vocabulary, 8, 24)
        optimizer = torch.optim.Adam(made.parameters(), 1e-2)
        depths = torch.arange(1, len(vocabulary.sizes) + 1)
        batches = [batch(vocabulary, seed) for seed in range(12)]
        for step in range(steps):
            grids = batches[step % len(batches)]
            loss = made(grids, depths).sum() / (grids >= 0).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return made.eval().requires_grad_(False)


def batch(vocabulary: Vocabulary, seed: int) -> Tensor:
    """A chain of every depth, [depths, planes, h, w], -1 in planes that it does not use."""
    shape = (6, 8) if vocabulary.planar else (1, 40)
    depths = range(1, len(vocabulary.sizes) + 1)
    result = np.full((len(depths), max(map(len, vocabulary.sizes)), *shape), -1)
    for depth in depths:
        grid = chain(vocabulary, depth, shape, seed)
        result[depth - 1, : len(grid)] = grid
    return torch.from_numpy(result)


@cache
def prior_of(kind: type[IndexPrior], vocabulary: Vocabulary) -> IndexPrior:
    if kind is UniformPrior:
        return UniformPrior(vocabulary)
    if kind is StaticPrior:
        return StaticPrior.from_counts(vocabulary, tables_of(vocabulary)[0])[0]
    if kind is ConditionalPrior:
        return ConditionalPrior.from_counts(vocabulary, tables_of(vocabulary)[1])[0]
    return ContextPrior.from_networks(networks(vocabulary))


# ------------------------------------------------------------------------------------------------ vocabularies


def test_depths_that_begin_alike_are_a_family():
    assert NESTED.families == ((4,), (9,), (32,)) and NESTED.family_of == (0, 1, 2)
    assert RESIDUAL.families == ((16, 16, 16),) and RESIDUAL.family_of == (0, 0, 0)
    assert [RESIDUAL.shared(depth) for depth in (1, 2, 3)] == [0, 1, 2]
    assert [NESTED.shared(depth) for depth in (1, 2, 3)] == [0, 0, 0]
    assert PRODUCT.slots == [(0, 0), (0, 1)] and PRODUCT.codes_before(1, 1) == 12
    assert RESIDUAL.slot(3, 1) == RESIDUAL.slot(2, 1) == 1 and NESTED.slot(3, 0) == 2


@pytest.mark.parametrize("vocabulary", [NESTED, RESIDUAL, PRODUCT])
def test_neighbours_are_decoded_before(vocabulary):
    sizes = vocabulary.sizes[-1]
    shape = (5, 6) if vocabulary.planar else (1, 9)
    frame = Frame(sizes, *shape)
    done = np.ones(frame.flat.size, bool)
    done[frame.cells().ravel()] = False
    for plane, cells in schedule(len(sizes), *shape, True):
        slot = vocabulary.slot(len(vocabulary.sizes), plane)
        for neighbours in (contexts(vocabulary, slot), [Near(0, -1, 0)] if vocabulary.planar else []):
            assert done[cells[:, None] + frame.offsets(neighbours)].all()
        done[cells] = True
    assert done.all()


def test_a_picture_takes_few_steps():
    assert len(schedule(1, 32, 48, True)) == 48 + 2 * 31
    assert len(schedule(8, 1, 75, True)) == 8 * 75
    assert len(schedule(1, 32, 48, False)) == 1


# ------------------------------------------------------------------------------------------------------ coding


@every_prior
@pytest.mark.parametrize("vocabulary", [NESTED, RESIDUAL, PRODUCT])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 33), (3, 1), (5, 7)])
def test_round_trip(kind, vocabulary, shape):
    if not vocabulary.planar and shape[0] > 1:
        shape = (1, shape[0] * shape[1])
    prior = prior_of(kind, vocabulary)
    generator = np.random.default_rng(0)
    for depth, sizes in enumerate(vocabulary.sizes, 1):
        for grid in (
            chain(vocabulary, depth, shape),
            np.stack([generator.integers(0, codes, shape) for codes in sizes]),
            np.stack([np.full(shape, codes - 1) for codes in sizes]),
        ):
            data = prior.encode(grid, depth)
            assert np.array_equal(prior.decode(data, shape, depth), grid)
            assert len(data) <= prior.bits(grid, depth) / 8 + 5
            assert prior.bits(grid, depth) >= prior.least_bits(depth) * grid[0].size - 1e-6


@every_prior
def test_bytes_are_what_the_bits_say(kind):
    prior = prior_of(kind, NESTED)
    grid = chain(NESTED, 3, (24, 32))
    assert 8 * len(prior.encode(grid, 3)) == pytest.approx(prior.bits(grid, 3), abs=40)


@modelled
def test_bits_do_not_depend_on_how_many_are_worked_on(kind, monkeypatch):
    """Rows are integers: whatever the batches, encoder and decoder have the same ones."""
    prior = prior_of(kind, RESIDUAL)
    grid = chain(RESIDUAL, 3, (1, 50))
    data = prior.encode(grid, 3)
    monkeypatch.setattr(indices, "ROW_CHUNK", 48)
    assert prior.encode(grid, 3) == data
    assert np.array_equal(prior.decode(data, (1, 50), 3), grid)


def test_the_more_a_prior_knows_the_less_it_takes():
    for vocabulary, shape in ((NESTED, (16, 16)), (RESIDUAL, (1, 120)), (PRODUCT, (12, 12))):
        depth = len(vocabulary.sizes)
        grid = chain(vocabulary, depth, shape, seed=3)
        bits = [prior_of(kind, vocabulary).bits(grid, depth) for kind in PRIORS]
        assert bits[1] < 1.01 * bits[0] and bits[2] < 0.9 * bits[1] and bits[3] < 0.9 * bits[0]
    assert bits[3] < bits[2]


@modelled
def test_damage_gives_other_indices_or_an_error(kind):
    prior = prior_of(kind, NESTED)
    grid = chain(NESTED, 3, (6, 6))
    data = bytearray(prior.encode(grid, 3))
    noticed = 0
    for place in range(len(data)):
        damaged = bytes(data[:place]) + bytes([data[place] ^ 0x55]) + bytes(data[place + 1 :])
        try:
            found = prior.decode(damaged, (6, 6), 3)
            assert found.min() >= 0 and found.max() < 32
        except BitstreamError:
            noticed += 1
    assert noticed > 0.9 * len(data)


@modelled
def test_codebooks_too_large_for_a_model(kind):
    with pytest.raises(UsageError, match="at most 4096"):
        ModelledPrior.__init__(kind.__new__(kind), Vocabulary(((5000,),), True))


# -------------------------------------------------------------------------------------------------- conditional


def test_clusters_find_what_is_followed_alike():
    generator = np.random.default_rng(0)
    groups = np.arange(60) % 3
    means = generator.dirichlet(np.ones(20), 3) * 500
    pairs = np.concatenate([generator.poisson(means[groups]), generator.poisson(20, (1, 20))]).astype(float)
    labels = clusters(pairs)
    assert labels[-1] == labels.max() and (labels[:-1] < labels[-1]).all() and labels.max() <= CLASSES
    for group in range(3):
        mine, others = labels[:-1][groups == group], labels[:-1][groups != group]
        assert not set(mine.tolist()) & set(others.tolist())


def test_classes_are_not_believed_where_neighbours_tell_nothing():
    """The cost that chooses the prior is taken on counts that the tables were not made of."""
    generator = np.random.default_rng(0)
    vocabulary = Vocabulary(((64,),), True)
    drawn = generator.dirichlet(np.ones(64)) * 3000
    pairs = generator.poisson(np.outer(np.full(65, 1 / 65), drawn)).astype(float)
    _, static = StaticPrior.from_counts(vocabulary, [pairs.sum(0)])
    _, conditional = ConditionalPrior.from_counts(vocabulary, lambda slot, number: pairs)
    assert static[0] < conditional[0]


def test_the_neighbour_that_tells_most_is_chosen():
    prior = prior_of(ConditionalPrior, RESIDUAL)
    assert [prior.neighbours(slot)[0] for slot in range(3)] == [Near(0, 0, -1), Near(1, 0, 0), Near(1, 0, 0)]


def test_without_counts_nothing_is_cheaper_than_log2():
    for vocabulary in (NESTED, RESIDUAL):
        counts = [np.zeros(vocabulary.codes(slot)) for slot in range(len(vocabulary.slots))]
        static, cost = StaticPrior.from_counts(vocabulary, counts)
        assert np.isinf(cost).all()
        grid = chain(vocabulary, 1, (4, 4) if vocabulary.planar else (1, 16))
        assert static.bits(grid, 1) == pytest.approx(UniformPrior(vocabulary).bits(grid, 1), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ context


def test_powers_are_those_of_two():
    expected = 2.0**24 * 2.0 ** (-np.arange(16 * 1024) / 1024)
    found = powers()
    assert found[0] == 2**24 and found[-1] == 0 and found.size == 16 * 1024 + 1
    assert (found[:-1] <= expected).all() and (found[:-1] > expected - 1.001).all()
    # Part of the format: other integers would be other files.
    assert zlib.crc32(found.astype("<i4").tobytes()) == 2146562278


@pytest.mark.parametrize("vocabulary", [NESTED, RESIDUAL, PRODUCT])
def test_integers_follow_the_trained_network(vocabulary):
    trained, exact = networks(vocabulary), prior_of(ContextPrior, vocabulary)
    grids = batch(vocabulary, 50)
    for depth, grid in enumerate(grids, 1):
        estimate = float(trained(grid[None], torch.tensor([depth])))
        own = grid[: len(vocabulary.sizes[depth - 1])].numpy()
        assert exact.bits(own, depth) == pytest.approx(estimate, rel=0.02, abs=2)


def test_a_batch_of_depths_is_its_items():
    trained, grids = networks(RESIDUAL), batch(RESIDUAL, 51)
    alone = [float(trained(grids[d : d + 1], torch.tensor([d + 1]))) for d in range(3)]
    assert trained(grids, torch.tensor([1, 2, 3])).tolist() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    "vocabulary",
    [
        Vocabulary(((1024,),), True),
        Vocabulary(tuple((2**k,) for k in range(3, 12)), True),
        Vocabulary(tuple((1024,) * n for n in range(1, 9)), False),
        Vocabulary(tuple((1024,) * n for n in range(1, 13)), False),
    ],
)
def test_size(vocabulary):
    made = ContextPrior.from_networks(IndexNetworks(vocabulary))
    sizes = [array.size for array in made.arrays().values()]
    assert sum(sizes) <= 1_200_000 + 6 * len(vocabulary.slots)
    widths = made.embeddings[0].shape[1], made.biases[0].size
    assert sum(sizes) == integers(vocabulary, *widths) + 4 * len(vocabulary.slots)
    narrow = [a for name, a in made.arrays().items() if "bias" not in name]
    assert max(int(np.abs(array).max()) for array in narrow) < 1 << 15


def test_restored_networks_are_the_integers():
    made = IndexNetworks(RESIDUAL, 8, 24)
    arrays = prior_of(ContextPrior, RESIDUAL).arrays()
    made.restore(arrays)
    again = ContextPrior.from_networks(made).arrays()
    assert all(np.array_equal(array, again[name]) for name, array in arrays.items())


@pytest.mark.parametrize("widths", [(8, None), (None, 8), (0, 8), (8, 0)])
def test_widths_that_do_not_exist(widths):
    with pytest.raises(UsageError):
        IndexNetworks(NESTED, *widths)


# ------------------------------------------------------------------------------------------------------- arrays


@modelled
@pytest.mark.parametrize("vocabulary", [NESTED, RESIDUAL, PRODUCT])
def test_arrays_hold_all_of_a_prior(kind, vocabulary):
    prior = prior_of(kind, vocabulary)
    assert isinstance(prior, ModelledPrior)
    again = kind.from_arrays(vocabulary, prior.arrays())
    grid = chain(vocabulary, 1, (3, 5) if vocabulary.planar else (1, 15))
    assert again.encode(grid, 1) == prior.encode(grid, 1)
    assert all(array.dtype == np.int32 for array in prior.arrays().values())


@modelled
def test_malformed_arrays(kind):
    arrays = prior_of(kind, RESIDUAL).arrays()
    for name, array in arrays.items():
        for changed in (
            None,
            array[:-1],
            np.full_like(array, -(1 << 30)),
            np.full_like(array, 1 << 30),
            array[None],
        ):
            bad = {key: value for key, value in arrays.items() if key != name}
            if changed is not None:
                bad[name] = changed
            try:
                found = kind.from_arrays(RESIDUAL, bad)
            except CheckpointError:
                continue
            # Only a bias may have any value; the rows stay sound.
            assert "bias" in name or "shape" in name
            grid = chain(RESIDUAL, 3, (1, 9))
            assert np.array_equal(found.decode(found.encode(grid, 3), (1, 9), 3), grid)


def test_conditions_of_planes_that_do_not_exist():
    arrays = prior_of(ConditionalPrior, RESIDUAL).arrays()
    arrays["conditions"] = np.array([1, 1, 1], np.int32)
    with pytest.raises(CheckpointError, match="before the first"):
        ConditionalPrior.from_arrays(RESIDUAL, arrays)
    arrays = prior_of(ConditionalPrior, RESIDUAL).arrays()
    arrays["classes"] = np.full_like(arrays["classes"], CLASSES)
    with pytest.raises(CheckpointError):
        ConditionalPrior.from_arrays(RESIDUAL, arrays)


def test_context_networks_of_another_shape():
    arrays = ContextPrior.from_networks(networks(NESTED)).arrays()
    with pytest.raises(CheckpointError):
        ContextPrior.from_arrays(RESIDUAL, arrays)
    assert index_context.MOST_INTEGERS == 1_200_000


def test_sums_beyond_exact_arithmetic_are_refused():
    """Neighbours of many planes, each within its limit, together reach what float32 does not count."""
    vocabulary = Vocabulary(tuple((4,) * planes for planes in range(1, 37)), False)
    large = IndexNetworks(vocabulary, 8, 16)
    with torch.no_grad():
        for embedding, first in zip(large.embeddings, large.first, strict=True):
            embedding.weight.fill_(31.0)
            first.weight.fill_(1.025)
    with pytest.raises(CheckpointError, match="exceeds exact arithmetic"):
        ContextPrior.from_networks(large)
