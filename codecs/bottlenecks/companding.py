"""Companding: a uniform quantiser between a compressing curve and its inverse, which makes its steps grow outwards."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compand.bottlenecks.gains import GainUnit
from compand.codec import Bottleneck, BottleneckOutput, Counts
from compand.errors import UsageError
from compand.refinement import Relaxation, SoftRounding

INPUT_LIMIT = 2.0**30
"""Latents are clamped to +- this, so that no product with 1 / scale overflows."""

SATURATION = 0.9998
"""Share of the compressed range that `expand` inverts: values up to 3.7 (Gaussian) or 8.5 (Laplace) scales. Beyond it
the inverse, whose slope is 900 or 5000 there, would let rounding and noise run away."""


class Compander(nn.Module, ABC):
    """An odd, increasing curve that bends at a learned scale of each channel and has slope 1 at 0.

    ```
    y --compress--> u --uniform quantiser--> u_hat --expand--> y_hat
    ```

    Small values pass unchanged, so gains mean the same with and without it.

    Args:
        channels: number of channels.
        scale: scale s of every channel at the start of training, in units of y.

    Raises:
        UsageError: the scale is not positive and finite.
    """

    def __init__(self, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise UsageError(f"scale {scale} is none: give a positive number")
        self.log_scale = nn.Parameter(torch.full((channels,), math.log(scale)))

    @abstractmethod
    def compress(self, y: Tensor) -> Tensor:
        """y: float32 [batch, channels, h, w] of any finite values -> u of the same shape, bounded."""

    @abstractmethod
    def expand(self, u: Tensor) -> Tensor:
        """Inverse of `compress`; u: any finite values, of which those beyond SATURATION are clamped."""

    def _scale(self) -> tuple[Tensor, Tensor]:
        """s and 1 / s, [channels, 1, 1]."""
        log_scale = self.log_scale[:, None, None]
        return torch.exp(log_scale), torch.exp(-log_scale)


class GaussianCompander(Compander):
    """u = s sqrt(pi / 2) erf(y / (s sqrt 2)): makes a normal density of standard deviation s uniform.

    The companding of WaLLoC (Jacobellis & Yadwadkar 2025, section 3) with a learned scale. |u| < s sqrt(pi / 2).
    """

    def compress(self, y: Tensor) -> Tensor:
        scale, inverse = self._scale()
        bent = torch.erf(y.clamp(-INPUT_LIMIT, INPUT_LIMIT) * (inverse * math.sqrt(0.5)))
        return bent * (scale * math.sqrt(math.pi / 2))

    def expand(self, u: Tensor) -> Tensor:
        scale, inverse = self._scale()
        bent = (u * (inverse * math.sqrt(2 / math.pi))).clamp(-SATURATION, SATURATION)
        return torch.erfinv(bent) * (scale * math.sqrt(2))


class LaplaceCompander(Compander):
    """u = s sign(y) (1 - exp(-|y| / s)): makes a Laplace density of mean magnitude s uniform.

    The curve of Bennett 1948 ("Spectra of quantized signals", section on companding) for that density. |u| < s.
    """

    def compress(self, y: Tensor) -> Tensor:
        scale, inverse = self._scale()
        sign = _sign(y)
        magnitude = (y * sign).clamp(max=INPUT_LIMIT)
        return torch.expm1(magnitude * -inverse) * (sign * -scale)

    def expand(self, u: Tensor) -> Tensor:
        scale, inverse = self._scale()
        sign = _sign(u)
        bent = (u * sign * inverse).clamp(max=SATURATION)
        return torch.log1p(-bent) * (sign * -scale)


def _sign(x: Tensor) -> Tensor:
    """-1 or 1, never 0: times x it is |x| with a slope at 0 too, where silence would otherwise stop every gradient."""
    return torch.ones_like(x).copysign(x.detach())


class CompandingBottleneck(Bottleneck):
    """Another bottleneck between a compander's two halves.

    ```
    y --compress--> u --inner--> u_hat --expand--> y_hat
    ```

    Companding is for quantisers whose steps cannot follow the signal (Bennett 1948); with an entropy coder behind, it
    spends fewer bits on large values, where errors are less visible or less audible. Jacobellis & Yadwadkar 2025
    (WaLLoC), section 3, train through it with noise. `expand` is floating-point arithmetic behind the integers: it
    never decides a symbol.

    Args:
        inner: codes u.
        compander: the curve; of as many channels.

    Raises:
        UsageError: the compander has another number of channels.
    """

    def __init__(self, inner: Bottleneck, compander: Compander) -> None:
        super().__init__()
        channels = compander.log_scale.shape[0]
        if channels != inner.latent_channels:
            raise UsageError(
                f"a compander of {channels} channels does not fit {inner.latent_channels} latent channels: "
                "give both the same number"
            )
        self.inner, self.compander = inner, compander
        self.latent_channels, self.refinable = inner.latent_channels, inner.refinable
        self.encoder_parts = tuple(f"inner.{part}" for part in inner.encoder_parts)
        self.coarse_parts = tuple(f"inner.{part}" for part in inner.coarse_parts)

    @property
    def y_gain(self) -> GainUnit:
        """Gains of the inner bottleneck."""
        gain = self.inner.y_gain
        assert isinstance(gain, GainUnit)
        return gain

    def forward(self, y: Tensor, quality: Tensor) -> BottleneckOutput:
        output = self.inner(self._compress(y), quality)
        expand = self._expand if self.training else self._expand_items
        return BottleneckOutput(expand(output.y_hat), output.bits, output.losses)

    def compress(self, y: Tensor, quality: int) -> list[bytes]:
        return self.inner.compress(self._compress(y), quality)

    def decompress(self, payloads: Sequence[bytes], shape: tuple[int, int], quality: int) -> Tensor:
        return self._expand_items(self.inner.decompress(payloads, shape, quality))

    def quantise(self, y: Tensor, quality: int) -> Tensor:
        return self.inner.quantise(self._compress(y), quality)

    def dequantise(self, integers: Tensor, quality: int) -> Tensor:
        return self._expand(self.inner.dequantise(integers, quality))

    def relaxed(self, y: Tensor, quality: int) -> Relaxation:
        return _RelaxedCompanding(self, self.inner.relaxed(self._compress(y), quality))

    def _compress(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            return self.compander.compress(y.float())

    def _expand(self, u_hat: Tensor) -> Tensor:
        with torch.autocast(u_hat.device.type, enabled=False):
            return self.compander.expand(u_hat)

    def _expand_items(self, u_hat: Tensor) -> Tensor:
        """Item by item: vectorised functions may differ in the last bit by where in memory a value lies."""
        return torch.cat([self._expand(item[None].contiguous()) for item in u_hat])

    def least_bits(self, shape: tuple[int, int]) -> float:
        return self.inner.least_bits(shape)

    def count(self, y: Tensor, quality: int) -> list[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        return self.inner.count(self._compress(y), quality)

    def table_counts(self) -> list[int]:
        return self.inner.table_counts()

    def freeze(self, counts: Sequence[Counts] | None = None) -> None:
        self.inner.freeze(counts)

    def thaw(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        self.inner.thaw(arrays)

    def frozen_arrays(self) -> dict[str, NDArray[np.int32]]:
        return self.inner.frozen_arrays()

    def load_frozen(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        self.inner.load_frozen(arrays)


class _RelaxedCompanding(Relaxation):
    """Another relaxation, whose result is expanded."""

    def __init__(self, bottleneck: CompandingBottleneck, inner: Relaxation) -> None:
        self._bottleneck, self._inner = bottleneck, inner
        self.variables = inner.variables

    def sample(self, rounding: SoftRounding) -> tuple[Tensor, Tensor]:
        bits, u_hat = self._inner.sample(rounding)
        return bits, self._bottleneck._expand(u_hat)

    def code(self) -> tuple[bytes, Tensor]:
        payload, u_hat = self._inner.code()
        return payload, self._bottleneck._expand_items(u_hat)
