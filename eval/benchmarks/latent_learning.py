"""Trains one network on latents, tokens and samples, and compares what it learns from each of them.

Pictures (Imagenette) and spoken words (keywords) are coded as `compand pack` codes them, then the same residual network
learns from

- latents: dequantised latents of the packed set;
- tokens: their integers;
- reduced: samples reduced to as many values as there are latents (pictures: antialiased bicubic; sounds: resampled);
- logmel (sounds): a log-mel spectrogram of as many values;
- full: the samples as they are, reduced to the grid of the latents by convolutions with stride;
- decoded (pictures): the decoded samples of the packed set, as `full`;
- latents-expanded, reduced-expanded (pictures): the same values, but brought back to the full grid by the network's
  first layer, a convolution that begins as the codec's linear synthesis (`LatentExpansion`) or a bicubic enlargement;
  behind it the layers of `full`;
- latents-previewed (pictures): latents, brought back to the full grid by a fixed convolution in front of the network
  (`LatentPreview`: the codec's linear synthesis); what comes out is varied and read as `decoded` is;
- latents-grid, reduced-grid (pictures): as above, varied by shifts, mirroring and mixing alone, see below.

All inputs have the network behind the first layer, steps, batch, rate schedule and targets in common. They are varied
alike in training: crops of random area and aspect, rotated and sheared, mirroring, color, erasing, mixup and CutMix
(pictures); speed, shift, filter, noise, mixup and masks in time (sounds). For latents and tokens this is done on what
the codec's linear synthesis makes of the stored latents, before the codec's analysis and quantiser; originals are not
seen. For `latents-previewed` the analysis and the quantiser are left out: what the synthesis makes, the network reads.
`latents-grid` stays on the grid: crops of whole positions,
mirrored by a second view made in the same way, erasing with zeros, mixup and CutMix; `reduced-grid` does the same to
pixels. Test items are read as they are stored; those of `latents-previewed` are latents too, 9,408 values of a picture
of 224 x 224, and pass the same fixed convolution. For `wavelet-rgb-16x` it takes 45 million multiplications a picture,
the network behind it 1,015 million, and the codec's decoder, which does not run, would take 2,148 million.

Every difference is tested on the same test items: outcomes are means over seeds, resampled by items (paired bootstrap).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand import checkpoint
from compand.codec import Codec
from compand.data.stem import LatentExpansion, LatentPreview, LatentStem
from compand.errors import MediaError, UsageError
from compand.eval.benchmarks import program
from compand.eval.benchmarks.sharing import QueuedSteps, devices, on_devices, prepared
from compand.eval.perception.tasks import imagenette
from compand.eval.perception.tasks.keywords import Keywords
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.image_codec import ImageCodec
from compand.train import augmentation
from compand.train.images import read_rgb
from compand.train.latent_tasks import (
    CROP,
    Fold,
    GridClassifier,
    ItemLevel,
    Quantiser,
    strided_stem,
)
from compand.train.vision_tasks import ImagenetteData, squared

PICTURE_INPUTS = ("full", "decoded", "latents", "tokens", "reduced")
EXPANDED_INPUTS = ("latents-expanded", "latents-previewed", "reduced-expanded")
GRID_INPUTS = ("latents-grid", "reduced-grid")
SOUND_INPUTS = ("full", "latents", "tokens", "logmel", "reduced")
RATE, SECONDS = 16000, 3.2
CHUNK = 16
"""Steps whose batches are varied at once."""


@dataclass(frozen=True)
class Settings:
    """What all runs of a task have in common. `share`: of the steps that warm the rate up."""

    codec: str
    quality: float
    steps: int
    batch: int
    lr: float
    weight_decay: float
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    drop_path: float
    dropout: float = 0.0
    momentum: float = 0.9
    share: float = 0.05


# ------------------------------------------------------------------------------------------------------- inputs


StemMaker = Callable[[], tuple[nn.Module, int]]


def in_parts(function: Callable[[Tensor], Tensor], items: Tensor, size: int = 64) -> Tensor:
    """`function` of a few items at a time."""
    return torch.cat([function(part) for part in items.split(size)])


def statistics(items: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every channel of [n, M, h, w]."""
    sums = [(part.float().sum((0, 2, 3)), part.float().square().sum((0, 2, 3))) for part in items.split(64)]
    count = items.numel() / items.shape[1]
    mean = torch.stack([first for first, _ in sums]).sum(0) / count
    square = torch.stack([second for _, second in sums]).sum(0) / count
    return mean, (square - mean.square()).clamp(min=0).sqrt()


