"""`compand eval rd`: rate and distortion of codecs on a folder, with Bjontegaard deltas against one of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compand.cli import table
from compand.errors import MediaError, UsageError
from compand.eval import subjects
from compand.eval.anchors import MISSING
from compand.eval.bdrate import Curve, bd_quality, bd_rate
from compand.eval.items import Item, Problem, content_hash, find_items, reason
from compand.eval.measurements import (
    EXAMPLES,
    RATES,
    Row,
    Store,
    complete_items,
    counted_rows,
    mean_points,
    row_notices,
    summary_codecs,
    write_results,
)
from compand.eval.metrics import METRICS, Metric, for_medium
from compand.eval.provenance import provenance
from compand.eval.published import TITLES, is_kodak, kodak
from compand.eval.runner import example_folders, measure_all
from compand.eval.selection import select

DEFAULT_ANCHORS = {"image": "jpeg", "audio": "opus"}
"""What Bjontegaard deltas are against where no published curve fits the data."""

BD_METRICS = {"image": ("psnr", "ms_ssim"), "audio": ("visqol", "pesq", "log_mel", "stoi", "sdr", "psnr")}
"""Metrics with Bjontegaard deltas; the first one present stands for the run. SI-SDR is left out: it falls with rate in
codecs that do not keep the waveform."""

PUBLISHED_ANCHOR = "vtm"
NOT_KODAK = "they are means over the 24 Kodak images, which these items are not"
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Options:
    """What `compand eval rd` was asked for; see `compand.eval.cli`."""

    data: Path
    output: Path
    codecs: Sequence[str] | None = None
    qualities: str | None = None
    metrics: Sequence[str] | None = None
    anchor: str | None = None
    medium: str | None = None
    published: str = "auto"
    examples: int = 3
    plugins: tuple[str, ...] = ()
    jobs: int | None = None
    force: bool = False
    quiet: bool = False


def run(options: Options) -> int:
    """Measure, write the results and the page, and print a summary.

    Returns:
        The exit status: 1 if anything could not be measured, else 0.

    Raises:
        UsageError: an option cannot be used, or the output folder holds something else.
        CompandError: measuring cannot start.
    """
    subjects.load_plugins(options.plugins)
    out, data = options.output.resolve(), options.data.resolve()
    if out == data or out in data.parents:
        raise UsageError(f"{options.output} holds all items: choose another -o")
    items, problems = find_items(options.data, options.medium, exclude=out)
    medium = items[0].medium
    chosen = select(options.codecs, options.qualities, medium)
    metrics, notices = for_medium(medium, options.metrics)
    if options.codecs is None:
        notices += [f"{name} is left out: {why}" for name, (kind, why) in MISSING.items() if kind == medium]
    if not metrics:
        raise UsageError(f"no metric for {medium} is left: {'; '.join(notices)}")
    readable, hashes, unreadable = hashed(items)
    overlay = published_curves(options.published, [item.name for item in items], medium)
    names = [subjects.find(source, medium).name for source in chosen]
    anchor = _anchor(options.anchor, names, medium, overlay, comparable=is_kodak(hashes))
    description = {
        "kind": "rd",
        "medium": medium,
        "data": options.data.resolve().name,
        "items": hashes,
        "metrics": [metric.name for metric in metrics],
        "plugins": list(options.plugins),
    }
    with Store.open(options.output, description, force=options.force) as store:
        problems += unreadable
        problems += measure_all(
            readable,
            chosen,
            [metric.name for metric in metrics],
            store,
            jobs=options.jobs,
            plugins=options.plugins,
            examples=options.output / EXAMPLES,
            example_items=options.examples,
            quiet=options.quiet,
        )
        kept = store.description["metrics"]
        metrics = [metric for metric in METRICS if metric.medium == medium and metric.name in kept]
        selected = dict(zip(names, chosen.values(), strict=True))
        summary = summarise(store, metrics, anchor, overlay, problems, notices, selected)
        summary["examples"] = kept_examples(options.output, readable, options.examples)
        written = write_results(store, summary, provenance(summary["data"]))
        written += write_page(store)
    report(summary, written, quiet=options.quiet)
    return 1 if problems else 0


def hashed(items: Sequence[Item]) -> tuple[list[Item], dict[str, str], list[Problem]]:
    """The items that can be read, hashes of their content by name, and a problem for each of the others.

    Raises:
        UsageError: none can be read.
    """
    hashes, problems = {}, []
    for item in items:
        try:
            hashes[item.name] = content_hash(item)
        except MediaError as error:
            problems.append(Problem(item.name, "", None, reason(error, item)))
    if not hashes:
        raise UsageError(f"no item can be read, {problems[0].message}")
    return [item for item in items if item.name in hashes], hashes, problems


# ------------------------------------------------------------------------------------------------ summary


def published_curves(wanted: str, items: Sequence[str], medium: str) -> dict[str, dict[str, Curve]]:
    """Published curves that belong beside the items, by metric and codec.

    Args:
        wanted: "auto" (on the 24 Kodak images, by their names), "kodak" (on all images) or "none".
        items: names of the items.
        medium: of the items.

    Raises:
        UsageError: another word, or "kodak" for sounds.
    """
    if wanted not in ("auto", "kodak", "none"):
        raise UsageError(f"--published {wanted} does not exist: choose auto, kodak or none")
    if wanted == "kodak" and medium != "image":
        raise UsageError(f"--published kodak has no curves for {medium}: leave it out")
    if wanted == "none" or medium != "image" or (wanted == "auto" and not is_kodak(items)):
        return {}
    return {
        metric: {name: found.curve for name, found in kodak(metric).items() if name in TITLES}
        for metric in ("psnr", "ms_ssim")
    }


def summarise(
    store: Store,
    metrics: Sequence[Metric],
    anchor: str | None,
    overlay: Mapping[str, Mapping[str, Curve]],
    problems: Sequence[Problem],
    notices: Sequence[str],
    selected: Mapping[str, Collection[float]] | None = None,
) -> dict[str, Any]:
    """What plots and the page are drawn from; README.md documents it.

    Args:
        store: the measurements.
        metrics: the columns to summarise.
        anchor: what Bjontegaard deltas are against; None: there is nothing to compare with.
        overlay: what `published_curves` returned.
        problems, notices: go into the summary as they are.
        selected: qualities of this run by codec, as `counted_rows` takes them.
    """
    medium = store.description["medium"]
    names = [metric.name for metric in metrics]
    rows, left_out = counted_rows(store, selected)
    codecs, fewer = summary_codecs(store, names, rows)
    comparison = _Comparison(rows, codecs, overlay, medium, store.description["items"])
    notices = [*notices, *left_out, *fewer]
    if overlay and not comparison.comparable:
        notices.append(f"published curves are drawn, and not compared with: {NOT_KODAK}")
    codecs |= published_entries(overlay, codecs, names)
    deltas = [
        comparison.deltas(anchor, metric)
        for metric in metrics
        if anchor is not None and metric.name in BD_METRICS[medium]
    ]
    deltas.sort(key=lambda delta: BD_METRICS[medium].index(delta["metric"]))
    count, folder = len(store.description["items"]), store.description["data"]
    return {
        "kind": store.description["kind"],
        "title": f"Rate and distortion on {folder}",
        "medium": medium,
        "data": f"{count} item{'s' * (count != 1)} of {folder}",
        "codecs": codecs,
        "metrics": [
            {"name": metric.name, "title": metric.title, "unit": metric.unit, "better": metric.better}
            for metric in metrics
        ],
        "bd": deltas[0] if deltas else None,
        "bd_others": deltas[1:],
        "problems": [problem._asdict() for problem in problems],
        "notices": [*notices, *row_notices(store.rows()), *comparison.reproductions()],
    }


def published_entries(
    overlay: Mapping[str, Mapping[str, Curve]], measured: Collection[str], metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Published curves as the summary has codecs; the key of one that is measured too ends in "-published"."""
    entries: dict[str, dict[str, Any]] = {}
    for metric in (name for name in metrics if name in overlay):
        for name, curve in overlay[metric].items():
            key = f"{name}-published" if name in measured else name
            entry = entries.setdefault(
                key,
                {
                    "title": TITLES[name],
                    "kind": "published",
                    "note": f"published: {kodak(metric)[name].source}",
                    "published": True,
                    "points": {},
                },
            )
            for rate, value in zip(curve.rate, curve.quality, strict=True):
                point = entry["points"].setdefault(rate, {"quality": None, "items": 24, "bpp": rate})
                point[metric] = value
    for entry in entries.values():
        entry["points"] = [entry["points"][rate] for rate in sorted(entry["points"])]
    return {key: entries[key] for name in TITLES for key in (name, f"{name}-published") if key in entries}


