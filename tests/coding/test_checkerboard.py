"""Positions in the order of a checkerboard, and what anchors tell about their neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from compand.coding.checkerboard import (
    TAPS,
    WINDOW,
    AnchorConvolution,
    Checkerboard,
    IntegerAnchorConvolution,
    checkerboard,
)
from compand.coding.integer import ACTIVATION_LIMIT, FRACTION_BITS, WEIGHT_BITS, to_fixed

SIZES = [(1, 1), (1, 2), (2, 1), (1, 7), (6, 1), (2, 2), (3, 3), (4, 5), (5, 4), (8, 12), (9, 7)]
any_size = pytest.mark.parametrize("size", SIZES, ids=str)


def board_of(size: tuple[int, int]) -> Checkerboard:
    return checkerboard(*size, torch.device("cpu"))


def places(size: tuple[int, int], odd: int) -> list[tuple[int, int]]:
    """Rows and columns of anchors (0) or of the others (1), row by row."""
    return [place for place in np.ndindex(*size) if sum(place) % 2 == odd]


@any_size
def test_anchors_come_first(size):
    board = board_of(size)
    x = torch.randn(2, 3, *size)
    ordered = board.ordered(x)
    assert ordered.shape == (2, 3, 1, size[0] * size[1])
    expected = [x[:, :, row, column] for row, column in places(size, 0) + places(size, 1)]
    assert torch.equal(ordered[:, :, 0], torch.stack(expected, 2))
    counts = [half.stop - half.start for half in board.halves]
    assert counts == [count for count in (len(places(size, 0)), len(places(size, 1))) if count]
    assert board.halves[0].start == 0 and board.halves[-1].stop == board.whole[0].stop == size[0] * size[1]


@any_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_spreading_undoes_ordering(size, dtype):
    board = board_of(size)
    x = torch.randint(-(10**6), 10**6, (2, 3, *size)).to(dtype)
    assert torch.equal(board.spread(board.ordered(x)), x)
    assert torch.equal(board.spread(board.ordered(x.contiguous(memory_format=torch.channels_last))), x)
    anchors = board.spread_anchors(board.ordered(x)[..., board.halves[0]])
    even = (torch.arange(size[0])[:, None] + torch.arange(size[1])) % 2 == 0
    assert torch.equal(anchors, x * even)


def test_gradients_return_to_their_places():
    board = board_of((5, 4))
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 2, 1, 20, dtype=torch.float64)
    (board.ordered(x) * weight).sum().backward()
    assert torch.equal(x.grad, board.spread(weight))
    assert torch.autograd.gradcheck(lambda x: board.spread_anchors(board.ordered(x)[..., board.halves[0]]), x)


def test_boards_first_asked_for_without_gradients_serve_training():
    checkerboard.cache_clear()
    with torch.inference_mode():
        board = board_of((3, 4))
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    board.spread(board.ordered(x)).sum().backward()
    AnchorConvolution(2, 3)(board.ordered(x)[..., board.halves[0]], board).sum().backward()
    assert x.grad is not None
    assert board_of((3, 4)) is board


@pytest.mark.parametrize("size", [size for size in SIZES if size != (1, 1)], ids=str)
def test_anchors_around_the_others(size):
    board = board_of(size)
    anchors = torch.randn(2, 3, 1, len(places(size, 0)))
    picture = F.pad(board.spread_anchors(anchors), (WINDOW // 2,) * 4)
    got = board.around(anchors)
    assert got.shape == (2, TAPS * 3, 1, len(places(size, 1)))
    for i, (row, column) in enumerate(places(size, 1)):
        window = picture[:, :, row : row + WINDOW, column : column + WINDOW].flatten(2)
        assert torch.equal(got[:, :, 0, i], window[:, :, 1::2].transpose(1, 2).flatten(1))


def masked_kernel(taps: torch.Tensor) -> torch.Tensor:
    """Weights [out, TAPS in, 1, 1] as a kernel with zeros where no anchors lie."""
    kernel = torch.zeros(taps.shape[0], taps.shape[1] // TAPS, WINDOW, WINDOW, dtype=taps.dtype)
    by_tap = taps.unflatten(1, (TAPS, -1))[..., 0, 0]
    ring = [place for place in np.ndindex(WINDOW, WINDOW) if sum(place) % 2 == 1]
    for i, (row, column) in enumerate(ring):
        kernel[:, :, row, column] = by_tap[:, i]
    return kernel


@pytest.mark.parametrize("size", [size for size in SIZES if size != (1, 1)], ids=str)
def test_it_is_a_masked_convolution(size):
    torch.manual_seed(0)
    board, module = board_of(size), AnchorConvolution(3, 4).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        # The others say nothing, whatever they are.
        kernel = masked_kernel(module.taps.weight)
        even = (torch.arange(size[0])[:, None] + torch.arange(size[1])) % 2 == 0
        everywhere = F.conv2d(x * even, kernel, module.taps.bias, padding=WINDOW // 2)
        expected = board.ordered(everywhere)[..., board.halves[1]]
        got = module(board.ordered(x)[..., board.halves[0]], board)
        assert got.shape == (2, 4, 1, len(places(size, 1)))
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [size for size in SIZES if size != (1, 1)], ids=str)
@pytest.mark.parametrize("largest", [3000, 1 << 20, 1 << 45])
def test_integers_equal_int64_arithmetic(size, largest):
    torch.manual_seed(1)
    board, module = board_of(size), AnchorConvolution(3, 4)
    exact = IntegerAnchorConvolution.from_float(module)
    anchors = torch.randint(-largest, largest + 1, (2, 3, 1, len(places(size, 0))))
    weight = torch.round(module.taps.weight.detach().double() * (1 << WEIGHT_BITS)).long()
    bias = torch.round(module.taps.bias.detach().double() * (1 << (WEIGHT_BITS + FRACTION_BITS))).long()
    picture = board.spread_anchors(anchors.clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT))
    windows = F.pad(picture, (WINDOW // 2,) * 4).unfold(2, WINDOW, 1).unfold(3, WINDOW, 1)
    sums = (windows[:, None] * masked_kernel(weight)[None, :, :, None, None]).sum((2, 5, 6))
    sums += bias[:, None, None] + (1 << (WEIGHT_BITS - 1))
    expected = (sums >> WEIGHT_BITS).clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
    got = exact(anchors, board)
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), board.ordered(expected)[..., board.halves[1]])


def test_far_anchors_say_nothing():
    board = board_of((9, 9))
    exact = IntegerAnchorConvolution.from_float(AnchorConvolution(1, 2))
    x = torch.zeros(1, 1, 9, 9, dtype=torch.int64)
    silent = exact(board.ordered(x)[..., board.halves[0]], board)
    x[0, 0, 4, 4] = to_fixed(torch.tensor(50.0))
    told = exact(board.ordered(x)[..., board.halves[0]], board)
    reached = [
        place
        for place, differs in zip(places((9, 9), 1), (told != silent)[0].any(0)[0], strict=True)
        if differs
    ]
    assert reached == [
        (row, column) for row, column in places((9, 9), 1) if max(abs(row - 4), abs(column - 4)) <= 2
    ]
