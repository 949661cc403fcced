"""Separation of drums and melody, on mixtures that are made from short loops and one-shots.

A source is played from a few samples as a sequencer plays them: each event is one sample at one speed, from one
moment on. Test mixtures follow from a seed and from samples that no training mixture holds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compand.errors import MediaError, UsageError
from compand.eval.items import Item, content_hash, find_items
from compand.eval.perception.task import Task, TaskItem, TaskModel
from compand.pictures import Picture
from compand.sounds import Sound, read_sound, resample

RATE = 44100
"""Of the samples, and of the codecs for music: the bandwidth that low rates give up is part of what is judged."""

SECONDS = 3.0
MIXTURES = 100

SOURCES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "drums",
        (
            "bd_", "drum_", "hat_", "loop_", "perc_", "ride_", "sn_", "elec_cymbal", "elec_filt_snare",
            "elec_fuzz_tom", "elec_hi_snare", "elec_hollow_kick", "elec_lo_snare", "elec_mid_snare", "elec_snare",
            "elec_soft_kick", "elec_tick",
        ),
    ),
    (
        "melody",
        (
            "ambi_choir", "ambi_piano", "ambi_soft_buzz", "bass_", "glitch_bass", "guit_", "elec_beep", "elec_bell",
            "elec_bong", "elec_chime", "elec_ping", "elec_triangle", "elec_twang",
        ),
    ),
)  # fmt: skip
"""The two sources and how the names of their samples begin; the names are those of Sonic Pi."""

TEST_FAMILIES = frozenset(
    {
        "bd_boom", "bd_haus", "bd_pure", "bd_zum", "drum_cymbal_closed", "drum_snare", "drum_tom_mid",
        "elec_hi_snare", "elec_snare", "hat_cab", "hat_gump", "hat_metal", "hat_sci", "hat_yosh", "loop_amen",
        "loop_perc", "perc_swash", "ride_via", "sn_zome", "ambi_soft_buzz", "bass_hit_c", "bass_woodsy_c",
        "elec_chime", "glitch_bass_g",
    }
)  # fmt: skip
"""Families of samples (see `family`) for test mixtures alone. The list is fixed, so that a folder with more or fewer
files cannot move a sample from one side to the other."""

VALIDATION_FAMILIES = frozenset(
    {
        "bd_fat", "drum_cowbell", "elec_lo_snare", "hat_gem", "hat_snap", "loop_industrial", "perc_impact",
        "sn_dub", "bass_hard_c", "elec_ping", "guit_harmonics",
    }
)  # fmt: skip
"""Families for the mixtures that training is watched on. Choices made by them leave the test untouched."""

PARTS = ("train", "validation", "test")

_LONGEST = 4.0  # seconds of a sample that are played
_FADE = 0.01  # seconds over which a note is damped when the next one begins
_SCALE = (-5, -2, 0, 3, 5, 7, 10)  # minor pentatonic, in semitones
_WORST = -30.0  # dB; an estimate that holds nothing of its source is not rated lower


class Samples(NamedTuple):
    """Samples of both sources, mono at `RATE`, each scaled to a peak of 1."""

    waveforms: Tensor  # float32 [samples, longest]; zeros behind the end
    lengths: Tensor  # int64 [samples]
    pools: tuple[
        NDArray[np.int64], ...
    ]  # rows of each of SOURCES; one that is there twice is played twice as often
    names: tuple[str, ...]

    def to(self, device: torch.device) -> Samples:
        """The same with its tensors on a device."""
        return self._replace(waveforms=self.waveforms.to(device), lengths=self.lengths.to(device))


class Events(NamedTuple):
    """What is played in a batch of sources, events along the last axis; arrays [batch, events]."""

    sample: NDArray[np.int64]  # index into Samples
    onset: NDArray[np.float64]  # seconds
    speed: NDArray[np.float64]  # 2 is an octave up
    gain: NDArray[np.float64]
    seconds: NDArray[np.float64]  # from the onset to the moment at which it is damped


def source_of(name: str) -> int | None:
    """Index into SOURCES of a file name; None where it belongs to neither."""
    for index, (_, beginnings) in enumerate(SOURCES):
        if name.startswith(beginnings):
            return index
    return None


def family(stem: str) -> str:
    """What is common to the names of takes of one instrument: "drum_tom_lo" of "drum_tom_lo_soft".

    >>> family("elec_blip2"), family("drum_snare_hard"), family("bass_hit_c")
    ('elec_blip', 'drum_snare', 'bass_hit_c')
    """
    return re.sub(r"(_hard|_soft|\d+)$", "", stem)


def part_of(stem: str) -> str:
    """Which of PARTS plays a sample: that of its family, "train" where no list names it.

    >>> part_of("drum_tom_mid_soft"), part_of("hat_gem"), part_of("bd_ada")
    ('test', 'validation', 'train')
    """
    name = family(stem)
    return "test" if name in TEST_FAMILIES else "validation" if name in VALIDATION_FAMILIES else "train"


def split(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items of both sources by part, drums first: that order decides which sample a seed draws."""
    own = [item for index in range(len(SOURCES)) for item in items if source_of(item.path.stem) == index]
    return {part: [item for item in own if part_of(item.path.stem) == part] for part in PARTS}


