"""The codecs `hyperprior` and `factorized`: one transform, two bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compand.bottlenecks.factorized import FactorizedBottleneck
from compand.bottlenecks.hyperprior import HyperpriorBottleneck
from compand.errors import UsageError
from compand.image_codec import ImageCodec
from compand.transforms.patch import PatchTransform

STAGES = ((8, 224, 5), (16, 256, 2))


def geometric_levels(low: float, high: float, levels: int) -> list[float]:
    """`levels` values from `low` to `high` in equal ratios. Raises UsageError for fewer than two."""
    if levels < 2:
        raise UsageError(f"{levels} quality levels are too few: give at least 2")
    return [low * (high / low) ** (i / (levels - 1)) for i in range(levels)]


def shared_architecture(
    latent_channels: int,
    stages: Sequence[Sequence[int]],
    lambda_range: Sequence[float],
    levels: int,
    transform: dict[str, Any] | None,
) -> dict[str, Any]:
    """The constructor arguments that both codecs have, as config.json keeps them."""
    return {
        "latent_channels": latent_channels,
        "stages": [list(stage) for stage in stages],
        "lambda_range": list(lambda_range),
        "levels": levels,
        "transform": dict(transform or {}),
    }


class HyperpriorCodec(ImageCodec):
    """Mean-scale hyperprior (Minnen et al. 2018) at all rates in one checkpoint.

    ```
    x --g_a--> y --HyperpriorBottleneck--> y_hat --g_s--> x_hat
    ```

    Args:
        latent_channels: channels M of y, at 1/16 resolution.
        stages: (stride, channels, depth) of each resolution of the transform.
        hyper_channels: channels N of z, at 1/64 resolution.
        hyper_widths: channels of the hyper-synthesis.
        lambda_range: Lagrange multipliers of the lowest and the highest level.
        levels: number of quality levels.
        trainable: False leaves out what only training needs (and compressai with it).
        transform: further arguments of `PatchTransform`.
    """

    codec_id = 1

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
    ) -> None:
        lambdas = geometric_levels(lambda_range[0], lambda_range[1], levels)
        super().__init__(
            PatchTransform(latent_channels, stages, levels, **(transform or {})),
            HyperpriorBottleneck(latent_channels, lambdas, hyper_channels, hyper_widths, trainable),
            lambdas,
        )
        self.architecture = shared_architecture(latent_channels, stages, lambda_range, levels, transform) | {
            "hyper_channels": hyper_channels,
            "hyper_widths": list(hyper_widths),
        }


class FactorizedCodec(ImageCodec):
    """Fully factorised prior (Balle et al. 2018) on the transform of `HyperpriorCodec`: no side information.

    ```
    x --g_a--> y --FactorizedBottleneck--> y_hat --g_s--> x_hat
    ```

    Arguments as for `HyperpriorCodec`.
    """

    codec_id = 2

    def __init__(
        self,
        latent_channels: int = 256,
        stages: Sequence[Sequence[int]] = STAGES,
        lambda_range: Sequence[float] = (0.0016, 0.15),
        levels: int = 8,
        trainable: bool = True,
        transform: dict[str, Any] | None = None,
    ) -> None:
        lambdas = geometric_levels(lambda_range[0], lambda_range[1], levels)
        super().__init__(
            PatchTransform(latent_channels, stages, levels, **(transform or {})),
            FactorizedBottleneck(latent_channels, lambdas, trainable),
            lambdas,
        )
        self.architecture = shared_architecture(latent_channels, stages, lambda_range, levels, transform)
