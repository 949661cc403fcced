"""The codec `context`: the transform of `hyperprior`, deeper, and a prior that looks at what is decoded already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compand.bottlenecks.context import ContextBottleneck
from compand.hyperprior import geometric_levels, shared_architecture
from compand.image_codec import ImageCodec
from compand.transforms.patch import PatchTransform

STAGES = ((8, 224, 9), (16, 256, 5))
"""Widths of `HyperpriorCodec`, so that training can start from its checkpoints."""


class ContextCodec(ImageCodec):
    """Slices of channels in two halves of a checkerboard, each predicted from the hyperprior and from all before it.

    ```
    x --g_a--> y --ContextBottleneck--> y_hat --g_s--> x_hat
    ```

    Args:
        latent_channels: channels M of y, at 1/16 resolution.
        stages: (stride, channels, depth) of each resolution of the transform.
        hyper_channels: channels N of z, at 1/64 resolution.
        hyper_widths: channels of the hyper-synthesis, three.
        lambda_range: Lagrange multipliers of the lowest and the highest level.
        levels: number of quality levels.
        trainable: False leaves out what only training needs (and compressai with it).
        transform: further arguments of `PatchTransform`.
        context: further arguments of `ContextBottleneck`: slices, contexts and sizes.
    """

    codec_id = 8
    prior_sources = ("hyperprior",)

    def __init__(
        self,
        latent_channels: int = 256,
        stages: Sequence[Sequence[int]] = STAGES,
        hyper_channels: int = 128,
        hyper_widths: Sequence[int] = (128, 96, 192),
        lambda_range: Sequence[float] = (0.0016, 0.15),
        levels: int = 8,
        trainable: bool = True,
        transform: dict[str, Any] | None = None,
        context: dict[str, Any] | None = None,
    ) -> None:
        lambdas = geometric_levels(lambda_range[0], lambda_range[1], levels)
        bottleneck = ContextBottleneck(
            latent_channels, lambdas, hyper_channels, hyper_widths, trainable, **(context or {})
        )
        super().__init__(
            PatchTransform(latent_channels, stages, levels, **(transform or {})), bottleneck, lambdas
        )
        self.architecture = shared_architecture(latent_channels, stages, lambda_range, levels, transform) | {
            "hyper_channels": hyper_channels,
            "hyper_widths": list(hyper_widths),
            "context": bottleneck.arrangement,
        }
