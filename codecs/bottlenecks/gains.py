"""Gain units: one quantisation step a channel and quality level, so that one checkpoint serves every rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compand.codec import level_table_at

INTEGER_LIMIT = float(1 << 30)
"""Latents are cut to +- this number of steps."""


class GainUnit(nn.Module):
    """Per-channel gains that grow with quality, and the inverse gains of the decoder.

    Cui et al. 2021 ("Asymmetric gained deep image compression with continuous rate adaptation", equations 2 to 5), with
    the logarithm of the gains interpolated linearly between levels, which is their exponential interpolation.

    Args:
        channels: number of channels.
        initial: gain of each level at the start of training.
    """

    def __init__(self, channels: int, initial: Sequence[float]) -> None:
        super().__init__()
        log_gain = torch.tensor([math.log2(value) for value in initial])[:, None].repeat(1, channels)
        self.log2_gain = nn.Parameter(log_gain)
        self.log2_inverse_offset = nn.Parameter(torch.zeros_like(log_gain))

    def log2(self, quality: Tensor) -> Tensor:
        """log2 of the gain, [batch, channels]; quality: integers [batch] in 1/32 level."""
        return level_table_at(self.log2_gain, quality)

    def gain(self, quality: Tensor) -> Tensor:
        """The encoder's gain, [batch, channels, 1, 1]."""
        return torch.exp2(self.log2(quality))[:, :, None, None]

    def inverse(self, quality: Tensor) -> Tensor:
        """The decoder's gain, [batch, channels, 1, 1]; near 1 / gain, learned separately."""
        offset = level_table_at(self.log2_inverse_offset, quality)
        return torch.exp2(offset - self.log2(quality))[:, :, None, None]

    def quantise(self, y: Tensor, quality: int) -> Tensor:
        """y [batch, channels, h, w] in steps of one quality, rounded to int32."""
        level = torch.tensor([quality], device=y.device)
        steps = torch.nan_to_num(y.float() * self.gain(level), nan=0.0)
        return steps.clamp_(-INTEGER_LIMIT, INTEGER_LIMIT).round_().to(torch.int32)

    def dequantise(self, integers: Tensor, quality: int) -> Tensor:
        """Inverse of `quantise` up to the rounding: float32."""
        level = torch.tensor([quality], device=integers.device)
        return integers.to(torch.float32) * self.inverse(level)

    def inverse_levels(self) -> Tensor:
        """The decoder's gains at the levels themselves, [levels, channels]; what an integer prior interpolates."""
        return torch.exp2(self.log2_inverse_offset - self.log2_gain)


def step_gains(lambdas: Sequence[float], media_channels: int = 3) -> list[float]:
    """Gains with which an orthonormal transform of [0, 1] samples meets each Lagrange multiplier at high rate.

    A uniform quantiser of step 1/g gives D = 1 / (12 g^2) per coefficient at log2(g) + const bits. With C channels, R
    in bits per position is a sum over them and D a mean, so that lambda 255^2 D + R is least at
    g^2 = lambda 255^2 ln(2) / (6 C).

    Args:
        lambdas: Lagrange multiplier of each level.
        media_channels: channels C of the samples.
    """
    return [math.sqrt(value * 255**2 * math.log(2) / (6 * media_channels)) for value in lambdas]
