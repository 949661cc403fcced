"""Speech of speakers that training did not hear: codecs of codebooks against Opus.

Two sets: recordings of spoken keywords, and excerpts of audio books (LibriVox), all at 16 kHz and mono. Ours is coded
at the best level whose whole files, headers and checksums included, stay within each target, in bits over seconds of
the whole set. Opus is coded at the lowest setting of libsndfile (to 2 %) whose payload, without Ogg pages and headers,
has at least the rate of its target; where its lowest setting has more already, at that one. Both rates, of files and
of payload, stand beside each other; the payload of ours are the indices.

PESQ is wide-band, ViSQOL in speech mode, on some of the recordings alone where there are many, for it takes long;
keyword accuracy is that of the reference classifier on what was decoded. Encoding and decoding are timed on one thread.
Differences are of ours minus Opus on the same recordings, with the 95 % interval of a bootstrap over recordings. The
aim is PESQ and STOI at or above those of Opus at 6 and 8 kbps with ours at 3.2 and 6 kbps. Opus works at 48 kHz inside;
what it decodes is aligned and of the same length.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from compand import checkpoint
from compand.audio_codec import AudioCodec
from compand.bottlenecks.codebook import CodebookBottleneck
from compand.codec import QUALITY_STEPS, Codec
from compand.errors import MediaError, UsageError
from compand.eval import metrics
from compand.eval.anchors.audio import ANCHORS
from compand.eval.benchmarks import program
from compand.eval.benchmarks.index_coding import token_codec
from compand.eval.benchmarks.scores import Difference, Mapper, difference, judged, mapper, score
from compand.eval.items import load
from compand.eval.perception.models import load_model
from compand.eval.perception.task import TaskItem
from compand.eval.perception.tasks.keywords import Keywords
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.sounds import Sound, read_sound, resample
from compand.train.sounds import find_sounds, split

RATE = 16000
TARGETS = ((3.2, 6.0), (6.0, 8.0))
"""Kilobits a second of ours and of the Opus that it is held against."""

BOOKS = ("198-209*", "3436-172162*")
"""Patterns of the shell of the excerpts of audio books."""

KEYWORDS, LIBRIVOX = "keywords", "LibriVox"
OPUS = "opus"
METRICS = ("pesq", "stoi", "visqol")
LOOKED_AT = 16
"""Recordings by which settings are first sought."""

HALVINGS = 8
"""Of the range of settings in which Opus's is sought on these."""

STEP = 0.02
"""By which share the setting of Opus that these want is changed until it is the lowest for the whole set."""


class Trial(NamedTuple):
    """A set coded by one codec at one setting."""

    set: str
    codec: str
    target: float  # kbps
    setting: float
    kbps_files: float
    kbps_payload: float
    encode: float  # times real time
    decode: float
    scores: dict[str, list[float | None]]  # by metric, of each recording
    correct: list[bool]  # keywords alone


class Coded(NamedTuple):
    """A recording as a file."""

    file: bytes
    payload: int  # bytes
    seconds: float  # that encoding took


def kbps(size: int, sounds: Sequence[Sound]) -> float:
    """Bytes of a set as kilobits a second."""
    return 8e-3 * size / sum(sound.seconds for sound in sounds)


@cache
def _codec(name: str) -> Codec:
    return token_codec(checkpoint.find(name))


def _ours_coded(name: str, sound: Sound, setting: float) -> Coded:
    codec, level = _codec(name), int(setting)
    bottleneck = codec.bottleneck
    assert isinstance(bottleneck, CodebookBottleneck)
    start = time.perf_counter()
    data = codec.encode(sound, quality=level)
    seconds = time.perf_counter() - start
    tokens = codec.tokens(data)
    grids = tokens.reshape(-1, len(codec.level_vocabulary(level)), 1, tokens.shape[-1])
    payload = sum(len(bottleneck.compress_indices(grid, level * QUALITY_STEPS)) for grid in grids)
    return Coded(data, payload, seconds)


