"""Discriminators of sounds: one looks at periods of samples, one at spectra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from compand.train.adversarial import Discriminator
from compand.train.sound_losses import Spectrum

SLOPE = 0.1
"""Of the rectifiers below zero."""


def _convolutions(layers: Sequence[nn.Conv2d]) -> nn.ModuleList:
    for layer in layers:
        # torch's own start makes features fade from layer to layer, and judges slow to learn.
        nn.init.kaiming_normal_(layer.weight, SLOPE)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.ModuleList(weight_norm(layer) for layer in layers)


def _judge(layers: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits of the last layer, and what the layers before it gave."""
    features = []
    *inner, last = layers.children()
    for layer in inner:
        x = F.leaky_relu(layer(x), SLOPE)
        features.append(x)
    return last(x), features


class MultiPeriodDiscriminator(Discriminator):
    """Samples as rows of a picture, by a prime number of them a row: each judge sees what recurs with a period.

    Kong et al. 2020 ("HiFi-GAN", section 2.3), with narrower layers. Channels are judged one by one.

    Args:
        periods: samples of a row, one judge each.
        widths: channels of the strided layers; the last layer before the logits has the width of the last one.
    """

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        widths: Sequence[int] = (32, 64, 128, 256, 256),
    ) -> None:
        super().__init__()
        self.periods = tuple(periods)
        self.judges = nn.ModuleList(self._judge(widths) for _ in periods)

    @staticmethod
    def _judge(widths: Sequence[int]) -> nn.ModuleList:
        layers, before = [], 1
        for i, width in enumerate(widths):
            stride = 3 if i + 1 < len(widths) else 1
            layers.append(nn.Conv2d(before, width, (5, 1), (stride, 1), (2, 0)))
            before = width
        return _convolutions([*layers, nn.Conv2d(before, 1, (3, 1), padding=(1, 0))])

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x = x.flatten(0, 1)
        logits, features = [], []
        for period, layers in zip(self.periods, self.judges, strict=True):
            padded = F.pad(x, (0, -x.shape[-1] % period))
            judged, seen = _judge(layers, padded.unflatten(-1, (-1, period))[:, 0][:, None])
            logits.append(judged)
            features += seen
        return logits, features


class SpectralDiscriminator(Discriminator):
    """Complex spectra of several resolutions as pictures.

    The multi-scale STFT discriminator of EnCodec (Defossez et al. 2022, figure 2), which sees phases too, where the
    multi-resolution discriminator of UnivNet (Jang et al. 2021, section 2.2) sees magnitudes alone.

    Args:
        channels: channels of the sounds.
        windows: samples of the windows, one judge each; hops are a quarter.
        width: channels of the layers.
        dilations: in time, of the strided layers, each of which halves the number of bins.
    """

    def __init__(
        self,
        channels: int = 1,
        windows: Sequence[int] = (2048, 1024, 512, 256),
        width: int = 32,
        dilations: Sequence[int] = (1, 2, 4),
    ) -> None:
        super().__init__()
        self.spectra = nn.ModuleList(Spectrum(window) for window in windows)
        self.judges = nn.ModuleList(self._judge(channels, width, dilations) for _ in windows)

    @staticmethod
    def _judge(channels: int, width: int, dilations: Sequence[int]) -> nn.ModuleList:
        layers = [nn.Conv2d(2 * channels, width, (3, 9), padding=(1, 4))]
        layers += [
            nn.Conv2d(width, width, (3, 9), (1, 2), (dilation, 4), dilation=(dilation, 1))
            for dilation in dilations
        ]
        layers.append(nn.Conv2d(width, width, (3, 3), padding=(1, 1)))
        return _convolutions([*layers, nn.Conv2d(width, 1, (3, 3), padding=(1, 1))])

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        logits, features = [], []
        for spectrum, layers in zip(self.spectra, self.judges, strict=True):
            with torch.autocast(x.device.type, enabled=False):
                parts = torch.view_as_real(cast(Spectrum, spectrum).complex(x[:, :, 0].float()))
            # A quiet partial of -60 dB is still seen: the square root of its magnitude, with its phase.
            size = (parts.square().sum(-1, keepdim=True) + 1e-8) ** 0.25
            picture = (parts / size).permute(0, 1, 4, 3, 2).flatten(1, 2)
            judged, seen = _judge(layers, picture)
            logits.append(judged)
            features += seen
        return logits, features
