"""Exact integer networks: what may stand between the bytes of a file and the choice of a probability table.

Weights and activations are integers. A convolution is carried out in float64, where every partial sum is an integer
below 2**40 (or that times a power of two) and therefore exact in any order of summation, and half a unit is added
before results are rounded down, so that not even an inexact product would matter. CPU and GPU, any number of threads
and any memory layout give the same integers.

Fixed-point numbers have FRACTION_BITS fractional bits unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compand.errors import CheckpointError

FRACTION_BITS = 10
WEIGHT_BITS = 12
"""Fractional bits of weights; a layer's accumulator has FRACTION_BITS + WEIGHT_BITS."""

ACTIVATION_LIMIT = 1 << 18
"""Activations between layers, and a network's input, are clamped to +- this."""

ACCUMULATOR_LIMIT = 1 << 40

_ONE = 1 << WEIGHT_BITS
_HALF = (1 << (WEIGHT_BITS - 1)) + 0.5
"""Added to sums, in units of the accumulator: rounds to the nearest activation, and the sums to integers."""

LEAK_BITS = 16
"""Fractional bits of the factor by which a leaky rectifier multiplies what is negative."""

BIAS_LIMIT = 1 << 31
"""Checkpoints hold biases in 32 bits."""


def to_fixed(x: Tensor) -> Tensor:
    """The nearest fixed-point integers, as int64."""
    return torch.round(x.double() * (1 << FRACTION_BITS)).long()


def interpolate_levels(table: Tensor, quality: int, steps: int) -> Tensor:
    """Row of an integer table at a quality given in 1/steps level, interpolated in integers.

    Args:
        table: int64 [levels, channels]; level 1 is row 0.
        quality: steps .. levels * steps.

    Returns:
        int64 [channels].
    """
    low, fraction = divmod(quality - steps, steps)
    high = min(low + 1, table.shape[0] - 1)
    total = table[low] * (steps - fraction) + table[high] * fraction
    return torch.div(total + steps // 2, steps, rounding_mode="floor")


def shuffled(x: Tensor, rows: int, columns: int) -> Tensor:
    """Unfolds channels into pixels: [batch, c rows columns, h, w] -> [batch, c, h rows, w columns]."""
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels // (rows * columns), rows, columns, height, width)
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * rows, width * columns)


