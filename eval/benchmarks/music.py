"""Stereo music held out from training, at equal bytes with Opus.

Every item is encoded at the best quality whose file stays within the wanted rate; bytes are those of the whole file,
headers included. A rival gets no fewer: of its settings that were tried (bisection over its whole range) the one whose
file has the fewest bytes not below ours; where its smallest file is larger still, that one. Vorbis and MP3 (average
bit rate, which goes lower than a variable one) take part where their smallest file is no larger than ours.

The items are what training kept apart: two pieces whole, and a third of a folder of short samples, joined end to end
into one program, because an Ogg container alone would take more bytes than a sound of a second. Mono samples become
two equal channels. Both pieces were Ogg Vorbis files before, which loses what Vorbis leaves out for every codec alike,
and leaves Vorbis less to lose. Opus works at 48 kHz and its files carry 12 bytes that restore rate and length.

PSNR is for a peak of 1, and in the other column for x / 2, samples of [-1, 1] taken as a range of 1 (as WaLLoC states
it): 6.02 dB more. SDR is 10 log10 of the energy of x over that of x - y, both channels together. Within an item, two
files therefore differ by the same number of dB in PSNR and SDR. SI-SDR and the log-mel distance (lower is better) are
means over the channels, ViSQOL (audio mode, 48 kHz; 1 to about 4.7) is of the mean of the channels. What was decoded
beyond full scale is clipped before it is measured, as playing it would. Means are over the items.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from compand import checkpoint
from compand.audio_codec import AudioCodec
from compand.codec import QUALITY_STEPS
from compand.coding import container
from compand.errors import MediaError, UsageError
from compand.eval import metrics
from compand.eval.anchors.audio import ANCHORS
from compand.eval.benchmarks import program
from compand.eval.benchmarks.ceiling import not_rounded
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.eval.subjects import Subject
from compand.sounds import Sound, read_sound, resample
from compand.train.sounds import find_sounds, split, with_channels
from compand.weights import build

HELD_OUT = {"Hungarian dance": "Hungarian_Dance*", "drum and bass": "admiralbob77*"}
"""Items, and the patterns of the shell by which training kept their files apart."""

EVERY_THIRD = {"samples": "samples/*"}
"""Such patterns of which training kept apart the first of every three files."""

RATE, CHANNELS = 44100, 2
"""Of all items."""

TARGETS = (12.0, 18.0, 66.0)
"""Kilobits a second."""

CODECS = ("wavelet-stereo-2x", "wavelet-stereo-5x", "wavelet-stereo-20x")

REFERENCE = "opus"
OTHERS = ("vorbis", "mp3-abr")

METRICS = ("psnr", "sdr", "si_sdr", "log_mel", "visqol")

LEVEL = 0.05
"""Difference in ViSQOL below which neither of two files is said to sound better."""

SETTINGS = 2**14
"""Steps of a rival's range between which its setting is sought."""

HALVED = 20 * math.log10(2)
"""What PSNR gains, in dB, where samples of [-1, 1] are halved and the peak stays 1."""


class Trial(NamedTuple):
    """One file."""

    item: str
    target: float  # kbps
    checkpoint: str  # ours, with whose bytes the file shares a comparison
    codec: str  # that made the file
    setting: float  # its quality
    size: int  # bytes of the whole file
    kbps: float
    scores: dict[str, float]  # by name of the metric


class Verdict(NamedTuple):
    """Our file against that of Opus."""

    ours: Trial
    opus: Trial

    @property
    def place(self) -> str:
        """Item and rate in words."""
        rate = f"{self.ours.target:g} kbps" if self.reached else f"{self.ours.kbps:.1f} kbps"
        return f"{self.ours.item} at {rate}"

    @property
    def gain(self) -> float:
        """dB of SDR, and of PSNR, by which ours is better."""
        return self.ours.scores["sdr"] - self.opus.scores["sdr"]

    @property
    def reached(self) -> bool:
        """Whether our file has nearly the bytes that the target allows."""
        return self.ours.kbps >= 0.9 * self.ours.target

    @property
    def outcome(self) -> str:
        """Whether the goal, PSNR and SDR at or above those of Opus at this rate, is met."""
        if not self.reached:
            return f"missed: ends at {self.ours.kbps:.1f} kbps"
        return "met" if self.gain >= 0 else f"missed by {-self.gain:.1f} dB"

    @property
    def sounds_better(self) -> str:
        """Ours, Opus or neither, by ViSQOL."""
        difference = self.ours.scores["visqol"] - self.opus.scores["visqol"]
        if abs(difference) < LEVEL:
            return "neither"
        return "ours" if difference > 0 else "Opus"


