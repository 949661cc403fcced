"""Augmentation of latents: crops on their grid, flips by a measured kernel, normalisation.

A transform takes a batch and a generator of random numbers, which loaders seed by (seed, epoch, batch): the same batch
comes out the same from any worker.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from compand.codec import Codec
from compand.errors import UsageError
from compand.image_codec import TILE, ImageCodec, Tile
from compand.pictures import as_picture

WORST_FLIP = 0.35
"""Largest relative error of a measured flip that `Flip` takes."""


class LatentTransform(ABC):
    """Something done to latents on their way into a batch."""

    @abstractmethod
    def __call__(self, latents: Tensor, generator: np.random.Generator, axes: int) -> Tensor:
        """latents: float32 [batch, ..., M, *grid], which may be changed in place; axes: those of the grid, 1 (time) or
        2 (rows and columns)."""


class Crop(LatentTransform):
    """Selects a window of the grid of each item. First in a list of transforms, it saves reading what it drops.

    Args:
        size: rows and columns of the window, or positions in time of sounds; one number: the same along each axis.
        pad: fill a grid that is smaller with zeros (gray, silence) at its end; else it is an error.

    Attributes:
        draws: random numbers that an item's window takes.
        geometric: whether it only selects positions, so that it can be done to tokens too.

    Raises:
        UsageError: the size is not positive.
    """

    geometric = True
    draws = 0

    def __init__(self, size: int | Sequence[int], *, pad: bool = False) -> None:
        self.size = size if isinstance(size, int) else tuple(size)
        sizes = (self.size,) if isinstance(self.size, int) else self.size
        if not 1 <= len(sizes) <= 2 or min(sizes) < 1:
            raise UsageError(f"a crop of {size} does not exist: give one or two positive numbers")
        self.pad = pad

    def extent(self, axes: int) -> tuple[int, ...]:
        """Positions of the result along each of 1 or 2 axes. Raises UsageError if the size is for others."""
        if isinstance(self.size, int):
            return (self.size,) * axes
        if len(self.size) != axes:
            raise UsageError(f"a crop of {self.size} does not fit a grid of {axes} axes: give {axes} numbers")
        return self.size

    @abstractmethod
    def window(self, grid: tuple[int, ...], numbers: Sequence[float]) -> tuple[slice, ...]:
        """The window in a grid of that size, given `draws` numbers in [0, 1).

        Raises:
            UsageError: the grid is smaller than the window, without `pad`.
        """

    def finish(self, window: Tensor, axes: int) -> Tensor:
        """A window of [..., *grid] in the size that `extent` promises."""
        missing = [
            wanted - found for wanted, found in zip(self.extent(axes), window.shape[-axes:], strict=True)
        ]
        if not any(missing):
            return window
        return F.pad(window, [edge for size in reversed(missing) for edge in (0, size)])

    def __call__(self, latents: Tensor, generator: np.random.Generator, axes: int) -> Tensor:
        grid = tuple(latents.shape[-axes:])
        numbers = generator.random((len(latents), self.draws)).tolist()
        return torch.stack(
            [
                self.finish(item[(..., *self.window(grid, drawn))], axes)
                for item, drawn in zip(latents, numbers, strict=True)
            ]
        )

    def _fitting(self, grid: tuple[int, ...]) -> list[tuple[int, int]]:
        """(positions found, positions taken) along each axis."""
        fitting = []
        for found, wanted in zip(grid, self.extent(len(grid)), strict=True):
            if found < wanted and not self.pad:
                sizes = ["x".join(map(str, size)) for size in (grid, self.extent(len(grid)))]
                raise UsageError(f"a grid of {sizes[0]} is smaller than the crop of {sizes[1]}: use pad=True")
            fitting.append((found, min(found, wanted)))
        return fitting


class RandomCrop(Crop):
    """A window anywhere in the grid, every place equally likely."""

    draws = 2

    def window(self, grid: tuple[int, ...], numbers: Sequence[float]) -> tuple[slice, ...]:
        window = []
        for (found, taken), number in zip(self._fitting(grid), numbers, strict=False):
            start = int(number * (found - taken + 1))
            window.append(slice(start, start + taken))
        return tuple(window)


class CenterCrop(Crop):
    """The window in the middle, for validation."""

    def window(self, grid: tuple[int, ...], numbers: Sequence[float]) -> tuple[slice, ...]:
        starts = [((found - taken) // 2, taken) for found, taken in self._fitting(grid)]
        return tuple(slice(start, start + taken) for start, taken in starts)


class RandomResizedCrop(Crop):
    """A window of random area and shape, brought to one size by linear interpolation between latents.

    An approximation: interpolated latents are not those of the resized picture, but for the lowest band of each colour
    they are near. Of sounds, the window's length varies and they are stretched, which changes pitch for no latent.

    Args:
        size: of the result.
        scale: smallest and largest share of the grid's area.
        ratio: smallest and largest width / height.
    """

    geometric = False
    draws = 4

    def __init__(
        self,
        size: int | Sequence[int],
        *,
        scale: tuple[float, float] = (0.25, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        super().__init__(size)
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise UsageError(
                f"scale {scale} or ratio {ratio} is no range: give (low, high), scale within 0 to 1"
            )
        self.scale, self.ratio = scale, ratio

    def window(self, grid: tuple[int, ...], numbers: Sequence[float]) -> tuple[slice, ...]:
        share = self.scale[0] + numbers[0] * (self.scale[1] - self.scale[0])
        if len(grid) == 1:
            extents = [share * grid[0]]
        else:
            low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
            aspect = math.exp(low + numbers[1] * (high - low))
            area = share * grid[0] * grid[1]
            extents = [math.sqrt(area / aspect), math.sqrt(area * aspect)]
        taken = [min(max(round(extent), 1), found) for extent, found in zip(extents, grid, strict=True)]
        starts = [
            int(number * (found - size + 1))
            for number, found, size in zip(numbers[2:], grid, taken, strict=False)
        ]
        return tuple(slice(start, start + size) for start, size in zip(starts, taken, strict=True))

    def finish(self, window: Tensor, axes: int) -> Tensor:
        extent = self.extent(axes)
        if tuple(window.shape[-axes:]) == extent:
            return window
        items = window.reshape(1, -1, *window.shape[-axes:])
        mode = "bilinear" if axes == 2 else "linear"
        resized = F.interpolate(items, extent, mode=mode, align_corners=False)
        return resized.reshape(*window.shape[:-axes], *extent)


class Normalize(LatentTransform):
    """(latents - mean) / std of each channel.

    Args:
        mean, std: [M], or one number for all.

    Raises:
        UsageError: a standard deviation is not positive.
    """

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean = torch.as_tensor(mean, dtype=torch.float32).reshape(-1)
        self.std = torch.as_tensor(std, dtype=torch.float32).reshape(-1)
        if not bool((self.std > 0).all()):
            raise UsageError("a standard deviation is 0 or less: leave constant channels at 1")

    def __call__(self, latents: Tensor, generator: np.random.Generator, axes: int) -> Tensor:
        shape = (-1, *[1] * axes)
        return (latents - self.mean.view(shape)) / self.std.view(shape)


@dataclass(frozen=True, eq=False)
class FlipFit:
    """How well latents of mirrored pictures follow from those of the pictures; errors are root mean squares relative
    to the latents, on pictures that nothing was fitted to.

    Attributes:
        kernel: float32 [M, M, 3]: out of a reversed row of the grid, with its left and right neighbours.
        error: of that kernel.
        matrix_error: of the best matrix [M, M], which cannot shift by parts of a position.
        reversed_error: of only reversing rows.
        quantisation_error: of the codec itself at that quality, for comparison.
    """

    kernel: NDArray[np.float32]
    error: float
    matrix_error: float
    reversed_error: float
    quantisation_error: float


class Flip(LatentTransform):
    """Mirrors pictures left to right, each with some probability, by the kernel that `measure_flip` found.

    An approximation, unlike mirrored pixels: a codec's sampling grid is not its own mirror image. With
    `wavelet-rgb-16x` at quality 3, 0.24 of the latents' amplitude is missed, mostly in the finest bands, where
    quantisation misses 0.21; only reversing the grid misses 0.56.

    Args:
        fit: what `measure_flip` gave for the codec, at about the quality of the set.
        probability: of mirroring an item.

    Raises:
        UsageError: the error is beyond WORST_FLIP.
    """

    def __init__(self, fit: FlipFit, probability: float = 0.5) -> None:
        if not fit.error <= WORST_FLIP:
            raise UsageError(
                f"mirrored latents miss {fit.error:.2f} of the amplitude, beyond {WORST_FLIP}: "
                "mirror the pictures before packing instead"
            )
        self.probability = probability
        # The rows are reversed behind the kernel, so that it is reversed here.
        self.kernel = torch.from_numpy(fit.kernel[:, :, None, ::-1].copy())

    def __call__(self, latents: Tensor, generator: np.random.Generator, axes: int) -> Tensor:
        chosen = np.flatnonzero(generator.random(len(latents)) < self.probability)
        if axes != 2:
            raise UsageError("sounds have no left and right to flip: leave Flip out")
        if not len(chosen):
            return latents
        items = torch.from_numpy(chosen)
        around = F.pad(latents.index_select(0, items), (1, 1, 0, 0), mode="replicate")
        return latents.index_copy_(0, items, F.conv2d(around, self.kernel).flip(-1))


@torch.inference_mode()
def measure_flip(codec: Codec, pictures: Iterable[Any], *, quality: float) -> FlipFit:
    """Fits the kernel of `Flip` by least squares.

    Args:
        codec: an image codec.
        pictures: at least two photographs, as `codec.encode` takes them; a few are enough. Every other one is fitted
            to, the rest measures the error.
        quality: of the latents.

    Raises:
        UsageError: the codec is not for pictures, or there are fewer than two.
    """
    if not isinstance(codec, ImageCodec):
        raise UsageError(f"{codec.name} has no left and right to flip: measure an image codec")
    stride, channels = codec.transform.stride, codec.transform.latent_channels
    pairs: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    missed = energy = 0.0
    for picture in pictures:
        pixels = as_picture(picture, channels=codec.channels).pixels
        height, width = (min(edge, TILE) // stride * stride for edge in pixels.shape[:2])
        pixels = np.ascontiguousarray(pixels[:height, :width])
        latents, mirrored = (
            codec.dequantise(codec.quantise(side, quality=quality), quality=quality).double().cpu().numpy()
            for side in (pixels, np.ascontiguousarray(pixels[:, ::-1]))
        )
        whole = Tile(0, 0, height, 0, width)
        exact = codec.analyse(pixels, whole, codec.quality_units(quality))[0].double().cpu().numpy()
        missed, energy = missed + float(((latents - exact) ** 2).sum()), energy + float((exact**2).sum())
        pairs.append((latents[..., ::-1], mirrored))
    if len(pairs) < 2:
        raise UsageError("a flip is measured on two pictures at least: give more")
    fitted, held = pairs[::2], pairs[1::2]
    kernel = _least_squares(fitted, 3)
    matrix = _least_squares(fitted, 1)
    return FlipFit(
        kernel.reshape(channels, 3, channels).transpose(0, 2, 1).astype(np.float32),
        _relative_error(held, kernel),
        _relative_error(held, matrix),
        _relative_error(held, np.eye(channels)),
        float(np.sqrt(missed / energy)),
    )


def _neighbours(latents: NDArray[np.float64], taps: int) -> NDArray[np.float64]:
    """[M, h, w] -> [taps M, h w]: every position with those beside it in its row."""
    padded = np.pad(latents, ((0, 0), (0, 0), (taps // 2, taps // 2)), mode="edge")
    width = latents.shape[2]
    return np.concatenate([padded[..., tap : tap + width] for tap in range(taps)]).reshape(
        taps * len(latents), -1
    )


def _least_squares(
    pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], taps: int
) -> NDArray[np.float64]:
    """The matrix [M, taps M] that makes the second of each pair of its neighbourhood in the first."""
    channels = len(pairs[0][0])
    products, cross = np.zeros((taps * channels,) * 2), np.zeros((taps * channels, channels))
    for given, wanted in pairs:
        around = _neighbours(given, taps)
        products += around @ around.T
        cross += around @ wanted.reshape(channels, -1).T
    ridge = 1e-6 * np.trace(products) / len(products) * np.eye(len(products))
    result: NDArray[np.float64] = np.linalg.solve(products + ridge, cross).T
    return result


def _relative_error(
    pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], matrix: NDArray[np.float64]
) -> float:
    missed = energy = 0.0
    for given, wanted in pairs:
        made = matrix @ _neighbours(given, matrix.shape[1] // len(given))
        missed += float(((made - wanted.reshape(len(wanted), -1)) ** 2).sum())
        energy += float((wanted**2).sum())
    return math.sqrt(missed / energy) if energy else math.inf
