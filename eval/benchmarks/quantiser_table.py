"""Quantisers of codebook codecs at equal bits: one trunk, data, steps and loss, several seeds.

Encoder, quantiser and decoder are trained together on spoken keywords (16 kHz), with every quantiser at four planes of
about 1024 codes: 40 bits for each of the 50 latent vectors a second (FSQ: 4 x log2 1000 = 39.9).

- rvq: four residual layers;
- grvq: two residual layers of two groups of channels each;
- mcrvq: three books, each of which sees a third of the channels, and a residual one;
- product: one layer of four groups;
- fsq: four groups, each projected to a grid of 8 x 5 x 5 x 5.

The loss is the distance of mel and linear spectra and of waveforms that the speech codecs are trained with, and a
quarter of the commitment loss relative to the variance of the latents. There is no adversarial part and no quantiser
dropout; codes are moving averages (FSQ has none). The first tenth of the steps is made without quantising, then the
quantiser is fitted to latents of training crops. Optimiser, its schedule and the crops, which follow from the seed
alone, are the same for all.

Measured on recordings that were not trained on: latent error, the squared error of quantised latents over the variance
of the latents, as they are and behind the affine map that brings them nearest (nothing ties the basis of what FSQ gives
to that of what it was given); distance of log-mel spectra and PESQ (wide-band) of what is decoded; perplexity of the
indices over K, mean over the planes; the first plane's share of the energy of what all planes contribute; bits a
second, of the indices as they are and by one static table a plane, counted on the training recordings. `Words` is the
accuracy of a small network that is trained to recognise the word from indices, of the first plane alone or of all
planes; it sees the training recordings at several speeds.

Numbers are means over seeds with their standard deviation. A quantiser wins a column where each of its seeds is better
than every seed of every other one; otherwise no winner is named.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compand.bottlenecks import codebooks
from compand.codec import QUALITY_STEPS
from compand.errors import MediaError, UsageError
from compand.eval import metrics
from compand.eval.benchmarks import program
from compand.eval.benchmarks.scores import judged, score
from compand.eval.benchmarks.sharing import (
    QueuedSteps,
    devices,
    moments,
    on_devices,
    prepared,
    rate_factor,
    restoring,
)
from compand.eval.items import load
from compand.eval.perception.networks.audio import loudest
from compand.eval.perception.tasks.keywords import Keywords
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.sounds import Sound, resample
from compand.train.sound_losses import SoundDistance
from compand.train.sounds import Int16Array, SoundCrops, Variation, as_int16
from compand.transforms.waveform import WaveformTransform

RATE = 16000
PLANES = 4
GRIDS = {64: (8, 8), 256: (8, 6, 5), 1024: (8, 5, 5, 5)}
"""Values of each dimension of FSQ by the size of the other codebooks (Mentzer et al. 2023, table 1, from 256 on)."""

QUANTISERS: dict[str, dict[str, Any]] = {
    "rvq": {"layers": PLANES},
    "grvq": {"groups": 2, "layers": PLANES // 2},
    "mcrvq": {"parallel": PLANES - 1, "residual": 1},
    "product": {"groups": PLANES},
    "fsq": {"groups": PLANES},
}
"""Arguments of `codebooks.build` by kind, besides the size of the codebooks."""

TRUNK: dict[str, Any] = {
    "encoder_stages": ((4, 64, ()), (4, 128, (1, 3)), (4, 192, (1, 3)), (5, 320, (1, 3))),
    "decoder_stages": ((1, 320, 3), (2, 256, 3)),
}
"""Arguments of WaveformTransform unless others are given. Little is done at high rates, where memory bounds a step."""

WEIGHTS = {"mel": 2.0, "stft": 1.0, "waveform": 0.1}
"""Of the terms of the distance, as the speech codecs are trained."""

CHUNK = 8
"""Steps whose crops are cut at once."""

SPEEDS = (1.0, 0.88, 0.94, 1.06, 1.13)
"""At which the recordings are played to train the recognition of words."""

SECONDS = 3.2
"""Excerpt in which a word is recognised."""

PROBE_RATE = 2e-3
"""Peak rate of the networks that recognise words."""

SCORES = ("log_mel", "pesq")


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Attributes:
        share: of the steps, those that warm the rate up.
        unquantised: of the steps, those before the quantiser comes in.
        final: of the peak rate, what is left at the end.
    """

    steps: int
    batch: int
    crop: int
    lr: float
    size: int
    commitment: float = 0.25
    clip: float = 1.0
    share: float = 0.05
    unquantised: float = 0.1
    final: float = 0.02
    probe_steps: int = 300
    trunk: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recordings:
    """Spoken words.

    Attributes:
        sounds: int16 [1, N] each, at `RATE`.
        targets: index of the word of each.
    """

    sounds: list[Int16Array]
    targets: list[int]

    def waves(self) -> list[NDArray[np.float32]]:
        """Samples [N] of each in [-1, 1]."""
        return [sound[0].astype(np.float32) / 32768 for sound in self.sounds]