class Rival:
    """The files that another codec makes of one sound.

    Args:
        subject: the codec, whose quality is a range.
        sound: what it encodes.
    """

    def __init__(self, subject: Subject, sound: Sound) -> None:
        self.subject, self._sound = subject, sound
        self._files: dict[int, bytes] = {}

    def setting(self, step: int) -> float:
        """The quality of a step, 0 to SETTINGS."""
        low, high = self.subject.lowest, self.subject.highest
        return low + (high - low) * step / SETTINGS

    def file(self, step: int) -> bytes:
        """The file of a step."""
        if step not in self._files:
            self._files[step] = self.subject.encode(self._sound, self.setting(step))
        return self._files[step]

    def smallest_from(self, size: int) -> tuple[float, bytes] | None:
        """Setting and file of the fewest bytes that are not below `size`; None where even the largest file is."""
        if len(self.file(SETTINGS)) < size:
            return None
        low, high = -1, SETTINGS  # the file of `high` is large enough
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self.file(middle)) >= size else (middle, high)
        # Sizes need not grow with every step: another that was tried may come closer.
        tried = {step: len(data) for step, data in self._files.items() if len(data) >= size}
        step = min(tried, key=lambda each: (tried[each], each))
        return self.setting(step), self.file(step)


def held_out(folder: Path) -> dict[str, list[Path]]:
    """Files of each item, below a folder. Raises MediaError if an item has none."""
    paths = find_sounds(folder)
    found = {item: split(paths, [pattern])[1] for item, pattern in HELD_OUT.items()}
    found |= {item: split(paths, (), [pattern])[1] for item, pattern in EVERY_THIRD.items()}
    for item, files in found.items():
        if not files:
            raise MediaError(f"{folder} has no file of the item {item}: name the folder of the audio data")
    return found


def joined(paths: Sequence[Path]) -> Sound:
    """Sounds end to end, at the rate and with the channels of all items."""
    parts = [with_channels(resample(read_sound(path), RATE).samples, CHANNELS) for path in paths]
    return Sound(np.concatenate(parts, axis=1), RATE)


def score(original: Sound, decoded: Sound) -> dict[str, float]:
    """All metrics of a decoded item."""
    heard = Sound(decoded.samples.clip(-1, 1), decoded.rate)
    return {name: metrics.measure(name, original, heard) for name in METRICS}


@torch.inference_mode()
def unquantised(codec: AudioCodec, sound: Sound) -> float:
    """SDR in dB of a stereo sound at the highest level, with all of the codec but the rounding of its latents."""
    level = codec.levels * QUALITY_STEPS
    y_hat = not_rounded(codec.bottleneck, codec.analyse(sound.samples, level), level)
    x_hat = codec.transform.synthesis(y_hat, torch.tensor([level]))
    samples = x_hat[0, :, 0, : sound.length].float().numpy()
    return metrics.measure("sdr", sound, Sound(samples.clip(-1, 1), sound.rate))


def compare(
    item: str, sound: Sound, codecs: Mapping[str, AudioCodec], targets: Sequence[float]
) -> list[Trial]:
    """All files of one item: ours at every target, each followed by those of its rivals."""
    rivals = [Rival(ANCHORS[name](), sound) for name in (REFERENCE, *OTHERS)]
    known: dict[bytes, dict[str, float]] = {}
    trials = []
    for target, (name, codec) in itertools.product(targets, codecs.items()):
        ours = codec.encode(sound, kbps=target)
        quality = container.read_header(ours).settings[0] / QUALITY_STEPS
        files: list[tuple[str, float, bytes, Callable[[bytes], Any]]] = [(name, quality, ours, codec.decode)]
        for rival in rivals:
            if rival.subject.name == REFERENCE or len(rival.file(0)) <= len(ours):
                found = rival.smallest_from(len(ours))
                if found is not None:
                    files.append((rival.subject.name, *found, rival.subject.decode))
        for maker, setting, data, decode in files:
            if data not in known:
                known[data] = score(sound, decode(data))
            kbps = 8 * len(data) / sound.seconds / 1000
            trials.append(Trial(item, target, name, maker, setting, len(data), kbps, known[data]))
    return trials