class _Comparison:
    """Bjontegaard deltas between measured and published curves, on the same items."""

    def __init__(
        self,
        rows: Sequence[Row],
        codecs: Mapping[str, Mapping[str, Any]],
        overlay: Mapping[str, Mapping[str, Curve]],
        medium: str,
        items: Collection[str],
    ) -> None:
        self._rows = {name: [row for row in rows if row["codec"] == name] for name in codecs}
        self._titles = {name: codec["title"] for name, codec in codecs.items()}
        self._overlay = overlay
        self._rate = RATES[medium]
        self._count = len(items)
        self.comparable = is_kodak(items)

    def deltas(self, anchor: str, metric: Metric) -> dict[str, Any]:
        """All deltas against one codec; BD-rate in percent, BD-quality in the metric's unit (MS-SSIM: dB)."""
        others = [name for name in self._rows if name != anchor]
        others += [
            name if name not in self._rows else f"{name}-published"
            for name in self._overlay.get(metric.name, ())
            if self.comparable and (name != anchor or name in self._rows)
        ]
        return {
            "anchor": anchor,
            "metric": metric.name,
            "unit": "dB" if metric.name == "ms_ssim" else metric.unit,
            "rows": [self._delta(anchor, name, metric) for name in others],
        }

    def _delta(self, anchor: str, name: str, metric: Metric) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(("bd_rate", "bd_psnr", "low", "high"))
        row = {"codec": name, **row, "reason": None}
        try:
            first, second = self._curves(anchor, name, metric)
            rate = bd_rate(first, second)
        except UsageError as error:
            return row | {"reason": str(error).partition(": ")[0]}
        try:
            difference = bd_quality(first, second).difference
        except UsageError:  # the curves share qualities at rates that they do not share
            difference = None
        low, high = sorted(abs(value) if metric.better == "lower" else value for value in rate[1:])
        return row | {"bd_rate": rate.percent, "bd_psnr": difference, "low": low, "high": high}

    def _curves(self, anchor: str, name: str, metric: Metric) -> tuple[Curve, Curve]:
        """Both curves on the items that both have. Raises UsageError where there are none."""
        measured = [each for each in (anchor, name) if each in self._rows]
        if len(measured) < 2 and not self.comparable:
            raise UsageError(NOT_KODAK)
        items = [set(complete_items(self._rows[each], metric.name).get(each, ())) for each in measured]
        common = set.intersection(*items) if items else set()
        if measured and not common:
            raise UsageError("no item was measured with both codecs: see the problems")
        if len(measured) == 1 and len(common) < self._count:
            raise UsageError(f"measured on {len(common)} of the {self._count} items of the published curve")
        return self._curve(anchor, metric, common), self._curve(name, metric, common)

    def _curve(self, name: str, metric: Metric, items: Collection[str]) -> Curve:
        if name in self._rows:
            points = mean_points(self._rows[name], metric.name, items)[name]
            pairs: Iterable[tuple[float, float]] = [(point.rate, point.value) for point in points]
        else:
            published = self._overlay.get(metric.name, {})
            curve = published.get(name) or published.get(name.removesuffix("-published"))
            if curve is None:
                raise UsageError(f"{TITLES.get(name, name)} has no published {metric.title}")
            pairs = zip(curve.rate, curve.quality, strict=True)
        pairs = sorted((rate, _growing(metric, value)) for rate, value in pairs)
        finite = [pair for pair in pairs if math.isfinite(pair[1])]
        if len(finite) < 2:
            raise UsageError(f"fewer than two lossy points of {name}: add qualities")
        rates, values = zip(*finite, strict=True)
        return Curve(rates, values)

    def reproductions(self) -> list[str]:
        """How far measured curves lie from those that others published for the same codec."""
        sentences = []
        for name, curve in self._overlay.get("psnr", {}).items() if self.comparable else ():
            if len(complete_items(self._rows.get(name, ()), "psnr").get(name, ())) != self._count:
                continue
            points = [
                point
                for point in mean_points(self._rows[name], "psnr")[name]
                if curve.rate[0] <= point.rate <= curve.rate[-1]
            ]
            if points:
                gaps = [
                    point.value - float(np.interp(point.rate, curve.rate, curve.quality)) for point in points
                ]
                sentences.append(
                    f"{self._titles[name]}: PSNR at equal rate is {min(gaps):+.2f} to {max(gaps):+.2f} dB from the "
                    f"published curve ({points[0].rate:.2f} to {points[-1].rate:.2f} bpp)"
                )
        return sentences