def recordings(folder: Path, limit: int | None) -> Recordings:
    """The spoken words below a folder, or `limit` of them, evenly from all."""

    def read(item: Any) -> Int16Array:
        sound = load(item.item)
        assert isinstance(sound, Sound)
        mean = sound.samples.mean(0, keepdims=True)
        return as_int16(resample(Sound(mean, sound.rate), RATE))

    items = program.spread(Keywords.labelled(folder), limit)
    with ThreadPoolExecutor() as pool:
        sounds = list(pool.map(read, items))
    return Recordings(sounds, [item.target for item in items])


def quantiser(kind: str, channels: int, size: int) -> codebooks.Quantiser:
    """The quantiser of a row of the table."""
    books = {"levels": GRIDS[size]} if kind == "fsq" else {"size": size}
    return codebooks.build(kind, channels, **books, **QUANTISERS[kind])


# ------------------------------------------------------------------------------------------------------ training


class Run:
    """One training, some steps at a time; see `QueuedSteps`.

    Args:
        kind: of the quantiser.
        seed: of weights and crops.
        sounds: to train on.
        settings: see `Settings`.
        device: to train on.
    """

    def __init__(
        self, kind: str, seed: int, sounds: Sequence[Int16Array], settings: Settings, device: torch.device
    ) -> None:
        self.kind, self.seed, self.settings, self.device = kind, seed, settings, device
        torch.manual_seed(seed)
        self.transform = WaveformTransform(**settings.trunk).to(device)
        self.quantiser = quantiser(kind, self.transform.latent_channels, settings.size).to(device)
        self.distance = SoundDistance(RATE).to(device)
        self._weights = [*self.transform.parameters(), *self.quantiser.parameters()]
        self._rate = torch.zeros((), device=device)
        # A rate in a tensor and captured updates are for the versions that run on the device alone.
        self._adam = torch.optim.AdamW(
            self._weights,
            lr=self._rate,
            betas=(0.8, 0.99),
            weight_decay=0.0,
            fused=device.type == "cuda",
            capturable=device.type == "cuda",
        )
        variation = Variation(gain=(-9.0, 6.0), mixing=0.0, spatial=False)
        crops = SoundCrops(
            sounds, CHUNK * settings.batch, settings.crop, 1, device, seed, variation=variation
        )
        self._crops = iter(crops)
        self.loss = torch.zeros((), device=device)
        self.step = 0
        self._quantising = False
        self.steps = self._queued()

    @property
    def depth(self) -> int:
        """The only depth that is trained and measured: all planes."""
        return self.quantiser.depths

    @property
    def done(self) -> bool:
        """Whether all steps have been queued."""
        return self.step >= self.settings.steps

    def advance(self) -> None:
        """Queues the next steps."""
        if not self._quantising and self.step >= self.settings.unquantised * self.settings.steps:
            self._begin()
        with self.steps.queue():
            for crops in next(self._crops).split(self.settings.batch):
                if self.done:
                    return
                settings = self.settings
                factor = rate_factor(self.step, settings.steps, settings.share, settings.final)
                self._rate.fill_(settings.lr * factor)
                self.steps.step(crops)
                self.step += 1

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        """Samples [batch, 1, 1, N] -> z [batch, M, 1, n]."""
        return self.transform.analysis(x, self._quality(x)).float()

    @torch.no_grad()
    def synthesis(self, z_hat: Tensor) -> Tensor:
        """Quantised latents -> samples [batch, 1, 1, N]."""
        return self.transform.synthesis(z_hat, self._quality(z_hat))

    def _queued(self) -> QueuedSteps:
        forget = restoring(lambda: [*self.quantiser.state_dict().values(), *moments(self._adam)])
        return QueuedSteps(self.device, self._update, self._rate, forget)

    def _begin(self) -> None:
        """Fits the quantiser to the latents; it takes part from now on."""
        self.steps.wait()
        crops = next(self._crops)
        self.quantiser.initialise(torch.cat([self.latents(part) for part in crops.split(16)]))
        self._quantising = True
        self.steps = self._queued()

    def _quality(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), QUALITY_STEPS, device=x.device)

    def _update(self, x: Tensor) -> None:
        self._adam.zero_grad()
        depth = torch.full((len(x),), self.depth, device=x.device)
        # Weights converted once would be stale when a captured step is replayed.
        with torch.autocast(x.device.type, torch.bfloat16, self.steps.captured, cache_enabled=False):
            z = self.transform.analysis(x, self._quality(x))
            quantised = self.quantiser(z, depth) if self._quantising else None
            z_hat = z if quantised is None else quantised.z_hat
            x_hat = self.transform.synthesis(z_hat, self._quality(x))
        terms = self.distance(x_hat.float(), x)
        loss = torch.stack([weight * terms[name] for name, weight in WEIGHTS.items()]).sum()
        if quantised is not None:
            variance = z.detach().var().clamp(min=1e-6)
            tie = self.settings.commitment * quantised.losses["commitment"] + quantised.losses["codebook"]
            loss = loss + tie / variance
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, self.settings.clip)
        self._adam.step()
        self.loss.copy_(loss.detach())


