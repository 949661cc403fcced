"""Sound to a few vectors a second, by strided convolutions, and back, by an inverse Fourier transform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compand.codec import QUALITY_STEPS, Transform
from compand.errors import UsageError
from compand.transforms.patch import DepthwiseBlock, LevelScale, colour_axes

LIMIT = 8.0
"""Largest amplitude that analysis looks at and largest magnitude of a partial that synthesis gives; full scale is 1."""

QUIET = -6.0
"""Logarithm of the magnitudes before training: an output about as loud as speech."""


@dataclass(frozen=True)
class EncoderStage:
    """One resolution of the encoder.

    Attributes:
        stride: factor by which it is coarser than the one before.
        channels: width from here on.
        dilations: one residual unit each, before the strided convolution.
    """

    stride: int
    channels: int
    dilations: Sequence[int]


@dataclass(frozen=True)
class DecoderStage:
    """One resolution of the decoder.

    Attributes:
        factor: by how much it is finer than the one before.
        channels: width.
        depth: number of blocks.
    """

    factor: int
    channels: int
    depth: int


class _LearningSnake(torch.autograd.Function):
    """Snake with a gradient of few steps in the precision of x; what autograd makes of the formula passes over memory,
    which bounds training, several times as often.

    With u = sin(2 a x): dy/dx = 1 + u, and dy/d(log a) = x u - sin^2(a x) / a = x dy/dx - y.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_slope: Tensor) -> Tensor:
        slope = log_slope.exp()[:, None, None].to(x.dtype)
        sine = torch.sin(slope * x)
        y = torch.addcmul(x, sine, sine / slope)
        ctx.save_for_backward(x, y, log_slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, y, log_slope = ctx.saved_tensors
        (of_y,) = gradients
        twice = (2 * log_slope.exp())[:, None, None].to(x.dtype)
        of_x = torch.addcmul(of_y, of_y, torch.sin(twice * x))
        of_slope = torch.addcmul(of_x * x, of_y, y, value=-1)
        return of_x, of_slope.sum((0, 2, 3), dtype=log_slope.dtype)


class Snake(nn.Module):
    """x + sin^2(a x) / a with a slope a > 0 of each channel (Ziyin et al. 2020, "Neural networks fail to learn periodic
    functions and how to fix it", equation 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_slope = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.log_slope.requires_grad:
            learned: Tensor = _LearningSnake.apply(x, self.log_slope)
            return learned
        slope = self.log_slope.exp()[:, None, None].to(x.dtype)
        return x + torch.sin(slope * x).square() / slope


class ResidualUnit(nn.Module):
    """x + W snake(dilated(snake(x))), with a kernel of 7 samples.

    The unit of DAC (Kumar et al. 2023, "High-fidelity audio compression with improved RVQGAN", section 3.1).
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilated = nn.Conv2d(
            channels, channels, (1, 7), padding=(0, 3 * dilation), dilation=(1, dilation)
        )
        self.project = nn.Conv2d(channels, channels, 1)
        self.first, self.second = Snake(channels), Snake(channels)
        with torch.no_grad():
            self.project.weight.mul_(0.2)
            nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.second(self.dilated(self.first(x))))


class Downsampling(nn.Module):
    """A convolution of twice its stride whose window is centred on the samples that it replaces."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.margins = (stride // 2, stride - stride // 2)
        self.activation = Snake(channels)
        self.convolution = nn.Conv2d(channels, width, (1, 2 * stride), stride=(1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(F.pad(self.activation(x), self.margins))


class ChannelNorm(nn.Module):
    """Layer normalisation of the channels at each position on its own, so that nothing far away is looked at."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        return F.layer_norm(rows, rows.shape[3:], self.scale, self.shift, 1e-6).permute(0, 3, 1, 2)


class NormalisedBlock(DepthwiseBlock):
    """x + W2 gelu(W1 norm(dw(x))): the whole block of ConvNeXt, along time. Its input stays as it is beside it, so that
    amplitude is not lost."""

    def __init__(self, channels: int, kernel: int, expansion: int) -> None:
        super().__init__(channels, (1, kernel), expansion)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        # On GPUs, kernels of one channel a group are made for channels one after another.
        x_in = x.contiguous() if x.is_cuda else x
        return x + self.project(F.gelu(self.expand(self.norm(self.depthwise(x_in)))))