def _growing(metric: Metric, value: float) -> float:
    """A figure that grows with quality, on a scale that can be averaged: MS-SSIM in dB, as curves of it are drawn."""
    if metric.name == "ms_ssim":
        return -10 * math.log10(1 - value) if value < 1 else math.inf
    return -value if metric.better == "lower" else value


def _anchor(
    wanted: str | None,
    names: Sequence[str],
    medium: str,
    overlay: Mapping[str, Mapping[str, Curve]],
    *,
    comparable: bool,
) -> str | None:
    """Name of the codec that Bjontegaard deltas are against. Raises UsageError if the one wanted is not there.

    Args:
        wanted: what was asked for.
        names: of the codecs that are measured.
        medium: of the items.
        overlay: published curves.
        comparable: whether the items are those of the published curves.
    """
    if wanted is None:
        if overlay and comparable:
            return PUBLISHED_ANCHOR
        candidates = [name for name in (DEFAULT_ANCHORS[medium], *names) if name in names]
        return candidates[0] if len(names) > 1 else None
    if wanted in names or wanted in overlay.get("psnr", ()):
        return wanted
    found = subjects.find(wanted, medium).name
    if found not in names:
        raise UsageError(f"--anchor {wanted} is not measured here: add it to --codecs")
    return found


def kept_examples(out: Path, items: Sequence[Item], count: int) -> list[dict[str, str]]:
    """Items whose files were kept, with the folder of each relative to the results."""
    return [
        {"item": name, "folder": f"{EXAMPLES}/{folder}"}
        for name, folder in example_folders(items, count).items()
        if (out / EXAMPLES / folder).is_dir()
    ]


