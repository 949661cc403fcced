"""The codecs `wavelet-image` and `wavelet-audio`: wavelet packets, a companding bottleneck, a light prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compand.audio_codec import AudioCodec
from compand.bottlenecks.companding import CompandingBottleneck, GaussianCompander, LaplaceCompander
from compand.bottlenecks.factorized import FactorizedBottleneck
from compand.bottlenecks.hyperprior import HyperpriorBottleneck
from compand.codec import Bottleneck
from compand.errors import UsageError
from compand.hyperprior import geometric_levels
from compand.image_codec import ImageCodec
from compand.transforms.wavelet import WaveletTransform

COMPANDERS = {"gaussian": GaussianCompander, "laplace": LaplaceCompander}

INITIAL_SCALE = 4.0
"""Where the curves bend before training, in units of the latents: beyond nearly all of them."""


def companded_bottleneck(
    latent_channels: int,
    lambdas: Sequence[float],
    channels: int,
    dimensions: int,
    prior: Mapping[str, Any] | None,
    compander: str | None,
    quantization: str,
    trainable: bool,
) -> Bottleneck:
    """The bottleneck of the wavelet codecs.

    Args:
        prior: arguments of a `HyperpriorBottleneck`, or None for one factorised table a channel.
        compander: a name in COMPANDERS, or None: uniform steps at every amplitude.

    Raises:
        UsageError: there is no such compander.
    """
    shared: dict[str, Any] = {"media_channels": channels, "quantization": quantization}
    inner: Bottleneck
    if prior is None:
        inner = FactorizedBottleneck(latent_channels, lambdas, trainable, **shared)
    else:
        inner = HyperpriorBottleneck(
            latent_channels, lambdas, trainable=trainable, dimensions=dimensions, **shared, **prior
        )
    if compander is None:
        return inner
    if compander not in COMPANDERS:
        raise UsageError(f"compander {compander} does not exist: choose {' or '.join(COMPANDERS)}, or none")
    return CompandingBottleneck(inner, COMPANDERS[compander](latent_channels, INITIAL_SCALE))


class WaveletImageCodec(ImageCodec):
    """Images of any number of channels, by an encoder that is nearly one matrix (after WaLLoC).

    ```
    x --packets--> w --g_a--> y --compress--> u --round--> symbols
                         x_hat <--packets^-1-- w_hat <--g_s-- y_hat <--expand-- u_hat
    ```

    Jacobellis & Yadwadkar 2025 ("Learned Compression for Compressed Learning"), to which this adds a rate term, a
    learned entropy model (the hyperprior of Minnen et al. 2018, in integers), one checkpoint for all rates, and a
    small synthesis.

    Args:
        channels: channels of the samples: 3 is RGB, 1 gray; others are coded from arrays [H, W, channels].
        latent_channels: channels M of y, at 1 / 2**packet_levels resolution.
        packet_levels, wavelet: the packets, see `WaveletTransform`.
        compander: "gaussian", "laplace" or None.
        prior: arguments of the hyperprior; None: factorised tables.
        quantization: what training sees of it, see `HyperpriorBottleneck`.
        lambda_range: Lagrange multipliers of the lowest and the highest level.
        levels: number of quality levels.
        trainable: False leaves out what only training needs (and compressai with it).
        transform: further arguments of `WaveletTransform`.
    """

    codec_id = 3

    def __init__(
        self,
        channels: int = 3,
        latent_channels: int = 12,
        packet_levels: int = 3,
        wavelet: str | None = "bior4.4",
        compander: str | None = "laplace",
        prior: dict[str, Any] | None = None,
        quantization: str = "mixed",
        lambda_range: Sequence[float] = (0.001, 0.1),
        levels: int = 8,
        trainable: bool = True,
        transform: dict[str, Any] | None = None,
    ) -> None:
        lambdas = geometric_levels(lambda_range[0], lambda_range[1], levels)
        super().__init__(
            WaveletTransform(
                channels,
                latent_channels,
                packet_levels=packet_levels,
                wavelet=wavelet,
                levels=levels,
                **(transform or {}),
            ),
            companded_bottleneck(
                latent_channels, lambdas, channels, 2, prior, compander, quantization, trainable
            ),
            lambdas,
            channels=channels,
        )
        self.architecture = {
            "channels": channels,
            "latent_channels": latent_channels,
            "packet_levels": packet_levels,
            "wavelet": wavelet,
            "compander": compander,
            "prior": dict(prior) if prior is not None else None,
            "quantization": quantization,
            "lambda_range": list(lambda_range),
            "levels": levels,
            "transform": dict(transform or {}),
        }


class WaveletAudioCodec(AudioCodec):
    """Sound, and signals of any number of channels, by the means of `WaveletImageCodec` along one axis.

    Args:
        channels: channels that are coded together: 2 is stereo.
        rate: samples a second of the network; sounds at other rates are resampled. None: signals are taken as they are.
        latent_channels: channels M of y, at 1 / 2**packet_levels of the sample rate.
        packet_levels, wavelet: the packets; a long wavelet (sym20, with `transform` {"mode": "periodization"})
            separates frequencies better and looks further around.
        compander, prior, quantization, lambda_range, levels, trainable, transform: as for `WaveletImageCodec`.
    """

    codec_id = 4

    def __init__(
        self,
        channels: int = 2,
        rate: int | None = 44100,
        latent_channels: int = 108,
        packet_levels: int = 8,
        wavelet: str | None = "bior4.4",
        compander: str | None = "laplace",
        prior: dict[str, Any] | None = None,
        quantization: str = "mixed",
        lambda_range: Sequence[float] = (0.005, 60.0),
        levels: int = 8,
        trainable: bool = True,
        transform: dict[str, Any] | None = None,
    ) -> None:
        lambdas = geometric_levels(lambda_range[0], lambda_range[1], levels)
        options = {"offset": 0.0, "odd": True, "synthesis_kernel": 9, "analysis_kernel": 9}
        super().__init__(
            WaveletTransform(
                channels,
                latent_channels,
                1,
                packet_levels=packet_levels,
                wavelet=wavelet,
                levels=levels,
                **(options | (transform or {})),
            ),
            companded_bottleneck(
                latent_channels, lambdas, channels, 1, prior, compander, quantization, trainable
            ),
            lambdas,
            channels=channels,
            rate=rate,
        )
        self.architecture = {
            "channels": channels,
            "rate": rate,
            "latent_channels": latent_channels,
            "packet_levels": packet_levels,
            "wavelet": wavelet,
            "compander": compander,
            "prior": dict(prior) if prior is not None else None,
            "quantization": quantization,
            "lambda_range": list(lambda_range),
            "levels": levels,
            "transform": dict(transform or {}),
        }
