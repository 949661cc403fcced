"""Reference networks for sound: a classifier of short utterances and a separator of two sources.

Both take raw samples at their own rate and compute spectra inside, so that whatever a file holds reaches them through
resampling alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compand.errors import MediaError
from compand.eval.perception.models import TaskNetwork
from compand.sounds import Sound, resample


def mono(sound: Sound, rate: int) -> Tensor:
    """Samples [N] at `rate`, channels averaged. Raises MediaError if there is no sample."""
    if not sound.length:
        raise MediaError("sound has no samples: leave the file out")
    return torch.from_numpy(resample(sound, rate).samples.mean(0, dtype=np.float32))


def loudest(waveform: Tensor, length: int) -> Tensor:
    """The `length` successive samples of most energy of a waveform [N]; a shorter one is centred in zeros."""
    missing = length - waveform.shape[0]
    if missing >= 0:
        return F.pad(waveform, (missing // 2, missing - missing // 2))
    energy = F.pad(waveform.double().square().cumsum(0), (1, 0))
    start = int((energy[length:] - energy[:-length]).argmax())
    return waveform[start : start + length]


class _Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut, the first with a stride (He et al. 2016, basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = (
            nn.Identity()
            if (stride, inputs) == (1, outputs)
            else nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), nn.Conv2d(inputs, outputs, 1, bias=False)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.body(x) + self.shortcut(x))


class SoundClassifier(TaskNetwork):
    """Log-mel spectrogram -> residual convolutions -> means and maxima over time -> classes.

    Powers are relative to the mean of the excerpt and floored 45 dB below it: neither loudness nor what lies in the
    pauses (digital silence in some recordings, noise in others) tells the classes apart.

    Args:
        classes: number of classes.
        rate: samples a second of the waveforms.
        seconds: length of the excerpt that is looked at, the loudest of a longer sound.
        bands: mel bands, from 60 Hz to 0.475 times the rate.
        window, hop: of the short-time Fourier transform, in samples.
        widths: channels of each stage; every stage after the first halves bands and frames.
        dropout: of the pooled features.
    """

    kind = "sound-classifier"
    FLOOR = 10**-4.5

    def __init__(
        self,
        classes: int,
        rate: int = 16000,
        seconds: float = 3.2,
        bands: int = 64,
        window: int = 512,
        hop: int = 256,
        widths: Sequence[int] = (24, 48, 96, 160),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.architecture: dict[str, Any] = {
            "classes": classes,
            "rate": rate,
            "seconds": seconds,
            "bands": bands,
            "window": window,
            "hop": hop,
            "widths": list(widths),
            "dropout": dropout,
        }
        self.rate, self.length, self.window, self.hop = rate, round(seconds * rate), window, hop
        mel = torchaudio.functional.melscale_fbanks(window // 2 + 1, 60.0, 0.475 * rate, bands, rate)
        self.mel: Tensor
        self.taper: Tensor
        self.register_buffer("mel", mel, persistent=False)
        self.register_buffer("taper", torch.hann_window(window), persistent=False)
        stages: list[nn.Module] = [
            nn.Conv2d(1, widths[0], 5, 2, 2, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.SiLU(),
        ]
        for inputs, outputs in zip((widths[0], *widths), widths, strict=False):
            stages.append(_Residual(inputs, outputs, 1 if inputs == outputs else 2))
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.classes = nn.Linear(2 * widths[-1], classes)

    def features(self, waveform: Tensor) -> Tensor:
        """Waveforms [batch, N] -> log-mel spectrograms [batch, 1, bands, frames], natural logarithm / 3."""
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = torch.stft(
                waveform.float(), self.window, self.hop, window=self.taper, return_complex=True
            )
            mel = torch.einsum("bft,fm->bmt", spectrum.abs().square(), self.mel)
            mel = mel / mel.mean((1, 2), keepdim=True).clamp(min=1e-12)
            return torch.log(mel + self.FLOOR)[:, None] / 3

    def scores(self, features: Tensor) -> Tensor:
        """Features as of `features` -> logits [batch, classes]."""
        x = self.stages(features).mean(2)
        return self.classes(self.dropout(torch.cat([x.mean(2), x.amax(2)], 1)))

    def forward(self, waveform: Tensor) -> Tensor:
        """Waveforms [batch, N] at `rate` -> logits [batch, classes]."""
        return self.scores(self.features(waveform))

    def excerpt(self, sound: Sound) -> Tensor:
        """What is looked at of any sound: [length], mono at `rate`. Raises MediaError if it has no samples."""
        return loudest(mono(sound, self.rate), self.length)

    def predict(self, signal: Sound) -> NDArray[np.float32]:
        """Logits [classes] of any sound. Raises MediaError if it has no samples."""
        waveform = self.excerpt(signal)[None].to(self.mel.device)
        return self(waveform)[0].float().cpu().numpy()


class _Block(nn.Module):
    """Residual block of two 3x3 convolutions with group normalisation; the second one dilated in time."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(4, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.GroupNorm(4, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, 1, (1, dilation), (1, dilation)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Separator(TaskNetwork):
    """Complex mask on the short-time Fourier transform from a U-Net over frequency and time, for two sources.

    The first source is the masked mixture, the second one the rest, so that the two sum up to the mixture. Four
    neighboring bins make one row of the network's image; every level below halves rows and frames.

    Args:
        rate: samples a second of the waveforms.
        window, hop: of the transform, in samples; window / 2 is a multiple of 4 * 2 ^ (number of levels - 1).
        widths: channels at each level.
        bottom: dilations in time of the blocks at the lowest level.
    """

    kind = "separator"
    ROWS = 4

    def __init__(
        self,
        rate: int = 44100,
        window: int = 2048,
        hop: int = 512,
        widths: Sequence[int] = (16, 40, 80, 128),
        bottom: Sequence[int] = (1, 2, 4),
    ) -> None:
        super().__init__()
        self.architecture: dict[str, Any] = {
            "rate": rate,
            "window": window,
            "hop": hop,
            "widths": list(widths),
            "bottom": list(bottom),
        }
        self.rate, self.window, self.hop = rate, window, hop
        self.taper: Tensor
        self.position: Tensor
        self.register_buffer("taper", torch.hann_window(window), persistent=False)
        # Convolutions are alike at every frequency; sources are not.
        position = torch.linspace(-1, 1, window // 2)[None, None, :, None]
        self.register_buffer("position", position, persistent=False)
        rows, first = self.ROWS, widths[0]
        self.first = nn.Conv2d(4, first, (rows, 3), (rows, 1), (0, 1))
        steps = list(pairwise(widths))
        self.before = nn.ModuleList(_Block(width) for width in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(wide, deep, 4, 2, 1) for wide, deep in steps)
        self.bottom = nn.Sequential(*(_Block(widths[-1], dilation) for dilation in bottom))
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, wide, 4, 2, 1) for wide, deep in steps)
        self.join = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for width in widths[:-1])
        self.after = nn.ModuleList(_Block(width) for width in widths[:-1])
        self.spread = nn.ConvTranspose2d(first, 8, (rows, 1), (rows, 1))
        self.mask = nn.Conv2d(12, 2, 3, padding=1)
        # Training begins with a half of the mixture for each source.
        nn.init.zeros_(self.mask.weight)
        nn.init.zeros_(self.mask.bias)  # type: ignore[arg-type]

    def forward(self, mixture: Tensor) -> Tensor:
        """Mixtures [batch, N] at `rate`, N >= window -> sources [batch, 2, N]."""
        with torch.autocast(mixture.device.type, enabled=False):
            mixture = mixture.float()
            level = mixture.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
            spectrum = torch.stft(
                mixture / level, self.window, self.hop, window=self.taper, return_complex=True
            )
            bins, size = spectrum[:, :-1], spectrum.abs()[:, :-1, :]
            # Power law on magnitudes: spectra span 60 dB and more.
            compressed = torch.view_as_real(bins / (size + 1e-4) ** 0.6).permute(0, 3, 1, 2)
            image = torch.cat(
                [compressed, torch.log(size + 1e-3)[:, None] / 3, self.position.expand(len(size), 1, *size.shape[1:])],
                1,
            )  # fmt: skip
        mask = self.masks(image)
        with torch.autocast(mixture.device.type, enabled=False):
            mask = mask.float()
            factor = torch.complex(torch.sigmoid(mask[:, 0]) * 1.5 - 0.25, torch.tanh(mask[:, 1]))
            masked = F.pad(torch.view_as_real(bins * factor), (0, 0, 0, 0, 0, 1))
            first = torch.istft(
                torch.view_as_complex(masked),
                self.window,
                self.hop,
                window=self.taper,
                length=mixture.shape[1],
            )
            first = first * level
            return torch.stack([first, mixture - first], 1)

    def masks(self, image: Tensor) -> Tensor:
        """[batch, 4, bins, frames] -> real and imaginary part [batch, 2, bins, frames], before their nonlinearity."""
        frames = image.shape[3]
        padded = F.pad(image, (0, -frames % (1 << len(self.down))))
        x = self.first(padded)
        skips = []
        for block, down in zip(self.before, self.down, strict=True):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.bottom(x)
        for up, join, block, skip in reversed(list(zip(self.up, self.join, self.after, skips, strict=True))):
            x = block(join(torch.cat([up(x), skip], 1)))
        return self.mask(torch.cat([self.spread(x), padded], 1))[..., :frames]

    def predict(self, signal: Sound) -> NDArray[np.float32]:
        """Sources [2, N] of a sound that has N samples at the network's `rate`; channels are averaged.

        Raises MediaError if the sound has no samples.
        """
        waveform = mono(signal, self.rate)
        padded = F.pad(waveform, (0, max(self.window - len(waveform), 0)))
        return self(padded[None].to(self.taper.device))[0, :, : len(waveform)].cpu().numpy()
