"""The hyperpriors of Balle et al. 2018 and Minnen et al. 2018 as they were published: scales without a logarithm."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compand.bottlenecks.hyperprior import HyperpriorBottleneck
from compand.codec import Counts
from compand.coding.integer import (
    ACCUMULATOR_LIMIT,
    ACTIVATION_LIMIT,
    BIAS_LIMIT,
    FRACTION_BITS,
    WEIGHT_BITS,
    to_fixed,
)
from compand.errors import CheckpointError

LEAST_SCALE = 0.11
"""Standard deviations below this one count as this one, in training and afterwards."""

PARTS = 64
"""Parts of an octave to which the logarithm of a scale is known."""

SPREAD = 4.0
"""Standard deviation, in quantisation steps, of the hyper-latents by which the range of activations is measured."""

SAMPLES, EXTENT = 8, 8
"""Number and edge of these fields of hyper-latents."""

HEADROOM = 16
"""How many times larger activations may become before they are clamped."""

MAX_EXPONENT = 12
"""The largest factor of what h_s gives, and one over the smallest, as a power of two."""

_ONE = 1 << FRACTION_BITS
_LEAST_LOG2 = round(math.log2(LEAST_SCALE) * _ONE)


def octave_thresholds(octaves: int) -> list[int]:
    """The smallest integer n with log2(n) >= k / PARTS, for k = 0 .. octaves * PARTS; in integer arithmetic, hence the
    same on every machine. PARTS is a power of two."""
    thresholds = []
    for k in range(octaves * PARTS + 1):
        root = 1 << k
        for _ in range(PARTS.bit_length() - 1):
            root = math.isqrt(root)  # roots of floors have the floors of roots
        thresholds.append(root + (root**PARTS < 1 << k))
    return thresholds


_THRESHOLDS = octave_thresholds(ACTIVATION_LIMIT.bit_length() - 1)


class LinearScaleBottleneck(HyperpriorBottleneck):
    """Scale hyperprior (Balle et al. 2018, figure 4) and mean-scale hyperprior (Minnen et al. 2018, section 3 without
    the context model), with the layers and the parametrisation of their first implementations.

    ```
    y --(|.| without means)--> h_a --> z --*gain_z--> round --> z symbols (factorised tables)
                                                        |
                                         *inverse gain_z, + centre
                                                        |
                                                       h_s --> sigma, mu
    ```

    Against `HyperpriorBottleneck`, h_s gives the standard deviation sigma itself (not below LEAST_SCALE), z is counted
    from a centre of each channel, and there is LeakyReLU between the layers (without means: ReLU).

    Transposed 5x5 convolutions of stride 2 are held as 3x3 convolutions before a pixel shuffle, which is the same. In
    the integer form, every channel behind a layer is counted in a unit of its own, a power of two, that suits its
    range: rectification and convolution do not mind.

    Args:
        latent_channels: channels M of y.
        lambdas: Lagrange multiplier of each quality level; sets the initial gains.
        hyper_channels: channels N of z.
        trainable: as in `HyperpriorBottleneck`.
        means: False for the scale hyperprior.
    """

    coarse_parts = ()

    def __init__(
        self,
        latent_channels: int,
        lambdas: Sequence[float],
        hyper_channels: int,
        trainable: bool = True,
        *,
        means: bool = True,
    ) -> None:
        activation = nn.LeakyReLU if means else nn.ReLU
        widths = (latent_channels, latent_channels * 3 // 2) if means else (hyper_channels, hyper_channels)
        super().__init__(
            latent_channels, lambdas, hyper_channels, widths, trainable,
            means=means, activations=(activation, activation),
        )  # fmt: skip
        self._centre = torch.zeros(hyper_channels, dtype=torch.int64)
        self._exponents = torch.zeros((1 + means) * latent_channels, dtype=torch.int64)
        if trainable:
            self.z_centre = nn.Parameter(torch.zeros(hyper_channels))
            last = self.hyper_synthesis[-1]
            assert isinstance(last, nn.Conv2d) and last.bias is not None
            with torch.no_grad():
                last.bias[means * latent_channels :] = 1.0

    def _analysed(self, y: Tensor) -> Tensor:
        return super()._analysed(y if self.means else y.abs())

    def _hyper(self, z: Tensor, quality: Tensor) -> Tensor:
        return super()._hyper(z, quality) + self.z_centre[:, None, None]

    def _scales(self, scales: Tensor, shift: Tensor) -> Tensor:
        return scales * torch.exp2(shift)  # the Gaussian tells LEAST_SCALE

    def _exact_hyper(self, z: Tensor, quality: int) -> Tensor:
        return super()._exact_hyper(z, quality) + self._centre.to(z)[:, None, None]

    def _exact_log2(self, scales: Tensor, shift: Tensor) -> Tensor:
        exponents = self._exponents[-self.latent_channels :].to(scales)[:, None, None]
        offset = shift - (exponents + FRACTION_BITS) * _ONE
        if scales.is_floating_point():
            log2 = torch.log2(scales.clamp(min=1)) * _ONE
        else:
            thresholds = torch.tensor(_THRESHOLDS, dtype=scales.dtype, device=scales.device)
            place = torch.bucketize(scales.contiguous(), thresholds, right=True, out_int32=True)
            log2 = place * (_ONE // PARTS) - _ONE // PARTS // 2  # the middle of a part
        return (log2 + offset).clamp(min=_LEAST_LOG2)

    def freeze(self, counts: Sequence[Counts] | None = None) -> None:
        super().freeze(counts)
        self._centre = to_fixed(self.z_centre.detach()).cpu()

    @torch.no_grad()
    def _scaled_prior(self) -> nn.Sequential:
        """h_s with a unit for each channel behind each layer, which does not change what it computes; sets the
        exponents of what it gives.

        Activations are measured on hyper-latents drawn from a normal density.
        """
        network = copy.deepcopy(self.hyper_synthesis)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(SAMPLES, self.hyper_channels, EXTENT, EXTENT, generator=generator)
        z = (SPREAD * drawn).round().to(self.z_centre)
        x = z * self.z_gain.inverse_levels().amax(0)[:, None, None] + self.z_centre[:, None, None]
        factors = x.new_ones(self.hyper_channels)  # by how much more the input of a layer is than it means
        starts = [i for i, part in enumerate(network) if isinstance(part, nn.Conv2d)]
        for start, end in pairwise([*starts, len(network)]):
            layer = network[start]
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            x = network[start:end](x)
            largest = x.abs().amax((0, 2, 3))
            folded = layer.out_channels // len(largest)
            layer.weight /= factors[:, None, None]
            last = end == len(network)
            exponents = self._exponents.to(x) if last else torch.zeros_like(largest)
            room = ACTIVATION_LIMIT / _ONE / (HEADROOM * largest.clamp(min=1e-6))
            room = torch.minimum(room, self._largest_factors(layer).view(-1, folded).amin(1))
            room /= torch.exp2(exponents)
            # What has been scaled already stays as it is, though rounded weights make it a little larger or smaller:
            # training that goes on from a checkpoint starts with its integers.
            scaled = (room >= 2 / 3) & (room < 3)
            exponents += torch.where(scaled, 0, room.log2().floor())
            if last:
                # Scales of pictures may lie far above those of samples: all that there are tables for have room, in
                # steps of the highest quality.
                finest = (self.y_gain.log2_gain + self.scale_offset).amax(0).floor()
                scales = exponents[-self.latent_channels :]
                torch.minimum(scales, finest, out=scales)
                exponents.clamp_(-MAX_EXPONENT, MAX_EXPONENT)
                self._set_exponents(exponents.long().cpu())
            factors = torch.exp2(exponents)
            layer.weight *= factors.repeat_interleave(folded)[:, None, None, None]
            layer.bias *= factors.repeat_interleave(folded)
        return network

    @staticmethod
    def _largest_factors(layer: nn.Conv2d) -> Tensor:
        """By how much the rows of a layer can be multiplied without leaving the limits of exact arithmetic, [out]."""
        assert layer.bias is not None
        bias = layer.bias.abs().clamp(min=1e-9) * _ONE * (1 << WEIGHT_BITS)
        reach = layer.weight.abs().sum((1, 2, 3)).clamp(min=1e-9) * (1 << WEIGHT_BITS) * ACTIVATION_LIMIT
        # Half of the limits: weights are yet to be rounded.
        return torch.minimum(ACCUMULATOR_LIMIT / (reach + bias), BIAS_LIMIT / bias) / 2

    def _set_exponents(self, exponents: Tensor) -> None:
        """exponents: int64, the factors of what h_s gives, as powers of two, [(1 + means) M]."""
        self._exponents = exponents
        if self.means:
            fraction = exponents[: self.latent_channels] + FRACTION_BITS
            self._unit = torch.exp2(-fraction.to(self._unit))[:, None, None]

    def frozen_arrays(self) -> dict[str, NDArray[np.int32]]:
        own = {"centre": self._centre, "exponents": self._exponents}
        return super().frozen_arrays() | {name: part.numpy().astype(np.int32) for name, part in own.items()}

    def load_frozen(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        super().load_frozen(arrays)
        for name, length in (("centre", self.hyper_channels), ("exponents", len(self._exponents))):
            if name not in arrays or arrays[name].shape != (length,):
                raise CheckpointError(f"the checkpoint's {name} does not have shape [{length}]")
        if np.abs(arrays["exponents"]).max() > MAX_EXPONENT:
            raise CheckpointError("the checkpoint's exponents are out of range: export it again")
        self._centre = torch.from_numpy(arrays["centre"].astype(np.int64))
        self._set_exponents(torch.from_numpy(arrays["exponents"].astype(np.int64)))

    @torch.no_grad()
    def thaw(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        super().thaw(arrays)
        last = self.hyper_synthesis[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        self._set_exponents(torch.from_numpy(arrays["exponents"].astype(np.int64)))
        factors = torch.exp2(self._exponents.to(last.bias))
        last.weight /= factors[:, None, None, None]
        last.bias /= factors
        self.z_centre.copy_(torch.from_numpy(arrays["centre"]).double() / _ONE)