def _opus_coded(_: str, sound: Sound, setting: float) -> Coded:
    subject = ANCHORS[OPUS]()
    start = time.perf_counter()
    data = subject.encode(sound, setting)
    return Coded(data, len(data) - subject.overhead(data), time.perf_counter() - start)


def _decoded(name: str, data: bytes) -> tuple[Sound, float]:
    """A recording and the seconds that decoding took."""
    codec: Any = ANCHORS[OPUS]() if name == OPUS else _codec(name)
    start = time.perf_counter()
    sound = codec.decode(data)
    seconds = time.perf_counter() - start
    return Sound(sound.samples.clip(-1, 1), sound.rate), seconds


class Encoder:
    """Codes a set at the settings that are asked for, at each once.

    Args:
        name: of the codec: a checkpoint's name or folder, or OPUS.
        sounds: the set.
        mapped: see `scores.mapper`.
    """

    def __init__(self, name: str, sounds: Sequence[Sound], mapped: Mapper) -> None:
        self.name, self.sounds, self.mapped = name, list(sounds), mapped
        self._found: dict[tuple[float, bool], list[Coded]] = {}

    def coded(self, setting: float, some: bool = False) -> list[Coded]:
        """The set, or some of it, at a setting."""
        some = some and len(self.sounds) > LOOKED_AT
        if (setting, some) not in self._found:
            work = _opus_coded if self.name == OPUS else _ours_coded
            sounds = self._chosen(some)
            number = len(sounds)
            self._found[setting, some] = list(
                self.mapped(work, [self.name] * number, sounds, [setting] * number)
            )
            if not some:
                note(f"{Path(self.name).name} at {setting:g}: {self.files(setting):.2f} kbps of files")
        return self._found[setting, some]

    def files(self, setting: float, some: bool = False) -> float:
        """Kilobits a second of whole files."""
        return kbps(sum(len(each.file) for each in self.coded(setting, some)), self._chosen(some))

    def payload(self, setting: float, some: bool = False) -> float:
        """Kilobits a second of payload."""
        return kbps(sum(each.payload for each in self.coded(setting, some)), self._chosen(some))

    def _chosen(self, some: bool) -> list[Sound]:
        return program.spread(self.sounds, LOOKED_AT) if some else self.sounds


def ours(encoder: Encoder, levels: int, target: float) -> int:
    """The best of some levels within a target; the lowest where none is."""
    low, high = 1, levels
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if encoder.files(middle, True) <= target else (low, middle - 1)
    while low < levels and encoder.files(low + 1) <= target:
        low += 1
    while low > 1 and encoder.files(low) > target:
        low -= 1
    return low


def rival(encoder: Encoder, target: float) -> float:
    """The setting of Opus whose payload has the target's rate, or a little more; the lowest where that has more."""
    lowest = ANCHORS[OPUS].lowest
    if encoder.payload(lowest, True) > target and encoder.payload(lowest) >= target:
        return lowest
    low, high = lowest, 4 * target + lowest
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if encoder.payload(middle, True) >= target else (middle, high)
    # A frame has a whole number of bytes: the rate rises in steps, about which the few and all agree nearly.
    while encoder.payload(high) < target:
        high *= 1 + STEP
    while high > lowest and encoder.payload(below := max(high / (1 + STEP), lowest)) >= target:
        high = below
    return high