class Inputs(ABC):
    """One kind of input: training batches, test items, and what a network needs to read them.

    Attributes:
        classes: number of classes.
        axes: 1 (sound) or 2 (pictures).
        tests: test items by the name of what they are, as a network takes them but of any type; the first is the main.
        labels: classes of the test items, [n].
        stem: makes a stem, and says how many channels come out of it.
    """

    classes: int
    axes: int

    def __init__(self, tests: dict[str, Tensor], labels: Tensor, stem: StemMaker) -> None:
        self.tests, self.labels, self.stem = tests, labels, stem

    @property
    def values(self) -> int:
        """Numbers that an item has."""
        return next(iter(self.tests.values()))[0].numel()

    def read(self, items: Tensor) -> Tensor:
        """What a network takes of test items, float32."""
        return items.float()

    @abstractmethod
    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless varied items [size, ...] with soft targets [size, classes]."""


def shuffled(items: int, size: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Endless item numbers [size]; every item comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(items, generator=generator)])
        yield waiting[:size].to(device)
        waiting = waiting[size:]


class PictureInputs(Inputs):
    """Pictures, or what a codec makes of them.

    Args:
        pictures: what training varies, [n, 3, edge, edge], 0 .. 255.
        targets: their classes, [n].
        tests, labels, stem: see `Inputs`.
        convert: turns varied pictures in [0, 1] into what a network takes.
        expand: turns test items into what a network takes, if they are not that already.
    """

    axes = 2
    classes = len(imagenette.SYNSETS)

    def __init__(
        self,
        pictures: Tensor,
        targets: Tensor,
        tests: dict[str, Tensor],
        labels: Tensor,
        stem: StemMaker,
        convert: Callable[[Tensor], Tensor],
        expand: Callable[[Tensor], Tensor] = Tensor.float,
    ) -> None:
        super().__init__(tests, labels, stem)
        self.pictures, self.targets, self.convert, self.expand = pictures, targets, convert, expand
        edge = pictures.shape[-1]
        # Crops enlarge what they show, as those of the reference classifier do.
        self.data = ImagenetteData("", edge=edge, crop=round(edge * CROP))

    def read(self, items: Tensor) -> Tensor:
        return self.expand(items)

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in shuffled(len(self.pictures), size, seed, self.targets.device):
            pictures, targets = self.data.distorted(self.pictures[chosen].float(), self.targets[chosen])
            with torch.no_grad():
                converted = in_parts(self.convert, pictures, 1024)
            yield converted, targets


class GridInputs(Inputs):
    """Pictures on a grid that only ever move by whole positions.

    Args:
        views: items as they are and mirrored, [2, n, M, h, w], normalised by nothing yet.
        targets: their classes, [n].
        test: the only kind of test items.
        labels, stem: see `Inputs`.
        unit: values of an axis a position.
    """

    axes = 2
    classes = len(imagenette.SYNSETS)

    def __init__(
        self,
        views: Tensor,
        targets: Tensor,
        test: Tensor,
        labels: Tensor,
        stem: StemMaker,
        unit: int,
    ) -> None:
        super().__init__({"as stored": test}, labels, stem)
        self.views, self.targets, self.unit = views, targets, unit
        self.mean = statistics(views[0])[0].view(1, -1, 1, 1)
        self.smoothing = 0.1

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        device, edge = self.targets.device, self.views.shape[-1] // self.unit
        crop = round(edge * CROP)
        place = torch.arange(crop * self.unit, device=device)
        for chosen in shuffled(self.views.shape[1], size, seed, device):
            view = torch.randint(0, 2, (size,), device=device)
            top, left = (torch.randint(0, edge - crop + 1, (size, 1), device=device) for _ in range(2))
            rows, columns = top * self.unit + place, left * self.unit + place
            # Indexed dimensions apart from each other come first: [size, rows, columns, M].
            x = self.views[view[:, None, None], chosen[:, None, None], :, rows[:, :, None], columns[:, None]]
            x = x.permute(0, 3, 1, 2).float()
            area = augmentation.uniform(size, 0.02, 0.3, device) * (torch.rand(size, device=device) < 0.25)
            x = torch.where(augmentation.rectangles(area, (x.shape[2], x.shape[3]), 3.0), self.mean, x)
            y = F.one_hot(self.targets[chosen], self.classes).float()
            y = torch.lerp(y, torch.full_like(y, 1 / self.classes), self.smoothing)
            yield augmentation.mix(x, y, 0.8, 0.4)


class SoundInputs(Inputs):
    """Sounds, or what a codec makes of them.

    Args:
        waveforms: what training varies, [n, N].
        targets: their classes, [n].
        test: the only kind of test items.
        labels, stem: see `Inputs`.
        convert: turns varied waveforms [n, N], of the loudness that stored ones have, into what a network takes.
    """

    axes = 1
    classes = len(Keywords.labels)

    def __init__(
        self,
        waveforms: Tensor,
        targets: Tensor,
        test: Tensor,
        labels: Tensor,
        stem: StemMaker,
        convert: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__({"as stored": test}, labels, stem)
        self.waveforms, self.targets, self.convert = waveforms, targets, convert

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        from compand.train.audio_tasks import UtteranceDataset, masked

        loudness = self.waveforms.square().mean(1, keepdim=True).sqrt()
        device = self.targets.device
        for x, y in UtteranceDataset(self.waveforms, self.targets, self.classes, size, 1.2, seed):
            drawn = torch.randint(0, len(loudness), (size,), device=device)
            with torch.no_grad():
                x = in_parts(self.convert, x * loudness[drawn], 256)
            y = torch.lerp(y, torch.full_like(y, 1 / self.classes), 0.1)
            yield masked(x, 3, 0.12, 2), y


# ---------------------------------------------------------------------------------------------------- preparation


@torch.no_grad()
def picture_inputs(
    root: Path, settings: Settings, names: Iterable[str], device: torch.device, limit: int | None, edge: int
) -> dict[str, PictureInputs | GridInputs]:
    """The inputs of these names from the folder of Imagenette."""
    codec = _codec(settings.codec, "image", device)
    assert isinstance(codec, ImageCodec)
    stride = codec.transform.stride
    pixels, classes = {}, {}
    for split in ("train", "val"):
        found = program.spread(imagenette.labelled_images(root / split), limit)
        with ThreadPoolExecutor() as pool:
            read = pool.map(lambda item: squared(read_rgb(item[0]), edge), found)
            stacked = torch.from_numpy(np.stack(list(read)))
        pixels[split] = stacked.permute(0, 3, 1, 2).contiguous().to(device)
        classes[split] = torch.tensor([label for _, label in found], device=device)
    train, val = pixels["train"], pixels["val"]
    targets, labels = classes["train"], classes["val"]

    quantiser = Quantiser(codec, settings.quality)

    def integers(x: Tensor) -> Tensor:
        return codec.quantise_batch(x, quality=settings.quality).short()

    stored = {split: in_parts(integers, x) for split, x in pixels.items()}
    channels = codec.transform.latent_channels
    # The edge that gives 3 x small^2 = channels x (edge / stride)^2 values.
    factor = round(stride * math.sqrt(3 / channels))
    small_edge, fold = edge // factor, stride // factor

    def small(x: Tensor) -> Tensor:
        result = F.interpolate(x.float(), (small_edge, small_edge), mode="bicubic", antialias=True)
        return result.round().clamp(0, 255).to(torch.uint8)

    def preview(x: Tensor) -> Tensor:
        return (quantiser.preview(quantiser.latents(x)) * 255).half()

    def decoded(x: Tensor) -> Tensor:
        return (quantiser.decoded(quantiser.latents(x)) * 255).round().clamp(0, 255).to(torch.uint8)

    def normalised(items: Tensor, unit: int, more: Callable[[], list[nn.Module]], outputs: int) -> StemMaker:
        mean, deviation = statistics(items)
        return lambda: (nn.Sequential(LatentStem(mean, deviation, unit), *more()), outputs)

    # Strides of 2 from samples down to the grid of the latents.
    stem_widths = [32, 64, 96, 128][: round(math.log2(stride))]

    def at_full(items: Tensor, expansion: Callable[[], nn.Module] | None = None) -> StemMaker:
        mean, deviation = statistics(items)

        def made() -> tuple[nn.Module, int]:
            layers = [LatentStem(mean, deviation, 1), strided_stem(3, stem_widths, [2] * len(stem_widths))]
            return nn.Sequential(*([expansion()] if expansion else []), *layers), stem_widths[-1]

        return made

    result: dict[str, PictureInputs | GridInputs] = {}
    names = tuple(names)
    if {"latents", "latents-expanded", "tokens", "latents-grid"} & set(names):
        previews = in_parts(preview, stored["train"])
        flipped = in_parts(lambda x: quantiser.integers(x.float().flip(3) / 255), previews)
    if {"decoded", "full"} & set(names):
        decoded_val = in_parts(decoded, stored["val"])
    for name in names:
        if name == "full":
            # Judged on decoded items too: a model that has never seen lossy data.
            tests = {"as stored": val, "decoded": decoded_val}
            result[name] = PictureInputs(train, targets, tests, labels, at_full(train), lambda x: x * 255)
        elif name == "decoded":
            lossy = in_parts(decoded, stored["train"])
            tests = {"as stored": decoded_val, "undamaged": val}
            result[name] = PictureInputs(lossy, targets, tests, labels, at_full(lossy), lambda x: x * 255)
        elif name in ("latents", "latents-expanded"):
            if name == "latents":
                stem = normalised(quantiser.latents(stored["train"]), stride, list, channels)
            else:
                stem = at_full(previews.float() / 255, lambda: LatentExpansion(codec))
            tests = {"as stored": quantiser.latents(stored["val"])}
            result[name] = PictureInputs(
                previews,
                targets,
                tests,
                labels,
                stem,
                lambda x: quantiser.latents(quantiser.integers(x)),
            )
        elif name == "latents-previewed":
            fixed = LatentPreview(codec).to(device)

            def expand(latents: Tensor, fixed: nn.Module = fixed) -> Tensor:
                expanded: Tensor = fixed(latents) * 255
                return expanded

            # Made once and kept: nothing of them changes from epoch to epoch.
            kept = in_parts(lambda x: expand(quantiser.latents(x)).half(), stored["train"])
            tests = {"as stored": quantiser.latents(stored["val"])}
            result[name] = PictureInputs(
                kept, targets, tests, labels, at_full(kept), lambda x: x * 255, expand
            )
        elif name == "tokens":
            stem = normalised(stored["train"], stride, list, channels)
            result[name] = PictureInputs(
                previews, targets, {"as stored": stored["val"]}, labels, stem, quantiser.integers
            )
        elif name == "latents-grid":
            views = torch.stack([quantiser.latents(stored["train"]), quantiser.latents(flipped)])
            stem = normalised(views[0], stride, list, channels)
            test = quantiser.latents(stored["val"])
            result[name] = GridInputs(views, targets, test, labels, stem, 1)
        elif name in ("reduced", "reduced-expanded", "reduced-grid"):
            less = in_parts(small, train)
            if name == "reduced-expanded":
                stem = at_full(less, lambda: nn.Upsample(scale_factor=factor, mode="bicubic"))
            else:
                stem = normalised(less, factor, lambda: [Fold(fold, fold)], 3 * fold**2)
            test = in_parts(small, val)
            if name != "reduced-grid":
                result[name] = PictureInputs(
                    less, targets, {"as stored": test}, labels, stem, lambda x: x * 255
                )
            else:
                views = torch.stack([less, less.flip(3)])
                result[name] = GridInputs(views, targets, test, labels, stem, fold)
        else:
            raise UsageError(f"input {name} of pictures does not exist")
    return result


@torch.no_grad()
def sound_inputs(
    root: Path, settings: Settings, names: Iterable[str], device: torch.device, limit: int | None
) -> dict[str, SoundInputs]:
    """The inputs of these names from the folder of keywords."""
    from compand.eval.items import load
    from compand.eval.perception.networks.audio import SoundClassifier
    from compand.sounds import Sound, resample

    codec = _codec(settings.codec, "audio", device)
    quantiser = Quantiser(codec, settings.quality)
    layout = codec.latent_layout()
    channels, stride, rate, group = (layout[key] for key in ("channels", "stride", "rate", "group"))
    length = round(SECONDS * RATE)
    columns = -(-round(SECONDS * rate) // stride)
    cutter = SoundClassifier(len(Keywords.labels), rate=RATE, seconds=SECONDS)

    def read(item: Any) -> tuple[np.ndarray, np.ndarray]:
        sound = load(item.item)
        assert isinstance(sound, Sound)
        excerpt = cutter.excerpt(sound).numpy()[None]
        return excerpt[0], resample(Sound(excerpt, RATE), rate).samples[0]

    def fitted(waves: Sequence[np.ndarray], size: int) -> Tensor:
        cut = [np.pad(wave[:size], (0, max(size - len(wave), 0))) for wave in waves]
        return torch.from_numpy(np.stack(cut)).to(device)

    full, coded, small, classes = {}, {}, {}, {}
    for split in ("train", "val"):
        items = program.spread(Keywords.labelled(root / split), limit)
        with ThreadPoolExecutor() as pool:
            waves = list(pool.map(read, items))
        full[split] = fitted([wave[0] for wave in waves], length)
        coded[split] = fitted([wave[1] for wave in waves], columns * stride)
        # An ideal low-pass filter, and any ratio of rates.
        padded = F.pad(full[split], (0, round(columns * stride / rate * RATE) - length))
        small[split] = fewer(padded, columns * channels)
        classes[split] = torch.tensor([item.target for item in items], device=device)

    def as_integers(x: Tensor) -> Tensor:
        return quantiser.integers(x[:, None, None].expand(-1, group, 1, -1))

    stored = {split: in_parts(as_integers, x) for split, x in coded.items()}
    targets, labels = classes["train"], classes["val"]
    mel = SoundClassifier(
        len(Keywords.labels), rate=RATE, seconds=SECONDS, bands=channels, hop=round(length / columns)
    ).to(device)

    def log_mel(x: Tensor) -> Tensor:
        return mel.features(x)[:, 0, :, None]

    def raw(x: Tensor) -> Tensor:
        return x[:, None, None]

    def normalised(items: Tensor) -> StemMaker:
        mean, deviation = statistics(items)
        # Silence stays silence: levels are taken out behind, by a factor.
        stem = LatentStem(torch.zeros_like(mean), deviation, stride, 1)
        return lambda: (nn.Sequential(stem, ItemLevel()), channels)

    result = {}
    for name in names:
        if name in ("latents", "tokens"):
            waveforms = in_parts(lambda x: quantiser.preview(quantiser.latents(x)), stored["train"]).mean(
                (1, 2)
            )
            values = quantiser.latents if name == "latents" else torch.Tensor.float
            stem = normalised(values(stored["train"]))

            def convert(x: Tensor, values: Callable[[Tensor], Tensor] = values) -> Tensor:
                return values(as_integers(x))

            result[name] = SoundInputs(waveforms, targets, values(stored["val"]), labels, stem, convert)
        elif name == "logmel":
            mean, deviation = statistics(log_mel(full["train"]))

            def mel_stem(mean: Tensor = mean, deviation: Tensor = deviation) -> tuple[nn.Module, int]:
                return LatentStem(mean, deviation, mel.hop, 1), channels

            test = log_mel(full["val"])
            result[name] = SoundInputs(full["train"], targets, test, labels, mel_stem, log_mel)
        elif name == "reduced":

            def folding() -> tuple[nn.Module, int]:
                return nn.Sequential(ItemLevel(), Fold(1, channels)), channels

            test = raw(small["val"])
            result[name] = SoundInputs(small["train"], targets, test, labels, folding, raw)
        elif name == "full":

            def strided() -> tuple[nn.Module, int]:
                return nn.Sequential(ItemLevel(), strided_stem(1, [32, 64, 96], [4, 4, 6], 1)), 96

            result[name] = SoundInputs(full["train"], targets, raw(full["val"]), labels, strided, raw)
        else:
            raise UsageError(f"input {name} of sounds does not exist")
    return result


def fewer(waveforms: Tensor, samples: int) -> Tensor:
    """Waveforms [n, N] resampled to [n, samples] by cutting off their spectra."""
    spectrum = torch.fft.rfft(waveforms)[:, : samples // 2 + 1]
    return torch.fft.irfft(spectrum, n=samples) * (samples / waveforms.shape[1])


def _codec(name: str, medium: str, device: torch.device) -> Codec:
    info = checkpoint.find(name)
    if info.medium != medium:
        raise UsageError(f"{info.name} codes {info.medium}: choose a codec for {medium}")
    return checkpoint.load(info.name, device=str(device)).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ training


class Run:
    """One training, some steps at a time, so that several share a device: their work is queued, not waited for.

    On a CUDA device a step is captured once and replayed.

    Args:
        inputs: what to train on.
        settings: of the task.
        seed: of the weights, the order and the variations.
    """

    def __init__(self, inputs: Inputs, settings: Settings, seed: int) -> None:
        self.inputs, self.settings = inputs, settings
        self.device = inputs.labels.device
        torch.manual_seed(seed)
        stem, channels = inputs.stem()
        self.network = GridClassifier(
            stem,
            channels,
            inputs.classes,
            inputs.axes,
            settings.widths,
            settings.blocks,
            settings.drop_path,
            settings.dropout,
        ).to(self.device)
        self._weights: list[Tensor] = list(self.network.parameters())
        self._momenta = [torch.zeros_like(p) for p in self._weights]
        self._rate = torch.zeros((), device=self.device)
        self.chunk = min(CHUNK, settings.steps)
        self.step = 0
        self.loss: Tensor | None = None
        self._batches = inputs.batches(self.chunk * settings.batch, seed)
        self._steps = QueuedSteps(self.device, self._update, self._rate, self._forget)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def done(self) -> bool:
        """Whether all steps have been made."""
        return self.step >= self.settings.steps

    def advance(self) -> None:
        """Queues the next steps."""
        with self._steps.queue():
            self._advance()

    def correct(self, items: Tensor) -> np.ndarray:
        """Which test items are answered correctly, bool [n]."""
        self._steps.wait()
        self.network.eval()
        with torch.no_grad(), self._autocast():
            answers = in_parts(lambda x: self.network(_laid_out(self.inputs.read(x))).argmax(1), items, 250)
        return (answers == self.inputs.labels).cpu().numpy()

    def _advance(self) -> None:
        settings = self.settings
        inputs, targets = next(self._batches)
        inputs = _laid_out(inputs.float())
        self.network.train()
        for x, y in zip(inputs.split(settings.batch), targets.split(settings.batch), strict=True):
            if self.done:
                return
            warmup = max(settings.share * settings.steps, 1)
            cosine = (1 + math.cos(math.pi * self.step / settings.steps)) / 2
            self._rate.fill_(settings.lr * min((self.step + 1) / warmup, 1) * cosine)
            self._steps.step(x, y)
            self.step += 1

    def _forget(self) -> None:
        torch._foreach_zero_(self._momenta)
        for p in self._weights:
            p.grad = None

    def _update(self, x: Tensor, y: Tensor) -> None:
        """A step of gradient descent with Nesterov momentum; kernels decay, biases and norms do not."""
        for p in self._weights:
            p.grad = None
        with self._autocast():
            logits = self.network(x)
        self.loss = F.cross_entropy(logits.float(), y)
        self.loss.backward()
        momentum = self.settings.momentum
        with torch.no_grad():
            gradients = [p.grad for p in self._weights if p.grad is not None]
            kernels = [i for i, p in enumerate(self._weights) if p.ndim > 1]
            decayed = [gradients[i] for i in kernels]
            torch._foreach_add_(
                decayed, [self._weights[i] for i in kernels], alpha=self.settings.weight_decay
            )
            torch._foreach_mul_(self._momenta, momentum)
            torch._foreach_add_(self._momenta, gradients)
            torch._foreach_add_(gradients, self._momenta, alpha=momentum)
            torch._foreach_mul_(gradients, -self._rate)
            torch._foreach_add_(self._weights, gradients)

    def _autocast(self) -> torch.autocast:
        # Weights converted once would be stale when a captured step is replayed.
        return torch.autocast(self.device.type, torch.bfloat16, self._steps.captured, cache_enabled=False)


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


Job = tuple[str, str, int]
"""Task, input, seed."""


def train(
    jobs: Iterator[Job], inputs: dict[str, dict[str, Any]], settings: dict[str, Settings], together: int
) -> list[dict[str, Any]]:
    """Trains the jobs, `together` of them at a time.

    Returns:
        For each: task, input, seed, parameters, values, seconds (shared with those beside it), loss, and for each kind
        of test items the outcomes as a text of 0 and 1.
    """
    active: list[tuple[Job, Run, float]] = []
    outcomes: list[dict[str, Any]] = []
    while True:
        while len(active) < together and (job := next(jobs, None)) is not None:
            task, name, seed = job
            active.append((job, Run(inputs[task][name], settings[task], seed), time.perf_counter()))
        if not active:
            return outcomes
        for entry in list(active):
            (task, name, seed), run, start = entry
            run.advance()
            if not run.done:
                continue
            active.remove(entry)
            tests = {
                which: "".join("01"[int(right)] for right in run.correct(items))
                for which, items in run.inputs.tests.items()
            }
            seconds = time.perf_counter() - start
            outcomes.append(
                {
                    "task": task,
                    "input": name,
                    "seed": seed,
                    "parameters": run.parameters,
                    "values": run.inputs.values,
                    "seconds": round(seconds, 1),
                    "loss": float(run.loss.detach()) if run.loss is not None else None,
                    "outcomes": tests,
                }
            )
            score = fmean(map(int, next(iter(tests.values()))))
            print(
                f"{task} {name} seed {seed}: {score:.4f}, loss {outcomes[-1]['loss']:.3f}, {seconds:.0f} s",
                flush=True,
            )


def work(
    device: str,
    jobs: Iterator[Job],
    roots: dict[str, Path],
    names: dict[str, tuple[str, ...]],
    settings: dict[str, Settings],
    together: int,
    limit: int | None,
    edge: int,
) -> list[dict[str, Any]]:
    """Prepares the inputs on a device, and trains the jobs. For what is returned see `train`."""
    place = prepared(device)
    start = time.perf_counter()
    inputs: dict[str, dict[str, Any]] = {}
    for task, root in roots.items():
        if task == "imagenette":
            inputs[task] = dict(picture_inputs(root, settings[task], names[task], place, limit, edge))
        else:
            inputs[task] = dict(sound_inputs(root, settings[task], names[task], place, limit))
    if place.type == "cuda":
        torch.cuda.synchronize()
        # Stored items are exact; what training varies need not be.
        torch.backends.cuda.matmul.allow_tf32 = True
    print(f"{device}: prepared in {time.perf_counter() - start:.0f} s", flush=True)
    return train(jobs, inputs, settings, together)


# -------------------------------------------------------------------------------------------------------- report


def summary(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Scores and paired differences by task, as JSON's types and as tables of Markdown."""
    from compand.eval.perception.statistics import Bootstrap, compare, scored

    results: dict[str, Any] = {}
    parts = []
    for task in dict.fromkeys(run["task"] for run in runs):
        own = [run for run in runs if run["task"] == task]
        rows: dict[str, dict[str, Any]] = {}
        points = {}
        bootstrap = Bootstrap(len(next(iter(own[0]["outcomes"].values()))))

        def mean_of(sums: np.ndarray, items: int = bootstrap.items) -> np.ndarray:
            return sums[..., 0] / items

        for name in dict.fromkeys(run["input"] for run in own):
            same = sorted((run for run in own if run["input"] == name), key=lambda run: run["seed"])
            for place, which in enumerate(same[0]["outcomes"]):
                right = np.array([[int(c) for c in run["outcomes"][which]] for run in same], np.float64)
                label = name if place == 0 else f"{name}, tested on {which} items"
                points[label] = scored(bootstrap, mean_of, right.mean(0)[:, None])
                scores = right.mean(1).tolist()
                rows[label] = {
                    "values": same[0]["values"],
                    "parameters": same[0]["parameters"],
                    "accuracy": fmean(scores),
                    "deviation_over_seeds": stdev(scores) if len(scores) > 1 else None,
                    "by_seed": scores,
                    "interval": list(points[label].score[1:]),
                    "against": {},
                }
        for label, row in rows.items():
            for reference in ("reduced", "full"):
                if reference in points and reference != label:
                    comparison = compare(points[label], points[reference])
                    row["against"][reference] = {
                        "difference": list(comparison.difference),
                        "p": comparison.p,
                    }
        results[task] = rows
        cells = [
            [
                label,
                str(row["values"]),
                f"{row['parameters'] / 1e6:.2f} M",
                f"{100 * row['accuracy']:.1f}"
                + (
                    f" ± {100 * row['deviation_over_seeds']:.1f}"
                    if row["deviation_over_seeds"] is not None
                    else ""
                ),
                " / ".join(f"{100 * score:.1f}" for score in row["by_seed"]),
                *(_difference(row["against"].get(reference)) for reference in ("reduced", "full")),
            ]
            for label, row in rows.items()
        ]
        header = ["input", "values", "parameters", "accuracy in %", "by seed", "minus reduced", "minus full"]
        parts += [f"## {task}", markdown_table(header, cells)]
    return results, parts


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    value, low, high = (100 * number for number in found["difference"])
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}], p {found['p']:.2g}"


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "latent_learning")
    add = parser.add_argument
    add("--images", type=Path, help="folder of Imagenette, with train and val")
    add("--keywords", type=Path, help="folder of keywords, with train and val")
    add(
        "--inputs",
        nargs="+",
        default=list(PICTURE_INPUTS),
        choices=PICTURE_INPUTS + EXPANDED_INPUTS + GRID_INPUTS,
    )
    add("--sound-inputs", nargs="+", default=list(SOUND_INPUTS), choices=SOUND_INPUTS)
    add("--codec", default="wavelet-rgb-16x", help="codec of the pictures")
    add("--quality", type=float, default=3.0, help="its quality")
    add("--sound-codec", default="wavelet-stereo-20x", help="codec of the sounds")
    add("--sound-quality", type=float, default=5.0, help="its quality")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=5000, help="steps of a run on pictures")
    add("--batch", type=int, default=128)
    add("--lr", type=float, default=0.1, help="peak rate of a batch of 128")
    add("--widths", type=int, nargs="+", default=[128, 192, 256], help="channels of the stages")
    add("--sound-steps", type=int, default=1500, help="steps of a run on sounds")
    add("--sound-batch", type=int, default=64)
    add("--sound-widths", type=int, nargs="+", default=[96, 160, 224])
    add("--edge", type=int, default=224, help="edge that pictures are brought to")
    add("--limit", type=int, help="take so many items of a split alone")
    add("--devices", nargs="+", help="cpu, cuda:0 ...; all that there are unless given")
    add("--together", type=int, default=3, help="runs that share a device at a time")
    add("--tables-of", type=Path, help="make the tables of this file of results again; nothing is trained")
    arguments = program.parse(parser, argv)
    if arguments.tables_of is not None:
        former = json.loads(arguments.tables_of.read_text(encoding="utf-8"))
        _write(arguments, former["results"]["runs"], former["results"]["settings"], former["provenance"])
        return
    roots = {
        task: root
        for task, root in (("imagenette", arguments.images), ("keywords", arguments.keywords))
        if root is not None
    }
    if not roots:
        raise UsageError("there is nothing to learn from: give --images, --keywords or both")
    for root in roots.values():
        if not (root / "train").is_dir() or not (root / "val").is_dir():
            raise MediaError(f"{root} has no folders train and val: give the folder above them")
    names = {"imagenette": tuple(arguments.inputs), "keywords": tuple(arguments.sound_inputs)}
    settings = {
        "imagenette": Settings(
            arguments.codec,
            arguments.quality,
            arguments.steps,
            arguments.batch,
            arguments.lr * arguments.batch / 128,
            5e-4,
            tuple(arguments.widths),
            (2,) * len(arguments.widths),
            0.1,
        ),
        "keywords": Settings(
            arguments.sound_codec,
            arguments.sound_quality,
            arguments.sound_steps,
            arguments.sound_batch,
            arguments.lr * arguments.sound_batch / 128,
            5e-4,
            tuple(arguments.sound_widths),
            (2,) * len(arguments.sound_widths),
            0.1,
            0.2,
        ),
    }
    jobs = [(task, name, seed) for task in roots for name in names[task] for seed in range(arguments.seeds)]
    start = time.perf_counter()
    shared = (roots, names, settings, arguments.together, arguments.limit, arguments.edge)
    runs = on_devices(work, devices(arguments.devices), jobs, *shared)
    print(f"{len(runs)} runs in {time.perf_counter() - start:.0f} s", flush=True)
    data = ", ".join(f"{task}: folders train and val of {root.name}" for task, root in roots.items())
    if arguments.limit is not None:
        data += f", {arguments.limit} items of each"
    chosen = {task: asdict(settings[task]) for task in roots}
    _write(arguments, runs, chosen, provenance(data))


def _write(
    arguments: argparse.Namespace,
    runs: list[dict[str, Any]],
    settings: dict[str, Any],
    origin: dict[str, Any],
) -> None:
    raw = {"settings": settings, "runs": runs}
    try:
        results, tables = summary(runs)
    except ImportError as error:
        write_results(arguments.output, raw, origin, force=arguments.force)
        raise UsageError(
            f"{error}: the runs are in {arguments.output}; pip install compand[eval], then give it to --tables-of"
        ) from None
    report = "\n\n".join(["# Learning from latents", (__doc__ or "").strip(), *tables])
    write_results(
        arguments.output, {"summary": results, **raw}, origin, report=report + "\n", force=arguments.force
    )
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