class Upsampling(nn.Module):
    """A point-wise layer that gives `factor` positions in the place of one."""

    def __init__(self, channels: int, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.spread = nn.Conv2d(channels, factor * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, n = x.shape
        x = self.spread(x).permute(0, 2, 3, 1)
        return x.reshape(b, h, n * self.factor, -1).permute(0, 3, 1, 2)


class InverseSpectrogram(nn.Module):
    """Spectra to samples: each frame windowed, added where frames overlap, divided by the sum of squared windows.

    The inverse short-time Fourier transform of Griffin & Lim 1984 (equation 6), as Vocos ends with (Siuzdak 2023,
    section 3.1). Frame i is centred on the samples from i * hop to (i + 1) * hop, so that n frames give n * hop samples
    and none looks further than `reach` frames.

    Args:
        hop: samples from frame to frame.
        overlap: frames that meet at a sample, at least 2; windows have overlap * hop samples.

    Raises:
        UsageError: the window cannot be centred, or its frames do not meet.
    """

    window: Tensor

    def __init__(self, hop: int, overlap: int) -> None:
        super().__init__()
        if overlap < 2 or hop * (overlap - 1) % 2 or hop * overlap % 2:
            raise UsageError(f"windows of {overlap} hops of {hop} samples do not fit: change overlap")
        self.hop, self.overlap = hop, overlap
        self.bins = hop * overlap // 2 + 1
        self.reach = overlap // 2
        # The window follows from the two integers: no part of a checkpoint.
        place = torch.arange(hop * overlap, dtype=torch.float64) + 0.5
        window = torch.sin(math.pi * place / (hop * overlap)).square().float()
        self.register_buffer("window", window, persistent=False)

    def forward(self, magnitude: Tensor, phase: Tensor) -> Tensor:
        """magnitude, in amplitudes of partials over two, and phase in radians, float32 [..., n, bins] ->
        samples [..., n * hop]."""
        spectrum = torch.complex(magnitude * torch.cos(phase), magnitude * torch.sin(phase))
        frames = torch.fft.irfft(spectrum, n=self.hop * self.overlap, norm="forward") * self.window
        counted = torch.ones_like(frames[..., :1]) * self.window.square()
        return self._added(frames) / self._added(counted)

    def _added(self, frames: Tensor) -> Tensor:
        """[..., n, overlap * hop] -> [..., n * hop]."""
        n = frames.shape[-2]
        parts = frames.unflatten(-1, (self.overlap, self.hop)).unbind(-2)
        total = sum(F.pad(part, (0, 0, j, self.overlap - 1 - j)) for j, part in enumerate(parts))
        begin = self.hop * (self.overlap - 1) // 2
        return torch.as_tensor(total).flatten(-2)[..., begin : begin + n * self.hop]


class WaveformTransform(Transform):
    """Strided residual convolutions before the latents, ConvNeXt blocks and an inverse spectrogram behind them.

    ```
    x --conv--> [residual units, strided conv] x stages --> blocks --1x1--> y              (analysis)
    y_hat --conv--> [blocks, finer] x stages --1x1--> m, p --> S = exp(m) (cos p + j sin p) --istft--> x_hat (synthesis)
    ```

    The encoder is that of SoundStream and its successors (Zeghidour et al. 2021, section III-A) with the units of DAC
    and without recurrence; the decoder that of Vocos (Siuzdak 2023, section 3), which works at the rate of the latents,
    or a few times it, and leaves the rest to the Fourier transform. No layer normalises over time, so that `context`
    samples around a position are all it depends on.

    Channels are first turned into sum and difference. The encoder knows nothing of the quality, so that the indices of
    a lower level are the first ones of a higher; the decoder knows the level.

    Args:
        channels: channels C of the samples [batch, C, 1, n], which are nominally within [-1, 1].
        latent_channels: channels M of y.
        levels: number of quality levels.
        encoder_width: channels of the first convolution.
        encoder_stages: (stride, channels, dilations) of each stage; the stride of the codec is their product.
        encoder_depth: blocks at the rate of the latents.
        decoder_stages: (factor, channels, depth) of each stage; the hop is stride / the product of the factors.
        kernel: extent of the blocks' depth-wise kernels.
        expansion: width factor inside the blocks.
        overlap: frames of the inverse spectrogram that meet at a sample.

    Raises:
        UsageError: the factors do not divide the stride, or the windows do not fit.
    """

    one_analysis = True
    encoder_parts = ("encoder.",)
    coarse_parts = ("encoder.", "decoder.")

    axes: Tensor

    def __init__(
        self,
        channels: int = 1,
        latent_channels: int = 128,
        levels: int = 8,
        encoder_width: int = 32,
        encoder_stages: Sequence[tuple[int, int, Sequence[int]]] = (
            (2, 64, (1, 3)),
            (4, 96, (1, 3, 9)),
            (5, 192, (1, 3, 9)),
            (8, 320, (1, 3)),
        ),
        encoder_depth: int = 2,
        decoder_stages: Sequence[tuple[int, int, int]] = ((1, 384, 4), (2, 320, 5)),
        kernel: int = 7,
        expansion: int = 3,
        overlap: int = 4,
    ) -> None:
        super().__init__()
        self.channels, self.latent_channels = channels, latent_channels
        coarser = [EncoderStage(*stage) for stage in encoder_stages]
        finer = [DecoderStage(*stage) for stage in decoder_stages]
        self.stride = math.prod(stage.stride for stage in coarser)
        factors = math.prod(stage.factor for stage in finer)
        if self.stride % factors:
            raise UsageError(f"decoder factors of {factors} do not divide a stride of {self.stride}")
        self.spectrogram = InverseSpectrogram(self.stride // factors, overlap)
        self.register_buffer("axes", colour_axes(channels).float(), persistent=False)

        encoder: list[nn.Module] = [nn.Conv2d(channels, encoder_width, (1, 7), padding=(0, 3))]
        width, resolution, reach = encoder_width, 1, 3
        for stage in coarser:
            encoder += [ResidualUnit(width, dilation) for dilation in stage.dilations]
            encoder.append(Downsampling(width, stage.channels, stage.stride))
            reach += resolution * (3 * sum(stage.dilations) + -(-stage.stride // 2))
            width, resolution = stage.channels, resolution * stage.stride
        encoder += [NormalisedBlock(width, kernel, expansion) for _ in range(encoder_depth)]
        reach += encoder_depth * (kernel // 2) * resolution
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(width, latent_channels, 1))

        margin = (0, kernel // 2)
        self.decoder_in = nn.Conv2d(latent_channels, finer[0].channels, (1, kernel), padding=margin)
        self.decoder_scale = LevelScale(levels, finer[0].channels)
        decoder: list[nn.Module] = []
        width, back = finer[0].channels, kernel // 2 * resolution
        for layer in finer:
            if layer.factor > 1 or layer.channels != width:
                decoder.append(Upsampling(width, layer.channels, layer.factor))
            decoder += [NormalisedBlock(layer.channels, kernel, expansion) for _ in range(layer.depth)]
            resolution //= layer.factor
            width = layer.channels
            back += layer.depth * (kernel // 2) * resolution
        back += self.spectrogram.reach * resolution
        self.decoder = nn.Sequential(*decoder, ChannelNorm(width))
        self.head = nn.Conv2d(width, channels * 2 * self.spectrogram.bins, 1)
        with torch.no_grad():
            bias = torch.tensor([QUIET, 0.0]).expand(self.spectrogram.bins, 2).T.flatten()
            self.head.bias.copy_(bias.repeat(channels))  # type: ignore[union-attr]
        self.context = -(-max(reach, back) // self.stride) * self.stride

    def analysis(self, x: Tensor, quality: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = torch.einsum("kc,bchn->bkhn", self.axes, x.float().clamp(-LIMIT, LIMIT))
        # Kernels along one axis run several times faster in channels-last memory.
        y: Tensor = self.encoder(x.contiguous(memory_format=torch.channels_last))
        return y.float()

    def synthesis(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        # Between two levels, the bottleneck uses the one below.
        level = quality - quality % QUALITY_STEPS
        weight = self.decoder_in.weight
        y_hat = y_hat.to(weight.dtype).contiguous(memory_format=torch.channels_last)
        feature = self.decoder(self.decoder_scale(self.decoder_in(y_hat), level))
        feature = self.head(feature.to(self.head.weight.dtype))
        with torch.autocast(y_hat.device.type, enabled=False):
            polar = feature.float()[:, :, 0].unflatten(1, (self.channels, 2, -1)).transpose(3, 4)
            magnitude = polar[:, :, 0].exp().clamp(max=LIMIT)
            x = self.spectrogram(magnitude, polar[:, :, 1])
            return torch.einsum("kc,bkn->bcn", self.axes, x)[:, :, None]

    def reduce_precision(self, dtype: torch.dtype) -> None:
        """Converts the decoder's blocks. Encoder and head stay in float32: a phase has no room for rounding, and tokens
        should not depend on the device."""
        self.decoder_in.to(dtype)
        self.decoder.to(dtype)