def trial(
    encoder: Encoder,
    setting: float,
    words: Sequence[TaskItem],
    place: tuple[str, float],
    names: Sequence[str],
    judged_by_visqol: int,
) -> Trial:
    """Decodes and measures a set at a setting.

    Args:
        encoder: of the set.
        setting: level or setting.
        words: what is said in the recordings; none if that is not judged.
        place: name of the set and target.
        names: of the metrics.
        judged_by_visqol: recordings that ViSQOL judges, at most.
    """
    sounds, made = encoder.sounds, encoder.coded(setting)
    outcomes = list(encoder.mapped(_decoded, [encoder.name] * len(made), [each.file for each in made]))
    heard = [sound for sound, _ in outcomes]
    found: dict[str, list[float | None]] = {name: [None] * len(sounds) for name in names}
    some = program.spread(range(len(sounds)), judged_by_visqol)
    for metric in names:
        chosen = some if metric == "visqol" else list(range(len(sounds)))
        values = score([(sounds[i], heard[i]) for i in chosen], [metric], encoder.mapped)
        for i, value in zip(chosen, values, strict=True):
            found[metric][i] = value[metric]
    correct = []
    if words:
        task, model = Keywords(Path()), load_model(Keywords.default_model)
        correct = [
            bool(task.outcome(model, sound, item)[0]) for sound, item in zip(heard, words, strict=True)
        ]
    total = sum(sound.seconds for sound in sounds)
    return Trial(
        *(place[0], Path(encoder.name).name, place[1], setting),
        encoder.files(setting),
        encoder.payload(setting),
        total / sum(each.seconds for each in made),
        total / sum(seconds for _, seconds in outcomes),
        found,
        correct,
    )


def sets(data: Path, limit: int | None) -> dict[str, tuple[list[Sound], list[TaskItem]]]:
    """Recordings and words of each set below the folder of audio data. Raises MediaError if there is none."""

    def fitted(sound: Any) -> Sound:
        assert isinstance(sound, Sound)
        mean = sound.samples.mean(0, keepdims=True, dtype=np.float64).astype(np.float32)
        return resample(Sound(mean, sound.rate), RATE)

    result: dict[str, tuple[list[Sound], list[TaskItem]]] = {}
    if (data / "keywords" / "val").is_dir():
        words = program.spread(Keywords.labelled(data / "keywords" / "val"), limit)
        result[KEYWORDS] = [fitted(load(item.item)) for item in words], words
    if (data / "music").is_dir():
        books = split(find_sounds(data / "music"), BOOKS)[1]
        if books:
            result[LIBRIVOX] = [fitted(read_sound(path)) for path in books], []
    if not result:
        raise MediaError(
            f"{data} has neither keywords/val nor audio books in music: give the folder of audio data"
        )
    return result


def verdicts(trials: Sequence[Trial], names: Sequence[str]) -> list[dict[str, Any]]:
    """Ours against Opus, by set, checkpoint and target."""
    rows = []
    for mine in trials:
        if mine.codec == OPUS:
            continue
        other = dict(TARGETS)[mine.target]
        theirs = next(t for t in trials if (t.set, t.codec, t.target) == (mine.set, OPUS, other))
        differences: dict[str, Difference | None] = {
            name: difference(mine.scores[name], theirs.scores[name]) for name in names
        }
        decisive = [differences[name] for name in ("pesq", "stoi") if name in names]
        rows.append(
            {
                "set": mine.set,
                "checkpoint": mine.codec,
                "target": mine.target,
                "opus_target": other,
                "kbps_files": mine.kbps_files,
                "opus_kbps_payload": theirs.kbps_payload,
                "differences": {name: d._asdict() if d else None for name, d in differences.items()},
                "within": mine.kbps_files <= mine.target,
                "met": mine.kbps_files <= mine.target
                and all(d is not None and d.mean >= 0 for d in decisive),
                "text": {name: str(d) if d else "" for name, d in differences.items()},
            }
        )
    return rows


def mean(values: Sequence[float | None]) -> float | None:
    """Mean over the recordings that a metric could judge."""
    return fmean(float(values[i] or 0) for i in places) if (places := judged([values])) else None


