"""From the seconds of all passes to tables: speeds with quartiles, stages, memory, ratios."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from compand.eval.provenance import markdown_table
from compand.eval.speed.contenders import Contender
from compand.eval.speed.stages import DIRECTIONS, STAGES
from compand.eval.subjects import Subject

COLUMNS = {
    "codec": "the contender, as it was written on the command line",
    "kind": "compand, classical, lossless, identity, or peer (a model of another project)",
    "quality": "the quality it ran at",
    "direction": "encode (samples in memory to closed files) or decode (files to samples in memory)",
    "round": "number of the round, from 1; in each round every contender has a fresh process",
    "timed": "total (only the two ends of a pass are timed) or stages (each stage is timed)",
    "repetition": "number of the pass over all items, of those timed so in this process and direction, from 1",
    "seconds": "duration of the pass",
    "speed": "megapixels, or seconds of sound, of the pass by its duration",
    "bytes": "size of all files of the pass",
} | {f"{stage}_ms": f"milliseconds of the pass in the stage {stage}, if it was timed" for stage in STAGES}
"""Columns of results.csv, and keys of the rows in results.json."""

_STAGE_TITLES = {"entropy_coding": "entropy coding", "io": "IO"}
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Amounts:
    """What one pass codes.

    Attributes:
        medium: "image" or "audio".
        items: megapixels, or seconds of sound, of each file.
    """

    medium: str
    items: Sequence[float]

    @property
    def total(self) -> float:
        """Of all files."""
        return sum(self.items)

    @property
    def unit(self) -> str:
        """Unit of speeds."""
        return "MP/s" if self.medium == "image" else "s/s"

    def rate(self, sizes: Sequence[int]) -> dict[str, float]:
        """Mean bits a pixel, or kilobits a second, of files of these sizes in bytes, under its name."""
        per_unit = statistics.fmean(8 * size / item for size, item in zip(sizes, self.items, strict=True))
        return {"bpp": per_unit / 1e6} if self.medium == "image" else {"kbps": per_unit / 1e3}


@dataclass
class Entry:
    """A contender with what its processes reported, one dict a round (see `worker.measure`)."""

    contender: Contender
    subject: Subject
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Its name in the results."""
        return self.contender.text_for(self.subject.name)

    def seconds(self, direction: str) -> list[list[float]]:
        """Durations of the passes that were timed as a whole, by round."""
        return [report["totals"][direction] for report in self.rounds]

    def stages(self, direction: str) -> dict[str, list[float]]:
        """Seconds of each stage in all passes that were timed in stages; stages in the order of STAGES."""
        found: dict[str, list[float]] = {}
        for name in STAGES:
            lists = [report["stages"][direction].get(name, []) for report in self.rounds]
            if any(lists):
                found[name] = list(chain(*lists))
        return found


def rows(entries: Sequence[Entry], amounts: Amounts) -> list[dict[str, Any]]:
    """One row a timed pass, with the keys of COLUMNS; stages that were not timed are None."""
    return [
        {
            "codec": entry.key,
            "kind": entry.subject.kind,
            "quality": report["quality"],
            "direction": direction,
            "round": number,
            "timed": timed,
            "repetition": repetition,
            "seconds": seconds,
            "speed": amounts.total / seconds,
            "bytes": sum(report["sizes"]),
        }
        | {f"{stage}_ms": 1e3 * parts[stage] if stage in parts else None for stage in STAGES}
        for entry in entries
        for number, report in enumerate(entry.rounds, start=1)
        for direction in DIRECTIONS
        for timed, repetition, seconds, parts in _passes(report, direction)
    ]


def _passes(
    report: Mapping[str, Any], direction: str
) -> Iterator[tuple[str, int, float, Mapping[str, float]]]:
    """(timed, repetition, seconds, seconds by stage) of each pass."""
    for repetition, seconds in enumerate(report["totals"][direction], start=1):
        yield "total", repetition, seconds, {}
    stages = report["stages"][direction]
    for repetition, parts in enumerate(zip(*stages.values(), strict=True), start=1):
        yield "stages", repetition, sum(parts), dict(zip(stages, parts, strict=True))


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a head; None is an empty field."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return stream.getvalue()


def codec_summaries(entries: Sequence[Entry], amounts: Amounts, reference: str) -> dict[str, Any]:
    """The part "codecs" of the summary, by key and in order.

    Args:
        entries: all contenders that were measured in every round.
        amounts: what a pass codes.
        reference: key of the contender that ratios are relative to.
    """
    base = next(entry for entry in entries if entry.key == reference)
    return {entry.key: _codec_summary(entry, amounts, base) for entry in entries}


