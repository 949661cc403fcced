"""Quantisers against their definitions written out, against each other, and encode against forward."""

from __future__ import annotations

import copy
import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from compand.bottlenecks.code_tables import Codebooks, Projection, ScalarGrid, kmeans, nearest
from compand.bottlenecks.codebooks import (
    CHUNK,
    KINDS,
    Layer,
    NestedQuantiser,
    Quantiser,
    ResidualQuantiser,
    build,
)
from compand.errors import UsageError

CHANNELS = 14
SIZE = 16
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "vq": {"kind": "vq", "size": SIZE},
    "product": {"kind": "product", "groups": 4, "size": SIZE},
    "rvq": {"kind": "rvq", "layers": 3, "size": SIZE},
    "grvq": {"kind": "grvq", "groups": 2, "layers": 2, "size": SIZE},
    "mcrvq": {"kind": "mcrvq", "parallel": 3, "residual": 2, "size": SIZE},
    "fsq": {"kind": "fsq", "levels": [5, 4, 3], "groups": 2, "layers": 2},
    "nested": {"kind": "nested", "sizes": [2, 4, 8, SIZE]},
    "rvq-factorised": {"kind": "rvq", "layers": 3, "size": SIZE, "code_dim": 3, "distance": "cosine"},
    "mcrvq-factorised": {"kind": "mcrvq", "residual": 1, "size": SIZE, "code_dim": 2, "update": "gradient"},
    "nested-factorised": {"kind": "nested", "sizes": [4, SIZE], "code_dim": 5, "update": "gradient"},
}
"""Every kind, and those whose codes have fewer dimensions."""


