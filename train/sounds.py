"""Folders of sounds as endless batches of random crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from compand.errors import MediaError, UsageError
from compand.sounds import Sound, is_sound_path, read_sound, resample

T = TypeVar("T", bound=np.generic)
Int16Array = NDArray[np.int16]

EXCERPT_SECONDS = 10
"""Length of the excerpts of held-out sounds."""

_LARGEST_TERM = 64  # of the ratio by which a copy is resampled: small integers make short filter banks


def find_sounds(root: str | Path) -> list[Path]:
    """All sound files below `root`, sorted. Raises MediaError if there is none."""
    paths = sorted(path for path in Path(root).rglob("*") if path.is_file() and is_sound_path(path))
    if not paths:
        raise MediaError(f"{root}: no sound found; give --data.roots folders with sounds")
    return paths


def split(
    paths: Sequence[Path], held_out: Sequence[str], every_third: Sequence[str] = ()
) -> tuple[list[Path], list[Path]]:
    """Sounds to train on and sounds to keep apart.

    Args:
        paths: sound files.
        held_out: patterns of the shell, held against the name of a file and against FOLDER/NAME.
        every_third: such patterns too, but of the files that match one, in sorted order, only the first of every three
            is kept apart.

    Returns:
        The paths of the two parts, each in the order given.
    """

    def matches(path: Path, pattern: str) -> bool:
        return fnmatchcase(path.name, pattern) or fnmatchcase(f"{path.parent.name}/{path.name}", pattern)

    apart = {path for path in paths for pattern in held_out if matches(path, pattern)}
    for pattern in every_third:
        apart.update(sorted(path for path in paths if matches(path, pattern))[::3])
    return [path for path in paths if path not in apart], [path for path in paths if path in apart]


def stretched(sound: Sound, speed: float) -> Sound:
    """The sound played faster by about `speed`, which raises its pitch alike, at the rate that it had."""
    ratio = Fraction(1 / speed).limit_denominator(_LARGEST_TERM)
    return Sound(resample(Sound(sound.samples, ratio.denominator), ratio.numerator).samples, sound.rate)


def as_int16(sound: Sound) -> Int16Array:
    """Samples [channels, N] in units of 2^-15; a sound beyond full scale is made quieter instead of clipped."""
    peak = max(float(np.abs(sound.samples).max(initial=0.0)), 1.0)
    return np.rint(sound.samples * (32768 / peak)).clip(-32768, 32767).astype(np.int16)


def with_channels(samples: NDArray[T], channels: int) -> NDArray[T]:
    """[any, N] -> [channels, N]: what is beyond is left out, the last one is repeated for what is missing."""
    return samples[np.minimum(np.arange(channels), len(samples) - 1)]


@dataclass(frozen=True)
class Variation:
    """How crops of sounds are varied.

    Attributes:
        gain: least and greatest gain in dB, uniform between them; what would then exceed full scale is made quieter.
        mixing: probability that another crop of the batch is added, at a gain of its own.
        spatial: whether polarity and order of channels are drawn, and the balance of mono sounds in half of the cases.
    """

    gain: tuple[float, float] = (-18.0, 6.0)
    mixing: float = 0.3
    spatial: bool = True


class SoundCrops(IterableDataset[Tensor]):
    """Endless batches of random crops of sounds, cut and varied on the device that holds the sounds.

    All sounds lie in one flat int16 array. A sound is drawn in proportion to its length times its weight, its crop
    uniformly. Of a sound shorter than the crop all is taken, somewhere between zeros or, as often, repeated. A sound of
    fewer channels than asked for is repeated over the channels.

    Args:
        sounds: int16 [channels, N] each, N at least 1.
        batch_size, crop: crops a batch, and their length in samples.
        channels: channels of the crops.
        device: where the sounds are kept and the batches arise.
        seed: seed of the crops; processes of a distributed run get different ones.
        weights: factor of each sound's probability; None: all 1.
        variation: how the crops are varied; None: as `Variation` has it.
    """

    def __init__(
        self,
        sounds: Sequence[Int16Array],
        batch_size: int,
        crop: int,
        channels: int,
        device: torch.device,
        seed: int,
        weights: Sequence[float] | None = None,
        variation: Variation | None = None,
    ) -> None:
        if not sounds:
            raise MediaError("no sound is left to train on: hold out fewer")
        lengths = torch.tensor([sound.shape[1] for sound in sounds], dtype=torch.int64)
        counts = torch.tensor([sound.shape[0] for sound in sounds], dtype=torch.int64)
        sizes = lengths * counts
        share = lengths.double() * torch.tensor(weights if weights is not None else [1.0] * len(sounds))
        self.samples = torch.from_numpy(np.concatenate([sound.reshape(-1) for sound in sounds])).to(device)
        self.starts = (sizes.cumsum(0) - sizes).to(device)
        self.lengths, self.counts = lengths.to(device), counts.to(device)
        self.share = (share / share.sum()).to(device)
        self.batch_size, self.crop, self.channels, self.seed = batch_size, crop, channels, seed
        self.variation = variation or Variation()

    def __iter__(self) -> Iterator[Tensor]:
        """Yields float32 [batch, channels, 1, crop] in [-1, 1]."""
        device, n, crop = self.samples.device, self.batch_size, self.crop
        low, high = self.variation.gain
        generator = torch.Generator(device).manual_seed(self.seed)
        steps = torch.arange(crop, device=device)
        places = torch.arange(self.channels, device=device)

        def drawn(*shape: int) -> Tensor:
            """Uniform in [0, 1), with a dimension of size 1 in place of each one that is missing of three."""
            return torch.rand(n, *shape, *[1] * (2 - len(shape)), device=device, generator=generator)

        def gain() -> Tensor:
            return 10 ** ((low + (high - low) * drawn()) / 20)

        while True:
            item = torch.multinomial(self.share, n, replacement=True, generator=generator)
            length, count = self.lengths[item][:, None], self.counts[item][:, None]
            room = length - crop  # negative: how many zeros there will be
            # In double precision: single has too few digits for the places of a long sound.
            place = torch.rand(n, 1, device=device, generator=generator, dtype=torch.float64)
            position = (place * (room.abs() + 1)).long() * room.sign() + steps
            silent = ((position < 0) | (position >= length)) & (drawn()[:, :, 0] < 0.5)
            turn = (drawn()[:, :, 0] * count).long() if self.variation.spatial else torch.zeros_like(count)
            channel = (places + turn) % count if self.variation.spatial else torch.minimum(places, count - 1)
            start = self.starts[item][:, None] + channel * length
            x = self.samples[start[:, :, None] + (position % length)[:, None]].float() / 32768
            x = torch.where(silent[:, None], 0.0, x)
            factor = gain()
            if self.variation.spatial:
                factor = factor * torch.where(drawn() < 0.5, -1.0, 1.0)
                panned = (drawn() < 0.5) & (count[:, :, None] == 1)
                factor = factor * torch.where(panned, 1 - 0.8 * drawn(self.channels), 1.0)
            x = x * factor
            if self.variation.mixing and n > 1:
                added = x.roll(1, 0) * gain()
                x = x + torch.where(drawn() < self.variation.mixing, added, 0.0)
            x = x / x.abs().amax((1, 2), keepdim=True).clamp(min=1)
            yield x[:, :, None]


class SoundFolder(pl.LightningDataModule):
    """Crops of all sounds below some folders for training, excerpts of held-out sounds for validation.

    Every sound is decoded and brought to one sample rate once, and kept as 16-bit integers together with copies that
    play it at other speeds.

    Args:
        roots: folders with sounds, searched through all subfolders.
        batch_size: crops a batch and device.
        crop: length of the crops in samples, a multiple of the codec's stride.
        channels: channels of the crops.
        rate: sample rate in Hz; None: sounds are taken at whatever rate they have.
        held_out: patterns of the shell of file names (or FOLDER/NAME) that are kept for validation.
        every_third: such patterns of which the first of every three files is kept for validation.
        shares: how often crops come from each folder, relative to each other; None: in proportion to the lengths.
        copies: number of further copies of each sound, each at a random speed.
        speed: range of those speeds.
        gain, mixing, spatial: see `Variation`.
        keep_on_device: keep the decoded sounds (2 bytes a sample and copy) in the accelerator's memory.
        seed: seed of crops and speeds.

    Raises:
        UsageError: the number of shares is not that of the folders.
    """

    def __init__(
        self,
        roots: list[str],
        batch_size: int = 32,
        crop: int = 65536,
        channels: int = 2,
        rate: int | None = 44100,
        held_out: list[str] | None = None,
        every_third: list[str] | None = None,
        shares: list[float] | None = None,
        copies: int = 2,
        speed: tuple[float, float] = (0.8, 1.25),
        gain: tuple[float, float] = (-18.0, 6.0),
        mixing: float = 0.3,
        spatial: bool = True,
        keep_on_device: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if shares is not None and len(shares) != len(roots):
            raise UsageError(f"{len(shares)} shares for {len(roots)} folders: give one share a folder")
        self.save_hyperparameters()
        self.roots, self.batch_size, self.crop, self.channels, self.rate = (
            [Path(root) for root in roots],
            batch_size,
            crop,
            channels,
            rate,
        )
        self.held_out, self.every_third, self.shares = held_out or [], every_third or [], shares
        self.copies, self.speed, self.keep_on_device, self.seed = copies, speed, keep_on_device, seed
        self.variation = Variation(gain, mixing, spatial)
        self._train: list[Int16Array] = []
        self._weights: list[float] = []
        self._held_out: list[Int16Array] = []

    def setup(self, stage: str | None = None) -> None:
        parts = [split(find_sounds(root), self.held_out, self.every_third) for root in self.roots]
        generator = np.random.default_rng(self.seed)
        slowest, fastest = self.speed
        self._train, self._weights = [], []
        with ThreadPoolExecutor() as pool:
            self._held_out = [
                sound for _, apart in parts for (sound,) in pool.map(self._read, apart) if sound.size
            ]
            for index, (train, _) in enumerate(parts):
                # Speeds are uniform on a logarithmic scale: as many copies are slower as faster by a factor.
                speeds = slowest * (fastest / slowest) ** generator.random((len(train), self.copies))
                sounds = [
                    sound for read in pool.map(self._read, train, speeds) for sound in read if sound.size
                ]
                total = sum(sound.shape[1] for sound in sounds)
                weight = 1.0 if self.shares is None else self.shares[index] / max(total, 1)
                self._train += sounds
                self._weights += [weight] * len(sounds)

    def _read(self, path: Path, speeds: Sequence[float] = ()) -> list[Int16Array]:
        """A sound at the wanted rate, and its copies at other speeds."""
        sound = read_sound(path)
        if self.rate is not None:
            sound = resample(sound, self.rate)
        return [as_int16(sound)] + [as_int16(stretched(sound, speed)) for speed in speeds]

    def train_dataloader(self) -> DataLoader[Tensor]:
        trainer = self.trainer
        device = (
            trainer.strategy.root_device
            if trainer is not None and self.keep_on_device
            else torch.device("cpu")
        )
        rank = trainer.global_rank if trainer is not None else 0
        # The step count shifts the seed so that a resumed run does not see its first crops again.
        step = trainer.global_step if trainer is not None else 0
        seed = (self.seed * 1_000_003 + step) * 1_000 + rank
        crops = SoundCrops(
            self._train,
            self.batch_size,
            self.crop,
            self.channels,
            device,
            seed,
            self._weights,
            self.variation,
        )
        return DataLoader(crops, batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Excerpts of ten seconds, float32 [1, channels, 1, N]; the held-out sounds follow each other."""
        if not self._held_out:
            return DataLoader([], batch_size=None)  # type: ignore[arg-type]
        sounds = np.concatenate([with_channels(sound, self.channels) for sound in self._held_out], axis=1)
        length = min(EXCERPT_SECONDS * (self.rate or self.crop), sounds.shape[1])
        excerpts = [sounds[:, i : i + length] for i in range(0, sounds.shape[1] - length + 1, length)]
        tensors = [torch.from_numpy(excerpt).float()[None, :, None] / 32768 for excerpt in excerpts]
        return DataLoader(tensors, batch_size=None)  # type: ignore[arg-type]
