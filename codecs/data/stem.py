"""What a model needs before its first layer to read latents or tokens: channels, stride and statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand.errors import UsageError

if TYPE_CHECKING:
    from compand.codec import Codec
    from compand.data.packed import PackedReader

FLOOR = 0.03
"""Least deviation by which a channel is divided, as a share of the largest one."""


class LatentStem(nn.Module):
    """Normalises latents channel by channel, and widens them if wanted.

    A model that reads pictures reads latents once its first layers, up to the stride of the codec, are replaced by this
    one.

    Args:
        mean, deviation: statistics of every channel, float [M].
        stride: samples of one axis per latent position.
        axes: 1 (time) or 2 (height and width).
        width: channels that a 3-wide convolution makes of them; None: they stay as they are.

    Attributes:
        channels: channels of what comes out.
        stride, axes: as given.
    """

    def __init__(
        self, mean: Tensor, deviation: Tensor, stride: int, axes: int = 2, width: int | None = None
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", mean.detach().float().clone())
        deviation = deviation.detach().float()
        # A channel in which next to nothing was seen must not drown the others when something comes.
        floor = (FLOOR * deviation.max()).clamp(min=1e-6)
        self.register_buffer("scale", 1 / deviation.clamp(min=floor))
        self.stride, self.axes, self.channels = stride, axes, width or len(mean)
        layer = nn.Conv1d if axes == 1 else nn.Conv2d
        self.widen = layer(len(mean), width, 3, padding=1) if width else nn.Identity()

    def forward(self, latents: Tensor) -> Tensor:
        """Latents or tokens [batch, M, n] or [batch, M, h, w] -> [batch, channels, ...], float32 if not widened."""
        shape = (-1, *[1] * (latents.ndim - 2))
        normalised = (latents.float() - self.mean.view(shape)) * self.scale.view(shape)
        result: Tensor = self.widen(normalised)
        return result


class LatentExpansion(nn.Module):
    """Turns latents back into samples by one convolution, so that a model for samples reads latents as it is.

    The convolution begins as the linear part of the codec's synthesis and learns with the model: it is the input layer
    of a network that keeps its layers for samples, at a small share of the arithmetic of a decoder.

    ```
    latents [M, h, w] --convolution--> [C stride^2, h, w] --pixel shuffle--> [C, h stride, w stride]
    ```

    Args:
        codec: a codec for pictures whose synthesis has a linear part (the wavelet codecs).
        kernel: edge of the convolution in latent positions, odd; 5 reaches all but 10^-4 of the energy of a synthesis
            by bior4.4 at three levels.
        padding: what lies beyond the borders: "zeros", or "replicate", which is nearer to the synthesis there.

    Attributes:
        channels: channels C of the samples.
        stride: 1: what comes out has the resolution of samples.

    Raises:
        UsageError: the codec's synthesis has no linear part, or it codes sounds.
    """

    def __init__(
        self, codec: Codec, kernel: int = 5, padding: Literal["zeros", "replicate"] = "zeros"
    ) -> None:
        super().__init__()
        from compand.transforms.wavelet import WaveletTransform

        transform = codec.transform
        if not isinstance(transform, WaveletTransform) or transform.dimensions != 2:
            raise UsageError(f"{codec.name} has no linear synthesis of pictures: use latent_stem")
        reach, edge = kernel // 2, transform.stride
        inputs = transform.latent_channels
        # Every channel's answer to a 1 in the middle of a grid that is large enough for it to die away.
        middle = reach + 8
        grid = torch.zeros(inputs + 1, inputs, 2 * middle + 1, 2 * middle + 1, device=codec.device)
        grid[range(inputs), range(inputs), middle, middle] = 1
        with torch.no_grad():
            samples = transform.linear_synthesis(grid)
        offset = samples[-1, :, middle * edge : (middle + 1) * edge, middle * edge : (middle + 1) * edge]
        first, last = (middle - reach) * edge, (middle + reach + 1) * edge
        answers = (samples[:-1] - samples[-1:])[:, :, first:last, first:last]
        self.channels, self.stride, self.edge = samples.shape[1], 1, edge
        parts = answers.reshape(inputs, self.channels, kernel, edge, kernel, edge)
        # A convolution looks from where it writes; the answers tell what a position writes to.
        weight = parts.permute(1, 3, 5, 0, 2, 4).flatten(0, 2).flip(2, 3)
        self.convolution = nn.Conv2d(inputs, len(weight), kernel, padding=reach, padding_mode=padding)
        with torch.no_grad():
            self.convolution.weight.copy_(weight)
            assert self.convolution.bias is not None
            self.convolution.bias.copy_(offset.flatten())

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [batch, M, h, w] -> samples [batch, C, h * stride, w * stride], in [0, 1] at first, not clamped."""
        return F.pixel_shuffle(self.convolution(latents), self.edge)