def latents(batch: int = 4, height: int = 5, width: int = 7, seed: int = 0) -> Tensor:
    """Correlated latents of unequal energies, [batch, CHANNELS, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(99))
    white = torch.randn(batch, CHANNELS, height, width, generator=generator)
    return torch.einsum("mn,bnhw->bmhw", mixing, white) + 0.5


def made(seed: int = 0, **options: Any) -> Quantiser:
    """A quantiser of CHANNELS channels, its random numbers seeded."""
    torch.manual_seed(seed)
    return build(options.pop("kind"), CHANNELS, **options)


def trained(steps: int = 4, **options: Any) -> Quantiser:
    """A quantiser after a few batches, codes by gradient after as many steps of descent."""
    quantiser = made(**options)
    quantiser.initialise(latents(seed=50))
    parameters = list(quantiser.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05) if parameters else None
    for step in range(steps):
        z = latents(seed=100 + step).requires_grad_()
        depth = torch.randint(1, quantiser.depths + 1, (len(z),))
        output = quantiser(z, depth)
        loss = (output.z_hat - latents(seed=100 + step)).square().mean() + sum(output.losses.values())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return quantiser


@cache
def trained_once(arrangement: str) -> Quantiser:
    return trained(**ARRANGEMENTS[arrangement])


@pytest.fixture(params=ARRANGEMENTS)
def quantiser(request: pytest.FixtureRequest) -> Quantiser:
    return copy.deepcopy(trained_once(request.param))


# ------------------------------------------------------------------------------------- encode, decode and forward


def test_encode_and_decode_are_what_forward_gives_in_evaluation(quantiser: Quantiser) -> None:
    z = latents(quantiser.depths + 1, seed=1)
    depth = torch.arange(quantiser.depths + 1).clamp(min=1)
    output = quantiser.eval()(z, depth)
    assert output.z_hat.shape == z.shape and output.z_hat.dtype == torch.float32
    assert output.indices.shape == (len(z), quantiser.planes(quantiser.depths), *z.shape[2:])
    for item, level in enumerate(depth.tolist()):
        planes = quantiser.planes(level)
        indices = quantiser.encode(z[item : item + 1], level)
        assert indices.dtype == torch.int64 and indices.shape == (1, planes, *z.shape[2:])
        assert torch.equal(indices[0], output.indices[item, :planes])
        assert bool((output.indices[item, planes:] == -1).all())
        assert torch.equal(quantiser.decode(indices, level)[0], output.z_hat[item])


def test_training_chooses_the_same_indices(quantiser: Quantiser) -> None:
    """And reconstructs the same, but for the rounding of linear maps."""
    before = copy.deepcopy(quantiser).eval()
    z = latents(seed=2)
    depth = (torch.arange(len(z)) % quantiser.depths) + 1
    output, expected = quantiser.train()(z, depth), before(z, depth)
    assert torch.equal(output.indices, expected.indices)
    torch.testing.assert_close(output.z_hat, expected.z_hat, rtol=1e-5, atol=1e-5)


def test_items_do_not_depend_on_their_batch(quantiser: Quantiser) -> None:
    z = latents(3, seed=3)
    depth = quantiser.depths
    together = quantiser.encode(z, depth)
    assert torch.equal(torch.cat([quantiser.encode(item[None], depth) for item in z]), together)
    alone = torch.cat([quantiser.decode(item[None], depth) for item in together])
    assert torch.equal(alone, quantiser.decode(together, depth))


def test_pictures_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    quantiser = trained(**ARRANGEMENTS["rvq"])
    seen: list[int] = []
    whole = Codebooks.nearest

    def observed(self: Codebooks, vectors: Tensor) -> Tensor:
        seen.append(vectors.shape[1])
        return whole(self, vectors)

    monkeypatch.setattr(Codebooks, "nearest", observed)
    z = latents(1, 70, 71)
    indices = quantiser.encode(z, 2)
    assert max(seen) == CHUNK < 70 * 71
    tile = quantiser.encode(z[:, :, :10, 20:40], 2)
    assert torch.equal(tile, indices[:, :, :10, 20:40])


def test_indices_are_within_the_sizes(quantiser: Quantiser) -> None:
    for depth, sizes in enumerate(quantiser.sizes, 1):
        indices = quantiser.encode(latents(seed=4), depth)
        assert len(sizes) == quantiser.planes(depth) == indices.shape[1]
        for plane, size in zip(indices.transpose(0, 1), sizes, strict=True):
            assert int(plane.min()) >= 0 and int(plane.max()) < size


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_latents_that_are_no_numbers_still_have_indices(quantiser: Quantiser, value: float) -> None:
    indices = quantiser.encode(torch.full((1, CHANNELS, 2, 2), value), quantiser.depths)
    assert bool(quantiser.decode(indices, quantiser.depths).isfinite().all())


def test_more_depth_is_closer() -> None:
    for name in ("rvq", "grvq", "mcrvq", "fsq", "nested"):
        quantiser = made(**ARRANGEMENTS[name])
        z = latents(16)
        quantiser.initialise(z)
        errors = [
            float((quantiser.decode(quantiser.encode(z, d), d) - z).square().mean())
            for d in range(1, quantiser.depths + 1)
        ]
        assert all(later < earlier for earlier, later in itertools.pairwise(errors)), name


# ----------------------------------------------------------------------------------------- definitions, identities


def written_out(z: Tensor, layers: list[list[tuple[slice, Tensor]]]) -> tuple[list[list[int]], Tensor]:
    """Indices by plane and z_hat of vectors z [N, M], by layers of (channels, codes [K, M], zero elsewhere)."""
    planes, total = [], torch.zeros_like(z)
    residual = z.clone()
    for books in layers:
        layer = torch.zeros_like(z)
        for channels, codes in books:
            masked = torch.zeros_like(z)
            masked[:, channels] = residual[:, channels]
            chosen = [int((codes - row).square().sum(1).argmin()) for row in masked]
            planes.append(chosen)
            layer += codes[chosen]
        total, residual = total + layer, residual - layer
    return planes, total


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        ("rvq", [[0, 14], [0, 14], [0, 14]]),
        ("grvq", [[0, 7, 14], [0, 7, 14]]),
        ("product", [[0, 3, 7, 10, 14]]),
        ("mcrvq", [[0, 4, 9, 14], [0, 14], [0, 14]]),
    ],
)
def test_arrangements_are_as_published(name: str, edges: list[list[int]]) -> None:
    """Every codebook as wide as z and zero outside its channels, as the masks of Language-Codec have it."""
    quantiser = trained(**ARRANGEMENTS[name])
    layers = []
    for table, places in zip(quantiser.tables(), edges, strict=True):
        assert isinstance(table, Codebooks)
        books = []
        for codes, (start, end) in zip(table.codes, itertools.pairwise(places), strict=True):
            wide = torch.zeros(SIZE, CHANNELS)
            wide[:, start:end] = codes[:, : end - start]
            books.append((slice(start, end), wide))
        layers.append(books)
    z = latents(1, seed=5)
    planes, z_hat = written_out(z[0].flatten(1).T, layers)
    indices = quantiser.encode(z, quantiser.depths)
    assert indices[0].flatten(1).tolist() == planes
    assert torch.equal(quantiser.decode(indices, quantiser.depths)[0].flatten(1).T, z_hat)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"kind": "grvq", "groups": 1, "layers": 3}, {"kind": "rvq", "layers": 3}),
        ({"kind": "grvq", "groups": 3, "layers": 1}, {"kind": "product", "groups": 3}),
        ({"kind": "mcrvq", "parallel": 3, "residual": 0}, {"kind": "product", "groups": 3}),
        ({"kind": "mcrvq", "parallel": 1, "residual": 2}, {"kind": "rvq", "layers": 3}),
        ({"kind": "product", "groups": 1}, {"kind": "vq"}),
        ({"kind": "nested", "sizes": [SIZE]}, {"kind": "vq"}),
    ],
)
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_identities_hold_bit_for_bit(one: dict[str, Any], other: dict[str, Any], update: str) -> None:
    """After k-means, training with restarts, and coding."""
    if "nested" in (one["kind"], other["kind"]):
        options: dict[str, Any] = {"update": update, "restart": 0.0}
    else:
        options = {"update": update, "restart": 0.3}
    first, second = (
        trained(**kind, **options, **({} if "sizes" in kind else {"size": SIZE})) for kind in (one, other)
    )
    assert first.sizes == second.sizes
    for a, b in zip(first.tables(), second.tables(), strict=True):
        assert isinstance(a, Codebooks) and isinstance(b, Codebooks)
        assert torch.equal(a.codes, b.codes) and torch.equal(a.usage, b.usage)
    z = latents(seed=6)
    for depth in range(1, first.depths + 1):
        indices = first.encode(z, depth)
        assert torch.equal(indices, second.encode(z, depth))
        assert torch.equal(first.decode(indices, depth), second.decode(indices, depth))


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_masked_channels_stay_zero(update: str) -> None:
    """After k-means, updates and restarts, in the codes that fill up a group, and so in what a codebook adds."""
    quantiser = trained(**ARRANGEMENTS["mcrvq"], update=update, restart=0.5, steps=10)
    assert isinstance(quantiser, ResidualQuantiser)
    layer = quantiser.layers[0]
    assert isinstance(layer, Layer) and isinstance(layer.table, Codebooks)
    assert layer.projection.widths == [4, 5, 5]
    assert bool((layer.table.codes[0, :, 4:] == 0).all())
    assert not bool((layer.table.codes[0, :, :4] == 0).any())


# ---------------------------------------------------------------------------------------------------------- learning


def test_moving_averages_are_those_of_van_den_oord() -> None:
    """Of counts and of sums, each with its own buffer (2017, appendix A.1)."""
    torch.manual_seed(0)
    table = Codebooks(1, 3, 2, decay=0.9, restart=0.0)
    data = torch.randn(30, 1, 40, 2)
    table.initialise(data[0])
    counts = table.usage[0] / 3
    sums = counts[:, None] * table.codes[0]
    for vectors in data:
        indices = table.nearest(vectors)
        table.learn(vectors, indices)
        chosen = nn.functional.one_hot(indices[0], 3).float() / 40
        counts = 0.9 * counts + 0.1 * chosen.sum(0)
        sums = 0.9 * sums + 0.1 * chosen.T @ vectors[0]
        torch.testing.assert_close(table.codes[0], sums / counts[:, None])
    torch.testing.assert_close(table.shares()[0], counts)


def test_dead_codes_restart_from_the_batch() -> None:
    table = Codebooks(2, 4, 3, restart=0.1)
    table.usage.fill_(1)
    table.usage[1, 2] = 0.05
    before = table.codes.clone()
    vectors = torch.randn(2, 50, 3)
    table.learn(vectors, torch.zeros(2, 50, dtype=torch.int64))
    assert bool((vectors[1] == table.codes[1, 2]).all(1).any()) and float(table.usage[1, 2]) == 1
    kept = torch.ones(2, 4, dtype=torch.bool)
    kept[1, 2] = False
    kept[:, 0] = False
    assert torch.equal(table.codes[kept], before[kept])


def test_without_restarts_codes_die() -> None:
    table = Codebooks(1, 4, 3, restart=0.0)
    before = table.codes.clone()
    for _ in range(3):
        table.learn(torch.randn(1, 50, 3), torch.zeros(1, 50, dtype=torch.int64))
    assert torch.equal(table.codes[0, 1:], before[0, 1:]) and not bool(table.usage[0, 1:].any())


def test_vectors_without_weight_teach_nothing() -> None:
    table = Codebooks(1, 4, 2)
    vectors = torch.randn(1, 20, 2)
    table.initialise(vectors)
    before = copy.deepcopy(table.state_dict())
    indices = table.nearest(vectors)
    table.learn(vectors, indices, torch.zeros(20))
    assert all(torch.equal(before[name], value) for name, value in table.state_dict().items())
    one = (torch.arange(20) == 7).float()
    table.usage.zero_()
    table.learn(vectors, indices, one)
    assert torch.equal(table.codes[0], vectors[0, 7].expand(4, 2))


def test_untrained_codes_take_the_first_batch() -> None:
    quantiser = made(kind="vq", size=SIZE)
    assert not quantiser.initialised
    z = latents()
    quantiser(z, torch.ones(len(z), dtype=torch.int64))
    assert quantiser.initialised
    table = quantiser.tables()[0]
    assert isinstance(table, Codebooks)
    rows = z.permute(0, 2, 3, 1).flatten(0, 2)
    assert all(bool((rows == code).all(1).any()) for code in table.codes[0])


@pytest.mark.parametrize("name", ["rvq", "mcrvq", "nested"])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_gradients_go_straight_through(name: str, update: str) -> None:
    quantiser = trained(**ARRANGEMENTS[name], update=update)
    z = latents().requires_grad_()
    pull = torch.randn(z.shape)
    output = quantiser(z, torch.full((len(z),), quantiser.depths))
    quantiser.zero_grad()
    (output.z_hat * pull).sum().backward(retain_graph=True)
    torch.testing.assert_close(z.grad, pull)
    assert all(p.grad is None or not bool(p.grad.any()) for p in quantiser.parameters())
    z.grad = None
    output.losses["commitment"].backward(retain_graph=True)
    assert z.grad is not None and bool(z.grad.any())
    assert all(p.grad is None or not bool(p.grad.any()) for p in quantiser.parameters())
    z.grad = None
    if update == "gradient":
        output.losses["codebook"].backward()
        assert z.grad is None or not bool(z.grad.any())
        assert any(p.grad is not None and bool(p.grad.any()) for p in quantiser.parameters())
    else:
        assert float(output.losses["codebook"]) == 0


@pytest.mark.parametrize("name", ["rvq-factorised", "fsq"])
def test_gradients_reach_the_linear_maps(name: str) -> None:
    quantiser = trained(**ARRANGEMENTS[name])
    z = latents().requires_grad_()
    quantiser(z, torch.full((len(z),), quantiser.depths)).z_hat.square().mean().backward()
    assert z.grad is not None and bool(z.grad.any())
    assert all(p.grad is not None and bool(p.grad.any()) for p in quantiser.parameters())


def test_codes_learn_from_the_reconstruction_where_the_encoder_is_frozen() -> None:
    quantiser = trained(**ARRANGEMENTS["nested"], update="gradient")
    assert isinstance(quantiser, NestedQuantiser)
    quantiser.zero_grad()
    z = latents(2)
    output = quantiser(z, torch.tensor([2, 4]))
    output.z_hat.sum().backward()
    used = [bool(table.codes.grad.any()) for table in quantiser.tables() if isinstance(table, Codebooks)]
    assert used == [False, True, False, True]
    assert torch.equal(output.z_hat[:1], quantiser.decode(output.indices[:1], 2))


def test_losses_are_means_over_what_each_item_uses() -> None:
    quantiser = trained(**ARRANGEMENTS["rvq"], restart=0.0)
    z = latents(2, seed=8)
    before = copy.deepcopy(quantiser)
    loss = float(quantiser(z, torch.tensor([1, 3])).losses["commitment"])
    errors = [
        float((before.decode(before.encode(z[item : item + 1], d), d) - z[item]).square().mean())
        for item, d in ((0, 1), (1, 1), (1, 2), (1, 3))
    ]
    assert loss == pytest.approx(sum(errors) / 4, rel=1e-5)


@pytest.mark.parametrize("name", ["vq", "rvq-factorised", "fsq"])
def test_training_lowers_the_error(name: str) -> None:
    """From k-means on, by what each kind learns by."""
    quantiser = made(**ARRANGEMENTS[name])
    held_out = latents(16, seed=1000)

    def error() -> float:
        d = quantiser.depths
        return float((quantiser.decode(quantiser.encode(held_out, d), d) - held_out).square().mean())

    quantiser.initialise(latents(2))
    before = error()
    parameters = list(quantiser.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.003) if parameters else None
    for step in range(100):
        z = latents(seed=step)
        output = quantiser.train()(z, torch.full((len(z),), quantiser.depths))
        if optimizer is not None:
            optimizer.zero_grad()
            (output.z_hat - z).square().mean().backward()
            optimizer.step()
    assert error() < 0.97 * before


# The others are special cases of these.
@pytest.mark.parametrize(
    "arrangement", ["rvq", "grvq", "mcrvq-factorised", "rvq-factorised", "fsq", "nested"]
)
def test_steps_can_be_compiled_as_one_graph(arrangement: str) -> None:
    """No step looks at a value."""
    quantiser = copy.deepcopy(trained_once(arrangement))
    torch.compiler.reset()
    step = torch.compile(quantiser.train(), fullgraph=True, backend="eager")
    z = latents().requires_grad_()
    depth = torch.full((len(z),), quantiser.depths)
    expected = copy.deepcopy(quantiser)(z, depth)
    assert torch.equal(step(z, depth).indices, expected.indices)


def test_autocast_leaves_codes_alone(quantiser: Quantiser) -> None:
    z = latents()
    expected = quantiser.encode(z, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantiser.encode(z, 1), expected)
        output = quantiser.train()(z.bfloat16(), torch.ones(len(z), dtype=torch.int64))
    assert output.z_hat.dtype == torch.float32


def test_processes_learn_the_same_codes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_learn_apart, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for restart in (0.0, 0.5):
        assert first[restart]
        assert all(torch.equal(value, second[restart][name]) for name, value in first[restart].items())
    alone = _both()
    alone(latents(4, seed=1), torch.full((4,), 3))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[0.0][name], value)


def _both() -> Quantiser:
    quantiser = made(**ARRANGEMENTS["rvq"], restart=0.0)
    quantiser.initialise(latents(4, seed=2))
    return quantiser


def _learn_apart(rank: int, folder: Path) -> None:
    """Once from the same codes, without restarts, and once each process from its own latents, with restarts."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    learned = {}
    for restart in (0.0, 0.5):
        quantiser = made(**ARRANGEMENTS["rvq"], restart=restart)
        torch.manual_seed(0 if restart == 0 else rank)
        if restart == 0:
            quantiser.load_state_dict(_both().state_dict())
        else:
            quantiser.initialise(latents(4, seed=rank))
        quantiser(latents(4, seed=1)[2 * rank : 2 * rank + 2], torch.full((2,), 3))
        learned[restart] = quantiser.state_dict()
    torch.save(learned, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["mcrvq", "nested-factorised"])
