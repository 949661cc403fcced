"""Shuffles, the DCT basis, and what a transform promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn

from compand import registry
from compand.transforms.patch import (
    DepthwiseBlock,
    LevelScale,
    PatchTransform,
    Stage,
    dct_patch_basis,
    pixel_shuffle,
    pixel_unshuffle,
)

NAMES = [entry.name for entry in registry.entries() if entry.medium == "image"]
VARIANTS = [{}, {"linear_path": False}, {"level_scales": False}, {"kernel": 3, "expansion": 2}]
SMALL_STAGES = ((4, 12, 1), (8, 16, 1))


def varied(**arguments) -> PatchTransform:
    """A small transform whose parameters have all left their initial values."""
    torch.manual_seed(0)
    transform = PatchTransform(24, SMALL_STAGES, 8, **arguments)
    with torch.no_grad():
        for p in transform.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return transform.eval()


shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)
)


@given(shapes)
def test_shuffles_are_inverse_and_exact(shape):
    b, c, rows, columns, factor = shape
    x = torch.arange(b * c * rows * columns * factor**2).view(b, c, rows * factor, columns * factor)
    folded = pixel_unshuffle(x, factor)
    assert torch.equal(pixel_shuffle(folded, factor), x)
    # Torch orders channels (c, dy, dx), we (dy, dx, c).
    reference = torch.nn.functional.pixel_unshuffle(x, factor).view(b, c, factor, factor, rows, columns)
    assert torch.equal(folded, reference.permute(0, 2, 3, 1, 4, 5).flatten(1, 3))


def test_folded_memory_is_channels_last():
    x = torch.zeros(2, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    assert pixel_unshuffle(x, 4).is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------- basis


@pytest.mark.parametrize(
    ("stride", "channels"), [(16, 256), (16, 48), (8, 192), (4, 48), (4, 40), (8, 7), (2, 1)]
)
def test_the_basis_is_orthonormal(stride, channels):
    basis = dct_patch_basis(stride, channels).double()
    assert basis.shape == (channels, 3 * stride**2)
    torch.testing.assert_close(basis @ basis.T, torch.eye(channels, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_basis_is_scipys_dct_of_luma():
    basis = dct_patch_basis(8, 96)
    patch = np.random.default_rng(0).random((8, 8, 3))
    luma = patch @ (np.array([0.299, 0.587, 0.114]) / np.linalg.norm([0.299, 0.587, 0.114]))
    expected = dctn(luma, norm="ortho").ravel()
    got = (basis.double() @ torch.from_numpy(patch.ravel())).numpy()[:64]
    sign = np.sign(got[0] / expected[0])
    matched = {int(np.abs(expected - sign * value).argmin()): value for value in got}
    assert set(matched) == set(range(64))
    for place, value in matched.items():
        assert sign * value == pytest.approx(expected[place], abs=1e-5)


def test_low_frequencies_come_first():
    basis = dct_patch_basis(16, 96).view(96, 16, 16, 3)
    gray = torch.full((16, 16, 3), 0.7)
    response = (basis * gray).sum((1, 2, 3)).abs()
    assert int(response.argmax()) == 0 and float(response[1:64].max()) < 1e-4
    roughness = basis.diff(dim=1).square().sum((1, 2, 3)) + basis.diff(dim=2).square().sum((1, 2, 3))
    assert float(roughness[:64].max()) < 4 and float(roughness[0]) < 1e-9


# --------------------------------------------------------------------------------------------------- transforms


def test_a_full_linear_path_is_lossless():
    transform = PatchTransform(192, (Stage(4, 8, 1), Stage(8, 8, 1)), 8)
    with torch.no_grad():
        for last in (transform.analysis_latent, transform.synthesis_fold[0]):
            last.weight.zero_()
        x = torch.rand(2, 3, 16, 24)
        quality = torch.tensor([32, 200])
        torch.testing.assert_close(
            transform.synthesis(transform.analysis(x, quality), quality), x, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_shapes_and_facts(variant):
    transform = varied(**variant)
    assert (transform.stride, transform.latent_channels) == (8, 24)
    kernel = variant.get("kernel", 5)
    assert transform.context >= (4 + 8) * (kernel // 2) and transform.context % 8 == 0
    x = torch.rand(2, 3, 40, 24)
    with torch.no_grad():
        y = transform.analysis(x, torch.tensor([32, 256]))
        assert y.shape == (2, 24, 5, 3) and y.dtype == torch.float32
        x_hat = transform.synthesis(y, torch.tensor([32, 256]))
        assert x_hat.shape == x.shape and x_hat.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_reduced_precision_stays_close(variant):
    transform = varied(**variant)
    x = torch.rand(2, 3, 64, 48)
    quality = torch.tensor([70, 200])
    with torch.no_grad():
        y = transform.analysis(x, quality)
        x_hat = transform.synthesis(y, quality)
        transform.reduce_precision(torch.bfloat16)
        reduced = transform.analysis(x, quality)
        reduced_x = transform.synthesis(y, quality)
    assert reduced.dtype == reduced_x.dtype == torch.float32
    assert 0 < float((reduced - y).abs().max()) < 0.03 * float(y.abs().max())
    assert 0 < float((reduced_x - x_hat).abs().max()) < 0.02 * float(x_hat.abs().max())


def test_what_shows_at_high_rates_keeps_its_precision():
    transform = varied()
    transform.reduce_precision(torch.bfloat16)
    kept = {n.split(".")[0] for n, p in transform.named_parameters() if p.dtype == torch.float32}
    assert {"analysis_linear", "synthesis_linear"} <= kept
    assert transform.synthesis_fold[0].weight.dtype == torch.float32
    assert transform.analysis_blocks[0][0].expand.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("direction", ["analysis", "synthesis"])
def test_nothing_beyond_the_context_is_seen(direction):
    transform = varied()
    quality = torch.tensor([100])
    margin = transform.context // transform.stride
    torch.manual_seed(1)
    whole = torch.rand(1, 3, 160, 160) if direction == "analysis" else torch.randn(1, 24, 20, 20)
    changed = whole.clone()
    edge = 80 if direction == "analysis" else 10
    changed[:, :, edge:] += 1
    with torch.no_grad():
        a, b = (getattr(transform, direction)(x, quality) for x in (whole, changed))
    first = (a - b).abs().amax((0, 1, 3)).nonzero()[0].item()
    unit = 8 if direction == "synthesis" else 1
    assert (10 - margin) * unit <= first < 10 * unit


def test_levels_scale_features():
    scale = LevelScale(3, 2)
    with torch.no_grad():
        scale.offset.copy_(torch.tensor([[0.0, 1], [1, 1], [3, 0]]))
    got = scale(torch.ones(3, 2, 1, 1), torch.tensor([32, 48, 96]))[:, :, 0, 0]
    assert got.tolist() == [[1, 2], [1.5, 2], [4, 1]]


def test_quality_reaches_both_directions():
    transform = varied()
    x, low, high = torch.rand(1, 3, 16, 16), torch.tensor([32]), torch.tensor([256])
    with torch.no_grad():
        y = transform.analysis(x, low)
        assert not torch.equal(y, transform.analysis(x, high))
        assert not torch.equal(transform.synthesis(y, low), transform.synthesis(y, high))
        both = transform.analysis(x.expand(2, -1, -1, -1), torch.tensor([32, 256]))
        torch.testing.assert_close(both[:1], y)


def test_the_block_is_its_formula():
    torch.manual_seed(0)
    block = DepthwiseBlock(4, kernel=3, expansion=2)
    x = torch.randn(1, 4, 5, 6)
    with torch.no_grad():
        inner = torch.nn.functional.conv2d(
            x, block.depthwise.weight, block.depthwise.bias, padding=1, groups=4
        )
        wide = (
            torch.einsum("oi,bihw->bohw", block.expand.weight[..., 0, 0], inner)
            + block.expand.bias[:, None, None]
        )
        gelu = 0.5 * wide * (1 + torch.erf(wide / 2**0.5))
        out = (
            torch.einsum("oi,bihw->bohw", block.project.weight[..., 0, 0], gelu)
            + block.project.bias[:, None, None]
        )
        torch.testing.assert_close(block(x), x + out)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_needs_none_of_the_encoder_parts(name, exact):
    codec = exact(name)
    state = codec.decoder_state()
    assert state and len(state) < len(codec.state_dict())
    y_hat = torch.randn(1, codec.transform.latent_channels, 2, 2, generator=torch.Generator().manual_seed(0))
    quality = torch.tensor([77])
    with torch.no_grad():
        expected = codec.transform.synthesis(y_hat, quality)
        for key, value in codec.state_dict().items():
            if key not in state:
                value.fill_(float("nan"))
        assert torch.equal(codec.transform.synthesis(y_hat, quality), expected)
