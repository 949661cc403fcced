"""The mean-scale Gaussian hyperprior with gain units, and its exact integer form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compand.bottlenecks.factorized import FactorizedDensity, blend, check_quantization, quantised, to_symbols
from compand.bottlenecks.gains import GainUnit, step_gains
from compand.codec import QUALITY_STEPS, Bottleneck, BottleneckOutput, Counts, level_table_at, subset
from compand.coding.ans import AnsReader, AnsWriter
from compand.coding.integer import (
    FRACTION_BITS,
    WEIGHT_BITS,
    IntegerNetwork,
    WidthShuffle,
    interpolate_levels,
    to_fixed,
)
from compand.coding.tables import TableSet
from compand.errors import CheckpointError, UsageError
from compand.refinement import Relaxation, Rounded, SoftRounding, TableCosts

SCALES = 64
MIN_LOG2_SCALE = -3.5
"""log2 of the smallest scale that has a table: 0.088 quantisation steps, where a symbol costs a millibit or less."""
SCALE_STEP = 192
"""Ratio of neighbouring scales, in fixed-point log2: 3/16 octave. The largest scale is 320 steps."""

HYPER_STRIDE = 4
"""Latent positions per position of z, along one axis."""


def scale_indexes(log2_scales: Tensor) -> Tensor:
    """Table of each element: the nearest scale in log2.

    Args:
        log2_scales: fixed-point log2 of the scales, integers of any shape.

    Returns:
        uint8 of the same shape, 0 .. SCALES - 1.
    """
    first = round(MIN_LOG2_SCALE * (1 << FRACTION_BITS)) - SCALE_STEP // 2
    # Integer division is slow. Half a unit on, floats hold the sums exactly wherever they do not leave the tables, and
    # no quotient is within 1/400 of an integer, of which floats err far less. Their dtype is named: sums with Python
    # numbers take torch's default one, which a process may have set to half precision.
    quotient = log2_scales.to(torch.float32).add_(0.5 - first).mul_(1 / SCALE_STEP)
    return quotient.clamp_(0, SCALES - 0.5).to(torch.uint8)


def scale_places(log2_scales: Tensor) -> Tensor:
    """Places of fixed-point log2 of scales among those of the tables, 0 for the first; floats, not rounded."""
    return (log2_scales - MIN_LOG2_SCALE * (1 << FRACTION_BITS)) / SCALE_STEP


def table_scales() -> list[float]:
    """Standard deviation of each table, in quantisation steps."""
    return [2.0 ** (MIN_LOG2_SCALE + k * SCALE_STEP / (1 << FRACTION_BITS)) for k in range(SCALES)]


class Coded(NamedTuple):
    """Latents of a batch as they are coded."""

    z: tuple[
        NDArray[np.int64], NDArray[np.int32]
    ]  # table indexes [n], shared by the items, and symbols [batch, ...]
    y: list[tuple[NDArray[np.uint8], NDArray[np.int32]]]  # of each push in turn; both [batch, ...]
    y_hat: Tensor  # [batch, M, h, w]


class HyperpriorBottleneck(Bottleneck):
    """Mean-scale hyperprior (Minnen et al. 2018, section 3 without the context model), variable in rate by gain units.

    ```
    y --h_a--> z --*gain_z--> round --> z symbols (factorised tables)
                                |
                           *inverse gain_z
                                |
                               h_s --> mu, log2 sigma
    y --(y - mu) * gain--> round --> y symbols (Gaussian tables, index from log2 sigma + log2 gain)
    y_hat = symbol * inverse gain + mu
    ```

    h_a and h_s work on y as the analysis made it, whatever the quality: quantising finer shifts log2 sigma by log2 gain
    and nothing else, so the prior is one and the same at all rates. In the frozen state h_s, the gains that reach it
    and the shift of log2 sigma are integers (`coding.integer`); no floating-point number decides a symbol.

    Args:
        latent_channels: channels M of y.
        lambdas: Lagrange multiplier of each quality level; sets the initial gains.
        hyper_channels: channels N of z.
        widths: channels of h_s at twice the resolution of z, and one or two widths at that of y; without the second,
            the last kernel has an extent of 3 instead of 1.
        trainable: whether h_s and the densities are built (needs compressai) or only the frozen state is to be loaded.
        dimensions: 2 for images; 1 for signals, y [batch, M, 1, n], of which z has a quarter of the time resolution.
        means: False leaves mu out: y is coded around zero, so that y = 0 is restored exactly (silence, in sounds).
        hyper_analysis_kernel: size of the strided kernels of h_a, from 2; 3 costs a third of 5.
        media_channels: channels of the samples; sets the initial gains.
        quantization: what stands in for rounding in training: "mixed", "noise" or "none", see `quantised`.
        activations: between the layers of h_a and of h_s; those of h_s are ReLU or LeakyReLU.

    Raises:
        UsageError: dimensions, kernel or quantization do not exist.
    """

    scale_offset: nn.Parameter
    _unit: Tensor
    _multiplier: Tensor
    _shift: Tensor
    encoder_parts = ("hyper_analysis", "z_gain")
    coarse_parts: tuple[str, ...] = ("hyper_analysis",)
    refinable = True

    def __init__(
        self,
        latent_channels: int,
        lambdas: Sequence[float],
        hyper_channels: int = 128,
        widths: Sequence[int] = (128, 96, 192),
        trainable: bool = True,
        *,
        dimensions: int = 2,
        means: bool = True,
        hyper_analysis_kernel: int = 5,
        media_channels: int = 3,
        quantization: str = "mixed",
        activations: tuple[type[nn.Module], type[nn.Module]] = (nn.GELU, nn.ReLU),
    ) -> None:
        super().__init__()
        if dimensions not in (1, 2):
            raise UsageError(f"a hyperprior of {dimensions} dimensions does not exist: choose 1 or 2")
        if hyper_analysis_kernel < 2:
            raise UsageError(f"hyper_analysis_kernel {hyper_analysis_kernel} skips latents: give 2 or more")
        m, n = latent_channels, hyper_channels
        self.quantization = check_quantization(quantization)
        self.latent_channels, self.hyper_channels, self.means = m, n, means
        middle = lambdas[len(lambdas) // 2]
        self.y_gain = GainUnit(m, step_gains(lambdas, media_channels))
        # z needs little more precision at high rates than at low ones.
        self.z_gain = GainUnit(n, [(value / middle) ** 0.125 for value in lambdas])
        planar = dimensions == 2
        self.hyper_stride = (HYPER_STRIDE if planar else 1, HYPER_STRIDE)

        def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
            edges, strides, padding = (
                (axis if planar else idle, axis)
                for axis, idle in ((kernel, 1), (stride, 1), ((kernel - 1) // 2, 0))
            )
            return nn.Conv2d(inputs, outputs, edges, strides, padding)

        k = hyper_analysis_kernel
        encoding, decoding = activations
        self.hyper_analysis = nn.Sequential(
            convolution(m, n, 3), encoding(),
            convolution(n, n, k, 2), encoding(),
            convolution(n, n, k, 2),
        )  # fmt: skip
        self.prior: IntegerNetwork | None = None
        self.z_tables: TableSet | None = None
        self.y_tables: TableSet | None = None
        for name in ("_multiplier", "_shift"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)
        unit = torch.tensor(1 / (1 << FRACTION_BITS), dtype=torch.float32)  # of the integer prior's means
        self.register_buffer("_unit", unit, persistent=False)
        self.trainable = trainable
        if not trainable:
            return

        self.z_density = FactorizedDensity(n)
        from compressai.entropy_models import GaussianConditional

        self.y_density = GaussianConditional(None)
        self.scale_offset = nn.Parameter(torch.zeros(len(lambdas), m))
        a, b, *further = widths
        shuffle, unfolded = (nn.PixelShuffle, 4) if planar else (WidthShuffle, 2)
        layers = [
            convolution(n, unfolded * a, 3), shuffle(2), decoding(),
            convolution(a, unfolded * b, 3), shuffle(2), decoding(),
        ]  # fmt: skip
        for c in further:
            layers += [convolution(b, c, 3), decoding()]
        layers.append(convolution((b, *further)[-1], (1 + means) * m, 1 if further else 3))
        self.hyper_synthesis = nn.Sequential(*layers)
        last = self.hyper_synthesis[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.zero_()
            last.bias[means * m :] = -1.0

    def forward(self, y: Tensor, quality: Tensor) -> BottleneckOutput:
        if self.prior is not None and not self.training:
            return self._forward_frozen(y, quality)
        if not self.trainable:
            raise CheckpointError("this codec is frozen: build it in its trainable state to train it")
        z_bits, hyper = self._side_information(y, quality)
        parameters = self.hyper_synthesis(hyper)[..., : y.shape[2], : y.shape[3]]
        with torch.autocast(y.device.type, enabled=False):
            means, log2_scales = self._split(parameters.float())
            shift = self.y_gain.log2(quality) + level_table_at(self.scale_offset, quality)
            scales = self._scales(log2_scales, shift[:, :, None, None])
            residual = (y.float() - means) * self.y_gain.gain(quality)
            coded, decoded = quantised(residual, self.quantization, self.training)
            likelihood = self.y_density.likelihood_lower_bound(self.y_density._likelihood(coded, scales))
            y_bits = -torch.log2(likelihood).sum((1, 2, 3))
            y_hat = decoded * self.y_gain.inverse(quality) + means
        return BottleneckOutput(y_hat, y_bits + z_bits, {"auxiliary": self.z_density.auxiliary_loss()})

    def _side_information(self, y: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """In floating point: bits of z, [batch], and what h_s works on."""
        z = self._analysed(y)
        with torch.autocast(y.device.type, enabled=False):
            z = z.float() * self.z_gain.gain(quality)
            coded, decoded = quantised(z, self.quantization, self.training)
            return self.z_density.bits(coded), self._hyper(decoded, quality)

    def _forward_frozen(self, y: Tensor, quality: Tensor) -> BottleneckOutput:
        y_hats, bits = [], []
        for item, level in zip(y, quality.tolist(), strict=True):
            coded = self._coded(item[None], self._hyper_steps(item[None], level), level)
            z_tables, y_tables = self._frozen()
            cost = z_tables.bits(coded.z[1].ravel(), coded.z[0]).sum()
            for indexes, symbols in coded.y:
                cost += y_tables.bits(symbols.ravel(), indexes.ravel()).sum()
            bits.append(float(cost))
            y_hats.append(coded.y_hat)
        return BottleneckOutput(torch.cat(y_hats), torch.tensor(bits, dtype=torch.float64, device=y.device))

    def compress(self, y: Tensor, quality: int) -> list[bytes]:
        return self._push(self._coded(y, self._hyper_steps(y, quality), quality))

    def _push(self, coded: Coded) -> list[bytes]:
        z_tables, y_tables = self._frozen()
        z_indexes, z_symbols = coded.z
        payloads = []
        for i, z_item in enumerate(z_symbols):
            writer = AnsWriter()
            writer.push(z_item.ravel(), z_indexes, z_tables)
            for indexes, symbols in coded.y:
                writer.push(symbols[i].ravel(), indexes[i].ravel(), y_tables)
            payloads.append(writer.finish())
        return payloads

    def decompress(self, payloads: Sequence[bytes], shape: tuple[int, int], quality: int) -> Tensor:
        z_tables, y_tables = self._frozen()
        z_shape = self._z_shape(shape)
        z_indexes = self._z_indexes(z_shape)
        readers = [AnsReader(payload) for payload in payloads]
        z = np.stack([reader.pull(z_indexes, z_tables).reshape(-1, *z_shape) for reader in readers])
        means, indexes = self._predict(torch.from_numpy(z), quality, shape)
        items = []
        for reader, index in zip(readers, indexes.cpu().numpy(), strict=True):
            items.append(reader.pull(index.ravel(), y_tables).reshape(index.shape))
            reader.finish()
        return self._dequantise(np.stack(items), means, quality)

    def quantise(self, y: Tensor, quality: int) -> Tensor:
        return self.y_gain.quantise(y, quality)

    def dequantise(self, integers: Tensor, quality: int) -> Tensor:
        return self.y_gain.dequantise(integers, quality)

    def _encode(
        self, y: Tensor, quality: int
    ) -> tuple[
        tuple[NDArray[np.int64], NDArray[np.int32]], tuple[NDArray[np.uint8], NDArray[np.int32]], Tensor
    ]:
        """Table indexes and symbols of z (shared, [batch, ...]) and of y (both [batch, ...]), and means of y."""
        return self._encode_with(y, self._hyper_steps(y, quality), quality)

    def _hyper_steps(self, y: Tensor, quality: int) -> Tensor:
        """z in quantisation steps."""
        level = torch.tensor([quality], device=y.device)
        return self._analysed(y).float() * self.z_gain.gain(level)

    def _analysed(self, y: Tensor) -> Tensor:
        """h_a."""
        z: Tensor = self.hyper_analysis(self._padded(y))
        return z

    def _hyper(self, z: Tensor, quality: Tensor) -> Tensor:
        """What the floating-point h_s works on: z, given in quantisation steps."""
        return z * level_table_at(self.z_gain.inverse_levels(), quality)[:, :, None, None]

    def _scales(self, scales: Tensor, shift: Tensor) -> Tensor:
        """Standard deviations of y in quantisation steps, from h_s in floating point and log2 of the gains."""
        return torch.exp2((scales + shift).clamp(max=12))

    def _encode_with(
        self, y: Tensor, z: Tensor, quality: int
    ) -> tuple[
        tuple[NDArray[np.int64], NDArray[np.int32]], tuple[NDArray[np.uint8], NDArray[np.int32]], Tensor
    ]:
        """As `_encode`, of a z that is given in quantisation steps."""
        z_symbols = to_symbols(z)
        means, indexes = self._predict(torch.from_numpy(z_symbols), quality, y.shape[2:])
        symbols = to_symbols((y.float().contiguous() - means) * self._gains(quality)[0])
        z_indexes = self._z_indexes(z_symbols.shape[2:])
        return (z_indexes, z_symbols), (indexes.cpu().numpy(), symbols), means

    def _coded(self, y: Tensor, z: Tensor, quality: int) -> Coded:
        """What `compress` codes; z is given in quantisation steps."""
        z_coded, y_coded, means = self._encode_with(y, z, quality)
        return Coded(z_coded, [y_coded], self._dequantise(y_coded[1], means, quality))

    def relaxed(self, y: Tensor, quality: int) -> Relaxation:
        return RelaxedHyperprior(self, y, quality)

    def _predict(self, z: Tensor, quality: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The integer prior: symbols of z -> means [batch, M, h, w] and table indexes, uint8 of the same shape."""
        self._frozen()
        assert self.prior is not None
        device = self.y_gain.log2_gain.device
        parameters = self.prior(self._exact_hyper(z.to(device).long(), quality))
        means, scales = self._split(parameters[..., : shape[0], : shape[1]])
        indexes = scale_indexes(self._exact_log2(scales, self._exact_shift(quality).to(device)))
        return means.to(torch.float32) * self._unit, indexes

    def _exact_shift(self, quality: int) -> Tensor:
        """What is added to log2 sigma, fixed-point int32 [M, 1, 1]."""
        # Beyond 2**30 every index is the first or the last; within it 32 bits hold the sum.
        shift = interpolate_levels(self._shift, quality, QUALITY_STEPS).clamp(-(1 << 30), 1 << 30)
        return shift[:, None, None].int()

    def _exact_hyper(self, z: Tensor, quality: int) -> Tensor:
        """What the integer h_s works on, fixed-point: z, given in quantisation steps. Floats are not rounded."""
        multiplier = interpolate_levels(self._multiplier, quality, QUALITY_STEPS).to(z)
        return z * multiplier[:, None, None]

    def _exact_log2(self, scales: Tensor, shift: Tensor) -> Tensor:
        """log2 of the scales in quantisation steps, fixed-point, from what the integer h_s gives and from that of the
        gains. Floats are not rounded."""
        return scales + shift

    def _relaxed_prediction(self, z: Tensor, quality: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`_predict` without rounding, for gradients: symbols of z, which may lie between integers -> means
        [1, M, h, w] and places among the tables' scales, 0 for the first."""
        assert self.prior is not None
        shift = interpolate_levels(self._shift, quality, QUALITY_STEPS).to(z)
        parameters = self.prior.relaxed(self._exact_hyper(z, quality))
        means, scales = self._split(parameters[..., : shape[0], : shape[1]])
        return means * self._unit, scale_places(self._exact_log2(scales, shift[:, None, None]))

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Output of h_s -> mu (without means, zeros of one element) and what says the scales, log2 sigma here."""
        if self.means:
            means, log2_scales = parameters.chunk(2, 1)
            return means, log2_scales
        return parameters.new_zeros(1, 1, 1, 1), parameters

    def _dequantise(self, symbols: NDArray[np.int32], means: Tensor, quality: int) -> Tensor:
        return torch.from_numpy(symbols).to(means) * self._gains(quality)[1] + means

    def _gains(self, quality: int) -> tuple[Tensor, Tensor]:
        """Of encoder and decoder at one quality, [1, M, 1, 1] each."""
        level = torch.tensor([quality], device=self.y_gain.log2_gain.device)
        return self.y_gain.gain(level), self.y_gain.inverse(level)

    def _z_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Positions of z for latents of a shape (h, w)."""
        return -(-shape[0] // self.hyper_stride[0]), -(-shape[1] // self.hyper_stride[1])

    def _padded(self, y: Tensor) -> Tensor:
        """y with its edges repeated up to whole positions of z."""
        bottom, right = -y.shape[2] % self.hyper_stride[0], -y.shape[3] % self.hyper_stride[1]
        return F.pad(y, (0, right, 0, bottom), mode="replicate") if right or bottom else y

    def _z_indexes(self, shape: Sequence[int]) -> NDArray[np.int64]:
        return np.repeat(np.arange(self.hyper_channels), shape[0] * shape[1])

    def freeze(self, counts: Sequence[Counts] | None = None) -> None:
        """Makes the integer prior and the integer tables from the trained densities.

        Args:
            counts: how often each symbol was seen with each table of z and of y; None: the densities alone.
        """
        if not self.trainable:
            raise CheckpointError("this bottleneck is frozen already")
        self.prior = IntegerNetwork.from_float(self._scaled_prior()).to(self.y_gain.log2_gain.device)
        self._multiplier = to_fixed(self.z_gain.inverse_levels().detach())
        self._shift = to_fixed((self.y_gain.log2_gain + self.scale_offset).detach())
        z_counts, y_counts = counts or ([{}] * self.hyper_channels, [{}] * SCALES)
        self.z_tables = blend(*self.z_density.masses(torch.ones(self.hyper_channels)), z_counts)
        gaussian = TableSet.gaussian(table_scales())
        rows = [row / row.sum() for row in gaussian.frequencies]
        self.y_tables = blend(
            [row[:-1] for row in rows], gaussian.lows.tolist(), [float(row[-1]) for row in rows], y_counts
        )

    def _scaled_prior(self) -> nn.Sequential:
        """h_s with activations in the range of the integer network."""
        return self.hyper_synthesis

    def least_bits(self, shape: tuple[int, int]) -> float:
        z_tables, y_tables = self._frozen()
        z_positions = math.prod(self._z_shape(shape))
        y_symbols = self.latent_channels * shape[0] * shape[1]
        return float(z_positions * z_tables.least_bits.sum() + y_symbols * y_tables.least_bits.min())

    def count(self, y: Tensor, quality: int) -> list[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        """(table indexes, symbols) of z and of y as `compress` codes them; what `freeze` wants counted."""
        (z_indexes, z_symbols), y_coded, _ = self._coded(y, self._hyper_steps(y, quality), quality)
        y_indexes, y_symbols = (
            np.concatenate([part.ravel() for part in parts]) for parts in zip(*y_coded, strict=True)
        )
        return [
            (np.tile(z_indexes, len(z_symbols)), z_symbols.ravel()),
            (y_indexes.astype(np.int64), y_symbols),
        ]

    @torch.no_grad()
    def thaw(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        """Restores h_s, the shift of log2 sigma and, as near as it comes, the density of z."""
        layers = [part for part in self.hyper_synthesis if isinstance(part, nn.Conv2d)]
        exact_layers = IntegerNetwork.from_arrays(subset(arrays, "prior.")).convolutions
        for layer, exact in zip(layers, exact_layers, strict=True):
            layer.weight.copy_(exact.weight / (1 << WEIGHT_BITS))
            assert layer.bias is not None
            layer.bias.copy_(exact.bias / (1 << (WEIGHT_BITS + FRACTION_BITS)))
        shift = torch.from_numpy(arrays["shift"]).double() / (1 << FRACTION_BITS)
        self.scale_offset.copy_(shift - self.y_gain.log2_gain)
        self.z_density.fit(TableSet.from_arrays(subset(arrays, "z_tables.")))

    def table_counts(self) -> list[int]:
        return [len(tables) for tables in self._frozen()]

    def frozen_arrays(self) -> dict[str, NDArray[np.int32]]:
        z_tables, y_tables = self._frozen()
        assert self.prior is not None
        arrays = {
            "multiplier": self._multiplier.cpu().numpy().astype(np.int32),
            "shift": self._shift.cpu().numpy().astype(np.int32),
        }
        for prefix, part in (("prior.", self.prior), ("z_tables.", z_tables), ("y_tables.", y_tables)):
            arrays |= {prefix + name: array for name, array in part.arrays().items()}
        return arrays

    def load_frozen(self, arrays: Mapping[str, NDArray[np.int32]]) -> None:
        self.prior = IntegerNetwork.from_arrays(subset(arrays, "prior."))
        self.z_tables = TableSet.from_arrays(subset(arrays, "z_tables."))
        self.y_tables = TableSet.from_arrays(subset(arrays, "y_tables."))
        levels = self.y_gain.log2_gain.shape[0]
        expected = {"multiplier": (levels, self.hyper_channels), "shift": (levels, self.latent_channels)}
        for name, shape in expected.items():
            if name not in arrays or arrays[name].shape != shape:
                raise CheckpointError(f"the checkpoint's {name} does not have shape {list(shape)}")
        if len(self.z_tables) != self.hyper_channels or len(self.y_tables) != SCALES:
            raise CheckpointError("the checkpoint's tables do not fit its architecture")
        first, last = self.prior.convolutions[0].weight, self.prior.convolutions[-1].weight
        growth = tuple(np.prod([layer.shuffle for layer in self.prior.convolutions], axis=0))
        channels = (first.shape[1], last.shape[0])
        if (
            channels != (self.hyper_channels, (1 + self.means) * self.latent_channels)
            or growth != self.hyper_stride
        ):
            raise CheckpointError("the checkpoint's integer prior does not fit its architecture")
        self._multiplier = torch.from_numpy(arrays["multiplier"].astype(np.int64))
        self._shift = torch.from_numpy(arrays["shift"].astype(np.int64))

    def _frozen(self) -> tuple[TableSet, TableSet]:
        if self.z_tables is None or self.y_tables is None:
            raise CheckpointError("this codec has no tables yet: export it first (compand export)")
        return self.z_tables, self.y_tables


class RelaxedHyperprior(Relaxation):
    """y and z, with the integer prior without its rounding between them.

    Bits of a symbol are those of the table that it will be coded with; from the difference to the next one z learns
    what it does to them. Coding rounds z first; what y is rounded around follows from that.
    """

    def __init__(self, bottleneck: HyperpriorBottleneck, y: Tensor, quality: int) -> None:
        z_tables, y_tables = bottleneck._frozen()
        self._bottleneck, self._quality = bottleneck, quality
        self._y, self._z = y.float().contiguous(), bottleneck._hyper_steps(y, quality).detach()
        self._gain, self._inverse = bottleneck._gains(quality)
        self._z_costs = TableCosts(z_tables, range(len(z_tables)), y.device)
        self._y_costs = TableCosts(y_tables, range(len(y_tables)), y.device)
        self._z_rows = torch.arange(self._z.shape[1], device=y.device)[:, None, None]
        self.variables = [torch.zeros_like(part).requires_grad_() for part in (self._y, self._z)]

    def sample(self, rounding: SoftRounding) -> tuple[Tensor, Tensor]:
        y_offset, z_offset = self.variables
        z = rounding(self._z + z_offset)
        means, places = self._bottleneck._relaxed_prediction(z.value, self._quality, self._y.shape[2:])
        y = rounding((self._y - means) * self._gain + y_offset)
        bits = self._z_costs(z, self._z_rows).sum() + self._bits(y, places)
        return bits, y.value * self._inverse + means

    def _bits(self, y: Rounded, places: Tensor) -> Tensor:
        """Of values with tables given by their places among the scales."""
        place = places.clamp(0, SCALES - 1)
        row = place.detach().floor().clamp(max=SCALES - 2)
        nearer_above = place.detach() - row >= 0.5
        below, above = (self._y_costs(y, each) for each in (row.long(), row.long() + 1))
        slope = (above - below).detach() * (place - place.detach())
        return (torch.where(nearer_above, above, below) + slope).sum()

    def code(self) -> tuple[bytes, Tensor]:
        y_offset, z_offset = (variable.detach() for variable in self.variables)
        moved = self._y + y_offset / self._gain
        coded = self._bottleneck._coded(moved, self._z + z_offset, self._quality)
        return self._bottleneck._push(coded)[0], coded.y_hat
