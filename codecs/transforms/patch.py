"""Convolutional transforms that do nearly all their work at 1/8 and 1/16 resolution."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand.codec import Transform, level_table_at
from compand.errors import UsageError


@dataclass(frozen=True)
class Stage:
    """One resolution of a `PatchTransform`.

    Attributes:
        stride: samples per position at this stage; a multiple of the stage before.
        channels: width.
        depth: number of blocks.
    """

    stride: int
    channels: int
    depth: int


class DepthwiseBlock(nn.Module):
    """x + W2 gelu(W1 dw(x)): a depth-wise convolution, then a point-wise network `expansion` times as wide.

    The block of ConvNeXt (Liu et al. 2022, figure 4) without its normalisation, which would discard the amplitude
    that a codec has to carry.

    Args:
        channels: width.
        kernel: extent of the depth-wise kernel, odd, along (height, width); one number for both.
        expansion: factor by which the point-wise network is wider.
    """

    def __init__(self, channels: int, kernel: int | tuple[int, int] = 5, expansion: int = 3) -> None:
        super().__init__()
        extent = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (extent[0] // 2, extent[1] // 2)
        self.depthwise = nn.Conv2d(channels, channels, extent, padding=padding, groups=channels)
        self.expand = nn.Conv2d(channels, expansion * channels, 1)
        self.project = nn.Conv2d(expansion * channels, channels, 1)
        with torch.no_grad():
            self.project.weight.mul_(0.2)
            nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.gelu(self.expand(self.depthwise(x))))


class LevelScale(nn.Module):
    """Multiplies every channel by a factor that depends on the quality level, so that one network serves all rates.

    The channel-wise gain of Cui et al. 2021 ("Asymmetric gained deep image compression with continuous rate
    adaptation", section 3) put inside the transform; interpolated linearly between levels.
    """

    def __init__(self, levels: int, channels: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(levels, channels))

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        return x * (1 + level_table_at(self.offset, quality))[:, :, None, None].to(x.dtype)


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """[B, C, H, W] -> [B, factor^2 C, H / factor, W / factor] with channels-last memory, channel order (dy, dx, c).

    The order keeps runs of samples together, so that the copy is about eight times faster on a CPU than
    `torch.nn.functional.pixel_unshuffle` followed by a change of layout.
    """
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(b, h // factor, factor, w // factor, factor, c)
    return (
        x.permute(0, 1, 3, 2, 4, 5)
        .reshape(b, h // factor, w // factor, factor * factor * c)
        .permute(0, 3, 1, 2)
    )


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Inverse of `pixel_unshuffle`."""
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(b, h, w, factor, factor, c // factor**2)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2).permute(0, 3, 1, 2)


def colour_axes(channels: int) -> Tensor:
    """Orthonormal axes that roughly decorrelate channels: luma and two chroma axes for RGB, else a cosine transform
    (for stereo the sum and the difference).

    Returns:
        [channels, channels] in float64, one axis a row.
    """
    if channels == 3:
        primaries = [[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]]
        axes: Tensor = torch.linalg.qr(torch.tensor(primaries, dtype=torch.float64).T)[0].T
        return axes
    n = torch.arange(channels, dtype=torch.float64)
    axes = torch.cos(math.pi * (n[None] + 0.5) * n[:, None] / channels) * math.sqrt(2 / channels)
    axes[0] /= math.sqrt(2)
    return axes


def dct_patch_basis(stride: int, latent_channels: int) -> Tensor:
    """The lowest frequencies of the orthonormal 2-D DCT of stride x stride patches in YCbCr-like colour axes.

    Args:
        stride: patch edge s.
        latent_channels: number M of basis vectors, at most 3 s^2; two thirds of them luma, as far as luma has so many.

    Returns:
        [M, 3 s^2] with orthonormal rows, columns ordered as by `pixel_unshuffle`.

    Raises:
        UsageError: a patch has fewer than M coefficients.
    """
    if latent_channels > 3 * stride**2:
        raise UsageError(
            f"patches of {stride}x{stride} have no {latent_channels} coefficients: lower latent_channels"
        )
    n = torch.arange(stride, dtype=torch.float64)
    basis = torch.cos(math.pi * (n[None, :] + 0.5) * n[:, None] / stride) * math.sqrt(2 / stride)
    basis[0] /= math.sqrt(2)
    colour = colour_axes(3)
    radius = (n[:, None] ** 2 + n[None, :] ** 2).flatten()
    luma = min(latent_channels - 2 * (latent_channels // 6), stride**2)
    chroma = (latent_channels - luma) // 2
    rows = []
    for axis, count in zip(colour, (luma, latent_channels - luma - chroma, chroma), strict=True):
        for index in torch.argsort(radius, stable=True)[:count].tolist():
            plane = basis[index // stride][:, None] * basis[index % stride][None, :]
            rows.append((plane[:, :, None] * axis).flatten())
    return torch.stack(rows).float()


class PatchTransform(Transform):
    """Residual depth-wise blocks at coarse resolutions beside a linear patch transform.

    ```
    x -> unshuffle -> 1x1 -> blocks -> unshuffle -> 1x1 -> blocks -> 1x1 -> (+) -> y
      \\----------------- unshuffle -> 1x1 (starts as a DCT) --------------/
    ```

    Each stage folds pixels into channels and works on them with `DepthwiseBlock`s, so that nearly all arithmetic is
    dense matrix products on few positions: fast on a CPU and on a GPU alike. The linear path, which starts as a block
    DCT while the nonlinear path starts near zero, makes the untrained codec a usable transform coder and carries the
    low frequencies ever after, in the spirit of the auxiliary transforms of Li et al. 2025 (AuxT, arXiv 2501.13751).
    Synthesis mirrors analysis.

    Args:
        latent_channels: channels M of y.
        stages: resolutions in order of growing stride; the last one is the latent's.
        levels: number of quality levels.
        kernel: edge of the depth-wise kernels.
        expansion: width factor inside a block.
        linear_path: whether the linear path exists.
        level_scales: whether features are scaled by quality level.
    """

    encoder_parts = ("analysis_",)

    def __init__(
        self,
        latent_channels: int = 256,
        stages: Sequence[Stage | Sequence[int]] = (Stage(8, 192, 4), Stage(16, 256, 2)),
        levels: int = 8,
        kernel: int = 5,
        expansion: int = 3,
        linear_path: bool = True,
        level_scales: bool = True,
    ) -> None:
        super().__init__()
        resolutions = [stage if isinstance(stage, Stage) else Stage(*stage) for stage in stages]
        self.latent_channels = latent_channels
        self.stages = resolutions
        self.stride = resolutions[-1].stride
        reach = sum(stage.stride * stage.depth * (kernel // 2) for stage in resolutions)
        self.context = -(-reach // self.stride) * self.stride

        self.folds = [resolutions[0].stride] + [b.stride // a.stride for a, b in pairwise(resolutions)]
        widths = [3] + [stage.channels for stage in resolutions]
        self.analysis_fold = nn.ModuleList(
            nn.Conv2d(fold**2 * a, b, 1) for fold, a, b in zip(self.folds, widths, widths[1:], strict=False)
        )
        self.synthesis_fold = nn.ModuleList(
            nn.Conv2d(b, fold**2 * a, 1) for fold, a, b in zip(self.folds, widths, widths[1:], strict=False)
        )

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(*(DepthwiseBlock(s.channels, kernel, expansion) for _ in range(s.depth)))
                for s in resolutions
            )

        def scales() -> nn.ModuleList:
            return nn.ModuleList(
                LevelScale(levels, s.channels) if level_scales else nn.Identity() for s in resolutions
            )

        self.analysis_blocks, self.synthesis_blocks = blocks(), blocks()
        self.level_scales = level_scales
        self.analysis_scales, self.synthesis_scales = scales(), scales()
        self.analysis_latent = nn.Conv2d(resolutions[-1].channels, latent_channels, 1)
        self.synthesis_latent = nn.Conv2d(latent_channels, resolutions[-1].channels, 1)
        self.linear_path = linear_path
        if linear_path:
            patch = 3 * self.stride**2
            self.analysis_linear = nn.Conv2d(patch, latent_channels, 1, bias=False)
            self.synthesis_linear = nn.Conv2d(latent_channels, patch, 1, bias=False)
            basis = dct_patch_basis(self.stride, latent_channels)
            with torch.no_grad():
                self.analysis_linear.weight.copy_(basis[:, :, None, None])
                self.synthesis_linear.weight.copy_(basis.T[:, :, None, None])
                for parameter in (*self.analysis_latent.parameters(), *self.synthesis_fold[0].parameters()):
                    parameter.mul_(0.1 if parameter.ndim == 4 else 0)

    def analysis(self, x: Tensor, quality: Tensor) -> Tensor:
        x = x - 0.5
        feature = x.to(self.analysis_latent.weight.dtype)
        for i, fold in enumerate(self.folds):
            feature = self.analysis_fold[i](pixel_unshuffle(feature, fold))
            if self.level_scales:
                feature = self.analysis_scales[i](feature, quality)
            feature = self.analysis_blocks[i](feature)
        y = self.analysis_latent(feature).float()
        if self.linear_path:
            return self.analysis_linear(pixel_unshuffle(x, self.stride)) + y
        return y

    def synthesis(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        feature = self.synthesis_latent(y_hat.to(self.synthesis_latent.weight.dtype))
        for i in reversed(range(len(self.folds))):
            feature = self.synthesis_blocks[i](feature)
            if self.level_scales:
                feature = self.synthesis_scales[i](feature, quality)
            feature = feature.float() if i == 0 else feature
            feature = pixel_shuffle(self.synthesis_fold[i](feature), self.folds[i])
        if self.linear_path:
            feature = feature + pixel_shuffle(self.synthesis_linear(y_hat), self.stride)
        return feature + 0.5

    def settle_new_parts(self, learned: Collection[str]) -> None:
        for side in ("analysis_blocks", "synthesis_blocks"):
            for i, stage in enumerate(getattr(self, side)):
                if f"{side}.{i}.0.project.weight" not in learned:
                    continue
                for j, block in enumerate(stage):
                    if f"{side}.{i}.{j}.project.weight" not in learned:
                        nn.init.zeros_(block.project.weight)
                        nn.init.zeros_(block.project.bias)

    def reduce_precision(self, dtype: torch.dtype) -> None:
        """Converts all but the linear path and the last layer, whose rounding would show at high rates."""
        for part in (
            self.analysis_fold, self.analysis_blocks, self.analysis_latent,
            self.synthesis_latent, self.synthesis_blocks, *list(self.synthesis_fold)[1:],
        ):  # fmt: skip
            part.to(dtype)
