"""Convolutional transforms between pictures and few latents, for codecs that send an index a position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from compand.codec import Transform
from compand.errors import UsageError
from compand.transforms.patch import DepthwiseBlock, Stage, pixel_shuffle, pixel_unshuffle


def _checked(stages: Sequence[Stage | Sequence[int]]) -> list[Stage]:
    """The stages, if each folds the one before. Raises UsageError if not."""
    resolutions = [stage if isinstance(stage, Stage) else Stage(*stage) for stage in stages]
    strides = [1, *(stage.stride for stage in resolutions)]
    if len(strides) < 2 or any(b % a or b <= a for a, b in pairwise(strides)):
        raise UsageError(f"strides {strides[1:]} of stages do not fold: give growing multiples")
    return resolutions


class TokenImageTransform(Transform):
    """Residual depth-wise blocks at coarse resolutions, most of them in the decoder.

    ```
    x -> (unshuffle -> 1x1 -> blocks) a stage -> 1x1 -> y
    y_hat -> 1x1 -> (blocks -> 1x1 -> shuffle) a stage ... blocks -> 3x3 -> shuffle -> x_hat
    ```

    What `PatchTransform` is made of, for the opposite task: behind a codebook there is no amplitude to carry, so there
    is neither a linear path nor a scale a level, and nearly everything that is seen is made up by the decoder. Its
    stages therefore differ from the encoder's and go on to a finer resolution; its last convolution overlaps, so that
    the samples of one patch do not end where the next begins. No layer looks at the whole picture (no attention, no
    normalisation), so tiles with `context` around them are as the picture transformed whole. The budget of the decoder,
    about 55,000 multiply-adds a pixel (see `multiply_adds`), is what lets two CPU cores decode a megapixel a second.

    Args:
        latent_channels: channels M of y.
        analysis_stages, synthesis_stages: resolutions in order of growing stride; both end with the latent's.
        kernel: edge of the depth-wise kernels.
        expansion: width factor inside a block.

    Raises:
        UsageError: the stages do not fold into each other, or do not end alike.
    """

    one_analysis = True
    encoder_parts = ("analysis_",)
    coarse_parts = ("analysis_", "synthesis_")

    def __init__(
        self,
        latent_channels: int = 64,
        analysis_stages: Sequence[Stage | Sequence[int]] = (Stage(8, 176, 3), Stage(16, 288, 3)),
        synthesis_stages: Sequence[Stage | Sequence[int]] = (
            Stage(4, 112, 3),
            Stage(8, 256, 3),
            Stage(16, 320, 4),
        ),
        kernel: int = 5,
        expansion: int = 3,
    ) -> None:
        super().__init__()
        coding, decoding = _checked(analysis_stages), _checked(synthesis_stages)
        if coding[-1].stride != decoding[-1].stride:
            raise UsageError(
                f"analysis ends at stride {coding[-1].stride}, synthesis at {decoding[-1].stride}: make them equal"
            )
        self.latent_channels = latent_channels
        self.stride = coding[-1].stride
        reach = max(
            sum(stage.stride * stage.depth * (kernel // 2) for stage in coding),
            # The last convolution reaches one patch further.
            sum(stage.stride * stage.depth * (kernel // 2) for stage in decoding) + decoding[0].stride,
        )
        self.context = -(-reach // self.stride) * self.stride

        def blocks(stages: Sequence[Stage]) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(*(DepthwiseBlock(s.channels, kernel, expansion) for _ in range(s.depth)))
                for s in stages
            )

        def folds(stages: Sequence[Stage]) -> list[int]:
            return [b // a for a, b in pairwise([1, *(stage.stride for stage in stages)])]

        self.analysis_folds, self.synthesis_folds = folds(coding), folds(decoding)
        widths = [3, *(stage.channels for stage in coding)]
        self.analysis_fold = nn.ModuleList(
            nn.Conv2d(fold**2 * a, b, 1)
            for fold, (a, b) in zip(self.analysis_folds, pairwise(widths), strict=True)
        )
        self.analysis_blocks = blocks(coding)
        self.analysis_latent = nn.Conv2d(widths[-1], latent_channels, 1)
        widths = [3, *(stage.channels for stage in decoding)]
        self.synthesis_latent = nn.Conv2d(latent_channels, widths[-1], 1)
        self.synthesis_blocks = blocks(decoding)
        self.synthesis_fold = nn.ModuleList(
            nn.Conv2d(b, fold**2 * a, 1 if i else 3, padding=0 if i else 1)
            for i, (fold, (a, b)) in enumerate(zip(self.synthesis_folds, pairwise(widths), strict=True))
        )

    def analysis(self, x: Tensor, quality: Tensor) -> Tensor:
        feature = (x - 0.5).to(self.analysis_latent.weight.dtype)
        for fold, into, blocks in zip(
            self.analysis_folds, self.analysis_fold, self.analysis_blocks, strict=True
        ):
            feature = blocks(into(pixel_unshuffle(feature, fold)))
        y: Tensor = self.analysis_latent(feature).float()
        return y

    def synthesis(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        feature = self.synthesis_latent(y_hat.to(self.synthesis_latent.weight.dtype))
        stages = list(zip(self.synthesis_folds, self.synthesis_fold, self.synthesis_blocks, strict=True))
        for fold, out, blocks in reversed(stages):
            feature = pixel_shuffle(out(blocks(feature)), fold)
        return feature.float() + 0.5

    def multiply_adds(self) -> tuple[float, float]:
        """Multiply-adds a pixel of analysis and of synthesis, convolutions alone."""
        result = []
        for direction, folds in (("analysis", self.analysis_folds), ("synthesis", self.synthesis_folds)):
            strides = [math.prod(folds[: i + 1]) for i in range(len(folds))]
            parts = [(getattr(self, f"{direction}_latent"), self.stride)]
            for name in ("fold", "blocks"):
                parts += zip(getattr(self, f"{direction}_{name}"), strides, strict=True)
            result.append(
                sum(
                    kernel.numel() / stride**2
                    for part, stride in parts
                    for kernel in part.parameters()
                    if kernel.ndim == 4
                )
            )
        return result[0], result[1]

    def reduce_precision(self, dtype: torch.dtype) -> None:
        """Converts everything: what is sent is an index, and a rounding of half a percent in what is made up is not
        seen. The result is rounded to 8 bits anyway."""
        self.to(dtype)
