"""Exact integer networks: what may stand between the bytes of a file and the choice of a probability table.

Weights and activations are integers. A convolution is carried out in float64, where every partial sum is an integer
below 2**40 and therefore exact in any order of summation, and its result is rounded before any bias, shift or
comparison. CPU and GPU, any number of threads and any memory layout give the same integers.

Fixed-point numbers have FRACTION_BITS fractional bits unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


class IntegerConvolution(nn.Module):
    """Convolution, rectification and pixel shuffle on integers.

    Args:
        weight: integers [out, in, k, k], k odd; fixed-point with WEIGHT_BITS.
        bias: integers [out]; fixed-point with FRACTION_BITS + WEIGHT_BITS.
        shuffle: factor by which channels are unfolded into pixels afterwards.
        rectify: whether negative results become 0.

    Raises:
        CheckpointError: an accumulator could reach 2**40, a bias does not fit 32 bits, or the shapes disagree.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, shuffle: int = 1, rectify: bool = True) -> None:
        super().__init__()
        square = weight.ndim == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] % 2 == 1
        if not square or bias.shape != weight.shape[:1] or shuffle < 1 or weight.shape[0] % shuffle**2:
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
        self.register_buffer("weight", weight.double(), persistent=False)
        self.register_buffer("bias", bias.double()[:, None, None], persistent=False)
        self.shuffle, self.rectify = shuffle, rectify

    def forward(self, x: Tensor) -> Tensor:
        """x: float64 integers [batch, in, h, w] -> float64 integers [batch, out / shuffle^2, h shuffle, w shuffle]."""
        total = torch.round(F.conv2d(x, self.weight, padding=self.weight.shape[2] // 2)) + self.bias
        half = 1 << (WEIGHT_BITS - 1)
        x = torch.floor((total + half) * (1 / (1 << WEIGHT_BITS)))
        low = 0 if self.rectify else -ACTIVATION_LIMIT
        return F.pixel_shuffle(x.clamp_(low, ACTIVATION_LIMIT), self.shuffle)


class IntegerNetwork(nn.Module):
    """A chain of `IntegerConvolution`s.

    Raises:
        CheckpointError: there is none, or one does not take what the one before it gives.
    """

    def __init__(self, layers: list[IntegerConvolution]) -> None:
        super().__init__()
        given = [layer.weight.shape[0] // layer.shuffle**2 for layer in layers]
        if not layers or given[:-1] != [layer.weight.shape[1] for layer in layers[1:]]:
            raise CheckpointError(
                "layers of an integer network do not fit each other: export the checkpoint again"
            )
        self.layers = nn.ModuleList(layers)

    @property
    def convolutions(self) -> list[IntegerConvolution]:
        """The layers in order."""
        return [layer for layer in self.layers if isinstance(layer, IntegerConvolution)]

    @classmethod
    def from_float(cls, network: nn.Sequential) -> IntegerNetwork:
        """Converts a chain of odd "same" convolutions, each optionally followed by PixelShuffle and by ReLU.

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
            elif isinstance(part, nn.ReLU) and layers:
                layers[-1]["rectify"] = True
            else:
                raise CheckpointError(
                    f"{part} has no integer form there: use odd same Conv2d, then PixelShuffle, ReLU"
                )
        return cls([IntegerConvolution(**layer) for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        """x: integers of any dtype, [batch, in, h, w], clamped to +-ACTIVATION_LIMIT. Returns int64."""
        x = x.double().clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
        for layer in self.layers:
            x = layer(x)
        return x.long()

    def arrays(self) -> dict[str, NDArray[np.int32]]:
        """Int32 arrays for a checkpoint: weights and biases by layer, and [shuffle, rectify] of each layer."""
        result = {}
        for i, layer in enumerate(self.convolutions):
            result[f"{i}.weight"] = layer.weight.cpu().numpy().astype(np.int32)
            result[f"{i}.bias"] = layer.bias.flatten().cpu().numpy().astype(np.int32)
        result["shape"] = np.array(
            [[layer.shuffle, layer.rectify] for layer in self.convolutions], dtype=np.int32
        )
        return result

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> IntegerNetwork:
        """Inverse of `arrays`. Raises CheckpointError where they are not a network."""
        try:
            shape = arrays["shape"].reshape(-1, 2).tolist()
            layers = [
                IntegerConvolution(
                    torch.from_numpy(arrays[f"{i}.weight"].astype(np.float64)),
                    torch.from_numpy(arrays[f"{i}.bias"].astype(np.float64)),
                    int(shuffle),
                    bool(rectify),
                )
                for i, (shuffle, rectify) in enumerate(shape)
            ]
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's integer network is incomplete: {error}") from None
        return cls(layers)


def _is_same(part: nn.Conv2d) -> bool:
    """Whether a convolution is the plain odd one, padded with zeros to the size of its input."""
    edge = part.kernel_size[0]
    plain = (part.kernel_size, part.stride, part.dilation, part.groups) == ((edge, edge), (1, 1), (1, 1), 1)
    return plain and edge % 2 == 1 and part.padding == (edge // 2, edge // 2) and part.padding_mode == "zeros"