class LatentPreview(LatentExpansion):
    """Turns latents into pictures by a fixed convolution: those of `LatentExpansion`, clamped, which learn nothing.

    What comes out can be varied as pictures are (crops, rotation, mirroring, color, mixing) and given to a model for
    samples. No network of the codec runs. For `wavelet-rgb-16x` it takes 45 million multiplications a picture of 224 x
    224 pixels, of which the codec's decoder takes 2,148 million.

    Args:
        codec: a codec for pictures whose synthesis has a linear part (the wavelet codecs).
        kernel: see `LatentExpansion`.

    Attributes:
        channels, stride: see `LatentExpansion`.

    Raises:
        UsageError: the codec's synthesis has no linear part, or it codes sounds.
    """

    def __init__(self, codec: Codec, kernel: int = 5) -> None:
        super().__init__(codec, kernel, "replicate")
        self.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [batch, M, h, w] -> pictures [batch, C, h * stride, w * stride], float32 in [0, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            return super().forward(latents.float()).clamp(0, 1)


def latent_stem(
    source: Codec | PackedReader | str | Path,
    field: str = "latents",
    *,
    quality: float = 4.0,
    width: int | None = None,
    rows: int = 512,
) -> LatentStem:
    """The input layer of a model that learns from latents.

    Args:
        source: a packed set (folder or `PackedReader`), of which the statistics are measured; or a codec, or the name
            of one, for which they are those of noise with the spectrum of photographs or sounds, near enough to begin
            training with.
        field: "latents" or "tokens".
        quality: of the tokens of a codec; a set has its own.
        width: see `LatentStem`.
        rows: how many rows of a set are measured, evenly from all.

    Raises:
        UsageError: there is no such field, the set is empty or has no tokens, or the codec has no integers.
        PackedSetError: a row of the set is damaged.
        CheckpointError: there is no such codec.
    """
    if field not in ("latents", "tokens"):
        raise UsageError(f"field {field} does not exist: choose latents or tokens")
    # Imported here, so that a model with a stem can be used without what reads sets.
    from compand.codec import Codec
    from compand.data.packed import PackedReader

    if isinstance(source, Codec):
        _check_amounts(source.vocabulary, field)
        parts: Iterable[Tensor] = _of_noise(source, field, quality)
        layout = source.latent_layout()
    elif isinstance(source, PackedReader) or Path(source).exists():
        reader = source if isinstance(source, PackedReader) else PackedReader(source)
        _check_amounts(reader.info.vocabulary, field)
        parts, layout = _of_rows(reader, field, rows), dict(reader.info.latent)
    else:
        from compand.checkpoint import load

        codec = load(str(source), device="cpu")
        _check_amounts(codec.vocabulary, field)
        parts, layout = _of_noise(codec, field, quality), codec.latent_layout()
    mean, deviation = _statistics(parts, layout["channels"])
    return LatentStem(mean, deviation, layout["stride"], layout["axes"], width)


def _check_amounts(vocabulary: Sequence[Any], field: str) -> None:
    """Raises UsageError for tokens of codebooks, of which a mean says nothing."""
    if field == "tokens" and vocabulary:
        raise UsageError(
            "tokens of codebooks are names, not amounts: give them to an nn.Embedding, or read latents"
        )


def _statistics(parts: Iterable[Tensor], channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every channel of parts [M, values], one of which is held at a time."""
    count, total, squares = 0, *torch.zeros(2, channels, dtype=torch.float64)
    for part in parts:
        values = part.double()
        count += values.shape[1]
        total += values.sum(1)
        squares += values.square().sum(1)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0).sqrt()


def _of_rows(reader: PackedReader, field: str, rows: int) -> Iterator[Tensor]:
    """Values of some rows of a set, [M, values] each."""
    from compand.data.payload import RowCodec

    if not len(reader):
        raise UsageError("the set has no rows: there is nothing to measure")
    coder, channels = RowCodec(reader.info), int(reader.info.latent["channels"])
    count = min(rows, len(reader))
    for i in range(count):
        index = i * len(reader) // count
        shape = reader.info.latent_shape(reader.row(index, reader.info.geometry))
        read: Any = coder.latents if field == "latents" else coder.decode
        values = torch.from_numpy(read(reader.payload(index), shape).astype("float32"))
        grouped = values.reshape(-1, *shape[-1 - int(reader.info.latent["axes"]) :])
        yield grouped.transpose(0, 1).reshape(channels, -1)


@torch.no_grad()
def _of_noise(codec: Codec, field: str, quality: float) -> list[Tensor]:
    """Values of what the codec makes of coloured noise, [M, values], as one part."""
    from compand.audio_codec import AudioCodec

    level = codec.quality_units(quality)
    generator = torch.Generator().manual_seed(0)
    channels = int(getattr(codec, "channels", 3))
    if isinstance(codec, AudioCodec):
        sound = _noise((1, channels, 1, 1 << 17), generator) * 0.1
        y = codec.analyse(sound[0, :, 0].numpy(), level)
    else:
        # Channels of photographs differ little from each other.
        shape = (16, channels, 32 * codec.transform.stride, 32 * codec.transform.stride)
        common = _noise((shape[0], 1, *shape[2:]), generator)
        picture = 0.5 + 0.22 * common + 0.1 * _noise(shape, generator)
        y = codec.transform.analysis(
            picture.clamp(0, 1).to(codec.device), torch.tensor([level], device=codec.device)
        )
    values = codec.bottleneck.quantise(y, level) if field == "tokens" else y
    return [values.transpose(0, 1).flatten(1).cpu()]


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise [batch, channels, h, w] of deviation 1 : amplitudes fall with frequency^1.3 (pictures) or its root."""
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator))
    down, across = torch.fft.fftfreq(shape[2])[:, None], torch.fft.rfftfreq(shape[3])[None]
    frequency = (down.square() + across.square()).sqrt()
    frequency[0, 0] = torch.inf
    noise = torch.fft.irfft2(spectrum * frequency ** (-1.3 if shape[2] > 1 else -0.5), s=shape[2:])
    return noise / noise.std((2, 3), keepdim=True)