def find_samples(folder: Path, part: str) -> list[Item]:
    """Files of samples below a folder for one of PARTS.

    Raises MediaError if a source has no samples there.
    """
    found, _ = find_items(folder, "audio")
    chosen = split(found)[part]
    for index, (source, beginnings) in enumerate(SOURCES):
        if not any(source_of(item.path.stem) == index for item in chosen):
            raise MediaError(
                f"{folder} has too few samples of {source} (none for the {part} mixtures): give a folder with samples "
                f"named {', '.join(beginnings[:4])}... such as those of Sonic Pi"
            )
    return chosen


def read_samples(items: Sequence[Item]) -> Samples:
    """Reads samples of both sources. Raises MediaError if a file cannot be read or is silent."""
    longest = round(_LONGEST * RATE)
    waveforms = torch.zeros(len(items), longest)
    lengths = []
    for row, item in enumerate(items):
        sound = read_sound(item.path)
        sound = resample(Sound(sound.samples.mean(0, keepdims=True), sound.rate), RATE)
        wave = sound.samples[0, :longest]
        peak = float(np.abs(wave).max(initial=0))
        if peak == 0:
            raise MediaError(f"{item.path} is silent: leave it out")
        waveforms[row, : len(wave)] = torch.from_numpy(wave / peak)
        lengths.append(len(wave))
    sources = np.array([source_of(item.path.stem) for item in items], np.int64)
    pools = tuple(np.flatnonzero(sources == index) for index in range(len(SOURCES)))
    return Samples(waveforms, torch.tensor(lengths), pools, tuple(item.path.stem for item in items))