class WidthShuffle(nn.Module):
    """nn.PixelShuffle along the width alone: [batch, c factor, h, w] -> [batch, c, h, w factor]."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return shuffled(x, 1, self.factor)


class _Planes(NamedTuple):
    """Activations by channel; the convolutions leave columns and rows of no meaning behind those that are meant."""

    values: Tensor  # float64 integers [channels, batch, rows, columns]
    height: int  # rows that are meant
    width: int  # columns that are meant


class IntegerConvolution(nn.Module):
    """Convolution, rectification and pixel shuffle on integers.

    One matrix product a kernel tap, on the input moved by so many positions: a frame of zeros around each plane makes
    all of them slices of one matrix, so that nothing is gathered. Weights and biases are held divided by
    2**WEIGHT_BITS, exactly, so that a layer's result is the floor of its sums.

    Args:
        weight: integers [out, in, kh, kw], both edges odd; fixed-point with WEIGHT_BITS.
        bias: integers [out]; fixed-point with FRACTION_BITS + WEIGHT_BITS.
        shuffle: factors (rows, columns) by which channels are unfolded into pixels afterwards; one number is both.
        rectify: whether negative results become 0, or, with a leak, `leak` times as large, rounded.
        leak: fixed-point with LEAK_BITS, 0 .. 2**LEAK_BITS - 1.

    Raises:
        CheckpointError: an accumulator could reach 2**40, a bias does not fit 32 bits, or the shapes disagree; a leak
            is out of range or without rectification.
    """

    taps: Tensor
    offset: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        shuffle: int | tuple[int, int] = 1,
        rectify: bool = True,
        leak: int = 0,
    ) -> None:
        super().__init__()
        rows, columns = (shuffle, shuffle) if isinstance(shuffle, int) else shuffle
        odd = weight.ndim == 4 and weight.shape[2] % 2 == 1 and weight.shape[3] % 2 == 1
        unfolds = odd and rows >= 1 and columns >= 1 and weight.shape[0] % (rows * columns) == 0
        leaks = 0 <= leak < 1 << LEAK_BITS and (rectify or not leak)
        if not unfolds or not leaks or bias.shape != weight.shape[:1]:
            shapes = f"{list(weight.shape)} and {list(bias.shape)}, shuffled by {shuffle},"
            raise CheckpointError(
                f"integer layer of shapes {shapes} is malformed: export the checkpoint again"
            )
        reach = float((weight.double().abs().sum((1, 2, 3)) * ACTIVATION_LIMIT + bias.double().abs()).max())
        largest_bias = float(bias.double().abs().max())
        # Written so that NaN, which no comparison holds for, is refused too.
        if not (reach < ACCUMULATOR_LIMIT and largest_bias < BIAS_LIMIT):
            raise CheckpointError(
                f"an integer layer can reach {reach:.3g} (bias {largest_bias:.3g}): its weights must be smaller"
            )
        taps = weight.double().permute(2, 3, 0, 1).reshape(-1, *weight.shape[:2]) / _ONE
        self.register_buffer("taps", taps.contiguous(), persistent=False)
        self.register_buffer("offset", (bias.double()[:, None] + _HALF) / _ONE, persistent=False)
        self.kernel = (weight.shape[2], weight.shape[3])
        self.shuffle, self.rectify, self.leak = (rows, columns), rectify, leak

    @property
    def weight(self) -> Tensor:
        """Float64 integers [out, in, kh, kw]."""
        return (self.taps * _ONE).unflatten(0, self.kernel).permute(2, 3, 0, 1)

    @property
    def bias(self) -> Tensor:
        """Float64 integers [out]."""
        return self.offset[:, 0] * _ONE - _HALF

    def forward(self, x: _Planes) -> _Planes:
        """Channels become out / (rows columns), height and width grow by rows and columns."""
        batch, height, width = x.values.shape[1], x.height, x.width
        rows, columns = x.values.shape[2:] if self.kernel == (1, 1) else self._framed_shape(height, width)
        size = batch * rows * columns
        flat = x.values.reshape(-1, size) if self.kernel == (1, 1) else self._framed(x, size)
        total: Tensor | None = None
        places = product(range(self.kernel[0]), range(self.kernel[1]))
        for tap, (row, column) in zip(self.taps, places, strict=True):
            moved = flat.narrow(1, row * columns + column, size)
            total = torch.addmm(self.offset, tap, moved) if total is None else total.addmm_(tap, moved)
        assert total is not None
        total.floor_().clamp_(0 if self.rectify and not self.leak else -ACTIVATION_LIMIT, ACTIVATION_LIMIT)
        if self.leak:
            # Products stay below 2**35, and are multiples of 2**-LEAK_BITS: exact.
            leaked = (total * (self.leak / (1 << LEAK_BITS))).add_(0.5).floor_()
            total = torch.maximum(total, leaked)
        planes = total.view(-1, batch, rows, columns)
        if self.shuffle == (1, 1):
            return _Planes(planes, height, width)
        planes = shuffled(planes[:, :, :height, :width].transpose(0, 1), *self.shuffle).transpose(0, 1)
        return _Planes(planes, height * self.shuffle[0], width * self.shuffle[1])

    def relaxed(self, x: Tensor) -> Tensor:
        """`forward` without rounding, for gradients: floats [batch, in, h, w] in units of the integers."""
        weight, bias = (self.weight / _ONE).to(x), (self.bias / _ONE).to(x)
        x = F.conv2d(x, weight, bias, padding=(self.kernel[0] // 2, self.kernel[1] // 2))
        if self.rectify:
            x = torch.maximum(x, x * (self.leak / (1 << LEAK_BITS)))
        return shuffled(x.clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT), *self.shuffle)

    def _framed_shape(self, height: int, width: int) -> tuple[int, int]:
        return height + self.kernel[0] - 1, width + self.kernel[1] - 1

    def _framed(self, x: _Planes, size: int) -> Tensor:
        """Planes within frames of zeros, one after another, [channels, size + the farthest move]."""
        channels, batch = x.values.shape[:2]
        rows, columns = self._framed_shape(x.height, x.width)
        flat = x.values.new_zeros(channels, size + (self.kernel[0] - 1) * columns + self.kernel[1] - 1)
        top, left = self.kernel[0] // 2, self.kernel[1] // 2
        inside = flat[:, :size].view(channels, batch, rows, columns)
        inside[:, :, top : top + x.height, left : left + x.width] = x.values[:, :, : x.height, : x.width]
        return flat


class IntegerNetwork(nn.Module):
    """A chain of `IntegerConvolution`s.

    Raises:
        CheckpointError: there is none, or one does not take what the one before it gives.
    """

    def __init__(self, layers: list[IntegerConvolution]) -> None:
        super().__init__()
        given = [layer.weight.shape[0] // math.prod(layer.shuffle) for layer in layers]
        if not layers or given[:-1] != [layer.weight.shape[1] for layer in layers[1:]]:
            raise CheckpointError(
                "layers of an integer network do not fit each other: export the checkpoint again"
            )
        self.layers = nn.ModuleList(layers)

    @property
    def convolutions(self) -> list[IntegerConvolution]:
        """The layers in order."""
        return [layer for layer in self.layers if isinstance(layer, IntegerConvolution)]

    @property
    def channels(self) -> tuple[int, int]:
        """Of what it takes and of what it gives."""
        first, last = self.convolutions[0], self.convolutions[-1]
        return first.taps.shape[2], last.taps.shape[1] // math.prod(last.shuffle)

    @property
    def pointwise(self) -> bool:
        """Whether each position's result depends on that position alone."""
        return all(layer.kernel == layer.shuffle == (1, 1) for layer in self.convolutions)

    @classmethod
    def from_float(cls, network: nn.Sequential) -> IntegerNetwork:
        """Converts a chain of odd "same" convolutions, each optionally followed by a shuffle and by ReLU or LeakyReLU.

        Raises:
            CheckpointError: another kind of layer, or weights too large for exact arithmetic.
        """
        layers: list[dict[str, Any]] = []
        for part in network:
            if isinstance(part, nn.Conv2d) and _is_same(part):
                scale = float(1 << WEIGHT_BITS)
                bias = part.bias if part.bias is not None else torch.zeros(part.out_channels)
                layers.append(
                    {
                        "weight": torch.round(part.weight.detach().double() * scale),
                        "bias": torch.round(bias.detach().double() * scale * (1 << FRACTION_BITS)),
                        "rectify": False,
                    }
                )
            elif isinstance(part, nn.PixelShuffle) and layers and "shuffle" not in layers[-1]:
                layers[-1]["shuffle"] = part.upscale_factor
            elif isinstance(part, WidthShuffle) and layers and "shuffle" not in layers[-1]:
                layers[-1]["shuffle"] = (1, part.factor)
            elif isinstance(part, nn.ReLU | nn.LeakyReLU) and layers:
                layers[-1]["rectify"] = True
                if isinstance(part, nn.LeakyReLU):
                    layers[-1]["leak"] = round(part.negative_slope * (1 << LEAK_BITS))
            else:
                raise CheckpointError(
                    f"{part} has no integer form there: use odd same Conv2d, then PixelShuffle, ReLU"
                )
        return cls([IntegerConvolution(**layer) for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        """x: integers of any dtype, [batch, in, h, w], clamped to +-ACTIVATION_LIMIT. Returns int32."""
        x = x.to(torch.float64, copy=True).clamp_(-ACTIVATION_LIMIT, ACTIVATION_LIMIT).transpose(0, 1)
        planes = _Planes(x, x.shape[2], x.shape[3])
        for layer in self.layers:
            planes = layer(planes)
        result = planes.values[:, :, : planes.height, : planes.width].transpose(0, 1)
        return result.to(torch.int32, memory_format=torch.contiguous_format)

    def relaxed(self, x: Tensor) -> Tensor:
        """`forward` without rounding, for gradients: floats [batch, in, h, w] in units of the integers, which the
        result differs from by what rounding does. It must decide no symbol."""
        for layer in self.convolutions:
            x = layer.relaxed(x)
        return x

    def arrays(self) -> dict[str, NDArray[np.int32]]:
        """Int32 arrays for a checkpoint: weights and biases by layer, and the `shape` of each layer.

        That is [shuffle, rectify] where the shuffles of all layers are square, else [columns, rectify, rows], and, if
        one leaks, [columns, rectify, rows, leak].
        """
        result = {}
        for i, layer in enumerate(self.convolutions):
            result[f"{i}.weight"] = layer.weight.cpu().numpy().astype(np.int32)
            result[f"{i}.bias"] = layer.bias.cpu().numpy().astype(np.int32)
        shape = [
            [layer.shuffle[1], layer.rectify, layer.shuffle[0], layer.leak] for layer in self.convolutions
        ]
        square = all(columns == rows for columns, _, rows, _ in shape)
        leaky = any(leak for *_, leak in shape)
        result["shape"] = np.array(shape, dtype=np.int32)[:, : 4 if leaky else 2 if square else 3]
        return result

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> IntegerNetwork:
        """Inverse of `arrays`. Raises CheckpointError where they are not a network."""
        try:
            shape = arrays["shape"]
            if shape.ndim != 2 or shape.shape[1] not in (3, 4):
                shape = shape.reshape(-1, 2)[:, [0, 1, 0]]
            layers = [
                IntegerConvolution(
                    torch.from_numpy(arrays[f"{i}.weight"].astype(np.float64)),
                    torch.from_numpy(arrays[f"{i}.bias"].astype(np.float64)),
                    (rows, columns),
                    bool(rectify),
                    *leak,
                )
                for i, (columns, rectify, rows, *leak) in enumerate(shape.tolist())
            ]
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's integer network is incomplete: {error}") from None
        return cls(layers)


def _is_same(part: nn.Conv2d) -> bool:
    """Whether a convolution is the plain odd one, padded with zeros to the size of its input."""
    rows, columns = part.kernel_size
    plain = (part.stride, part.dilation, part.groups, part.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    return plain and rows % 2 == columns % 2 == 1 and part.padding == (rows // 2, columns // 2)