# ----------------------------------------------------------------------------------------------- output


def write_page(store: Store) -> list[Path]:
    """Plots and the page of the results that a store's folder has."""
    from compand.eval.report import write

    written = write(store.out)
    store.add_written(path.name for path in written)
    return written


def report(summary: Mapping[str, Any], written: Sequence[Path], *, quiet: bool) -> None:
    """Print a run's figures on standard output, its notices and problems on standard error."""
    if not quiet:
        for notice in summary["notices"]:
            print(f"note: {notice}", file=sys.stderr)
        print(points_table(summary))
        if summary["bd"]:
            print(f"\n{deltas_table(summary)}")
        print(f"\nwritten: {', '.join(map(str, written))}")
    report_problems(summary["problems"])


def report_problems(problems: Sequence[Mapping[str, Any]]) -> None:
    """A summary's problems on standard error: the same one of several items in a line, and not too many lines."""
    if not problems:
        return
    items: dict[str, dict[str, None]] = {}
    for problem in problems:
        items.setdefault(problem["message"].removeprefix(f"{problem['item']}: "), {})[problem["item"]] = None
    lines = []
    for message, names in items.items():
        first = ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(message if first in message else f"{first}: {message}")
    print(f"compand: {len(problems)} problem{'s' * (len(problems) != 1)}:", file=sys.stderr)
    for line in lines[:SHOWN_PROBLEMS]:
        print(f"  {line}", file=sys.stderr)
    if len(lines) > SHOWN_PROBLEMS:
        print(f"  and {len(lines) - SHOWN_PROBLEMS} more, in results.json", file=sys.stderr)


def points_table(summary: Mapping[str, Any]) -> str:
    """Means of every measured codec and quality as text."""
    measured = {name: codec for name, codec in summary["codecs"].items() if not codec["published"]}
    rate = RATES[summary["medium"]]
    columns = {rate: rate.upper()}
    if any("kbps_payload" in point for codec in measured.values() for point in codec["points"]):
        columns["kbps_payload"] = "WITHOUT CONTAINER"
    columns |= {metric["name"]: metric["title"] for metric in summary["metrics"]}
    rows = [
        [
            name,
            f"{point['quality']:g}",
            str(point["items"]),
            *(f"{point[column]:.4g}" if column in point else "" for column in columns),
        ]
        for name, codec in measured.items()
        for point in codec["points"]
    ]
    return table([["CODEC", "QUALITY", "ITEMS", *columns.values()], *rows])


def deltas_table(summary: Mapping[str, Any]) -> str:
    """Bjontegaard deltas as text, with the overlap that they are means over."""
    bd = summary["bd"]
    title = next(metric["title"] for metric in summary["metrics"] if metric["name"] == bd["metric"])
    # A published anchor without a curve of this metric is no codec of the summary.
    missing = {"title": TITLES.get(bd["anchor"], bd["anchor"]), "published": True}
    anchor = summary["codecs"].get(bd["anchor"], missing)
    name = anchor["title"] + (" (published)" if anchor["published"] else "")
    head = [f"AGAINST {name}", "BD-RATE", f"BD-{title}", f"OVER {title}"]
    rows = []
    for row in bd["rows"]:
        codec = summary["codecs"][row["codec"]]
        label = codec["title"] + (" (published)" if codec["published"] else "")
        if row["reason"]:
            rows.append([label, "none", "", row["reason"]])
            continue
        unit = f" {bd['unit']}" if bd["unit"] else ""
        overlap = f"{row['low']:.2f} to {row['high']:.2f}{unit}"
        quality = "none" if row["bd_psnr"] is None else f"{row['bd_psnr']:+.2f}{unit}"
        rows.append([label, f"{row['bd_rate']:+.1f} %", quality, overlap])
    return table([head, *rows])
