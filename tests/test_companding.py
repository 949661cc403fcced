"""Compander curves against their closed forms, and the companding bottleneck against the one within it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compand.bottlenecks.companding import (
    SATURATION,
    Compander,
    CompandingBottleneck,
    GaussianCompander,
    LaplaceCompander,
)
from compand.bottlenecks.factorized import FactorizedBottleneck
from compand.bottlenecks.hyperprior import HyperpriorBottleneck
from compand.codec import Bottleneck
from compand.errors import UsageError

CURVES: list[type[Compander]] = [GaussianCompander, LaplaceCompander]
LAMBDAS = [0.002, 0.01, 0.05, 0.25]
QUALITY = 100

curves = pytest.mark.parametrize("curve", CURVES)


def factorized(trainable: bool = True) -> FactorizedBottleneck:
    return FactorizedBottleneck(3, LAMBDAS, trainable)


def hyperprior(trainable: bool = True) -> HyperpriorBottleneck:
    return HyperpriorBottleneck(3, LAMBDAS, 4, (4, 4, 8), trainable)


def latents(batch: int = 2, height: int = 7, width: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(batch, 3, height, width, generator=generator) * torch.tensor([0.1, 1, 5])[:, None, None]
    )


def frozen(inner: Bottleneck, compander: Compander) -> CompandingBottleneck:
    bottleneck = CompandingBottleneck(inner, compander)
    bottleneck.freeze()
    return bottleneck.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ curves


@pytest.mark.parametrize(
    ("curve", "closed", "reach"),
    [
        (GaussianCompander, lambda t: math.sqrt(math.pi / 2) * math.erf(t / math.sqrt(2)), 3.7),
        (LaplaceCompander, lambda t: math.copysign(1 - math.exp(-abs(t)), t), 8.5),
    ],
)
@given(scale=st.floats(0.01, 100), share=st.floats(-1, 1))
def test_closed_form_and_inverse(curve, closed, reach, scale, share):
    compander = curve(1, scale)
    with torch.no_grad():
        y = torch.full((1, 1, 1, 1), share * reach * scale)
        u = compander.compress(y)
        assert float(u) == pytest.approx(scale * closed(float(y) / scale), rel=1e-5, abs=1e-6 * scale)
        # Near the ends a compressed value has few digits left, and the inverse a slope in the thousands.
        assert float(compander.expand(u)) == pytest.approx(float(y), rel=2e-4, abs=1e-3 * scale)
        assert torch.equal(compander.compress(-y), -u)


@curves
def test_channels_have_scales_of_their_own(curve):
    compander = curve(3)
    with torch.no_grad():
        compander.log_scale.copy_(torch.tensor([0.1, 1.0, 10.0]).log())
        y = torch.full((2, 3, 1, 2), 4.0)
        u = compander.compress(y)
        for channel, scale in enumerate((0.1, 1.0, 10.0)):
            alone = curve(1, scale).compress(y[:, channel : channel + 1])
            torch.testing.assert_close(u[:, channel : channel + 1], alone)
    assert u[0, 0, 0, 0] < u[0, 1, 0, 0] < u[0, 2, 0, 0] < 4


@curves
def test_slope_is_one_at_zero(curve):
    """There too, where |y| has no derivative: silence must not stop gradients."""
    compander = curve(1, 0.7)
    for function in (compander.compress, compander.expand):
        y = torch.tensor([-1e-6, -0.0, 0.0, 1e-6]).view(1, 1, 1, 4).requires_grad_()
        (slope,) = torch.autograd.grad(function(y).sum(), y)
        torch.testing.assert_close(slope, torch.ones_like(slope), rtol=1e-5, atol=0)


@curves
def test_curves_rise_and_stay_within_their_bounds(curve):
    compander = curve(1, 2.0)
    with torch.no_grad():
        u = compander.compress(torch.linspace(-20, 20, 2001).view(1, 1, 1, -1)).flatten()
        bound = float(compander.compress(torch.full((1, 1, 1, 1), 1e30)))
        assert (u.diff() >= 0).all() and float(u.abs().max()) <= bound
        assert bound == pytest.approx(2 * (math.sqrt(math.pi / 2) if curve is GaussianCompander else 1))
        y = compander.expand(torch.linspace(-2 * bound, 2 * bound, 2001).view(1, 1, 1, -1)).flatten()
    assert (y.diff() >= 0).all() and y.isfinite().all()
    inside = SATURATION * bound
    assert torch.equal(y[-1:], compander.expand(torch.full((1, 1, 1, 1), inside * 1.001)).flatten())


@curves
def test_its_density_becomes_uniform(curve):
    generator = np.random.default_rng(0)
    draw = generator.normal if curve is GaussianCompander else generator.laplace
    with torch.no_grad():
        y = torch.from_numpy(draw(0, 3, 40_000).astype(np.float32)).view(1, 1, 1, -1)
        u = np.sort(curve(1, 3.0).compress(y).flatten().numpy())
    bound = 3 * (math.sqrt(math.pi / 2) if curve is GaussianCompander else 1)
    # Kolmogorov-Smirnov: the distance of the empirical distribution from the uniform one.
    assert np.abs((u / bound + 1) / 2 - np.linspace(0, 1, u.size)).max() < 0.01


@curves
@pytest.mark.parametrize("log_scale", [-20.0, 0.0, 20.0])
def test_gradients_are_finite_everywhere(curve, log_scale):
    compander = curve(1)
    torch.nn.init.constant_(compander.log_scale, log_scale)
    extremes = torch.tensor([0.0, -0.0, 1e-45, 1e-30, 1.0, -4.0, 40.0, 1e5, -1e20, 3e38, -3e38])
    for function in (compander.compress, compander.expand, lambda y: compander.expand(compander.compress(y))):
        y = extremes.clone().view(1, 1, 1, -1).requires_grad_()
        result = function(y)
        gradients = torch.autograd.grad(result.sum(), [y, compander.log_scale])
        assert all(value.isfinite().all() for value in (result, *gradients))


@curves
def test_gradients_are_the_derivatives(curve):
    compander = curve(2, 1.5).double()
    y = (torch.randn(1, 2, 1, 3, generator=torch.Generator().manual_seed(0)) * 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y, _: compander.compress(y), (y, compander.log_scale))
    u = compander.compress(y).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda u, _: compander.expand(u), (u, compander.log_scale))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scales_that_are_none(scale):
    with pytest.raises(UsageError, match="positive"):
        LaplaceCompander(2, scale)


# -------------------------------------------------------------------------------------------------- bottleneck


def test_channels_must_agree():
    with pytest.raises(UsageError, match="3 latent channels"):
        CompandingBottleneck(factorized(), LaplaceCompander(4))


@curves
@pytest.mark.parametrize("build", [factorized, hyperprior])
def test_symbols_are_those_of_the_compressed_latents(curve, build: Callable[..., Bottleneck]):
    bottleneck = frozen(build(), curve(3, 2.0))
    inner, y = bottleneck.inner, latents()
    u = bottleneck.compander.compress(y)
    payloads = bottleneck.compress(y, QUALITY)
    assert payloads == inner.compress(u, QUALITY)
    for (indexes, symbols), (expected, values) in zip(
        bottleneck.count(y, QUALITY), inner.count(u, QUALITY), strict=True
    ):
        assert np.array_equal(indexes, expected) and np.array_equal(symbols, values)
    u_hat = inner.decompress(payloads, (7, 9), QUALITY)
    torch.testing.assert_close(
        bottleneck.decompress(payloads, (7, 9), QUALITY), bottleneck.compander.expand(u_hat)
    )
    assert bottleneck.least_bits((7, 9)) == inner.least_bits((7, 9))
    assert bottleneck.table_counts() == inner.table_counts()
    assert bottleneck.y_gain is inner.y_gain


@curves
@pytest.mark.parametrize("build", [factorized, hyperprior])
@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 40))
def test_decoding_gives_what_forward_gave(curve, build, batch, height, width):
    bottleneck = frozen(build(), curve(3))
    y = latents(batch, height, width)
    output = bottleneck(y, torch.full((batch,), QUALITY))
    payloads = bottleneck.compress(y, QUALITY)
    assert torch.equal(bottleneck.decompress(payloads, (height, width), QUALITY), output.y_hat)
    for payload, bits in zip(payloads, output.bits.tolist(), strict=True):
        assert abs(8 * len(payload) - bits) < 64


@pytest.mark.parametrize("build", [factorized, hyperprior])
def test_the_decoder_needs_the_scale_and_no_encoder_part(build):
    bottleneck = frozen(build(), LaplaceCompander(3, 0.8))
    assert bottleneck.encoder_parts == tuple(f"inner.{part}" for part in bottleneck.inner.encoder_parts)
    assert bottleneck.coarse_parts == tuple(f"inner.{part}" for part in bottleneck.inner.coarse_parts)
    assert not "compander.log_scale".startswith(bottleneck.encoder_parts)
    y = latents()
    payloads = bottleneck.compress(y, QUALITY)
    bare = CompandingBottleneck(build(trainable=False), LaplaceCompander(3)).eval()
    kept = bare.state_dict().keys() & {
        name for name in bottleneck.state_dict() if not name.startswith(bottleneck.encoder_parts)
    }
    bare.load_state_dict({name: bottleneck.state_dict()[name] for name in kept}, strict=False)
    bare.load_frozen(bottleneck.frozen_arrays())
    with torch.no_grad():
        decoded = bare.decompress(payloads, (7, 9), QUALITY)
    assert torch.equal(decoded, bottleneck.decompress(payloads, (7, 9), QUALITY))
    assert bottleneck.frozen_arrays().keys() == bottleneck.inner.frozen_arrays().keys()


def test_steps_grow_with_the_value():
    """What companding is for: error in proportion to the magnitude, where uniform steps have one error."""
    y = torch.linspace(0.5, 8, 4000).view(1, 1, 1, -1).expand(-1, 3, -1, -1)
    quality = torch.tensor([QUALITY])
    errors = {}
    for name, bottleneck in (
        ("uniform", factorized()),
        ("companded", CompandingBottleneck(factorized(), LaplaceCompander(3, 4.0))),
    ):
        bottleneck.freeze()
        with torch.no_grad():
            error = (bottleneck.eval()(y, quality).y_hat - y)[0, 0, 0].square()
        errors[name] = (float(error[:1000].mean()), float(error[-1000:].mean()))
    assert errors["uniform"][1] == pytest.approx(errors["uniform"][0], rel=0.2)
    # Slopes are e^(-y / 4), at 1.4 and at 7.1 on average.
    ratio = errors["companded"][1] / errors["companded"][0]
    assert ratio == pytest.approx(math.exp(2 * (7.1 - 1.4) / 4), rel=0.3)


@curves
@pytest.mark.parametrize("build", [factorized, hyperprior])
def test_training_reaches_the_scale_with_extreme_latents(curve, build):
    bottleneck = CompandingBottleneck(build(), curve(3)).train()
    y = latents()
    y[0, :, :2], y[1, 0, 0, 0], y[1, 1, 0, 0] = 0, 1e30, -1e12
    y.requires_grad_()
    output = bottleneck(y, torch.tensor([40, 128]))
    (output.bits.sum() + output.y_hat.square().sum() + output.losses["auxiliary"]).backward()
    gradients = [p.grad for p in (y, *bottleneck.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert bool((bottleneck.compander.log_scale.grad != 0).all())


def test_thawing_is_the_inner_bottlenecks():
    source = frozen(hyperprior(), LaplaceCompander(3))
    other = CompandingBottleneck(hyperprior(), LaplaceCompander(3))
    other.thaw(source.frozen_arrays())
    for a, b in zip(source.inner.hyper_synthesis, other.inner.hyper_synthesis, strict=True):
        if isinstance(a, torch.nn.Conv2d):
            torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=2.0**-13)