def test_state_passes_between_updates(name: str) -> None:
    """A checkpoint trained by moving averages is tuned by gradient, and the other way round."""
    z = latents()
    for update, other in (("ema", "gradient"), ("gradient", "ema")):
        first = trained(**(ARRANGEMENTS[name] | {"update": update}))
        second = made(**(ARRANGEMENTS[name] | {"update": other}))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.encode(z, first.depths), second.encode(z, first.depths))


# -------------------------------------------------------------------------------------------------- k-means, nearest


def test_nearest_is_nearest() -> None:
    vectors, codes = torch.randn(3, 20, 5), torch.randn(3, 9, 5)
    assert torch.equal(nearest(vectors, codes), torch.cdist(vectors, codes).argmin(-1))
    cosines = nn.functional.cosine_similarity(vectors[:, :, None], codes[:, None], dim=-1)
    assert torch.equal(nearest(vectors, codes, "cosine"), cosines.argmax(-1))
    assert torch.equal(nearest(vectors, 7 * codes, "cosine"), cosines.argmax(-1))


def test_kmeans_finds_what_stands_apart() -> None:
    torch.manual_seed(0)
    places = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    vectors = (places[:, None] + 0.1 * torch.randn(4, 25, 2)).flatten(0, 1)
    centres, indices = kmeans(vectors, 4, 20, weight=torch.ones(100))
    assert float(torch.cdist(places, centres).min(1).values.max()) < 0.2
    assert torch.equal(indices.view(4, 25), indices.view(4, 25)[:, :1].expand(4, 25))