def verdicts(trials: Sequence[Trial]) -> list[Verdict]:
    """Our files, each beside the one of Opus that has its bytes."""
    opus = {(t.item, t.target, t.checkpoint): t for t in trials if t.codec == REFERENCE}
    ours = [trial for trial in trials if trial.codec == trial.checkpoint]
    return [Verdict(trial, opus[trial.item, trial.target, trial.checkpoint]) for trial in ours]


def conclusion(judged: Sequence[Verdict]) -> str:
    """What the verdicts on one checkpoint come to, in Markdown."""

    def places(chosen: Sequence[Verdict], detail: Callable[[Verdict], str]) -> str:
        listed = "; ".join(f"{each.place} ({detail(each)})" for each in chosen)
        return f"{len(chosen)} of {len(judged)}{': ' if chosen else ''}{listed}."

    def gain(each: Verdict) -> str:
        return f"{each.gain:+.1f} dB"

    def heard(each: Verdict) -> str:
        return f"{each.opus.scores['visqol']:.2f} against our {each.ours.scores['visqol']:.2f}"

    met = [each for each in judged if each.reached and each.gain >= 0]
    behind = [each for each in judged if each.gain < 0]
    short = [each for each in judged if not each.reached]
    lines = [
        f"**{judged[0].ours.checkpoint}**\n",
        f"- PSNR and SDR at or above Opus, at the wanted rate: {places(met, gain)}",
        f"- Opus is better in PSNR and SDR: {places(behind, gain)}",
    ]
    if short:
        ends = places(short, lambda each: f"for {each.ours.target:g} kbps")
        lines.append(f"- The target is missed because the largest file of all is far smaller: {ends}")
    for who, words in (("Opus", "Opus sounds better"), ("ours", "Ours sounds better"), ("neither", "Level")):
        chosen = [each for each in judged if each.sounds_better == who]
        if chosen or who == "ours":
            lines.append(f"- {words} by ViSQOL: {places(chosen, heard)}")
    nearer = sum(each.opus.scores["log_mel"] < each.ours.scores["log_mel"] for each in judged)
    lines.append(f"- Opus is nearer by the log-mel distance: {nearer} of {len(judged)}.")
    return "\n".join(lines)


def _mean_rows(trials: Sequence[Trial], items: int) -> list[list[str]]:
    """Rows of the table of means, for codecs that have a file of every item."""
    groups: dict[tuple[str, float, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.checkpoint, trial.target, trial.codec), []).append(trial)
    return [
        [
            _title(codec),
            f"{target:g}",
            beside,
            f"{fmean(trial.kbps for trial in group):.2f}",
            *_figures({name: fmean(trial.scores[name] for trial in group) for name in METRICS}),
        ]
        for (beside, target, codec), group in groups.items()
        if len(group) == items
    ]


def _figures(scores: Mapping[str, float]) -> list[str]:
    """Cells of the metrics, PSNR in both conventions."""
    psnr = scores["psnr"]
    return [f"{psnr:.2f}", f"{psnr + HALVED:.2f}", *(f"{scores[name]:.2f}" for name in METRICS[1:])]


def _title(codec: str) -> str:
    return ANCHORS[codec].title if codec in ANCHORS else codec