def draw(
    generator: np.random.Generator, samples: Samples, batch: int, spread: float = 0.0
) -> tuple[Events, Events]:
    """Random drums and melodies of `SECONDS`, each one bar of a common tempo of 90 to 160 beats a minute.

    Drums are three samples (some of them whole loops) on a grid of half beats; a melody is one sample, or two that
    take turns, played as notes of a minor pentatonic scale, each of which ends where the next one begins.

    Args:
        generator: decides all.
        samples: what there is to play.
        batch: number of pairs.
        spread: semitones by which the ranges of tuning and key are wider at either end than in the test.
    """
    beat = 60 / generator.uniform(90, 160, (batch, 1))
    drums, melody = samples.pools

    def chosen(
        pool: NDArray[np.int64], voices: int, events: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        members = pool[generator.integers(0, len(pool), (batch, voices))]
        voice = generator.integers(0, voices, (batch, events))
        return np.take_along_axis(members, voice, 1), voice

    hits = 10
    sample, voice = chosen(drums, 3, hits)
    step = generator.integers(0, 12, (batch, hits))
    step[:, 0] = 0
    tuning = 2 ** (generator.uniform(-4 - spread, 4 + spread, (batch, 3)) / 12)
    played_drums = Events(
        sample,
        step * beat / 2,
        np.take_along_axis(tuning, voice, 1),
        10 ** (generator.uniform(-12, 0, (batch, hits)) / 20),
        np.full((batch, hits), SECONDS),
    )
    notes = 8
    sample, _ = chosen(melody, 2, notes)
    alone = generator.random((batch, 1)) < 0.6
    sample = np.where(alone, sample[:, :1], sample)
    seconds = beat * generator.choice([0.5, 1.0, 1.0, 2.0], (batch, notes))
    onset = np.cumsum(seconds, 1) - seconds
    key = generator.uniform(-9 - spread, 5 + spread, (batch, 1))
    pitch = key + generator.choice(_SCALE, (batch, notes))
    gain = 10 ** (generator.uniform(-6, 0, (batch, notes)) / 20)
    return played_drums, Events(sample, onset, 2 ** (pitch / 12), gain, seconds)


def play(samples: Samples, events: Events, length: int) -> Tensor:
    """Plays events, on the device of the samples, reading between samples by linear interpolation.

    Returns:
        float32 [batch, length].
    """
    device = samples.waveforms.device
    flat, longest = samples.waveforms.reshape(-1), samples.waveforms.shape[1]
    time = torch.arange(length, device=device, dtype=torch.float64)
    output = torch.zeros(events.sample.shape[0], length, device=device)
    tensors = [torch.from_numpy(values).to(device) for values in events]
    for event in range(events.sample.shape[1]):
        sample, onset, speed, gain, seconds = (tensor[:, event, None] for tensor in tensors)
        since = time - onset * RATE
        place = since * speed
        alive = (place >= 0) & (place < samples.lengths[sample] - 1)
        index = place.long().clamp(0, longest - 2)
        between = (place - index).float()
        index = index + sample * longest
        value = torch.lerp(flat[index], flat[index + 1], between)
        damping = ((seconds * RATE - since) / (_FADE * RATE)).clamp(0, 1)
        output += torch.where(alive, value * (gain * damping).float(), 0.0)
    return output


def mix(sources: Tensor, balance: Tensor) -> Tensor:
    """Scales sources [batch, 2, N]: the first `balance` [batch] dB above the second, their sum with a peak of 0.7."""
    power = sources.double().square().mean(2).clamp(min=1e-12)
    gain = torch.stack([10 ** (balance / 40), 10 ** (-balance / 40)], 1).to(power) / power.sqrt()
    scaled = (sources.double() * gain[..., None]).float()
    peak = scaled.sum(1).abs().amax(1).clamp(min=1e-9)
    return scaled * (0.7 / peak)[:, None, None]


def mixture_of(samples: Samples, seed: int, number: int) -> NDArray[np.float32]:
    """Drums and melody [2, N] of the mixture of that number: the samples, the seed and the number decide it."""
    generator = np.random.default_rng([seed, number])
    events = draw(generator, samples, 1)
    length = round(SECONDS * RATE)
    played = torch.stack([play(samples, source, length) for source in events], 1)
    balance = torch.from_numpy(generator.uniform(-5, 5, 1))
    sources: NDArray[np.float32] = mix(played, balance)[0].numpy()
    return sources


def si_sdr(estimate: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Scale-invariant ratio of signal to distortion, in dB (Le Roux et al. 2019, eq. 3); not below -30.

    Args:
        estimate, reference: [N]; the reference is not silent.
    """
    e, r = estimate.astype(np.float64), reference.astype(np.float64)
    target = (e @ r) / (r @ r) * r
    distortion = ((e - target) ** 2).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * np.log10((target @ target) / distortion)
    return float(max(np.nan_to_num(ratio, nan=_WORST, posinf=100.0, neginf=_WORST), _WORST))


class Separation(Task):
    """Drums and melody out of their mono mixture at 44.1 kHz.

    An item is a mixture of 3 s; the target is its number. Its outcome is the mean over the two sources of the
    improvement of SI-SDR over the undamaged mixture, so that a codec loses by what it does to the sources and cannot
    win by spoiling the mixture. The folder holds samples named like those of Sonic Pi.
    """

    name = "separation"
    medium = "audio"
    kinds = ("separator",)
    score_name = "SI-SDR improvement in dB"
    outcome_names = ("improvement", "items")
    pairwise = "bootstrap"
    default_model = "separation-separator"
    labels = tuple(source for source, _ in SOURCES)
    version = 1  # raise it with every change of `draw`, `play` or `mix`
    caveats = (
        "the test mixtures share few samples (27 of Sonic Pi's): intervals, which are over mixtures, say nothing of "
        "other samples",
        "the recipe of the separator was tuned while test mixtures were watched: its baseline may be flattered, "
        "comparisons of codecs are not",
    )
    seed = 20251
    """Of the test mixtures; another seed is another test."""

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        # An item is judged for one codec after another, and playing it takes as long as separating it.
        self._played = lru_cache(4)(self._play)

    @cached_property
    def _files(self) -> list[Item]:
        return find_samples(self.data, "test")

    @cached_property
    def _samples(self) -> Samples:
        return read_samples(self._files)

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(f"{self.version} {self.seed} {SECONDS} {RATE}".encode())
        for item in self._files:
            digest.update(f"{item.path.name}\0{content_hash(item)}\0".encode())
        return digest.hexdigest()

    def items(self) -> list[TaskItem]:
        find_samples(self.data, "test")  # refuses a folder without them
        names = [f"mixture-{number:03d}" for number in range(MIXTURES)]
        return [TaskItem(name, Item(name, self.data, "audio"), number) for number, name in enumerate(names)]

    def content_hash(self, item: TaskItem) -> str:
        return hashlib.sha256(f"{self._digest} {item.target}".encode()).hexdigest()[:16]

    def sources(self, item: TaskItem) -> NDArray[np.float32]:
        """Drums and melody, [2, N]; their sum is what is coded."""
        return self._played(item.target)

    def _play(self, number: int) -> NDArray[np.float32]:
        return mixture_of(self._samples, self.seed, number)

    def load(self, item: TaskItem) -> Sound:
        return Sound(self.sources(item).sum(0, keepdims=True), RATE)

    def outcome(self, model: TaskModel, decoded: Picture | Sound, item: TaskItem) -> list[float]:
        references = self.sources(item)
        mixture = references.sum(0)
        estimates = np.asarray(model(decoded))
        if estimates.shape != references.shape:
            raise UsageError(
                f"{model.name} gives sources of shape {list(estimates.shape)} for {item.name}, not "
                f"{list(references.shape)}: choose a separator of {' and '.join(self.labels)} at {RATE} Hz"
            )
        gained = [
            si_sdr(estimate, reference) - si_sdr(mixture, reference)
            for estimate, reference in zip(estimates, references, strict=True)
        ]
        return [float(np.mean(gained)), 1.0]

    def score(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(total[..., 0] / total[..., 1])
