"""The audio trunk: the inverse spectrogram against numpy's Fourier transform, and how far each position looks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from compand.errors import UsageError
from compand.transforms.waveform import LIMIT, InverseSpectrogram, Snake, WaveformTransform

SMALL = {
    "latent_channels": 6,
    "levels": 3,
    "encoder_width": 4,
    "encoder_stages": ((2, 6, (1, 3)), (5, 8, (1,))),
    "encoder_depth": 1,
    "decoder_stages": ((1, 8, 1), (5, 8, 2)),
    "kernel": 3,
}


def small(channels: int = 1, **options) -> WaveformTransform:
    """A transform of stride 10 whose parameters all matter."""
    torch.manual_seed(0)
    transform = WaveformTransform(channels, **(SMALL | options)).eval()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return transform


def level(transform: WaveformTransform, value: float, batch: int = 1) -> torch.Tensor:
    return torch.full((batch,), round(32 * value))


# ----------------------------------------------------------------------------------------- inverse spectrogram


def frames_of(x: np.ndarray, hop: int, overlap: int) -> np.ndarray:
    """Windowed spectra of frames that are centred on the hops of x, nothing being around it."""
    size = hop * overlap
    window = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    margin = hop * (overlap - 1) // 2
    padded = np.pad(x, (margin, size))
    frames = np.stack([padded[i : i + size] * window for i in range(0, len(x), hop)])
    return np.fft.rfft(frames) / size


@settings(max_examples=30, deadline=None)
@given(half=st.integers(1, 40), overlap=st.integers(2, 8), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_inverse_spectrogram_restores_what_was_analysed(half, overlap, n, seed):
    hop = 2 * half
    x = np.random.default_rng(seed).standard_normal(n * hop)
    spectrum = torch.from_numpy(frames_of(x, hop, overlap))
    restored = InverseSpectrogram(hop, overlap)(spectrum.abs().float(), spectrum.angle().float())
    assert restored.shape == (n * hop,)
    assert np.abs(restored.numpy() - x).max() < 1e-4


def test_no_frame_is_heard_beyond_its_reach():
    for overlap in (2, 3, 4, 5, 8):
        inverse = InverseSpectrogram(6, overlap)
        magnitude, phase = torch.rand(20, inverse.bins), torch.rand(20, inverse.bins)
        before = inverse(magnitude, phase)
        magnitude[10] += 1
        heard = (inverse(magnitude, phase) != before).nonzero().flatten() // 6
        assert 10 - inverse.reach <= int(heard.min()) and int(heard.max()) <= 10 + inverse.reach


@pytest.mark.parametrize(("hop", "overlap"), [(8, 1), (7, 2), (7, 4), (5, 3)])
def test_windows_that_cannot_be_centred_are_refused(hop, overlap):
    with pytest.raises(UsageError, match="change overlap"):
        InverseSpectrogram(hop, overlap)


# ------------------------------------------------------------------------------------------------ the transform


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("positions", [1, 2, 13])
def test_shapes(channels, positions):
    transform = small(channels)
    x = 0.3 * torch.randn(2, channels, 1, 10 * positions)
    y = transform.analysis(x, level(transform, 1, 2))
    assert transform.stride == 10 and y.shape == (2, 6, 1, positions) and y.dtype == torch.float32
    x_hat = transform.synthesis(y, level(transform, 3, 2))
    assert x_hat.shape == x.shape and x_hat.dtype == torch.float32 and x_hat.isfinite().all()


@pytest.mark.parametrize("channels", [1, 2])
def test_a_window_with_its_context_is_transformed_as_if_it_were_not_cut_out(channels):
    transform = small(channels)
    context, stride = transform.context, transform.stride
    assert context % stride == 0
    margin = context // stride
    x = 0.3 * torch.randn(1, channels, 1, 6 * context + 20 * stride)
    quality = level(transform, 2)
    begin, end = 2 * context, 2 * context + 20 * stride
    with torch.inference_mode():
        y = transform.analysis(x, quality)
        part = transform.analysis(x[..., begin - context : end + context], quality)
        whole = transform.synthesis(y, quality)
        columns = slice(begin // stride - margin, end // stride + margin)
        piece = transform.synthesis(y[..., columns], quality)
    assert torch.allclose(part[..., margin:-margin], y[..., begin // stride : end // stride], atol=1e-5)
    assert torch.allclose(piece[..., context:-context], whole[..., begin:end], atol=1e-5)


def test_nothing_beyond_the_context_is_looked_at():
    transform = small()
    context, stride = transform.context, transform.stride
    columns = 4 * context // stride
    x, y = torch.randn(1, 1, 1, columns * stride), torch.randn(1, 6, 1, columns)
    quality, place = level(transform, 1), columns // 2
    with torch.inference_mode():
        before = transform.analysis(x, quality), transform.synthesis(y, quality)
        x[..., place * stride : (place + 1) * stride] += 1
        y[..., place] += 1
        after = transform.analysis(x, quality), transform.synthesis(y, quality)
    seen = (after[0] != before[0]).any(1).flatten().nonzero() * stride
    heard = (after[1] != before[1]).flatten().nonzero()
    for reached in (seen, heard):
        assert int(reached.min()) >= place * stride - context
        assert int(reached.max()) < (place + 1) * stride + context


def test_the_encoder_knows_nothing_of_the_quality_and_the_decoder_whole_levels():
    transform = small()
    x = torch.randn(1, 1, 1, 200)
    y = transform.analysis(x, level(transform, 1))
    assert torch.equal(y, transform.analysis(x, level(transform, 3)))
    heard = [transform.synthesis(y, level(transform, value)) for value in (1, 1.75, 2, 3)]
    assert torch.equal(heard[0], heard[1])
    assert not torch.allclose(heard[0], heard[2]) and not torch.allclose(heard[2], heard[3])


def test_sum_and_difference_are_a_rotation():
    transform = small(2)
    assert torch.allclose(transform.axes @ transform.axes.T, torch.eye(2), atol=1e-6)
    seen = []
    transform.encoder[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 1, 1, 100)
    transform.analysis(torch.cat([x, x], 1), level(transform, 1))
    assert torch.allclose(seen[0][:, 0].abs(), math.sqrt(2) * x[:, 0].abs(), atol=1e-6)
    assert seen[0][:, 1].abs().max() < 1e-6


@pytest.mark.parametrize("value", [1e30, -1e30, 0.0])
def test_extremes_stay_finite(value):
    transform = small(2)
    x = torch.full((1, 2, 1, 400), value)
    y = transform.analysis(x, level(transform, 1))
    assert y.isfinite().all()
    assert transform.synthesis(1e4 * torch.randn_like(y), level(transform, 1)).isfinite().all()
    assert torch.equal(y, transform.analysis(x.clamp(-LIMIT, LIMIT), level(transform, 1)))


def test_reduced_precision_leaves_the_encoder_as_it_is():
    transform = small(latent_channels=12)
    x = 0.3 * torch.randn(1, 1, 1, 400)
    quality = level(transform, 2)
    with torch.inference_mode():
        y = transform.analysis(x, quality)
        expected = transform.synthesis(y, quality)
        transform.reduce_precision(torch.bfloat16)
        assert torch.equal(transform.analysis(x, quality), y)
        error = transform.synthesis(y, quality) - expected
    assert error.square().mean() < 1e-3 * expected.square().mean()


def test_every_parameter_learns():
    transform = small(2)
    x = 0.3 * torch.randn(2, 2, 1, 200)
    quality = level(transform, 2, 2)
    (transform.synthesis(transform.analysis(x, quality), quality) - x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in transform.parameters())


def test_snake_is_what_its_paper_says():
    snake, x = Snake(3), torch.randn(2, 3, 1, 50)
    with torch.no_grad():
        snake.log_slope.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    slope = snake.log_slope.exp()[:, None, None]
    assert torch.allclose(snake(x), x + torch.sin(slope * x) ** 2 / slope, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(snake(x), x + torch.sin(slope * x) ** 2 / slope, atol=1e-6)


def test_snake_learns_by_its_gradient():
    snake = Snake(3).double()
    with torch.no_grad():
        snake.log_slope.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    x = torch.randn(2, 3, 1, 5, dtype=torch.float64, requires_grad=True)

    def output(x: torch.Tensor, log_slope: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(snake, {"log_slope": log_slope}, x)

    assert torch.autograd.gradcheck(output, (x, snake.log_slope))
    half = x.detach().bfloat16().requires_grad_()
    Snake(3)(half).sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_factors_have_to_divide_the_stride():
    with pytest.raises(UsageError, match="do not divide"):
        WaveformTransform(**(SMALL | {"decoder_stages": ((3, 8, 1),)}))


MUSIC = {"channels": 2, "encoder_stages": ((2, 64, (1,)), (4, 96, (1,)), (8, 192, (1,)), (8, 320, (1,)))}


@pytest.mark.parametrize(("options", "rate", "budget"), [({}, 16000, 1.0e9), (MUSIC, 44100, 2.0e9)])
def test_multiply_adds_a_second_of_decoding(options, rate, budget):
    """A core does some 20e9 of them in a second."""
    transform = WaveformTransform(**options)
    y = torch.zeros(1, transform.latent_channels, 1, 20)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        transform.synthesis(y, level(transform, 1))
    assert counter.get_total_flops() / 2 * rate / (20 * transform.stride) < budget