def render(
    items: Mapping[str, str], trials: Sequence[Trial], limits: Mapping[str, Mapping[str, float]]
) -> str:
    """The report in Markdown.

    Args:
        items: what each consists of, in words.
        trials: all files.
        limits: `unquantised` by checkpoint and item.
    """
    judged = verdicts(trials)
    titles = {metric.name: metric.title for metric in metrics.METRICS if metric.medium == "audio"}
    columns = ["PSNR", "PSNR of x / 2", *(titles[name] for name in METRICS[1:])]
    sections = [
        "# Stereo music at equal bytes",
        (__doc__ or "").strip(),
        "\n".join(f"- {item}: {words}" for item, words in items.items()),
        "## Against Opus",
        *(conclusion([each for each in judged if each.ours.checkpoint == name]) for name in limits),
        markdown_table(
            [
                *(
                    "item",
                    "kbps",
                    "checkpoint",
                    "bytes",
                    "Opus",
                    "SDR",
                    "Opus",
                    "PSNR and SDR at or above Opus",
                ),
                *("ViSQOL", "Opus", "sounds better"),
            ],
            [
                [
                    ours.item,
                    f"{ours.target:g}",
                    ours.checkpoint,
                    f"{ours.size:,}",
                    f"{opus.size:,}",
                    f"{ours.scores['sdr']:.2f}",
                    f"{opus.scores['sdr']:.2f}",
                    each.outcome,
                    f"{ours.scores['visqol']:.2f}",
                    f"{opus.scores['visqol']:.2f}",
                    each.sounds_better,
                ]
                for each in judged
                for ours, opus in (each,)
            ],
        ),
        "## Ceiling of the networks",
        "SDR in dB at the highest level where latents are not rounded: about what the network, with its number of "
        "channels, can make of any number of bytes.",
        markdown_table(
            ["checkpoint", *items],
            [[name, *(f"{limit[item]:.2f}" for item in items)] for name, limit in limits.items()],
        ),
        "## Means over the items",
        markdown_table(
            ["codec", "target, kbps", "bytes of", "kbps", *columns], _mean_rows(trials, len(items))
        ),
        "## All files",
        markdown_table(
            ["item", "target, kbps", "codec", "quality", "bytes of", "bytes", "kbps", *columns],
            [
                [
                    trial.item,
                    f"{trial.target:g}",
                    _title(trial.codec),
                    f"{trial.setting:.2f}",
                    trial.checkpoint,
                    f"{trial.size:,}",
                    f"{trial.kbps:.2f}",
                    *_figures(trial.scores),
                ]
                for trial in trials
            ],
        ),
    ]
    return "\n\n".join(sections)


def audio_codec(info: checkpoint.CheckpointInfo) -> AudioCodec:
    """The codec of a checkpoint, on the CPU. Raises UsageError if it is not one for sounds."""
    codec = build(info, "cpu")
    if not isinstance(codec, AudioCodec):
        raise UsageError(f"{info.name} codes {info.medium}s: choose an audio codec")
    return codec


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "music")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of audio data, with music and samples"
    )
    parser.add_argument("--codecs", nargs="+", default=CODECS, help="checkpoints: names or folders")
    parser.add_argument("--kbps", type=float, nargs="+", default=TARGETS, help="targets in kilobits a second")
    arguments = program.parse(parser, argv)
    lacking = metrics.for_medium("audio", METRICS)[1]
    if lacking:
        raise UsageError("; ".join(lacking))
    infos = [checkpoint.find(name) for name in arguments.codecs]
    codecs = {info.name: audio_codec(info) for info in infos}
    files = held_out(arguments.data)
    trials: list[Trial] = []
    limits: dict[str, dict[str, float]] = {name: {} for name in codecs}
    words = {}
    for item, paths in files.items():
        sound = joined(paths)
        words[item] = f"{len(paths)} file{'s' if len(paths) > 1 else ''}, {sound.seconds:.1f} s"
        for name, codec in codecs.items():
            limits[name][item] = unquantised(codec, sound)
        trials += compare(item, sound, codecs, arguments.kbps)

    report = render(words, trials, limits)
    results = {
        "checkpoints": {
            info.name: {"symbols": info.symbols.hex(), "weights": info.weights.hex()} for info in infos
        },
        "transforms": str(next(iter(next(iter(codecs.values())).transform.parameters())).dtype).removeprefix(
            "torch."
        ),
        "rivals": {name: ANCHORS[name]().settings_note for name in (REFERENCE, *OTHERS)},
        "items": {item: [path.name for path in paths] for item, paths in files.items()},
        "unquantised_sdr": limits,
        "verdicts": [
            {
                "item": each.ours.item,
                "target": each.ours.target,
                "checkpoint": each.ours.checkpoint,
                "sdr_gain": each.gain,
                "psnr_and_sdr": each.outcome,
                "sounds_better": each.sounds_better,
            }
            for each in verdicts(trials)
        ],
        "trials": [trial._asdict() for trial in trials],
    }
    origin = provenance(
        f"{sum(map(len, files.values()))} files of {arguments.data.name}, held out from training"
    )
    write_results(arguments.output, results, origin, report=report + "\n", force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