# ------------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def frames(run: Run, sounds: Sequence[NDArray[np.float32]]) -> list[Tensor]:
    """The latent vectors of each sound [N], float32 [M, n]."""
    stride = run.transform.stride
    order = sorted(range(len(sounds)), key=lambda i: len(sounds[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), 32):
        group = order[start : start + 32]
        counts = [-(-len(sounds[i]) // stride) for i in group]
        x = np.stack([np.pad(sounds[i], (0, max(counts) * stride - len(sounds[i]))) for i in group])
        z = run.latents(torch.from_numpy(x)[:, None, None].to(run.device))
        for i, item, count in zip(group, z, counts, strict=True):
            found[i] = item[:, 0, :count]
    return [found[i] for i in range(len(sounds))]


def indices_of(run: Run, z: Sequence[Tensor]) -> list[Tensor]:
    """The indices of each sound's latent vectors, int64 [planes, n]."""
    together = run.quantiser.encode(torch.cat(list(z), 1)[None, :, None], run.depth)[0, :, 0]
    return list(together.split([item.shape[1] for item in z], 1))


@torch.no_grad()
def decoded(run: Run, indices: Sequence[Tensor], lengths: Sequence[int]) -> list[Int16Array]:
    """What the indices of each sound decode to, int16 [N]."""
    order = sorted(range(len(indices)), key=lambda i: indices[i].shape[1])
    found: dict[int, Int16Array] = {}
    for start in range(0, len(order), 32):
        group = order[start : start + 32]
        longest = max(indices[i].shape[1] for i in group)
        z_hat = [run.quantiser.decode(indices[i][None, :, None], run.depth) for i in group]
        padded = torch.cat([F.pad(item, (0, longest - item.shape[3])) for item in z_hat])
        x_hat = run.synthesis(padded)[:, 0, 0].clamp(-1, 1).cpu().numpy()
        for i, item in zip(group, x_hat, strict=True):
            found[i] = np.rint(item[: lengths[i]] * 32767).astype(np.int16)
    return [found[i] for i in range(len(indices))]


def relative_error(z: Tensor, z_hat: Tensor) -> float:
    """Squared error over the variance of z; both [M, n]."""
    return float((z_hat - z).square().sum() / (z - z.mean(1, keepdim=True)).square().sum())


def mapped(z: Tensor, z_hat: Tensor) -> Tensor:
    """The affine map of z_hat that comes nearest to z; all [M, n]."""
    centred, given = (x.double() - x.double().mean(1, keepdim=True) for x in (z, z_hat))
    gram = given @ given.T
    # Directions that quantised latents hardly take would be blown up by rounding errors.
    found = torch.linalg.pinv(gram, rtol=1e-9, hermitian=True) @ given @ centred.T
    return (found.T @ given + z.double().mean(1, keepdim=True)).float()


def counts_of(indices: Tensor, size: int) -> NDArray[np.float64]:
    """How often each index occurs in each plane: [planes, n] -> [planes, size]."""
    return np.stack([torch.bincount(plane, minlength=size).cpu().numpy() for plane in indices]).astype(float)


def perplexity(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 to the entropy of counts [..., K]: 1 to K."""
    p = counts / counts.sum(-1, keepdims=True)
    return np.exp2(-(p * np.log2(np.where(p > 0, p, 1))).sum(-1))


def static_bits(learned: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    """Bits of what was counted, in all planes, by tables of what was counted elsewhere and once more for each code."""
    p = (learned + 1) / (learned + 1).sum(-1, keepdims=True)
    return float(-(counts * np.log2(p)).sum())


class WordProbe(nn.Module):
    """Indices [batch, planes, n] -> logits of words: embeddings, summed over planes, two convolutions, pooling."""

    def __init__(self, planes: int, size: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for _ in range(planes))
        self.layers = nn.Sequential(
            nn.Conv1d(width, 96, 5, 2, 2),
            nn.BatchNorm1d(96),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Conv1d(96, 128, 5, 2, 2),
            nn.BatchNorm1d(128),
            nn.GELU(),
        )
        self.classes = nn.Sequential(nn.Dropout(0.3), nn.Linear(256, classes))

    def forward(self, indices: Tensor) -> Tensor:
        parts = [embed(plane) for embed, plane in zip(self.embeddings, indices.unbind(1), strict=True)]
        x = self.layers(torch.stack(parts).sum(0).transpose(1, 2))
        return self.classes(torch.cat([x.mean(2), x.amax(2)], 1))


def recognised(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], size: int, steps: int, seed: int
) -> float:
    """Accuracy of a `WordProbe` on test items; both: indices [items, planes, n] and words [items]."""
    (inputs, targets), (others, answers) = train, test
    device = inputs.device
    torch.manual_seed(seed)
    probe = WordProbe(inputs.shape[1], size, len(Keywords.labels)).to(device)
    rate = torch.zeros((), device=device)
    on_device = device.type == "cuda"
    adam = torch.optim.AdamW(
        probe.parameters(), lr=rate, weight_decay=0.05, fused=on_device, capturable=on_device
    )

    def update(rows: Tensor) -> None:
        loss = F.cross_entropy(probe(inputs[rows]), targets[rows], label_smoothing=0.1)
        adam.zero_grad()
        loss.backward()
        adam.step()

    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(inputs), (steps, 128), generator=generator).to(device)
    queued = QueuedSteps(device, update, rate, restoring(lambda: [*probe.buffers(), *moments(adam)]))
    with queued.queue():
        for step, rows in enumerate(chosen):
            rate.fill_(PROBE_RATE * rate_factor(step, steps, 0.3, 0.0))
            queued.step(rows)
    queued.wait()
    probe.eval()
    with torch.no_grad():
        return float((probe(others).argmax(1) == answers).double().mean())


@dataclass
class Probes:
    """Excerpts in which words are to be recognised: samples, [items, N] float32, and words, [items]."""

    train: tuple[NDArray[np.float32], list[int]]
    test: tuple[NDArray[np.float32], list[int]]

    @classmethod
    def of(cls, train: Recordings, test: Recordings) -> Probes:
        """Of the recordings of both sets, those of the first one at all `SPEEDS`."""

        def excerpts(found: Recordings, speeds: Sequence[float]) -> tuple[NDArray[np.float32], list[int]]:
            waves = [torch.from_numpy(wave) for wave in found.waves()]
            played = [
                F.interpolate(wave[None, None], scale_factor=1 / speed, mode="linear")[0, 0]
                for speed in speeds
                for wave in waves
            ]
            length = round(SECONDS * RATE)
            return np.stack([loudest(wave, length).numpy() for wave in played]), found.targets * len(speeds)

        return cls(excerpts(train, SPEEDS), excerpts(test, (1.0,)))


def measured(run: Run, train: Recordings, test: Recordings, probes: Probes) -> dict[str, Any]:
    """All figures of a trained run but those of what it decodes, which lies in "decoded"."""
    run.steps.wait()
    run.transform.eval()
    run.quantiser.eval()
    planes = run.quantiser.planes(run.depth)
    size = run.quantiser.sizes[run.depth - 1][0]
    waves = test.waves()
    z = frames(run, waves)
    indices = indices_of(run, z)
    all_z, all_indices = torch.cat(z, 1), torch.cat(indices, 1)
    with torch.no_grad():
        z_hat = run.quantiser.decode(all_indices[None, :, None], run.depth)[0, :, 0]
        share = float(run.quantiser.energy_shares(all_z[None, :, None])[0])

    sets = []
    for waveforms, words in (probes.train, probes.test):
        found = torch.stack(indices_of(run, frames(run, list(waveforms))))
        sets.append((found, torch.tensor(words, device=run.device)))
    learn, judge = sets
    steps, seed = run.settings.probe_steps, run.seed
    first, every = (
        recognised((learn[0][:, :n], learn[1]), (judge[0][:, :n], judge[1]), size, steps, seed)
        for n in (1, planes)
    )
    learned = torch.cat(indices_of(run, frames(run, train.waves())), 1)
    counts = counts_of(all_indices, size)
    rate = RATE / run.transform.stride
    return {
        "quantiser": run.kind,
        "seed": run.seed,
        "parameters": sum(p.numel() for p in (*run.transform.parameters(), *run.quantiser.parameters())),
        "planes": planes,
        "size": size,
        "loss": float(run.loss),
        "bits_raw": rate * planes * math.log2(size),
        "bits_static": rate * static_bits(counts_of(learned, size), counts) / all_indices.shape[1],
        "latent_error": relative_error(all_z, z_hat),
        "latent_error_mapped": relative_error(all_z, mapped(all_z, z_hat)),
        "perplexity": float(perplexity(counts).mean()) / size,
        "perplexity_by_plane": perplexity(counts).tolist(),
        "first_share": share,
        "words_first": first,
        "words_all": every,
        "decoded": decoded(run, indices, [len(wave) for wave in waves]),
    }


Job = tuple[str, int]
"""Quantiser and seed."""


def work(
    device: str,
    jobs: Iterator[Job],
    root: Path,
    settings: Settings,
    together: int,
    limit: int | None,
    end: float,
) -> list[dict[str, Any]]:
    """Trains the jobs on a device, `together` of them at a time, and measures them, until the clock (`time.time`) shows
    `end`; see `measured`."""
    place = prepared(device)
    train, test = (recordings(root / split, limit) for split in ("train", "val"))
    probes = Probes.of(train, test)
    active: list[tuple[Run, float]] = []
    outcomes: list[dict[str, Any]] = []
    while True:
        while len(active) < together and (job := next(jobs, None)) is not None:
            active.append((Run(*job, train.sounds, settings, place), time.perf_counter()))
        if not active or time.time() > end:
            return outcomes
        for entry in list(active):
            run, start = entry
            run.advance()
            if not run.done or time.time() > end:
                continue
            active.remove(entry)
            # Batches of many lengths come a few times each: kernels are not tried out for them.
            run.steps.wait()
            trained = time.perf_counter()
            with torch.backends.cudnn.flags(benchmark=False):
                outcome = measured(run, train, test, probes)
            now = time.perf_counter()
            outcome["seconds"] = round(now - start, 1)
            outcomes.append(outcome)
            print(
                f"{run.kind} seed {run.seed}: loss {outcome['loss']:.3f}, latent error "
                f"{outcome['latent_error']:.3f}, {now - start:.0f} s, {now - trained:.0f} s of them measuring",
                flush=True,
            )


def step_seconds(device: str, root: Path, settings: Settings, together: int, limit: int | None) -> float:
    """What a step of one run takes where `together` runs share a device."""
    place = prepared(device)
    sounds = recordings(root / "train", limit).sounds
    kinds = [list(QUANTISERS)[i % len(QUANTISERS)] for i in range(together)]
    quantised = replace(settings, unquantised=0.0)
    runs = [Run(kind, seed, sounds, quantised, place) for seed, kind in enumerate(kinds)]
    for timed in (False, True):
        start = time.perf_counter()
        for _ in range(1 + timed):
            for run in runs:
                run.advance()
        for run in runs:
            run.steps.wait()
    return (time.perf_counter() - start) / sum(2 * CHUNK for _ in runs)


# -------------------------------------------------------------------------------------------------------- report


def as_sound(wave: Int16Array) -> Sound:
    """Samples [N] as a sound."""
    return Sound(wave[None].astype(np.float32) / 32768, RATE)


@dataclass(frozen=True)
class Column:
    """A column of the table. `sign`: 1 where more is better, -1 where less is, 0 where neither."""

    key: str
    title: str
    sign: int
    form: str = "{:.3f}"
    factor: float = 1.0


COLUMNS = (
    Column("bits_raw", "bits/s", 0, "{:.0f}"),
    Column("bits_static", "by static tables", 0, "{:.0f}"),
    Column("latent_error", "latent error", -1),
    Column("latent_error_mapped", "mapped", -1),
    Column("log_mel", "log-mel, dB", -1, "{:.2f}"),
    Column("pesq", "PESQ", 1, "{:.3f}"),
    Column("perplexity", "perplexity / K", 0),
    Column("first_share", "share of plane 1", 0),
    Column("words_first", "words from plane 1, %", 0, "{:.1f}", 100),
    Column("words_all", "words from all, %", 0, "{:.1f}", 100),
)


def computable() -> list[str]:
    """The scores that the installed packages can give."""
    return [metric.name for metric in metrics.for_medium("audio", SCORES)[0]]


def means(runs: Sequence[dict[str, Any]]) -> None:
    """Adds to each run the mean of every score over the items that it has a value of in all runs."""
    for name in SCORES:
        lists = [run["scores"][name] for run in runs if name in run["scores"]]
        if len(lists) != len(runs):
            continue
        places = judged(lists)
        for run in runs:
            run[name] = fmean(run["scores"][name][i] for i in places) if places else None


def winner(values: dict[str, list[float]], sign: int) -> str | None:
    """Whose every value is better than every value of all others; None if nobody's is, or each has one alone."""
    if min(map(len, values.values())) < 2:
        return None
    for name, own in values.items():
        others = [value for other, each in values.items() if other != name for value in each]
        if others and min(sign * value for value in own) > max(sign * value for value in others):
            return name
    return None


def summary(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The table, as JSON's types and as Markdown with a sentence on who wins."""
    kinds = list(dict.fromkeys(run["quantiser"] for run in runs))
    columns = [column for column in COLUMNS if all(run.get(column.key) is not None for run in runs)]
    values = {
        column.key: {
            kind: [
                run[column.key]
                for run in sorted(runs, key=lambda run: run["seed"])
                if run["quantiser"] == kind
            ]
            for kind in kinds
        }
        for column in columns
    }
    winners = {column.key: winner(values[column.key], column.sign) for column in columns if column.sign}

    def cell(column: Column, kind: str) -> str:
        given = [column.factor * value for value in values[column.key][kind]]
        text = column.form.format(fmean(given))
        if column.key != "bits_raw" and len(given) > 1:
            text += f" ± {column.form.format(stdev(given))}"
        return f"**{text}**" if winners.get(column.key) == kind else text

    shape = {run["quantiser"]: f"{run['planes']} x {run['size']}" for run in runs}
    table = markdown_table(
        ["quantiser", "planes x codes", *(column.title for column in columns)],
        [[kind, shape[kind], *(cell(column, kind) for column in columns)] for kind in kinds],
    )
    sentences = []
    for column in columns:
        if not column.sign:
            continue
        best = max(kinds, key=lambda kind: column.sign * fmean(values[column.key][kind]))
        sure = "wins" if winners[column.key] else "is best on average, not by every seed"
        sentences.append(f"- {column.title}: {best} {sure}.")
    results = {
        kind: {
            column.key: {"mean": fmean(v), "by_seed": v}
            for column in columns
            for v in [values[column.key][kind]]
        }
        for kind in kinds
    }
    return {"rows": results, "winners": winners}, "\n\n".join([table, "\n".join(sentences)])


def keep(runs: Sequence[dict[str, Any]], originals: Sequence[Int16Array], number: int, output: Path) -> None:
    """Writes some of the recordings and what was decoded of them beside the results, a file a run, for `complete`."""
    chosen = program.spread(range(len(originals)), number)
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(_kept(output), **{str(i): originals[i][0] for i in chosen})
    for run in runs:
        np.savez_compressed(_kept(output, run), **{str(i): run["decoded"][i] for i in chosen})


def _kept(results: Path, run: dict[str, Any] | None = None) -> Path:
    """Where sounds of a run are kept, or the recordings themselves."""
    name = "originals" if run is None else f"{run['quantiser']}_{run['seed']}"
    return results.with_name(f"{results.stem}_{name}.npz")


def complete(runs: Sequence[dict[str, Any]], path: Path, workers: int) -> None:
    """Adds the scores that runs of a former file lack, as far as they can be computed here, from what `keep` wrote."""
    for run in runs:
        missing = [name for name in computable() if name not in run["scores"]]
        source, originals = _kept(path, run), _kept(path)
        if not missing or not source.is_file() or not originals.is_file():
            continue
        with (
            np.load(source, allow_pickle=False) as arrays,
            np.load(originals, allow_pickle=False) as references,
        ):
            pairs = [(as_sound(references[name]), as_sound(arrays[name])) for name in arrays.files]
        found = score(pairs, missing, workers)
        run["scores"] |= {name: [scores[name] for scores in found] for name in missing}


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "quantiser_table")
    add = parser.add_argument
    add("--data", type=Path, help="folder of keywords, with train and val")
    add("--quantisers", nargs="+", default=list(QUANTISERS), choices=list(QUANTISERS))
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=3000, help="steps of a run")
    add("--minutes", type=float, help="choose the steps so that all runs together take about this long")
    add(
        "--within",
        type=float,
        default=math.inf,
        help="minutes after which runs that are not over are left out",
    )
    add("--batch", type=int, default=32, help="crops a step")
    add("--crop", type=int, default=12800, help="samples of a crop, a multiple of the stride")
    add("--lr", type=float, default=8e-4, help="peak rate")
    add("--size", type=int, default=1024, choices=list(GRIDS), help="codes of a codebook")
    add("--probe-steps", type=int, default=300, help="steps of the networks that recognise words")
    add("--trunk", type=json.loads, default=TRUNK, help="arguments of WaveformTransform, as JSON")
    add("--limit", type=int, help="take so many recordings of a split alone")
    add("--keep", type=int, default=0, help="keep so many decoded recordings a run beside the results")
    add("--devices", nargs="+", help="cpu, cuda:0 ...; all that there are unless given")
    add("--together", type=int, default=5, help="runs that share a device at a time")
    add("--workers", type=int, default=1, help="processes that measure what was decoded")
    add("--tables-of", type=Path, help="complete and tabulate this file of results again; nothing is trained")
    arguments = program.parse(parser, argv)
    if arguments.tables_of is not None:
        former = json.loads(arguments.tables_of.read_text(encoding="utf-8"))
        runs = former["results"]["runs"]
        complete(runs, arguments.tables_of, arguments.workers)
        _write(arguments, runs, former["results"]["settings"], former["provenance"])
        return
    began = time.time()
    root = arguments.data
    if root is None:
        raise UsageError("there is nothing to learn from: give --data")
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        raise MediaError(f"{root} has no folders train and val: give the folder above them")
    settings = Settings(
        arguments.steps,
        arguments.batch,
        arguments.crop,
        arguments.lr,
        arguments.size,
        probe_steps=arguments.probe_steps,
        trunk=arguments.trunk,
    )
    places = devices(arguments.devices)
    jobs = [(kind, seed) for seed in range(arguments.seeds) for kind in arguments.quantisers]
    if arguments.minutes is not None:
        together = min(arguments.together, len(jobs))
        seconds = step_seconds(places[0], root, settings, together, arguments.limit)
        rounds = len(jobs) / len(places)
        settings = replace(settings, steps=max(round(60 * arguments.minutes / (rounds * seconds)), CHUNK))
        print(f"{1000 * seconds:.1f} ms a step: {settings.steps} steps a run", flush=True)
    start = time.perf_counter()
    end = began + 60 * arguments.within
    runs = on_devices(work, places, jobs, root, settings, arguments.together, arguments.limit, end)
    if not runs:
        raise UsageError(f"no run was over within {arguments.within:g} minutes: give more, or fewer --steps")
    print(f"{len(runs)} runs in {time.perf_counter() - start:.0f} s", flush=True)
    test = recordings(root / "val", arguments.limit)
    if arguments.keep:
        keep(runs, test.sounds, arguments.keep, arguments.output)
    available = computable()
    originals = [as_sound(sound[0]) for sound in test.sounds]
    pairs = [
        (original, as_sound(wave))
        for run in runs
        for original, wave in zip(originals, run["decoded"], strict=True)
    ]
    found = score(pairs, available, arguments.workers)
    for place, run in enumerate(runs):
        own = found[place * len(test.sounds) : (place + 1) * len(test.sounds)]
        run["scores"] = {name: [scores[name] for scores in own] for name in available}
    data = f"{root.name}: {len(test.sounds)} recordings of val, trained on train"
    if arguments.limit is not None:
        data += f", {arguments.limit} of each"
    for run in runs:
        del run["decoded"]
    _write(arguments, runs, asdict(settings), provenance(data))


def _write(
    arguments: argparse.Namespace,
    runs: list[dict[str, Any]],
    settings: dict[str, Any],
    origin: dict[str, Any],
) -> None:
    means(runs)
    results, tables = summary(runs)
    report = "\n\n".join(
        [
            "# Quantisers at equal bits",
            (__doc__ or "").strip(),
            f"{settings['steps']} steps of {settings['batch']} crops of {settings['crop']} samples, "
            f"peak rate {settings['lr']:g}.",
            tables,
        ]
    )
    write_results(
        arguments.output,
        {"summary": results, "settings": settings, "runs": runs},
        origin,
        report=report + "\n",
        force=arguments.force,
    )
    print(tables)


if __name__ == "__main__":
    main()
