"""What encode-time refinement saves, from the bytes of files.

Every picture is encoded at every quality with every effort, and decoded again. The curve of an effort is the mean of
bits per pixel and of PSNR over the pictures at each quality; its BD-rate is taken against effort 0, and on the 24 Kodak
images against the published VTM curve as well. Per picture, the BD-rate against effort 0 is given as mean and range
over the pictures, and so is the cost that refinement lowers, R + lambda D in bits: of files that it finds no cheaper
form of, nothing changes. Seconds are those of `encode`, of the first file of each effort apart, in which libraries are
still being loaded.

What is measured is kept beside the results until they are written: the same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from compand.checkpoint import CheckpointInfo
from compand.errors import UsageError
from compand.eval.bdrate import Curve, bd_rate
from compand.eval.benchmarks import program
from compand.eval.provenance import markdown_table, provenance, write_results
from compand.eval.published import is_kodak, kodak
from compand.image_codec import ImageCodec
from compand.pictures import psnr, read_picture
from compand.refinement import SCHEDULES, schedule_of


class Trial(NamedTuple):
    """One file."""

    picture: str
    quality: float
    effort: int
    bytes: int
    pixels: int
    psnr: float  # dB
    cost: float  # bits: R + lambda D
    seconds: float  # of encoding


def measure(codec: ImageCodec, path: Path, quality: float, effort: int) -> Trial:
    """Encodes and decodes a picture."""
    picture = read_picture(path, strip=True)
    start = time.perf_counter()
    data = codec.encode(picture, quality=quality, effort=effort)
    seconds = time.perf_counter() - start
    decoded = codec.decode(data).pixels
    # Squared errors of channels are averaged, as training does it.
    error = np.square(decoded.astype(np.float64) - picture.pixels).sum() / picture.pixels.shape[2]
    cost = 8 * len(data) + codec.multiplier_at(codec.quality_units(quality)) * float(error)
    pixels = picture.height * picture.width
    return Trial(path.stem, quality, effort, len(data), pixels, psnr(picture.pixels, decoded), cost, seconds)


class Draft:
    """Trials so far, in a file of one JSON object a line.

    Args:
        path: the file; trials of another description in it are forgotten.
        description: what all trials have in common.
    """

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self.path = path
        self.trials: list[Trial] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines and json.loads(lines[0]) == description:
            self.trials = [Trial(**json.loads(line)) for line in lines[1:] if line.endswith("}")]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write([description, *(trial._asdict() for trial in self.trials)], "w")

    def find(self, picture: str, quality: float, effort: int) -> Trial | None:
        """The trial of that picture, if it was made."""
        wanted = picture, quality, effort
        return next((trial for trial in self.trials if trial[:3] == wanted), None)

    def add(self, trial: Trial) -> None:
        """Keeps a trial."""
        self.trials.append(trial)
        self._write([trial._asdict()], "a")

    def _write(self, objects: Sequence[dict[str, Any]], mode: str) -> None:
        with open(self.path, mode, encoding="utf-8") as file:
            file.writelines(json.dumps(each) + "\n" for each in objects)


def curve(trials: Sequence[Trial], effort: int, picture: str | None = None) -> Curve:
    """Mean bits per pixel and PSNR of an effort by quality, over all pictures or of one."""
    points = []
    for quality in sorted({trial.quality for trial in trials}):
        own = [
            trial
            for trial in trials
            if (trial.effort, trial.quality) == (effort, quality) and picture in (None, trial.picture)
        ]
        points.append((fmean(8 * t.bytes / t.pixels for t in own), fmean(t.psnr for t in own)))
    rate, quality_db = zip(*points, strict=True)
    return Curve(rate, quality_db)


def summary(trials: Sequence[Trial], efforts: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Figures by effort."""
    pictures = sorted({trial.picture for trial in trials})
    plain = {trial[:2]: trial for trial in trials if trial.effort == 0}
    published = kodak()["vtm"].curve if is_kodak(pictures) else None
    rows: dict[str, dict[str, Any]] = {}
    for effort in efforts:
        own = [trial for trial in trials if trial.effort == effort]
        found = curve(trials, effort)
        each = [
            bd_rate(curve(trials, 0, name), curve(trials, effort, name)).percent if effort else 0.0
            for name in pictures
        ]
        costs = [100 * (trial.cost / plain[trial[:2]].cost - 1) for trial in own]
        rows[str(effort)] = {
            "steps": SCHEDULES[effort].steps,
            "bpp": list(found.rate),
            "psnr": list(found.quality),
            "bd_rate": bd_rate(curve(trials, 0), found).percent if effort else 0.0,
            "bd_rate_vtm": bd_rate(published, found).percent if published else None,
            "bd_rate_pictures": {"mean": fmean(each), "least": max(each), "most": min(each)},
            "cost": {"mean": fmean(costs), "least": max(costs), "most": min(costs)},
            "unchanged": sum(cost == 0 for cost in costs),
            "files": len(own),
            "seconds": fmean(trial.seconds for trial in own[1:] or own),
        }
    return rows


