"""The codec `compressai`: what CompressAI's checkpoints without a context model become."""

from __future__ import annotations

from collections.abc import Sequence

from compand.bottlenecks.factorized import FactorizedBottleneck
from compand.bottlenecks.linear_scales import LinearScaleBottleneck
from compand.codec import Bottleneck
from compand.errors import UsageError
from compand.hyperprior import geometric_levels
from compand.image_codec import ImageCodec
from compand.transforms.divisive import DivisiveTransform

PRIORS = ("factorized", "scale", "mean-scale")


class CompressaiCodec(ImageCodec):
    """Divisive normalisation with a factorised prior, a scale hyperprior (both Balle et al. 2018) or a mean-scale
    hyperprior (Minnen et al. 2018): bmshj2018-factorized, bmshj2018-hyperprior and mbt2018-mean of CompressAI.

    ```
    x --g_a--> y --FactorizedBottleneck | LinearScaleBottleneck--> y_hat --g_s--> x_hat
    ```

    Imported checkpoints (`compand import-compressai`) have one quality level; trained here, the codec has gain units
    and as many levels as multipliers.

    Args:
        prior: "factorized", "scale" or "mean-scale".
        width: channels N of the transform, and of z.
        latent_channels: channels M of y, at 1/16 resolution.
        activation: "gdn" or "relu".
        lambdas: Lagrange multiplier of each level; None: eight from 0.0018 to 0.18.
        trainable: False leaves out what only training needs (and compressai with it).

    Raises:
        UsageError: an unknown prior or activation, or no multipliers.
    """

    codec_id = 7
    half_kernels = False  # the symbols are to be those of the original

    def __init__(
        self,
        prior: str = "mean-scale",
        width: int = 128,
        latent_channels: int = 192,
        activation: str = "gdn",
        lambdas: Sequence[float] | None = None,
        trainable: bool = True,
    ) -> None:
        if prior not in PRIORS:
            raise UsageError(f"prior {prior!r} does not exist: choose one of {', '.join(PRIORS)}")
        levels = geometric_levels(0.0018, 0.18, 8) if lambdas is None else list(lambdas)
        if not levels or min(levels) <= 0:
            raise UsageError(f"lambdas are {levels}: give one above 0 for each quality level")
        bottleneck: Bottleneck = (
            FactorizedBottleneck(latent_channels, levels, trainable)
            if prior == "factorized"
            else LinearScaleBottleneck(latent_channels, levels, width, trainable, means=prior == "mean-scale")
        )
        super().__init__(DivisiveTransform(latent_channels, width, activation), bottleneck, levels)
        self.architecture = {
            "prior": prior,
            "width": width,
            "latent_channels": latent_channels,
            "activation": activation,
            "lambdas": levels,
        }
