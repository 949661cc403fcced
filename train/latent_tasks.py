"""Classification from latents and tokens, and from samples for comparison, by one and the same network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand.codec import Codec
from compand.data.packed import PackedReader
from compand.data.payload import RowCodec
from compand.data.stem import LatentExpansion, LatentPreview, LatentStem, latent_stem
from compand.errors import UsageError
from compand.eval.perception.networks.vision import DEVIATION, MEAN, ResidualBlock, convolution
from compand.train.audio_tasks import noisy, uniform, warped
from compand.train.tasks import DescentTraining
from compand.train.vision_tasks import ImagenetteData
from compand.transforms.wavelet import WaveletTransform

LIMIT = 1024
"""Integers are clamped to +- this; those of loud sounds reach it at high qualities."""

CROP = 11 / 14
"""Edge of training crops as a share of the pictures': crops enlarge what they show, see `ImagenetteData`."""

SMOOTHING = 0.1
"""Share of the targets that is spread over all classes."""

# -------------------------------------------------------------------------------------------------------- network


class GridClassifier(nn.Module):
    """A residual network on a grid of latents: at its own resolution, at a half and at a quarter of it.

    Args:
        stem: module that turns inputs into a grid [batch, inputs, h, w]; h is 1 for sound.
        inputs: channels of that grid.
        classes: number of classes.
        axes: 1 (time) or 2 (height and width).
        widths: channels of the stages; every stage after the first halves the grid.
        blocks: residual blocks of each stage.
        drop_path: probability of leaving out the last block's branch; it rises linearly from 0 at the first.
        dropout: probability with which a feature is left out in training.
    """

    def __init__(
        self,
        stem: nn.Module,
        inputs: int,
        classes: int,
        axes: int = 2,
        widths: Sequence[int] = (128, 192, 256),
        blocks: Sequence[int] = (2, 2, 2),
        drop_path: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kernel = 3 if axes == 2 else (1, 5)
        self.stem = stem
        layers: list[nn.Module] = [convolution(inputs, widths[0], kernel)]
        before = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                rate = drop_path * (len(layers) - 1) / max(sum(blocks) - 1, 1)
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(before, width, stride, rate, kernel))
                before = width
        self.trunk = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(before, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits [batch, classes]."""
        logits: Tensor = self.head(self.dropout(self.trunk(self.stem(x)).mean((2, 3))))
        return logits


class Fold(nn.Module):
    """Blocks of samples become channels: [batch, C, h, w] -> [batch, C * rows * columns, h / rows, w / columns]."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        blocks = x.reshape(b, c, h // self.rows, self.rows, w // self.columns, self.columns)
        return blocks.permute(0, 1, 3, 5, 2, 4).reshape(b, -1, h // self.rows, w // self.columns)


class ItemLevel(nn.Module):
    """Gives every item a root mean square of 1, so that loudness tells nothing."""

    def forward(self, x: Tensor) -> Tensor:
        level = x.float().square().mean((1, 2, 3), keepdim=True).sqrt()
        return x / level.clamp(min=1e-5)


def strided_stem(
    channels: int, widths: Sequence[int], strides: Sequence[int], axes: int = 2
) -> nn.Sequential:
    """Convolutions that reduce samples [batch, channels, h, w] by the product of the strides."""
    layers = []
    for width, stride in zip(widths, strides, strict=True):
        size = 2 * (stride // 2) + 1
        if axes == 2:
            layers.append(convolution(channels, width, size, stride))
        else:
            layers.append(convolution(channels, width, (1, 2 * size - 1), (1, stride)))
        channels = width
    return nn.Sequential(*layers)


# --------------------------------------------------------------------------------------------------------- codecs


class Quantiser:
    """Samples to the integers and the latents that a packed set would hold.

    Args:
        codec: the codec, on its device.
        quality: 1 to its levels.
    """

    def __init__(self, codec: Codec, quality: float) -> None:
        self.codec, self.level = codec, codec.quality_units(quality)
        self.quality = torch.tensor([self.level], device=codec.device)
        symbols = torch.arange(-LIMIT, LIMIT, device=codec.device, dtype=torch.int32)
        every = symbols.expand(1, codec.transform.latent_channels, 1, 2 * LIMIT).contiguous()
        self.values = codec.bottleneck.dequantise(every, self.level)[0, :, 0]

    def integers(self, samples: Tensor) -> Tensor:
        """Samples [batch, C, h, w], edges multiples of the stride -> integers [batch, M, h', w'], int16."""
        y = self.codec.transform.analysis(samples, self.quality)
        return self.codec.bottleneck.quantise(y, self.level).clamp(-LIMIT, LIMIT - 1).short()

    def latents(self, integers: Tensor) -> Tensor:
        """The values that integers [batch, M, h, w], clamped, stand for, float32."""
        channel = torch.arange(integers.shape[1], device=integers.device)[:, None, None]
        return self.values[channel, integers.long().clamp(-LIMIT, LIMIT - 1) + LIMIT]

    def preview(self, latents: Tensor) -> Tensor:
        """What the linear part of synthesis makes of latents: samples [batch, C, H, W], not clamped."""
        transform = self.codec.transform
        if not isinstance(transform, WaveletTransform):
            return transform.synthesis(latents, self.quality)
        return transform.linear_synthesis(latents)

    def decoded(self, latents: Tensor) -> Tensor:
        """Decoded samples, not clamped."""
        return self.codec.transform.synthesis(latents, self.quality)


# ------------------------------------------------------------------------------------------------------- training


class LatentClassification(DescentTraining):
    """Trains a `GridClassifier` on a packed set, as `compand.data.PackedDataModule` delivers it.

    Items are varied on the device: pictures as `ImagenetteData` says, sounds in speed, start and noise. Latents and
    tokens go to samples and back for it, by the linear part of synthesis and the analysis of the codec, which cost
    little beside the network; previews of latents (`expand="fixed"`) are varied as they are. Validation reads what is
    stored.

    Args:
        train_set: the packed training set; says what there is to learn from and what the classes are.
        field: "latents", "tokens" or "samples"; the data module delivers it.
        widths, blocks, drop_path, dropout: see `GridClassifier`.
        expand: bring latents of pictures back to samples, which layers for samples follow, for more arithmetic:
            "fixed" by `compand.data.LatentPreview` in front of the network, which does not learn; "learned" by the
            network's first layer (`compand.data.LatentExpansion`).
        vary: vary the items; latents and tokens of a set of profile cpd, or without an installed codec, cannot be.
        lr, momentum, weight_decay, warmup_steps, minutes: see `DescentTraining`.

    Raises:
        UsageError: the set has no classes, or no such field, or its latents cannot be expanded.
        PackedSetError: the set cannot be read.
    """

    def __init__(
        self,
        train_set: str,
        field: str = "latents",
        widths: Sequence[int] = (128, 192, 256),
        blocks: Sequence[int] = (2, 2, 2),
        drop_path: float = 0.1,
        dropout: float = 0.0,
        expand: Literal["fixed", "learned"] | None = None,
        vary: bool = True,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_steps: int = 200,
        minutes: float | None = None,
    ) -> None:
        super().__init__(lr, momentum, weight_decay, warmup_steps, minutes)
        reader = PackedReader(train_set)
        info = reader.info
        if info.classes is None:
            raise UsageError(f"{train_set} has no classes: pack a folder of class folders")
        self.field, self.vary, self.classes, self.expand = field, vary, len(info.classes), expand
        self.axes, self.level = int(info.latent["axes"]), info.level
        self._coder = RowCodec(info)
        self._quantiser: Quantiser | None = None
        if expand and field != "latents":
            raise UsageError(f"{field} are not expanded: choose field latents")
        self.preview = LatentPreview(self._coder.codec) if expand == "fixed" else nn.Identity()
        stem, channels = self._stem(reader)
        self.network = GridClassifier(
            stem, channels, self.classes, self.axes, widths, blocks, drop_path, dropout
        )

    def _stem(self, reader: PackedReader) -> tuple[nn.Module, int]:
        channels, stride = int(reader.info.latent["channels"]), int(reader.info.latent["stride"])
        if self.field != "samples" and not self.expand:
            normalise = latent_stem(reader, self.field)
            return (nn.Sequential(normalise, ItemLevel()) if self.axes == 1 else normalise), channels
        if self.axes == 1 and not self.expand:
            raise UsageError("decoded sounds have several lengths and rates: choose field latents or tokens")
        widths = [32, 64, 96, 128][: stride.bit_length() - 1]
        convolutions = strided_stem(3, widths, [2] * len(widths))
        mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
        full = 255 if self.field == "samples" else 1
        layers = [LatentStem(full * mean, full * deviation, 1), convolutions]
        if self.expand == "learned":
            layers.insert(0, LatentExpansion(self._coder.codec))
        return nn.Sequential(*layers), widths[-1]

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs: as `varied` makes them; targets: class probabilities [batch, classes]."""
        return F.cross_entropy(self.network(inputs).float(), targets)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:  # type: ignore[override]
        # In full precision: what is varied goes through the codec's matrices.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            inputs, targets = self.varied(self._grid(batch), batch["label"])
        return super().training_step((inputs, targets), batch_index)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        correct = self.network(self.preview(self._grid(batch))).argmax(1) == batch["label"]
        self.log("val/accuracy", correct.float().mean(), batch_size=len(correct), prog_bar=True)

    def varied(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A varied batch for the network: inputs [batch, C, h, w] of the field, or previews [batch, 3, H, W] of them;
        and targets [batch, classes] from labels [batch]."""
        targets = F.one_hot(labels, self.classes).float()
        smoothed = torch.lerp(targets, torch.full_like(targets, 1 / self.classes), SMOOTHING)
        if not self.vary:
            return self.preview(inputs), smoothed
        if self.expand == "fixed":
            previews = self.preview(inputs)
            return self._variation(previews.shape).distorted(previews * 255, labels)
        if self.field == "samples":
            pictures, targets = self._variation(inputs.shape).distorted(inputs, labels)
            return pictures * 255, targets
        quantiser = self._on_device()
        samples = quantiser.preview(inputs if self.field == "latents" else quantiser.latents(inputs))
        if self.axes == 2:
            samples, targets = self._variation(samples.shape).distorted(samples * 255, labels)
        else:
            samples, targets = self._varied_sounds(samples), smoothed
        integers = quantiser.integers(samples)
        return integers if self.field == "tokens" else quantiser.latents(integers), targets

    def _variation(self, shape: torch.Size) -> ImagenetteData:
        """Distorts pictures of this shape, [batch, C, h, w]. Raises UsageError if they are not square."""
        if shape[2] != shape[3]:
            raise UsageError(f"pictures of {shape[2]} x {shape[3]} pixels are not square: crop the latents")
        stride = self._coder.info.latent["stride"]
        variation = ImagenetteData("", edge=shape[2], crop=round(shape[2] * CROP / stride) * stride)
        variation.classes = self.classes
        return variation

    def _varied_sounds(self, samples: Tensor) -> Tensor:
        """Other speed, start, balance and noise at the same loudness: [batch, C, 1, n]."""
        waveforms = samples.flatten(0, 2)
        generator = torch.Generator(samples.device).manual_seed(int(torch.randint(1 << 62, ())))
        count, length = waveforms.shape
        speed, shift = (
            1.2 ** uniform(generator, count, -1, 1),
            uniform(generator, count, -0.12, 0.12) * length,
        )
        # All channels of a sound are varied alike.
        items = torch.arange(count, device=samples.device).div(samples.shape[1], rounding_mode="floor")
        first = items * samples.shape[1]
        waveforms = warped(waveforms, speed[first], shift[first])
        return noisy(waveforms, uniform(generator, count, 3, 45)[first], generator).view_as(samples)

    def _on_device(self) -> Quantiser:
        if self._quantiser is None:
            codec = self._coder.codec.to(self.device).requires_grad_(False)
            self._quantiser = Quantiser(codec, self.level)
        return self._quantiser

    def _grid(self, batch: dict[str, Any]) -> Tensor:
        """Inputs of a batch as [batch, C, h, w]; h is 1 for sounds."""
        inputs: Tensor = batch[self.field]
        return inputs if inputs.ndim == 4 else inputs[:, :, None]