def render(rows: dict[str, dict[str, Any]], qualities: Sequence[float]) -> str:
    """The tables, in Markdown."""

    def ranged(figures: dict[str, float]) -> str:
        return f"{figures['mean']:+.2f} % ({figures['least']:+.2f} to {figures['most']:+.2f})"

    compared = any(row["bd_rate_vtm"] is not None for row in rows.values())
    columns = ["effort", "steps", "BD-rate", *(["against VTM"] if compared else [])]
    columns += ["BD-rate by picture", "R + lambda D", "files unchanged", "seconds a file"]
    lines = []
    for effort, row in rows.items():
        refined = effort != "0"
        lines.append(
            [
                effort,
                f"{row['steps']}",
                f"{row['bd_rate']:+.2f} %" if refined else "",
                *([f"{row['bd_rate_vtm']:+.2f} %"] if compared else []),
                ranged(row["bd_rate_pictures"]) if refined else "",
                ranged(row["cost"]) if refined else "",
                f"{row['unchanged']} of {row['files']}" if refined else "",
                f"{row['seconds']:.2f}",
            ]
        )
    points = [
        [effort, *(f"{bpp:.4f} / {db:.3f}" for bpp, db in zip(row["bpp"], row["psnr"], strict=True))]
        for effort, row in rows.items()
    ]
    titles = ["effort", *(f"bpp / dB at {quality:g}" for quality in qualities)]
    return "\n\n".join([markdown_table(columns, lines), markdown_table(titles, points)])


def measured(
    info: CheckpointInfo,
    device: str,
    pictures: Sequence[Path],
    qualities: Sequence[float],
    efforts: Sequence[int],
    draft: Draft,
) -> list[Trial]:
    """Trials of all pictures; those that a draft has are not made again."""
    codec = program.image_codec(info, device)
    jobs = [(effort, path, quality) for effort in efforts for path in pictures for quality in qualities]
    trials = []
    for number, (effort, path, quality) in enumerate(jobs, 1):
        trial = draft.find(path.stem, quality, effort)
        if trial is None:
            trial = measure(codec, path, quality, effort)
            draft.add(trial)
            print(
                f"{number} of {len(jobs)}: effort {effort}, {path.stem}, quality {quality:g}: "
                f"{8 * trial.bytes / trial.pixels:.3f} bpp, {trial.psnr:.2f} dB, {trial.seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        trials.append(trial)
    return trials


def _effort(text: str) -> int:
    try:
        schedule_of(effort := int(text))
    except (ValueError, UsageError):
        raise argparse.ArgumentTypeError(
            f"effort {text} does not exist: choose from 0 to {len(SCHEDULES) - 1}"
        ) from None
    return effort


def main(argv: list[str] | None = None) -> None:
    parser = program.parser(__doc__ or "", "refinement")
    program.add_codec(parser)
    program.add_pictures(parser, required=True)
    add = parser.add_argument
    add("--limit", type=int, help="take so many pictures alone, evenly from all")
    add(
        "--efforts", type=_effort, nargs="+", default=list(range(len(SCHEDULES))), help="0 is always measured"
    )
    add("--qualities", type=float, nargs="+", help="two or more; all levels unless given")
    add("--device", default="auto", help="auto, cpu or cuda")
    arguments = program.parse(parser, argv)
    info, pictures = arguments.codec, program.spread(arguments.data, arguments.limit)
    low, high = map(int, info.qualities)
    qualities = sorted(set(arguments.qualities or range(low, high + 1)))
    efforts = sorted({0, *arguments.efforts})
    if len(qualities) < 2:
        raise UsageError("one quality makes no curve: give --qualities two or more")
    description = {"weights": info.weights.hex(), "device": arguments.device}
    draft = Draft(arguments.output.with_suffix(".draft"), description)
    trials = measured(info, arguments.device, pictures, qualities, efforts, draft)
    rows = summary(trials, efforts)
    tables = render(rows, qualities)
    data = program.folder_of(pictures)
    report = "\n\n".join(
        ["# Refinement at encode time", (__doc__ or "").strip(), f"{info.name}, {data}.", tables]
    )
    results = {
        "checkpoint": info.name,
        "qualities": qualities,
        "efforts": rows,
        "trials": [trial._asdict() for trial in trials],
    }
    write_results(arguments.output, results, provenance(data), report=report + "\n", force=arguments.force)
    draft.path.unlink()
    print(tables)


if __name__ == "__main__":
    main()