def _codec_summary(entry: Entry, amounts: Amounts, base: Entry) -> dict[str, Any]:
    first, subject = entry.rounds[0], entry.subject
    point = {"quality": first["quality"], "items": len(amounts.items), "bytes": sum(first["sizes"])}
    speed: dict[str, Any] = {"quality": first["quality"], "bytes": point["bytes"], "device": first["device"]}
    speed["milliseconds"], speed["stages"] = {}, {}
    scale = 1e3 / len(amounts.items)
    for direction in DIRECTIONS:
        by_round, base_by_round = entry.seconds(direction), base.seconds(direction)
        every, base_every = list(chain(*by_round)), list(chain(*base_by_round))
        low, middle, high = _quartiles(every)
        speed[direction] = {
            "median": amounts.total / middle,
            "q1": amounts.total / high,
            "q3": amounts.total / low,
            "unit": amounts.unit,
            "repetitions": len(every),
        }
        speed["milliseconds"][direction] = scale * middle
        speed["stages"][direction] = {
            name: scale * statistics.median(seconds) for name, seconds in entry.stages(direction).items()
        }
        ratios = [
            statistics.median(theirs) / statistics.median(own)
            for own, theirs in zip(by_round, base_by_round, strict=True)
        ]
        speed[f"ratio_{direction}"] = statistics.median(base_every) / middle
        speed[f"ratio_{direction}_range"] = [min(ratios), max(ratios)]
    for name in ("peak_rss", "baseline_rss", "peak_gpu"):
        measured = [report[name] for report in entry.rounds if report[name] is not None]
        speed[f"{name}_mb"] = max(measured) / _MEGABYTE if measured else None
    notes = [subject.settings_note.rstrip("."), first["note"]]
    return {
        "title": entry.contender.title(subject),
        "kind": subject.kind,
        "note": "; ".join(filter(None, notes)) + ".",
        "published": False,
        # Files of random weights say nothing of a peer's rate.
        "points": [] if subject.kind == "peer" else [point | amounts.rate(first["sizes"])],
        "speed": speed,
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def render(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown: speeds, stages, memory, and under which conditions."""
    codecs, run = summary["codecs"], summary["speed"]
    unit, reference = run["unit"], codecs[run["reference"]]["title"]
    head = [f"relative to {reference}", "quality"]
    for direction in DIRECTIONS:
        head += [f"{direction}, {unit}", "quartiles", "ratio"]
    speeds = []
    for codec in codecs.values():
        speed = codec["speed"]
        cells = [codec["title"], f"{speed['quality']:g}"]
        for direction in DIRECTIONS:
            own = speed[direction]
            cells += [
                _figure(own["median"]),
                f"{_figure(own['q1'])} to {_figure(own['q3'])}",
                f"{_figure(speed[f'ratio_{direction}'])} x",
            ]
        speeds.append(cells)

    rivals = [codec for codec in codecs.values() if codec["kind"] == "peer"]
    faster = [
        [codec["title"]]
        + [
            f"{_figure(rival['speed']['milliseconds'][direction] / codec['speed']['milliseconds'][direction])} x"
            for rival in rivals
            for direction in DIRECTIONS
        ]
        for codec in codecs.values()
        if codec["kind"] == "compand"
    ]
    timed = {name for c in codecs.values() for stages in c["speed"]["stages"].values() for name in stages}
    names = [name for name in run["stage_names"] if name in timed]
    stages = [
        [f"{codec['title']}: {direction}"]
        + [_figure(milliseconds[name]) if name in milliseconds else "" for name in names]
        for codec in codecs.values()
        for direction, milliseconds in codec["speed"]["stages"].items()
    ]
    memory = [
        [codec["title"], codec["speed"]["device"]]
        + [
            "" if codec["speed"][name] is None else f"{codec['speed'][name]:.0f}"
            for name in ("peak_rss_mb", "baseline_rss_mb", "peak_gpu_mb")
        ]
        for codec in codecs.values()
    ]
    per_item = "ms" if run["items"] == 1 else "ms an item"
    parts = [
        f"# {summary['title']}",
        markdown_table(head, speeds),
        *([markdown_table(["as fast as", *_each_direction(rivals)], faster)] if rivals and faster else []),
        markdown_table([f"stage, {per_item}", *(_STAGE_TITLES.get(name, name) for name in names)], stages),
        markdown_table(
            ["memory, MB", "device", "highest resident", "after loading", "highest on the GPU"], memory
        ),
        "\n".join(f"- {sentence}" for sentence in run["conditions"]),
        "\n".join(f"- {codec['title']}: {codec['note']}" for codec in codecs.values()),
    ]
    for name, lines in (
        ("Notices", summary["notices"]),
        ("Problems", [problem["message"] for problem in summary["problems"]]),
    ):
        if lines:
            parts.append("\n".join([f"{name}:", "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def _each_direction(codecs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{codec['title']}: {direction}" for codec in codecs for direction in DIRECTIONS]


def _figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
