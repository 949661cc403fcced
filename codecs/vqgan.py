"""The codec `vqgan`: pictures as one index of a codebook for each patch, for the lowest rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compand.bottlenecks.codebook import CodebookBottleneck
from compand.hyperprior import geometric_levels
from compand.image_codec import ImageCodec
from compand.transforms.token_image import TokenImageTransform

NESTED: Mapping[str, Any] = {"kind": "nested", "sizes": [8, 16, 32, 64, 128, 256, 512, 1024]}
"""Three to ten bits a position."""


class VqganCodec(ImageCodec):
    """VQGAN (Esser et al. 2021) at the rates of nested codebooks (Mao et al. 2024, "Extreme Image Compression using
    Fine-tuned VQGANs"), in one checkpoint.

    ```
    x --g_a--> y --nearest code--> indices [h / 16, w / 16] --> y_hat --g_s--> x_hat
    ```

    Levels are codebooks: level d sends at most log2(sizes[d - 1]) bits a position, of 256 pixels at stride 16. A
    quality in between is the level below it.

    Args:
        latent_channels: channels M of y.
        quantiser: `kind` and arguments of the codebooks; None: NESTED.
        prior: `kind` and arguments of the index prior; None: the causal network.
        lambda_range: Lagrange multipliers of the lowest and the highest level, for what weighs rate against error.
        transform: further arguments of `TokenImageTransform`.
        trainable: False leaves out what only training needs.
    """

    codec_id = 5

    def __init__(
        self,
        latent_channels: int = 64,
        quantiser: dict[str, Any] | None = None,
        prior: dict[str, Any] | None = None,
        lambda_range: Sequence[float] = (0.0001, 0.01),
        transform: dict[str, Any] | None = None,
        trainable: bool = True,
    ) -> None:
        described = dict(NESTED if quantiser is None else quantiser)
        coded = {"kind": "context"} if prior is None else dict(prior)
        bottleneck = CodebookBottleneck(latent_channels, described, coded, trainable)
        levels = bottleneck.quantiser.depths
        super().__init__(
            TokenImageTransform(latent_channels, **(transform or {})),
            bottleneck,
            geometric_levels(lambda_range[0], lambda_range[1], levels) if levels > 1 else lambda_range[-1:],
        )
        self.architecture = {
            "latent_channels": latent_channels,
            "quantiser": described,
            "prior": coded,
            "lambda_range": list(lambda_range),
            "transform": dict(transform or {}),
        }
