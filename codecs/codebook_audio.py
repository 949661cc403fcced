"""The codec `codebook-audio`: sound as a few codes a second, from any arrangement of codebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compand.audio_codec import AudioCodec
from compand.bottlenecks.codebook import CodebookBottleneck
from compand.hyperprior import geometric_levels
from compand.transforms.waveform import WaveformTransform

SPEECH: Mapping[str, Any] = {"kind": "rvq", "layers": 8, "size": 1024}
"""Eight books of ten bits, one after the other."""


class CodebookAudioCodec(AudioCodec):
    """Speech or music by vector quantisation; the trunk is one, the codebooks are an argument.

    ```
    x --g_a--> y --codebooks--> indices [books, n] --prior--> bytes
                 x_hat <--g_s-- y_hat <--look-ups-- indices
    ```

    The codecs of SoundStream, DAC, HiFi-Codec and Language-Codec differ, beside their networks, in how a vector of
    latents is shared between codebooks: residual (RVQ), grouped (GRVQ), masked (MCRVQ). Here the networks are the same
    (`WaveformTransform`) and the bottleneck is any (`compand.bottlenecks.codebooks.build`). Quality levels are depths:
    level d uses the first books, so that the tokens of a lower level begin those of a higher; qualities between two
    levels are the lower one.

    What comes back sounds alike and is not the same waveform: quality is heard, or measured with PESQ or STOI, rather
    than by PSNR.

    Args:
        channels: channels that are coded together: 1 for speech, 2 for stereo.
        rate: samples a second of the network; sounds at other rates are resampled.
        latent_channels: channels M of y.
        quantiser: `kind` and arguments of the codebooks; None: SPEECH.
        prior: `kind` and arguments of the index prior; None: the causal network.
        lambda_range: Lagrange multipliers of the lowest and the highest level, for what weighs rate against error.
        transform: further arguments of `WaveformTransform`.
        trainable: False leaves out what only training needs.
    """

    codec_id = 6

    def __init__(
        self,
        channels: int = 1,
        rate: int | None = 16000,
        latent_channels: int = 128,
        quantiser: dict[str, Any] | None = None,
        prior: dict[str, Any] | None = None,
        lambda_range: Sequence[float] = (0.01, 1.0),
        transform: dict[str, Any] | None = None,
        trainable: bool = True,
    ) -> None:
        described = dict(SPEECH if quantiser is None else quantiser)
        coded = {"kind": "context"} if prior is None else dict(prior)
        bottleneck = CodebookBottleneck(latent_channels, described, coded, trainable, dimensions=1)
        levels = bottleneck.quantiser.depths
        super().__init__(
            WaveformTransform(channels, latent_channels, levels, **(transform or {})),
            bottleneck,
            geometric_levels(lambda_range[0], lambda_range[1], levels) if levels > 1 else lambda_range[-1:],
            channels=channels,
            rate=rate,
        )
        self.architecture = {
            "channels": channels,
            "rate": rate,
            "latent_channels": latent_channels,
            "quantiser": described,
            "prior": coded,
            "lambda_range": list(lambda_range),
            "transform": dict(transform or {}),
        }

    def _shortest_payload(self, columns: int) -> int:
        # Whatever its indices cost, a payload begins with a byte that names their prior.
        return max(super()._shortest_payload(columns), 1)