def render(
    trials: Sequence[Trial],
    judgements: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    notices: Sequence[str],
) -> str:
    """Tables and notices as Markdown."""
    titles = {metric.name: metric.title for metric in metrics.METRICS if metric.medium == "audio"}

    def cell(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    table = markdown_table(
        [
            "set",
            "codec",
            "target, kbps",
            "setting",
            "files, kbps",
            "payload, kbps",
            *(titles[name] for name in names),
            "keywords, %",
            "encode, x real time",
            "decode, x real time",
        ],
        [
            [
                t.set,
                t.codec,
                f"{t.target:g}",
                f"{t.setting:.2f}",
                cell(t.kbps_files, 2),
                cell(t.kbps_payload, 2),
                *(cell(mean(t.scores[name])) for name in names),
                cell(100 * fmean(t.correct), 1) if t.correct else "",
                cell(t.encode, 0),
                cell(t.decode, 0),
            ]
            for t in trials
        ],
    )
    against = markdown_table(
        ["set", "checkpoint", "ours", "Opus", *(f"{titles[name]}, difference" for name in names), "aim"],
        [
            [
                row["set"],
                row["checkpoint"],
                f"{row['kbps_files']:.2f} kbps (files)",
                f"{row['opus_kbps_payload']:.2f} kbps (payload)",
                *(row["text"][name] for name in names),
                "met" if row["met"] else "missed",
            ]
            for row in judgements
        ],
    )
    return "\n\n".join(["## Against Opus", against, "## All", table, *notices])


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "speech_codecs")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of audio data, with keywords and music")
    add("--codecs", nargs="+", default=["speech-rvq"], help="checkpoints: names or folders")
    add("--limit", type=int, help="take so many keywords alone")
    add("--metrics", nargs="+", default=list(METRICS), choices=METRICS)
    add("--visqol-items", type=int, default=24, help="recordings of a set that ViSQOL judges, at most")
    add("--workers", type=int, default=2, help="processes that code and measure")
    arguments = program.parse(parser, argv)
    chosen, notices = metrics.for_medium("audio", arguments.metrics)
    names = [metric.name for metric in chosen]
    infos = [checkpoint.find(name) for name in arguments.codecs]
    levels = {}
    for info in infos:
        codec = token_codec(info)
        if not isinstance(codec, AudioCodec):
            raise UsageError(f"{info.name} codes pictures: choose an audio codec")
        levels[str(info.path)] = codec.levels
    found = sets(arguments.data, arguments.limit)
    data = ", ".join(f"{len(sounds)} recordings of {kind}" for kind, (sounds, _) in found.items())
    if "visqol" in names:
        notices = [*notices, f"ViSQOL: at most {arguments.visqol_items} recordings of each set."]
    trials: list[Trial] = []
    with mapper(arguments.workers) as mapped:
        # The smaller sets first, so that there is something to look at soon.
        for kind, (sounds, words) in sorted(found.items(), key=lambda entry: len(entry[1][0])):
            encoders = {name: Encoder(name, sounds, mapped) for name in (OPUS, *levels)}
            for target, other in TARGETS:
                for name, encoder in encoders.items():
                    asked = other if name == OPUS else target
                    setting = (
                        rival(encoder, asked) if name == OPUS else float(ours(encoder, levels[name], asked))
                    )
                    trials.append(
                        trial(encoder, setting, words, (kind, asked), names, arguments.visqol_items)
                    )
                    note(f"{kind}, {trials[-1].codec} at {asked:g} kbps: measured")
                judgements = verdicts(trials, names)
                results = {
                    "checkpoints": {
                        info.name: {"symbols": info.symbols.hex(), "weights": info.weights.hex()}
                        for info in infos
                    },
                    "opus": ANCHORS[OPUS]().settings_note,
                    "verdicts": judgements,
                    "trials": [t._asdict() for t in trials],
                }
                report = "\n\n".join(
                    [
                        "# Speech against Opus",
                        (__doc__ or "").strip(),
                        "\n".join(
                            f"- {name}: {len(heard)} recordings, {sum(sound.seconds for sound in heard):.0f} s"
                            for name, (heard, _) in found.items()
                        ),
                        render(trials, judgements, names, notices),
                    ]
                )
                # After each target, so that what there is survives an interruption.
                write_results(arguments.output, results, provenance(data), report=report + "\n", force=True)
    print(report)


def note(text: str) -> None:
    """Tells how far the program is."""
    print(f"speech_codecs: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
