"""Attention and gates of a picture's positions, in floating point to be trained and in integers to code with.

The integer forms keep to what `coding.integer` says: float64 holds integers below 2**53, whose sums are exact in any
order, and the floor of a quotient of two of them is that of the exact quotient as long as the dividend is below 2**52.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compand.coding.integer import ACTIVATION_LIMIT, FRACTION_BITS, IntegerNetwork
from compand.errors import CheckpointError

_ONE = 1 << FRACTION_BITS
_PARTS = ("query", "key", "value")

LARGEST_KEY = 16
"""Queries and keys are clamped to this."""

LARGEST_VALUE = 64
"""Values are clamped to +- this: sums over 2**21 positions stay below 2**51."""


def _quotient(dividend: Tensor, divisor: Tensor) -> Tensor:
    """The nearest integers to quotients of integers in float64; half way they are rounded up."""
    # What a matrix product gives is rounded, so that not even an inexact one would matter.
    return dividend.round().add_((divisor / 2).floor_()).div_(divisor).floor_()


class LinearAttention(nn.Module):
    """Attention whose cost grows with the number of positions, not with its square (Shen et al. 2021, "Efficient
    Attention: Attention with Linear Complexities", equation 3), with rectified and then normalised queries and keys in
    place of softmax, which integers can compute:

    ```
    Q = relu(W_q guide) + unit, K = relu(W_k guide') + unit, V = W_v content
    G[c] = sum_n K[c, n] V[n] / sum_n K[c, n];  out[n] = sum_c Q[c, n] G[c] / sum_c Q[c, n]
    ```

    The unit is that of the integers; queries and keys are clamped to LARGEST_KEY, values to +-LARGEST_VALUE.

    Args:
        guide: channels of what queries and keys are made of.
        content: channels of what values are made of.
        width: channels of queries, keys and values.
    """

    def __init__(self, guide: int, content: int, width: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(guide, width, 1)
        self.key = nn.Conv2d(guide, width, 1)
        self.value = nn.Conv2d(content, width, 1)

    def forward(self, query: Tensor, key: Tensor, content: Tensor) -> Tensor:
        """[batch, guide, 1, n], [batch, guide, 1, m], [batch, content, 1, m] -> [batch, width, 1, n]."""
        q, k, v = self.query(query), self.key(key), self.value(content)
        with torch.autocast(q.device.type, enabled=False):
            q, k = (x.float().clamp(0, LARGEST_KEY)[:, :, 0] + 1 / _ONE for x in (q, k))
            v = v.float().clamp(-LARGEST_VALUE, LARGEST_VALUE)[:, :, 0]
            gathered = (k / k.sum(2, keepdim=True)) @ v.mT
            return (gathered.mT @ (q / q.sum(1, keepdim=True)))[:, :, None]


class IntegerAttention(nn.Module):
    """`LinearAttention` on fixed-point integers.

    Args:
        query, key, value: networks of kernels 1, without rectification.

    Raises:
        CheckpointError: a network has other kernels, or they do not fit each other.
    """

    def __init__(self, query: IntegerNetwork, key: IntegerNetwork, value: IntegerNetwork) -> None:
        super().__init__()
        pointwise = all(network.pointwise for network in (query, key, value))
        if not pointwise or query.channels != key.channels or key.channels[1] != value.channels[1]:
            raise CheckpointError("an integer attention is malformed: export the checkpoint again")
        self.query, self.key, self.value = query, key, value

    @classmethod
    def from_float(cls, module: LinearAttention) -> IntegerAttention:
        """Raises CheckpointError where weights are too large for exact arithmetic."""
        return cls(*(IntegerNetwork.from_float(nn.Sequential(getattr(module, name))) for name in _PARTS))

    def forward(self, query: Tensor, key: Tensor, content: Tensor) -> Tensor:
        """As of `LinearAttention`, int32."""
        q, k, v = self.query(query), self.key(key), self.value(content)
        q, k = (x[:, :, 0].double().clamp_(0, LARGEST_KEY * _ONE).add_(1) for x in (q, k))
        v = v[:, :, 0].double().clamp_(-LARGEST_VALUE * _ONE, LARGEST_VALUE * _ONE)
        gathered = _quotient(k @ v.mT, k.sum(2, keepdim=True))
        return _quotient(gathered.mT @ q, q.sum(1, keepdim=True)).to(torch.int32)[:, :, None]

    def relaxed(self, query: Tensor, key: Tensor, content: Tensor) -> Tensor:
        """`forward` without rounding, see `IntegerNetwork.relaxed`."""
        q, k, v = self.query.relaxed(query), self.key.relaxed(key), self.value.relaxed(content)
        q, k = (x[:, :, 0].clamp(0, LARGEST_KEY * _ONE) + 1 for x in (q, k))
        v = v[:, :, 0].clamp(-LARGEST_VALUE * _ONE, LARGEST_VALUE * _ONE)
        gathered = (k / k.sum(2, keepdim=True)) @ v.mT
        return (gathered.mT @ (q / q.sum(1, keepdim=True)))[:, :, None]


class ChannelGate(nn.Module):
    """Multiplies each channel by 0 to 2, as the means of all over the positions say: squeeze and excitation (Hu et al.
    2018, "Squeeze-and-Excitation Networks", equations 2 to 4) with a hard sigmoid. Begins as the identity.

    Args:
        channels: number of channels.
        reduction: how many times narrower the layer between is.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.excitation = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(), silent(nn.Conv2d(hidden, channels, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w]."""
        mean = x.float().mean((2, 3), keepdim=True)
        return x * (1 + self.excitation(mean)).clamp(0, 2).to(x.dtype)


class IntegerGate(nn.Module):
    """`ChannelGate` on fixed-point integers.

    Args:
        excitation: a network of kernels 1.

    Raises:
        CheckpointError: the network has other kernels, or gives not as many channels as it takes.
    """

    def __init__(self, excitation: IntegerNetwork) -> None:
        super().__init__()
        if not excitation.pointwise or excitation.channels[0] != excitation.channels[1]:
            raise CheckpointError("an integer gate is malformed: export the checkpoint again")
        self.excitation = excitation

    @classmethod
    def from_float(cls, module: ChannelGate) -> IntegerGate:
        """Raises CheckpointError where weights are too large for exact arithmetic."""
        return cls(IntegerNetwork.from_float(module.excitation))

    def forward(self, x: Tensor) -> Tensor:
        """As of `ChannelGate`, int32."""
        x = x.to(torch.float64, copy=True).clamp_(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
        positions = torch.full((), x.shape[2] * x.shape[3], dtype=x.dtype, device=x.device)
        mean = _quotient(x.sum((2, 3), keepdim=True), positions)
        gate = (self.excitation(mean).double() + _ONE).clamp_(0, 2 * _ONE)
        return x.mul_(gate).add_(_ONE // 2).mul_(1 / _ONE).floor_().to(torch.int32)

    def relaxed(self, x: Tensor) -> Tensor:
        """`forward` without rounding, see `IntegerNetwork.relaxed`."""
        x = x.clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
        gate = self.excitation.relaxed(x.mean((2, 3), keepdim=True)) / _ONE
        return x * (1 + gate).clamp(0, 2)


def silent(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, giving zeros as yet."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
