"""How far a decoded sound is from its original, in terms that training can follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchaudio.functional import melscale_fbanks

from compand.errors import UsageError

FLOOR = 1e-5
"""Magnitude, in amplitudes of a sine, below which differences fade: -100 dB of full scale."""


class Spectrum(nn.Module):
    """Magnitudes of a short-time Fourier transform with hops of a quarter window; a sine of amplitude a gives a.

    Args:
        window: samples of the Hann window.
    """

    window: Tensor

    def __init__(self, window: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def complex(self, x: Tensor) -> Tensor:
        """x: [..., n] -> complex [..., bins, frames]."""
        size = len(self.window)
        flat = F.pad(x.reshape(-1, x.shape[-1]), (size // 2, size // 2), mode="reflect")
        # Windows are four hops side by side: the gradient of overlapping views would be scattered value by value.
        hops = flat[:, : flat.shape[1] // (size // 4) * (size // 4)].unflatten(1, (-1, size // 4))
        count = hops.shape[1] - 3
        frames = torch.cat([hops[:, place : place + count] for place in range(4)], 2)
        spectrum = torch.fft.rfft(frames * (self.window * (4 / size))).mT
        return spectrum.reshape(*x.shape[:-1], *spectrum.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., n] -> [..., bins, frames], at least FLOOR; its gradient is finite at zero too."""
        spectrum = torch.view_as_real(self.complex(x))
        return (spectrum.square().sum(-1) + FLOOR**2).sqrt()


class SoundDistance(nn.Module):
    """Multi-scale mel, multi-resolution spectral and waveform distances of sounds.

    - mel: mean over windows of the mean absolute difference of log10 mel magnitudes (Kumar et al. 2023,
      "High-fidelity audio compression with improved RVQGAN", section 3.3), with window / 16 bands a window;
    - stft: mean over windows of at least 512 samples of spectral convergence |X - X_hat| / |X| and the mean absolute
      difference of log10 magnitudes (Yamamoto et al. 2020, "Parallel WaveGAN", equations 4 to 6);
    - waveform: mean absolute difference of samples.

    Of two channels, sum and difference are compared as well.

    Args:
        rate: samples a second.
        windows: samples of the windows, powers of two.

    Attributes:
        names: of the terms.
        description: in words, for the card of a checkpoint.

    Raises:
        UsageError: a window has no mel band, or none has 512 samples.
    """

    names = ("mel", "stft", "waveform")

    def __init__(self, rate: int = 16000, windows: Sequence[int] = (64, 128, 256, 512, 1024, 2048)) -> None:
        super().__init__()
        if min(windows) < 64 or max(windows) < 512:
            raise UsageError(f"windows {list(windows)} do not do: give at least 64 samples, once 512 or more")
        sizes = ", ".join(map(str, windows))
        self.description = f"log-mel and spectral distances at windows of {sizes} samples, waveform"
        self.windows = tuple(windows)
        self.spectra = nn.ModuleList(Spectrum(window) for window in windows)
        for window in windows:
            bank = melscale_fbanks(
                window // 2 + 1, 0.0, rate / 2, window // 16, rate, norm=None, mel_scale="slaney"
            )
            self.register_buffer(f"bank_{window}", bank, persistent=False)

    def forward(self, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
        """x_hat, x: float32 [batch, channels, 1, n] in [-1, 1], n more than half of the longest window. Scalars."""
        with torch.autocast(x.device.type, enabled=False):
            return self._terms(_views(x_hat.float()), _views(x.float()))

    def _terms(self, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Of views [batch, views, n]."""
        mel, stft = [], []
        for window, spectrum in zip(self.windows, self.spectra, strict=True):
            fake, real = spectrum(x_hat), spectrum(x)
            bank = self.get_buffer(f"bank_{window}")
            levels = [torch.log10(bank.T @ each) for each in (fake, real)]
            mel.append((levels[0] - levels[1]).abs().mean())
            if window >= 512:
                norm = real.square().sum((-2, -1)).sqrt()
                convergence = (fake - real).square().sum((-2, -1)).clamp(min=FLOOR**2).sqrt() / norm
                # Of silence, any error is more than all there is: bounded, so that it drowns nothing else.
                stft.append(convergence.clamp(max=10).mean() + (fake / real).log10().abs().mean())
        return {
            "mel": torch.stack(mel).mean(),
            "stft": torch.stack(stft).mean(),
            "waveform": (x_hat - x).abs().mean(),
        }


def _views(x: Tensor) -> Tensor:
    """[batch, channels, 1, n] -> [batch, views, n]: the channels and, of two, their sum and difference."""
    x = x[:, :, 0]
    if x.shape[1] != 2:
        return x
    both = torch.stack([x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], 1)
    return torch.cat([x, both / math.sqrt(2)], 1)