def test_kmeans_weights_vectors() -> None:
    vectors = torch.tensor([[0.0], [1.0]])
    centres, _ = kmeans(vectors, 1, 3, weight=torch.tensor([3.0, 1.0]))
    assert float(centres) == pytest.approx(0.25)


def test_kmeans_of_few_vectors() -> None:
    centres, indices = kmeans(torch.randn(3, 2), 8, 5)
    assert centres.shape == (8, 2) and bool(centres.isfinite().all()) and len(indices) == 3
    same, _ = kmeans(torch.ones(6, 2), 4, 5, weight=torch.ones(6))
    assert torch.equal(same, torch.ones(4, 2))


# --------------------------------------------------------------------------------------------------------------- FSQ


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [2, 3], [4]])
def test_grid_rounds_as_published(levels: list[int]) -> None:
    """Mentzer et al. 2023, appendix A.1, and every code of the product is reached by its own values."""
    grid = ScalarGrid(1, levels)
    vectors = 3 * torch.randn(1, 500, len(levels))
    counts = torch.tensor(levels)
    span = (counts - 1) * (1 + 1e-3) / 2
    offset = torch.where(counts % 2 == 0, 0.5, 0.0)
    bounded = torch.tanh(vectors + (offset / span).atanh()) * span - offset
    values = grid.values(grid.nearest(vectors))
    torch.testing.assert_close(values, bounded.round() / (counts // 2))
    every = torch.arange(grid.size)[None]
    assert len(set(map(tuple, grid.values(every)[0].tolist()))) == grid.size == math.prod(levels)
    digits = grid.values(every) * (counts // 2)
    inverse = torch.atanh(((digits + offset) / span).clamp(-0.9999999, 0.9999999)) - (offset / span).atanh()
    assert torch.equal(grid.nearest(inverse), every)


def test_grid_hands_gradients_through() -> None:
    """Of what lies between the levels, but not of all vectors together, nor of how far they lie apart."""
    grid = ScalarGrid(1, [8, 5])
    vectors = torch.tensor([-1.0, -0.3, 0.3, 1.0])[None, :, None].repeat(1, 1, 2).requires_grad_()
    (grid.straight(vectors) * torch.tensor([0.0, -1.0, 1.0, 0.0])[:, None]).sum().backward()
    assert vectors.grad is not None
    assert bool((vectors.grad[0, 1] < -0.3).all()) and bool((vectors.grad[0, 2] > 0.3).all())
    assert vectors.grad.sum(1).abs().max() < 1e-5
    assert (vectors.grad * vectors).sum(1).abs().max() < 1e-5


def test_grids_keep_up_with_latents_that_move() -> None:
    """Latents that wander off by many deviations, as those of an encoder that has just begun to learn do."""
    quantiser = trained(kind="fsq", levels=[8, 5, 5], groups=2)
    quantiser.train()
    depth = torch.full((2,), quantiser.depths)
    # Nothing but the moving averages may follow: no parameter is trained.
    for step in range(120):
        z = latents(2, seed=step) + 0.5 * min(step, 60)
        output = quantiser(z, depth)
    assert min(quantiser.perplexity()) > 20
    error = (output.z_hat - z).square().mean()
    assert error < 0.8 * z.var()
    tie = output.losses
    assert float(tie["commitment"].detach()) == pytest.approx(float(error.detach()), rel=1e-4)
    assert float(tie["codebook"].detach()) == pytest.approx(float(error.detach()), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ nested


def base_error(quantiser: NestedQuantiser, depth: int) -> float:
    """Mean squared distance of the base's codes from a depth's, weighted by use."""
    base, table = quantiser.tables()[-1], quantiser.tables()[depth - 1]
    assert isinstance(base, Codebooks) and isinstance(table, Codebooks)
    values = table.values(table.nearest(base.codes))
    return float((values - base.codes).square().sum(2)[0] @ base.shares()[0])


def test_reclustering_is_better_than_a_subset() -> None:
    quantiser = trained(kind="nested", sizes=[2, 4, 8, 16, 64])
    assert isinstance(quantiser, NestedQuantiser)
    base = quantiser.tables()[-1].state_dict()
    before = {name: value.clone() for name, value in base.items()}
    quantiser.recluster()
    clustered = [base_error(quantiser, depth) for depth in range(1, 5)]
    quantiser.random_subset()
    subset = [base_error(quantiser, depth) for depth in range(1, 5)]
    assert all(ours < 0.95 * theirs for ours, theirs in zip(clustered, subset, strict=True))
    assert clustered == sorted(clustered, reverse=True)
    assert all(torch.equal(value, before[name]) for name, value in base.items())
    codes, whole = quantiser.tables()[0], quantiser.tables()[-1]
    assert isinstance(codes, Codebooks) and isinstance(whole, Codebooks)
    assert all(bool((whole.codes[0] == code).all(1).any()) for code in codes.codes[0])


def test_reclustering_is_repeatable() -> None:
    quantiser = trained(**ARRANGEMENTS["nested"])
    assert isinstance(quantiser, NestedQuantiser)
    quantiser.recluster(seed=3)
    first = copy.deepcopy(quantiser.state_dict())
    torch.randn(10)
    quantiser.recluster(seed=3)
    assert all(torch.equal(value, first[name]) for name, value in quantiser.state_dict().items())
    for table in quantiser.tables():
        assert float(table.shares().sum()) == pytest.approx(1)


def test_tables_learn_from_their_own_depth() -> None:
    quantiser = trained(**ARRANGEMENTS["nested"])
    before = copy.deepcopy(quantiser.state_dict())
    quantiser(latents(2), torch.tensor([1, 3]))
    changed = [
        not torch.equal(before[f"books.{number}.codes"], quantiser.state_dict()[f"books.{number}.codes"])
        for number in range(4)
    ]
    assert changed == [True, False, True, False]


# ----------------------------------------------------------------------------------------------- statistics, options


def test_usage_and_perplexity() -> None:
    quantiser = trained(**ARRANGEMENTS["grvq"])
    assert [len(share) for share in quantiser.usage()] == [SIZE] * 4
    for share, perplexity in zip(quantiser.usage(), quantiser.perplexity(), strict=True):
        assert float(share.sum()) == pytest.approx(1) and 1 < perplexity <= SIZE
    quantiser.tables()[0].usage[0].fill_(2.0)
    quantiser.tables()[0].usage[1].copy_(torch.arange(SIZE) == 3)
    assert quantiser.perplexity()[:2] == pytest.approx([SIZE, 1])


def test_energy_of_the_planes() -> None:
    z = latents(16)
    shares = {}
    for name in ("rvq", "mcrvq", "fsq", "nested"):
        quantiser = made(**ARRANGEMENTS[name])
        quantiser.initialise(z)
        shares[name] = quantiser.energy_shares(z)
        assert shares[name].shape == (quantiser.planes(quantiser.depths),)
        assert float(shares[name].sum()) == pytest.approx(1)
    assert shares["rvq"].tolist() == sorted(shares["rvq"].tolist(), reverse=True)
    assert float(shares["mcrvq"][0]) < float(shares["rvq"][0])


def test_energy_is_that_of_the_error_it_takes_away() -> None:
    """Codes that are means of their vectors leave what they do not explain."""
    quantiser = made(kind="rvq", layers=2, size=SIZE, decay=0.0, restart=0.0)
    z = latents(16)
    quantiser.initialise(z)
    for _ in range(40):
        quantiser(z, torch.full((16,), 2))
    energies = [float((z - z.mean((0, 2, 3), keepdim=True)).square().sum(1).mean())]
    for depth in (1, 2):
        z_hat = quantiser.decode(quantiser.encode(z, depth), depth)
        energies.append(float((z - z_hat).square().sum(1).mean()))
    explained = [(a - b) / (energies[0] - energies[2]) for a, b in itertools.pairwise(energies)]
    assert quantiser.energy_shares(z).tolist() == pytest.approx(explained, rel=0.02)


def test_what_decoding_does_not_need(quantiser: Quantiser) -> None:
    z = latents()
    depth = quantiser.depths
    indices = quantiser.encode(z, depth)
    expected = quantiser.decode(indices, depth)
    state = quantiser.state_dict()
    assert any(name.endswith("usage") for name in quantiser.encoder_parts)
    for name in quantiser.encoder_parts:
        state[name].fill_(math.nan)
    assert torch.equal(quantiser.decode(indices, depth), expected)


def test_shares_of_channels() -> None:
    """As Language-Codec has them for 128 channels."""
    assert Projection(128, 3).widths == [42, 43, 43]
    projection = Projection(14, 4)
    rows = torch.randn(5, 14)
    assert projection.split(rows).shape == (4, 5, 4)
    assert torch.equal(projection.join(projection.split(rows)), rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lattice"}, "lattice"),
        ({"kind": "rvq", "groups": 2}, "no option 'groups'"),
        ({"kind": "fsq", "restart": 0.1}, "no option 'restart'"),
        ({"kind": "vq", "distance": "hamming"}, "hamming"),
        ({"kind": "vq", "update": "never"}, "never"),
        ({"kind": "vq", "decay": 1.0}, "decay"),
        ({"kind": "vq", "restart": -1.0}, "restart"),
        ({"kind": "vq", "size": 1}, "1 codes"),
        ({"kind": "rvq", "layers": 0}, "0 layers"),
        ({"kind": "product", "groups": 15}, "15 groups"),
        ({"kind": "grvq", "groups": 2, "code_dim": 8}, "8 dimensions"),
        ({"kind": "fsq", "levels": [8, 1]}, "levels"),
        ({"kind": "fsq", "levels": []}, "levels"),
        ({"kind": "nested", "sizes": [8, 8]}, "nested"),
        ({"kind": "nested", "sizes": []}, "nested"),
    ],
)
def test_arguments_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        made(**options)
    assert "\n" not in str(error.value)


def test_indices_that_do_not_exist(quantiser: Quantiser) -> None:
    with pytest.raises(UsageError, match="depth 0"):
        quantiser.encode(latents(), 0)
    indices = quantiser.encode(latents(), 1)
    with pytest.raises(UsageError, match="planes"):
        quantiser.decode(indices[:, :0], 1)
    for wrong in (-1, quantiser.sizes[0][0]):
        indices[0, 0, 0, 0] = wrong
        with pytest.raises(UsageError, match="exceed"):
            quantiser.decode(indices, 1)


def test_every_kind_is_tested() -> None:
    assert {options["kind"] for options in ARRANGEMENTS.values()} == set(KINDS)


def test_codes_far_from_zero_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-50, 50, (64, 4), generator=generator).float() + 30_000
    vectors = codes[torch.randint(64, (200,), generator=generator)] + torch.rand(200, 4, generator=generator)
    expected = torch.cdist(vectors.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(nearest(vectors, codes), expected.argmin(1))


def test_grids_of_too_many_codes_are_refused() -> None:
    with pytest.raises(UsageError, match="4294967296 codes are too large"):
        build("fsq", 4, levels=[65536, 65536])
