"""Speech of speakers that training did not hear: codecs of codebooks against Opus.

Two sets: recordings of spoken keywords, and excerpts of audio books (LibriVox), all at 16 kHz and mono. Ours is coded
at the best level whose whole files, headers and checksums included, stay within each target, in bits over seconds of
the whole set. Opus is coded at the lowest setting of libsndfile whose payload, without Ogg pages and headers, has at
least the rate of its target; where its lowest setting has more already, at that one. Both rates, of files and of
payload, stand beside each other; the payload of ours are the indices.

PESQ is wide-band, ViSQOL in speech mode; keyword accuracy is that of the reference classifier on what was decoded.
Differences are of ours minus Opus on the same recordings, with the 95 % interval of a bootstrap over recordings. The
aim is PESQ and STOI at or above those of Opus at 6 and 8 kbps with ours at 3.2 and 6 kbps. Opus works at 48 kHz inside;
what it decodes is aligned and of the same length.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
from compand.eval.benchmarks.scores import Difference, difference, judged, score
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
METRICS = ("pesq", "stoi", "visqol")
HALVINGS = 9
"""Of the range of settings in which Opus's is sought."""


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
    """The files of a set."""

    files: list[bytes]
    payload: int  # bytes
    seconds: float  # that encoding took


def kbps(size: int, sounds: Sequence[Sound]) -> float:
    """Bytes of a set as kilobits a second."""
    return 8e-3 * size / sum(sound.seconds for sound in sounds)


def ours(codec: Codec, sounds: Sequence[Sound], target: float) -> tuple[int, Coded]:
    """The best level within a target, and its files; the lowest level where none is."""
    result = _coded(codec, sounds, 1)
    level = 1
    for higher in range(2, codec.levels + 1):
        more = _coded(codec, sounds, higher)
        if kbps(sum(map(len, more.files)), sounds) > target:
            break
        level, result = higher, more
    return level, result


def _coded(codec: Codec, sounds: Sequence[Sound], level: int) -> Coded:
    bottleneck = codec.bottleneck
    assert isinstance(bottleneck, CodebookBottleneck)
    start = time.perf_counter()
    files = [codec.encode(sound, quality=level) for sound in sounds]
    seconds = time.perf_counter() - start
    payload = 0
    for data in files:
        tokens = codec.tokens(data)
        grids = tokens.reshape(-1, len(codec.level_vocabulary(level)), 1, tokens.shape[-1])
        payload += sum(len(bottleneck.compress_indices(grid, level * QUALITY_STEPS)) for grid in grids)
    return Coded(files, payload, seconds)


def rival(sounds: Sequence[Sound], target: float) -> tuple[float, Coded]:
    """The lowest setting of Opus whose payload has at least the target's rate, and its files."""
    subject = ANCHORS["opus"]()

    def coded(setting: float) -> Coded:
        start = time.perf_counter()
        files = [subject.encode(sound, setting) for sound in sounds]
        payload = sum(len(data) - subject.overhead(data) for data in files)
        return Coded(files, payload, time.perf_counter() - start)

    low, high = subject.lowest, 4 * target + subject.lowest
    result = coded(low)
    if kbps(result.payload, sounds) >= target:
        return low, result
    setting, result = high, coded(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = coded(middle)
        if kbps(tried.payload, sounds) >= target:
            high = setting = middle
            result = tried
        else:
            low = middle
    return setting, result


def trial(
    name: str,
    sounds: Sequence[Sound],
    words: Sequence[TaskItem],
    codec: Any,
    found: tuple[float, Coded],
    place: tuple[str, float],
    names: Sequence[str],
    workers: int,
) -> Trial:
    """Decodes and measures the files of a set.

    Args:
        name: of the codec.
        sounds: the originals.
        words: what is said in them; none if that is not judged.
        codec: what decodes.
        found: setting and files.
        place: name of the set and target.
        names: of the metrics.
        workers: processes that measure.
    """
    setting, made = found
    start = time.perf_counter()
    decoded = [codec.decode(data) for data in made.files]
    seconds = time.perf_counter() - start
    heard = [Sound(sound.samples.clip(-1, 1), sound.rate) for sound in decoded]
    scores = score(list(zip(sounds, heard, strict=True)), names, workers)
    correct = []
    if words:
        task, model = Keywords(Path()), load_model(Keywords.default_model)
        correct = [
            bool(task.outcome(model, sound, item)[0]) for sound, item in zip(heard, words, strict=True)
        ]
    total = sum(sound.seconds for sound in sounds)
    return Trial(
        *(place[0], name, place[1], setting),
        kbps(sum(map(len, made.files)), sounds),
        kbps(made.payload, sounds),
        total / made.seconds,
        total / seconds,
        {metric: [each[metric] for each in scores] for metric in names},
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
        if mine.codec == "opus":
            continue
        other = dict(TARGETS)[mine.target]
        theirs = next(t for t in trials if (t.set, t.codec, t.target) == (mine.set, "opus", other))
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
    add("--workers", type=int, default=1, help="processes that measure what was decoded")
    arguments = program.parse(parser, argv)
    chosen, notices = metrics.for_medium("audio", arguments.metrics)
    names = [metric.name for metric in chosen]
    infos = [checkpoint.find(name) for name in arguments.codecs]
    codecs = {info.name: token_codec(info) for info in infos}
    for name, codec in codecs.items():
        if not isinstance(codec, AudioCodec):
            raise UsageError(f"{name} codes pictures: choose an audio codec")
    found = sets(arguments.data, arguments.limit)
    opus = ANCHORS["opus"]()
    trials: list[Trial] = []
    for kind, (sounds, words) in found.items():
        for target, other in TARGETS:
            for name, codec in codecs.items():
                level, made = ours(codec, sounds, target)
                given = (float(level), made)
                trials.append(
                    trial(name, sounds, words, codec, given, (kind, target), names, arguments.workers)
                )
            setting = rival(sounds, other)
            trials.append(
                trial("opus", sounds, words, opus, setting, (kind, other), names, arguments.workers)
            )
    judgements = verdicts(trials, names)
    report = "\n\n".join(
        [
            "# Speech against Opus",
            (__doc__ or "").strip(),
            "\n".join(
                f"- {kind}: {len(sounds)} recordings, {sum(sound.seconds for sound in sounds):.0f} s"
                for kind, (sounds, _) in found.items()
            ),
            render(trials, judgements, names, notices),
        ]
    )
    results = {
        "checkpoints": {
            info.name: {"symbols": info.symbols.hex(), "weights": info.weights.hex()} for info in infos
        },
        "opus": opus.settings_note,
        "verdicts": judgements,
        "trials": [t._asdict() for t in trials],
    }
    data = ", ".join(f"{len(sounds)} recordings of {kind}" for kind, (sounds, _) in found.items())
    write_results(arguments.output, results, provenance(data), report=report + "\n", force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
