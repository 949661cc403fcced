"""Latents in two halves, coded one after the other: those on the white squares of a checkerboard are told by those on
the black ones."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand.coding.integer import ACTIVATION_LIMIT, IntegerNetwork
from compand.errors import CheckpointError

WINDOW = 5
"""Edge of the neighbourhood of a position, odd."""

TAPS = WINDOW**2 // 2
"""Anchors in it around a position that is none."""


class _Permuted(torch.autograd.Function):
    """Positions in another order; the gradient is the inverse permutation, where indexing would add up atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(-1, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(-1, inverse), None, None


class Checkerboard:
    """The positions of h x w latents in the order of coding: anchors, whose row plus column is even, then the others.

    Attributes:
        halves: where anchors and others lie in that order; a single position has no others.
        whole: where all positions lie, as one part.
    """

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        self.height, self.width = height, width
        rows, columns = torch.arange(height)[:, None], torch.arange(width)
        odd = ((rows + columns) % 2).flatten()
        order = torch.argsort(odd, stable=True)
        place = torch.argsort(order)
        anchors = int((odd == 0).sum())
        halves = slice(0, anchors), slice(anchors, height * width)
        self.halves = tuple(half for half in halves if half.start < half.stop)
        self.whole = (slice(0, height * width),)
        # Places of the anchors around each other position, by tap; what lies beyond the edges is one place more.
        reach = WINDOW // 2
        framed = F.pad(place.view(height, width), (reach,) * 4, value=anchors)
        near = framed.unfold(0, WINDOW, 1).unfold(1, WINDOW, 1).flatten(2).flatten(0, 1)[order[anchors:]]
        self._order, self._place = order.to(device), place.to(device)
        self._near = near[:, 1::2].flatten().to(device)  # see `AnchorConvolution`

    def ordered(self, x: Tensor) -> Tensor:
        """[batch, c, h, w] -> [batch, c, 1, h w]."""
        flat: Tensor = _Permuted.apply(x.flatten(2)[:, :, None], self._order, self._place)
        return flat

    def spread(self, x: Tensor) -> Tensor:
        """[batch, c, 1, h w] -> [batch, c, h, w]."""
        flat: Tensor = _Permuted.apply(x, self._place, self._order)
        return flat.view(*x.shape[:2], self.height, self.width)

    def spread_anchors(self, anchors: Tensor) -> Tensor:
        """[batch, c, 1, anchors] -> [batch, c, h, w], zeros between."""
        others = self.height * self.width - anchors.shape[-1]
        return self.spread(F.pad(anchors, (0, others)))

    def around(self, anchors: Tensor) -> Tensor:
        """[batch, c, 1, anchors] -> [batch, TAPS c, 1, others]: the anchors around each other position, tap by tap,
        zeros beyond the edges."""
        batch, channels = anchors.shape[:2]
        # Channels last: whole rows are copied, where single numbers would take several times as long.
        near = F.pad(anchors[:, :, 0].mT, (0, 0, 0, 1)).index_select(1, self._near)
        return near.view(batch, len(self._near) // TAPS, TAPS * channels).mT[:, :, None]


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # gradients may be wanted later of what is first asked for without
def checkerboard(height: int, width: int, device: torch.device) -> Checkerboard:
    """The checkerboard of a size, made once."""
    return Checkerboard(height, width, device)


class AnchorConvolution(nn.Module):
    """What the anchors within a window around each of the other positions say: a checkerboard convolution (He et al.
    2021, "Checkerboard Context Model for Efficient Learned Image Compression", section 3.2).

    Its weights are in the order of `Checkerboard.around`.

    Args:
        inputs, outputs: channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.taps = nn.Conv2d(TAPS * inputs, outputs, 1)

    def forward(self, anchors: Tensor, board: Checkerboard) -> Tensor:
        """[batch, in, 1, anchors] -> [batch, out, 1, others]."""
        taps = self.taps.weight.unflatten(1, (TAPS, -1))[..., 0, 0].mT
        kernel = taps.new_zeros(*taps.shape[:2], WINDOW**2)
        kernel[..., 1::2] = taps  # every second tap of a window, row by row, lies on anchors
        kernel = kernel.unflatten(2, (WINDOW, WINDOW))
        everywhere = F.conv2d(board.spread_anchors(anchors), kernel, self.taps.bias, padding=WINDOW // 2)
        return board.ordered(everywhere)[..., board.halves[1]]


class IntegerAnchorConvolution(nn.Module):
    """`AnchorConvolution` on fixed-point integers.

    Args:
        taps: a network of one layer of kernel 1, whose inputs are in the order of `Checkerboard.around`.

    Raises:
        CheckpointError: the network is another.
    """

    def __init__(self, taps: IntegerNetwork) -> None:
        super().__init__()
        if not taps.pointwise or len(taps.convolutions) > 1 or taps.channels[0] % TAPS:
            raise CheckpointError("an integer neighbourhood is malformed: export the checkpoint again")
        self.taps = taps

    @classmethod
    def from_float(cls, module: AnchorConvolution) -> IntegerAnchorConvolution:
        """Raises CheckpointError where weights are too large for exact arithmetic."""
        return cls(IntegerNetwork.from_float(nn.Sequential(module.taps)))

    def forward(self, anchors: Tensor, board: Checkerboard) -> Tensor:
        """As of `AnchorConvolution`, int32."""
        # Clamped before each is copied a dozen times.
        anchors = anchors.clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT).int()
        result: Tensor = self.taps(board.around(anchors))
        return result

    def relaxed(self, anchors: Tensor, board: Checkerboard) -> Tensor:
        """`forward` without rounding, see `IntegerNetwork.relaxed`."""
        return self.taps.relaxed(board.around(anchors))
