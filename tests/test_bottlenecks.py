"""Gains, scale indexes, tables, and the two states of a bottleneck against each other."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compand import registry
from compand.bottlenecks.factorized import (
    QUANTIZATIONS,
    FactorizedBottleneck,
    FactorizedDensity,
    blend,
    noisy,
    quantised,
    ste_round,
    to_symbols,
)
from compand.bottlenecks.gains import GainUnit, step_gains
from compand.bottlenecks.hyperprior import (
    MIN_LOG2_SCALE,
    SCALE_STEP,
    SCALES,
    HyperpriorBottleneck,
    scale_indexes,
    table_scales,
)
from compand.codec import Bottleneck, level_table_at
from compand.coding.integer import FRACTION_BITS, interpolate_levels, to_fixed
from compand.errors import CheckpointError, UsageError
from compand.image_codec import tile_rows

NAMES = [entry.name for entry in registry.entries() if entry.medium == "image" and entry.name != "vqgan"]
"""Those whose latents are numbers, not codes."""


def prior_of(bottleneck: Bottleneck) -> FactorizedBottleneck | HyperpriorBottleneck:
    """The bottleneck with the tables, within any compander."""
    return getattr(bottleneck, "inner", bottleneck)


def adam_groups(module: torch.nn.Module) -> list[dict[str, object]]:
    """Parameters with faster steps for quantiles, which start far from the tails."""
    quantiles = [p for n, p in module.named_parameters() if n.endswith("quantiles")]
    others = [p for n, p in module.named_parameters() if not n.endswith("quantiles")]
    return [{"params": others}, {"params": quantiles, "lr": 1.0}]


# ------------------------------------------------------------------------------------------------------- gains


@given(st.integers(32, 128))
def test_gains_are_interpolated_in_the_logarithm(quality):
    unit = GainUnit(2, [1, 4, 2, 8])
    with torch.no_grad():
        unit.log2_gain[:, 1] += 1
        unit.log2_inverse_offset.copy_(torch.tensor([[0.0, 0.5], [1, 0], [0, 0], [-1, 2]]))
    position = quality / 32
    logs = [np.interp(position, [1, 2, 3, 4], column) for column in ([0, 2, 1, 3], [1, 3, 2, 4])]
    offsets = [np.interp(position, [1, 2, 3, 4], column) for column in ([0, 1, 0, -1], [0.5, 0, 0, 2])]
    level = torch.tensor([quality])
    assert unit.gain(level).shape == (1, 2, 1, 1)
    np.testing.assert_allclose(unit.gain(level).detach().flatten(), np.exp2(logs), rtol=1e-5)
    expected = np.exp2(np.subtract(offsets, logs))
    np.testing.assert_allclose(unit.inverse(level).detach().flatten(), expected, rtol=1e-5)
    if quality % 32 == 0:
        row = unit.inverse_levels()[quality // 32 - 1]
        torch.testing.assert_close(row, unit.inverse(level)[0, :, 0, 0])


def test_items_of_a_batch_have_their_own_quality():
    table = torch.arange(24.0).view(8, 3)
    got = level_table_at(table, torch.tensor([32, 256, 48, 255]))
    expected = torch.stack(
        [table[0], table[7], (table[0] + table[1]) / 2, table[6] * (1 / 32) + table[7] * (31 / 32)]
    )
    torch.testing.assert_close(got, expected)
    assert torch.equal(level_table_at(table[:1], torch.tensor([32])), table[:1])


def test_integer_and_floating_interpolation_agree():
    table = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 3
    for quality in range(32, 257, 5):
        floating = level_table_at(table, torch.tensor([quality]))[0]
        integer = interpolate_levels(to_fixed(table), quality, 32)
        assert float((integer / (1 << FRACTION_BITS) - floating).abs().max()) <= 1.01 / (1 << FRACTION_BITS)


@pytest.mark.parametrize("channels", [1, 2, 3, 12])
def test_initial_gains_meet_the_multiplier(channels):
    """At high rate d(R)/d(step) + lambda d(D)/d(step) is 0 at the step 1 / gain."""
    for value, gain in zip([0.0016, 0.15], step_gains([0.0016, 0.15], channels), strict=True):

        def cost(step: float, multiplier: float = value) -> float:
            # R per position is that of all channels' coefficients, D the mean over them.
            return -channels * math.log2(step) + multiplier * 255**2 * step**2 / 12

        best = min(np.exp(np.linspace(-8, 4, 24001)), key=cost)
        assert 1 / gain == pytest.approx(best, rel=1e-3)


# --------------------------------------------------------------------------------------------- symbols, scales


def test_to_symbols():
    x = torch.tensor([0.4, 0.6, -1.6, 1e30, -1e30, float("nan"), float("inf"), -float("inf")])
    limit = 1 << 30
    assert to_symbols(x).tolist() == [0, 1, -2, limit, -limit, 0, limit, -limit]
    assert to_symbols(x).dtype == np.int32


def test_straight_through_rounding():
    x = torch.tensor([0.4, 1.7], requires_grad=True)
    (ste_round(x) * torch.tensor([2.0, 3.0])).sum().backward()
    assert ste_round(x).tolist() == [0, 2] and x.grad.tolist() == [2, 3]


def test_scale_indexes_by_brute_force():
    values = torch.arange(-6 << FRACTION_BITS, 12 << FRACTION_BITS)
    tables = np.array([MIN_LOG2_SCALE * (1 << FRACTION_BITS) + k * SCALE_STEP for k in range(SCALES)])
    distance = np.abs(values.numpy()[:, None] - tables)
    indexes = scale_indexes(values)
    assert indexes.dtype == torch.uint8 and set(indexes.tolist()) == set(range(SCALES))
    chosen = distance[np.arange(len(values)), indexes.numpy()]
    assert np.array_equal(chosen, distance.min(1))
    assert scale_indexes(torch.tensor([-(1 << 40), 1 << 40])).tolist() == [0, SCALES - 1]


def test_scales_of_the_tables():
    scales = table_scales()
    assert len(scales) == SCALES and scales[0] == 2**MIN_LOG2_SCALE
    np.testing.assert_allclose(np.diff(np.log2(scales)), SCALE_STEP / (1 << FRACTION_BITS))
    assert scales[-1] > 256


# ------------------------------------------------------------------------------------- what stands for rounding


def test_noise_and_rounding_stand_where_they_should():
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 5).requires_grad_()
    mixed, noise, none = (quantised(x, name, training=True) for name in QUANTIZATIONS)
    for coded, _ in (mixed, noise):
        difference = (coded - x).detach()
        assert float(difference.abs().max()) <= 0.5
        assert float(difference.std()) == pytest.approx(12**-0.5, rel=0.1)
    torch.testing.assert_close(mixed[1], x.round())
    assert noise[1] is noise[0] and none[0] is x and none[1] is x
    for _, decoded in (mixed, noise, none):
        (gradient,) = torch.autograd.grad(decoded.sum(), x)
        assert torch.equal(gradient, torch.ones_like(x))
    for name in QUANTIZATIONS:
        coded, decoded = quantised(x, name, training=False)
        assert torch.equal(coded, x.round())
        torch.testing.assert_close(decoded, x.round())


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("kind", ["factorized", "hyperprior"])
def test_the_three_ways_of_training(kind, dimensions):
    quality = torch.tensor([100, 100])
    y = latents(dimensions)
    for quantization in QUANTIZATIONS:
        bottleneck = make(kind, dimensions, quantization=quantization).train()
        with torch.no_grad():
            first, second = bottleneck(y, quality), bottleneck(y, quality)
            steps = (first.y_hat - y) * bottleneck.y_gain.gain(quality)
            errors = (bottleneck.eval()(y, quality).y_hat - y) * bottleneck.y_gain.gain(quality)
        if quantization == "none":
            assert float(steps.abs().max()) < 1e-4
            assert torch.equal(first.bits, second.bits)
        else:
            assert float(steps.abs().max()) < 0.501 and float(steps.std()) == pytest.approx(12**-0.5, rel=0.1)
            assert not torch.equal(first.bits, second.bits)
        assert float(errors.abs().max()) < 0.501


def test_arguments_that_do_not_exist():
    for build in (FactorizedBottleneck, HyperpriorBottleneck):
        with pytest.raises(UsageError, match="mixed, noise, none"):
            build(4, [0.1, 0.2], quantization="dither")
    with pytest.raises(UsageError, match="3 dimensions"):
        HyperpriorBottleneck(4, [0.1, 0.2], dimensions=3)
    with pytest.raises(UsageError, match="hyper_analysis_kernel 1"):
        HyperpriorBottleneck(4, [0.1, 0.2], hyper_analysis_kernel=1)


# ------------------------------------------------------------------------------------------------------ tables


def test_blended_tables_lie_between_model_and_counts():
    model = np.array([0.25, 0.5, 0.2])
    plain = blend([model], [-1], [0.05], [{}])
    np.testing.assert_allclose(plain.frequencies[0] / 2**24, [0.25, 0.5, 0.2, 0.05], atol=1e-6)
    seen = Counter({-1: 6000, 1: 1000, 40: 900, -40: 100})
    mixed = blend([model], [-1], [0.05], [seen])
    expected = (2000 * np.array([0.25, 0.5, 0.2, 0.05]) + [6000, 0, 1000, 1000]) / 10000
    np.testing.assert_allclose(mixed.frequencies[0] / 2**24, expected, atol=1e-6)
    assert mixed.lows.tolist() == [-1]


def test_masses_are_the_density_between_half_steps():
    torch.manual_seed(0)
    density = FactorizedDensity(3)
    with torch.no_grad():
        density.model.quantiles[:, 0] = torch.tensor([[-9.3, 0, 12.2], [-0.1, 0, 0.1], [-40.0, 1, 30]])
    steps = torch.tensor([1.0, 0.5, 2.0])
    masses, lows, escapes = density.masses(steps)
    assert lows == [-10, -1, -20] and [len(mass) for mass in masses] == [10 + 13 + 1, 3, 20 + 15 + 1]
    for channel, (mass, low, escape) in enumerate(zip(masses, lows, escapes, strict=True)):
        assert mass.sum() + escape == pytest.approx(1) and (mass >= 0).all()
        for k in (0, len(mass) // 2, len(mass) - 1):
            edges = torch.zeros(3, 1, 2)
            edges[channel, 0] = (torch.tensor([low + k - 0.5, low + k + 0.5])) * steps[channel]
            with torch.no_grad():
                a, b = torch.sigmoid(density.model._logits_cumulative(edges, stop_gradient=True))[channel, 0]
            assert mass[k] == pytest.approx(float(b - a), abs=1e-6)


def test_noisy_bits_are_those_of_the_masses():
    """The rate that training sees, against the entropy of the tables made from the same density."""
    torch.manual_seed(1)
    density = FactorizedDensity(2)
    x = torch.randn(8, 2, 40, 40) * torch.tensor([3.0, 8.0])[:, None, None]
    step = torch.tensor([0.5, 2.0])[None, :, None, None]
    optimizer = torch.optim.Adam(adam_groups(density), lr=0.05)
    for _ in range(80):
        loss = density.bits(noisy(x / step), step).mean() / 3200 + density.auxiliary_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        estimated = float(density.bits(noisy(x / step), step).sum())
        tables = blend(*density.masses(step.flatten()), [{}, {}])
    symbols = torch.round(x / step).int().numpy()
    indexes = np.broadcast_to(np.arange(2)[None, :, None, None], symbols.shape)
    assert tables.bits(symbols.ravel(), indexes.ravel()).sum() == pytest.approx(estimated, rel=0.01)
    # And both near the truth: a Gaussian of standard deviation s steps has log2(s sqrt(2 pi e)) bits.
    truth = sum(math.log2(s * math.sqrt(2 * math.pi * math.e)) for s in (6, 4)) * 8 * 1600
    assert estimated == pytest.approx(truth, rel=0.03)


# -------------------------------------------------------------------------------------------- one and two axes

LAMBDAS = [0.002, 0.01, 0.05, 0.25]


def make(kind: str, dimensions: int, trainable: bool = True, **arguments: Any) -> Any:
    """A small bottleneck of 5 channels, with tables that differ from place to place."""
    torch.manual_seed(2)
    if kind == "factorized":
        return FactorizedBottleneck(5, LAMBDAS, trainable, **arguments)
    bottleneck = HyperpriorBottleneck(
        5, LAMBDAS, 4, (4, 4, 8), trainable, dimensions=dimensions, hyper_analysis_kernel=3, **arguments
    )
    if trainable:
        with torch.no_grad():
            bottleneck.hyper_synthesis[-1].weight.mul_(20)
            bottleneck.hyper_analysis[-1].weight.mul_(20)
    return bottleneck


def latents(dimensions: int, batch: int = 2, height: int = 14, width: int = 45) -> Tensor:
    """Latents whose scale differs between channels."""
    shape = (batch, 5, height if dimensions == 2 else 1, width)
    scales = torch.tensor([0.1, 0.5, 1, 2, 6])[:, None, None]
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)) * scales


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("kind", ["factorized", "hyperprior"])
@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 10),
    width=st.integers(1, 60),
    quality=st.integers(32, 128),
)
def test_bytes_give_what_forward_gave(kind, dimensions, batch, height, width, quality):
    bottleneck = make(kind, dimensions)
    bottleneck.freeze()
    bottleneck.eval()
    y = latents(dimensions, batch, height, width)
    shape = (y.shape[2], y.shape[3])
    with torch.inference_mode():
        output = bottleneck(y, torch.full((batch,), quality))
        payloads = bottleneck.compress(y, quality)
        assert torch.equal(bottleneck.decompress(payloads, shape, quality), output.y_hat)
    for payload, bits in zip(payloads, output.bits.tolist(), strict=True):
        assert abs(8 * len(payload) - bits) < 64
        assert 8 * len(payload) + 64 >= bottleneck.least_bits(shape)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_threads_and_batches_decode_alike(dimensions):
    bottleneck = make("hyperprior", dimensions)
    bottleneck.freeze()
    bottleneck.eval()
    y = latents(dimensions, 3, 40, 300)
    shape = (y.shape[2], y.shape[3])
    threads = torch.get_num_threads()
    with torch.inference_mode():
        payloads = bottleneck.compress(y.contiguous(memory_format=torch.channels_last), 77)
        expected = bottleneck.decompress(payloads, shape, 77)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(bottleneck.decompress(payloads, shape, 77), expected)
        finally:
            torch.set_num_threads(threads)
        alone = [bottleneck.decompress([payload], shape, 77) for payload in payloads]
    assert torch.equal(torch.cat(alone), expected)
    # The tables really differ from place to place, so that a wrong index would have shown.
    assert len(np.unique(bottleneck.count(y, 77)[1][0])) > 10


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_z_has_a_quarter_of_the_resolution(dimensions, kernel):
    bottleneck = HyperpriorBottleneck(
        5, LAMBDAS, 4, (4, 4, 8), dimensions=dimensions, hyper_analysis_kernel=kernel
    )
    bottleneck.freeze()
    for height, width in ((1, 1), (4, 8), (5, 9), (7, 11)):
        y = latents(dimensions, 1, height, width)
        positions = -(-y.shape[2] // 4) * -(-y.shape[3] // 4)
        with torch.inference_mode():
            (_, z), (_, symbols) = bottleneck.eval().count(y, 60)
            assert bottleneck.train()(y, torch.tensor([60])).y_hat.shape == y.shape
        assert z.size == 4 * positions and symbols.size == y.numel()


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("kind", ["factorized", "hyperprior"])
def test_a_frozen_state_decodes_elsewhere(kind, dimensions):
    source, other = make(kind, dimensions), make(kind, dimensions, trainable=False)
    source.freeze()
    other.load_state_dict(source.state_dict(), strict=False)
    other.load_frozen(source.frozen_arrays())
    y = latents(dimensions)
    with torch.inference_mode():
        payloads = source.eval().compress(y, 90)
        decoded = other.eval().decompress(payloads, tuple(y.shape[2:]), 90)
        assert torch.equal(decoded, source(y, torch.tensor([90, 90])).y_hat)


def test_a_prior_of_the_other_dimension_is_refused():
    source = make("hyperprior", 1)
    source.freeze()
    with pytest.raises(CheckpointError, match="prior"):
        make("hyperprior", 2, trainable=False).load_frozen(source.frozen_arrays())


# ------------------------------------------------------------------------------------------------- two states


@pytest.mark.parametrize("name", NAMES)
def test_frozen_and_trainable_bits_agree(name, scenery):
    torch.manual_seed(0)
    codec = registry.by_name(name).load_class()(**SMALL.get(name, {}))
    bottleneck = codec.bottleneck
    if isinstance(prior_of(bottleneck), HyperpriorBottleneck):
        with torch.no_grad():
            # From wide scales the prior settles within seconds; from narrow ones most symbols have no gradient.
            prior_of(bottleneck).hyper_synthesis[-1].bias[bottleneck.latent_channels :] = 1
    whole = tile_rows(256, 320, 0)[0][0]
    with torch.no_grad():
        latents = {level: codec.analyse(scenery[:256, :320], whole, level) for level in range(32, 257, 16)}
    optimizer = torch.optim.Adam(adam_groups(bottleneck), lr=5e-3)
    for step in range(120):
        level = 32 + 16 * (step * 4 % 15)
        output = bottleneck(latents[level], torch.tensor([level]))
        optimizer.zero_grad()
        (output.bits.mean() / 15360 + output.losses["auxiliary"]).backward()
        optimizer.step()
    # Where most symbols are 0, noise in place of rounding costs more bits a symbol than rounding does.
    bounds = ((32, 0.15, 0.2), (96, 0.06, 0.15), (160, 0.02, 0.08), (256, 0.01, 0.02))
    if name == "context":
        # Noise is told apart from what contexts expect, too.
        bounds = ((32, 0.2, 0.25), (96, 0.12, 0.2), (160, 0.07, 0.15), (256, 0.02, 0.03))
    for level, relative, a_symbol in bounds:
        quality = torch.tensor([level])
        with torch.no_grad():
            floating = bottleneck.train()(latents[level], quality)
            bottleneck.freeze()
            frozen = bottleneck.eval()(latents[level], quality)
        assert float(frozen.bits) < 1.01 * float(floating.bits)
        excess = float(floating.bits - frozen.bits) / latents[level].numel()
        assert -0.01 < excess < a_symbol
        # A codec of few latents has few bits for the same number of symbols; the others are held to a share of them.
        if bottleneck.latent_channels >= 48:
            assert float(frozen.bits) == pytest.approx(float(floating.bits), rel=relative)
        assert float((frozen.y_hat - floating.y_hat).abs().mean()) < 0.005
        assert not frozen.losses and set(floating.losses) == {"auxiliary"}


@pytest.mark.parametrize("name", NAMES)
def test_training_gradients_reach_every_parameter(name, trained, scenery):
    codec = trained(name, steps=1).train()
    tile = tile_rows(64, 64, 0)[0][0]
    y = codec.analyse(scenery[:64, :64], tile, 100)
    output = codec.bottleneck(y, torch.tensor([100]))
    (output.bits.sum() + output.y_hat.square().sum() + output.losses["auxiliary"]).backward()
    missing = [
        n for n, p in codec.bottleneck.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_counting_sees_what_compress_codes(name, exact, scenery):
    bottleneck = exact(name).bottleneck
    y = exact(name).analyse(scenery[:80, :96], tile_rows(80, 96, 0)[0][0], 133)
    with torch.inference_mode():
        counted = bottleneck.count(y, 133)
        bits = float(bottleneck(y, torch.tensor([133])).bits)
    assert len(counted) == len(bottleneck.table_counts())
    for (indexes, symbols), number in zip(counted, bottleneck.table_counts(), strict=True):
        assert indexes.shape == symbols.shape and indexes.min() >= 0 and indexes.max() < number
    tables = prior_of(bottleneck)._frozen()
    tables = tables if isinstance(tables, tuple) else (tables,)
    total = sum(
        part.bits(symbols, indexes).sum() for part, (indexes, symbols) in zip(tables, counted, strict=True)
    )
    assert total == pytest.approx(bits)


def test_counts_make_the_tables_fit(trained, scenery):
    codec = trained("factorized", steps=20)
    bottleneck = codec.bottleneck
    y = codec.analyse(scenery[:256, :256], tile_rows(256, 256, 0)[0][0], 160).detach()
    bottleneck.freeze()
    before = float(bottleneck(y, torch.tensor([160])).bits)
    ((indexes, symbols),) = bottleneck.count(y, 160)
    counts: list[Counter[int]] = [Counter() for _ in range(bottleneck.table_counts()[0])]
    for index, symbol in zip(indexes.tolist(), symbols.tolist(), strict=True):
        counts[index][symbol] += 20
    bottleneck.freeze([counts])
    assert float(bottleneck(y, torch.tensor([160])).bits) < before


@pytest.mark.parametrize("quality", [32, 35, 36, 37, 44, 250, 256])
def test_factorized_tables_are_those_of_the_nearest_quarter_level(exact, quality):
    bottleneck = exact("factorized").bottleneck
    indexes = bottleneck._indexes((2, 3), quality)
    m = bottleneck.latent_channels
    assert indexes.shape == (m * 6,) and np.array_equal(indexes - indexes[0], np.repeat(np.arange(m), 6))
    assert abs(indexes[0] / m * 8 - (quality - 32)) <= 4


@pytest.mark.parametrize("name", NAMES)
def test_frozen_integers_round_trip_and_are_checked(name, exact):
    bottleneck = exact(name).bottleneck
    arrays = bottleneck.frozen_arrays()
    assert all(array.dtype == np.int32 for array in arrays.values())
    bottleneck.load_frozen(arrays)
    again = bottleneck.frozen_arrays()
    assert again.keys() == arrays.keys() and all(np.array_equal(again[key], arrays[key]) for key in arrays)
    other = exact(name).bottleneck
    for key in arrays:
        with pytest.raises(CheckpointError):
            other.load_frozen({k: v for k, v in arrays.items() if k != key})
    with pytest.raises(CheckpointError, match="frozen already"):
        bottleneck.freeze()


def test_frozen_integers_of_another_architecture_are_refused(exact, trained):
    arrays = exact("hyperprior").bottleneck.frozen_arrays()
    for m, n in ((47, 16), (48, 15)):
        other = HyperpriorBottleneck(m, exact("hyperprior").lambdas, n, (16, 16, 24), trainable=False)
        with pytest.raises(CheckpointError):
            other.load_frozen(arrays)
    forged = dict(arrays)
    last = max(int(key.split(".")[1]) for key in arrays if key.startswith("prior.") and key != "prior.shape")
    forged[f"prior.{last}.weight"] = arrays[f"prior.{last}.weight"][:-2]
    forged[f"prior.{last}.bias"] = arrays[f"prior.{last}.bias"][:-2]
    with pytest.raises(CheckpointError, match="prior"):
        exact("hyperprior").bottleneck.load_frozen(forged)


def test_the_prior_decides_scale_and_mean(exact, scenery):
    """Quality shifts log2 sigma by log2 of the gain and leaves means alone, up to rounding."""
    bottleneck = exact("hyperprior").bottleneck
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(-3, 4, (1, bottleneck.hyper_channels, 2, 3), generator=generator)
    means, indexes = bottleneck._predict(z, 96, (7, 10))
    assert means.shape == indexes.shape == (1, bottleneck.latent_channels, 7, 10)
    fixed = means * (1 << FRACTION_BITS)
    assert torch.equal(fixed, fixed.round()) and len(indexes.unique()) > 3
    hyper = z * interpolate_levels(bottleneck._multiplier, 96, 32)[:, None, None]
    _, log2_scales = bottleneck.prior(hyper)[..., :7, :10].chunk(2, 1)
    shift = bottleneck._shift[2][:, None, None]
    assert torch.equal(indexes, scale_indexes(log2_scales + shift))


def test_edges_of_the_latent_are_repeated_for_the_hyperprior(exact):
    bottleneck = exact("hyperprior").bottleneck
    y = torch.randn(1, bottleneck.latent_channels, 5, 6, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([y, y[:, :, -1:].expand(-1, -1, 3, -1)], 2)
    padded = torch.cat([padded, padded[..., -1:].expand(-1, -1, -1, 2)], 3)
    with torch.inference_mode():
        assert np.array_equal(bottleneck.count(y, 128)[0][1], bottleneck.count(padded, 128)[0][1])
