"""The plots of a report, drawn by matplotlib from the results alone.

Each codec keeps its color and marker in all plots of a report. Colors are those of Okabe and Ito (Color Universal
Design, 2008) and, for published curves, the muted scheme of Tol (SRON/EPS/TN/09-002, 2021): both stay apart for people
with color vision deficiencies. Markers differ beside them.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from compand.eval.report.results import PUBLISHED, Codec, Metric, Results, number

_MARKERS = ("o", "s", "^", "D", "v", "<", ">", "p", "h", "P", "X")
_WIDTH, _HEIGHT = 7.6, 4.4  # inches, the legend included
_BAR = 0.36  # height of a bar, in rows
_MARGIN = 1.06  # how far axes reach beyond the outermost points, as a factor in rate
_NEAR_ONE = 0.97  # largest value from which on a score is taken to approach one
_OUR_WIDTH, _OTHER_WIDTH = 2.4, 1.2  # of lines, in points


@dataclass(frozen=True)
class Theme:
    """Colors of a plot."""

    paper: str
    ink: str  # of text, and of the first of our codecs
    grid: str
    measured: tuple[str, ...]
    published: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#000000",
    grid="#d9d9d9",
    measured=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    published=("#882255", "#44aa99", "#332288", "#999933", "#cc6677", "#88ccee", "#117733", "#aa4499"),
)
DARK = Theme(
    paper="#16181b",
    ink="#f2f2f2",
    grid="#3c4046",
    measured=("#3a9bdc", "#e8692c", "#1fb58a", "#d98bb5", "#e69f00", "#8fd0f5"),
    published=("#c2557f", "#44aa99", "#8c7fe0", "#b5b54a", "#dd7788", "#88ccee", "#4fa464", "#c46fc0"),
)


class Look(NamedTuple):
    """How a codec is drawn."""

    color: str
    marker: str
    ours: bool
    published: bool
    joined: bool = True  # whether a line runs through the points

    @property
    def line(self) -> dict[str, Any]:
        """Properties of its curve."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linewidth": _OUR_WIDTH if self.ours else _OTHER_WIDTH,
            "linestyle": "none" if not self.joined else (0, (4, 2)) if self.published else "-",
            "markersize": 6 if self.ours else 4.5,
            "markerfacecolor": "none" if self.published else self.color,
            "zorder": 4 if self.ours else 2 if self.published else 3,
        }


@dataclass(frozen=True)
class Plot:
    """A plot that can be drawn in any theme.

    Attributes:
        name: of its file, without the suffix.
        title: what it shows; the alternative text of the page.
        caption: what a reader must know beside it; "" for nothing.
        draw: puts it on an empty figure.
        size: width and height in inches.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Figure, Theme], None]
    size: tuple[float, float] = (_WIDTH, _HEIGHT)

    def png(self, theme: Theme = LIGHT) -> bytes:
        """The plot as a PNG file of 150 dots per inch."""
        return self._saved(theme, format="png", dpi=150)

    def svg(self, theme: Theme = LIGHT) -> bytes:
        """The plot as an SVG file on a transparent ground."""
        return self._saved(theme, format="svg", transparent=True, metadata={"Date": None})

    def _saved(self, theme: Theme, **options: Any) -> bytes:
        settings: dict[Any, Any] = {
            "svg.hashsalt": self.name,  # the same results give the same file
            "axes.edgecolor": theme.ink,
            "axes.facecolor": theme.paper,
            "axes.labelcolor": theme.ink,
            "axes.titlecolor": theme.ink,
            "axes.titlesize": "medium",
            "figure.facecolor": theme.paper,
            "font.size": 10,
            "grid.color": theme.grid,
            "grid.linewidth": 0.6,
            "legend.fontsize": "small",
            "legend.labelcolor": theme.ink,
            "text.color": theme.ink,
            "text.parse_math": False,  # names are no formulas
            "xtick.color": theme.ink,
            "ytick.color": theme.ink,
        }
        stream = io.BytesIO()
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page has the name
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure, theme)
            figure.savefig(stream, **options)
        return stream.getvalue()


def plots(results: Results) -> list[Plot]:
    """All plots that the results have the figures for."""
    if results.kind == "speed":
        return [plot for plot in (_speed(results), _stages(results)) if plot]
    found: list[Plot | None] = []
    if results.score:
        found.append(_rate_score(results, results.score))
        found += [_score_drop(results, metric) for metric in results.metrics]
    found += [_rate_distortion(results, metric) for metric in results.metrics]
    return [plot for plot in found if plot]


def looks(codecs: Iterable[Codec], theme: Theme) -> dict[str, Look]:
    """Color and marker by name of the codec.

    The first of our codecs has the color of the text, which no other has. A published curve has the color of the
    measured codec of the same title, if there is one.
    """
    drawn = [codec for codec in codecs if not codec.lossless]
    measured = sorted((codec for codec in drawn if not codec.published), key=lambda codec: not codec.ours)
    first = theme.ink if any(codec.ours for codec in measured) else None
    palette = chain([first] if first else [], cycle(theme.measured))
    colors = {codec.title: color for codec, color in zip(measured, palette, strict=False)}
    others = cycle(theme.published)
    found = {}
    for codec, marker in zip(
        [*measured, *(codec for codec in drawn if codec.published)], cycle(_MARKERS), strict=False
    ):
        title = codec.title.removesuffix(PUBLISHED)
        color = colors[title] if title in colors else next(others)
        found[codec.name] = Look(color, marker, codec.ours, codec.published)
    return found


# ------------------------------------------------------------------------------------------------ curves


def _rate_distortion(results: Results, metric: Metric) -> Plot | None:
    curves = _curves(results, metric.name)
    if not curves:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        styles = looks(results.codecs.values(), theme)
        _draw_curves(axes, results, curves, styles)
        if metric.better == "higher" and not metric.unit:
            _spread_towards_one(axes, curves.values())
        axes.set_ylabel(metric.label)
        _legend(figure, results, _by_height(curves), styles)

    title = f"{_sentence(metric.title)} against rate"
    return Plot(f"rd_{metric.name}", title, _caption(results, curves, metric), draw)


def _rate_score(results: Results, score: Metric) -> Plot | None:
    curves = _curves(results, "score")
    perception = results.perception or {}
    baseline = number(perception.get("baseline"))
    if not curves:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        styles = looks(results.codecs.values(), theme)
        _draw_curves(axes, results, curves, styles)
        for name in curves:
            rate, low, high = _band(results.codecs[name], results.rate)
            alpha = 0.18 if styles[name].ours else 0.09
            axes.fill_between(rate, low, high, color=styles[name].color, alpha=alpha, linewidth=0)
        extra: list[Line2D | Patch] = []
        if baseline is not None:
            line = axes.axhline(baseline, color=theme.ink, linewidth=1, linestyle=":")
            line.set_label("originals")
            extra.append(line)
            low_end, high_end = (number(perception.get(f"baseline_{end}")) for end in ("low", "high"))
            if low_end is not None and high_end is not None:
                axes.axhspan(low_end, high_end, color=theme.ink, alpha=0.07, linewidth=0)
        axes.autoscale(axis="y")
        axes.set_ylabel(score.label)
        _legend(figure, results, _by_height(curves), styles, extra)

    caption = "Bands: 95 % bootstrap intervals over the items. " + _caption(results, curves, score)
    return Plot("rate_score", f"{_sentence(score.title)} against rate", caption.strip(), draw)


def _score_drop(results: Results, metric: Metric) -> Plot | None:
    curves = {
        name: codec.curve(metric.name, "score_drop")
        for name, codec in results.codecs.items()
        if not codec.lossless and not codec.published
    }
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if not curves:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        styles = {
            name: look._replace(joined=False) for name, look in looks(results.codecs.values(), theme).items()
        }
        for name, (x, y) in curves.items():
            axes.plot(x, y, **styles[name].line)
        axes.axhline(0, color=theme.ink, linewidth=1, linestyle=":")
        axes.grid()
        axes.set_axisbelow(True)
        axes.set(xlabel=metric.label, ylabel="score drop")
        _legend(figure, results, sorted(curves, key=lambda name: -float(np.mean(curves[name][1]))), styles)

    correlation = next(
        (
            row
            for row in (results.perception or {}).get("spearman") or ()
            if row.get("metric") == metric.name and number(row.get("rho")) is not None
        ),
        None,
    )
    title = f"Score drop against {metric.title}"
    return Plot(f"score_drop_{metric.name}", title, spearman(correlation) if correlation else "", draw)


def spearman(row: Mapping[str, Any]) -> str:
    """A rank correlation in words.

    >>> spearman({"rho": 0.913, "low": 0.8, "high": 0.97, "points": 24})
    'Spearman ρ of distortion and drop: 0.91 [0.80, 0.97], 24 points.'
    """
    low, high, points = number(row.get("low")), number(row.get("high")), row.get("points")
    interval = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
    count = f", {points} points" if points else ""
    return f"Spearman ρ of distortion and drop: {float(row['rho']):.2f}{interval}{count}."


def _curves(results: Results, y: str) -> dict[str, tuple[list[float], list[float]]]:
    """Rates and values of every codec that has a curve, by name."""
    curves = {
        name: codec.curve(results.rate, y) for name, codec in results.codecs.items() if not codec.lossless
    }
    return {name: curve for name, curve in curves.items() if curve[0] and min(curve[0]) > 0}


def _band(codec: Codec, rate: str) -> tuple[list[float], list[float], list[float]]:
    """Rates of a codec's points and the ends of their intervals, where they have one."""
    rows = [
        tuple(number(point.get(key)) for key in (rate, "score_low", "score_high")) for point in codec.points
    ]
    whole = [
        (r, low, high) for r, low, high in rows if r is not None and low is not None and high is not None
    ]
    return [r for r, _, _ in whole], [low for _, low, _ in whole], [high for _, _, high in whole]


def _draw_curves(
    axes: Axes,
    results: Results,
    curves: Mapping[str, tuple[list[float], list[float]]],
    styles: Mapping[str, Look],
) -> None:
    """Curves over the logarithm of the rate, as far as measured ones reach."""
    for name, (rate, value) in curves.items():
        axes.plot(rate, value, **styles[name].line)
    measured = [curve for name, curve in curves.items() if not results.codecs[name].published]
    rates = [rate for curve in measured or curves.values() for rate in curve[0]]
    low, high = min(rates) / _MARGIN, max(rates) * _MARGIN
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    values = [
        value for curve in curves.values() for rate, value in zip(*curve, strict=True) if low <= rate <= high
    ]
    span = max(values) - min(values) or 1.0
    axes.set_ylim(min(values) - 0.04 * span, max(values) + 0.04 * span)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"rate, {results.rate_unit} (whole files)")
    axes.grid()
    axes.set_axisbelow(True)


def _spread_towards_one(axes: Axes, curves: Iterable[tuple[list[float], list[float]]]) -> None:
    """Draw scores that approach one over the logarithm of what they lack; otherwise their curves end in one line."""
    values = np.concatenate([value for _, value in curves])
    if values.max() >= 1 or values.max() < _NEAR_ONE or values.min() < 0:
        return
    axes.set_yscale(
        "function",
        functions=(
            lambda value: -np.log10(np.maximum(1 - np.asarray(value), 1e-9)),
            lambda place: 1 - 10.0 ** -np.asarray(place),
        ),
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 1 - (1 - values.max()) * 0.8))
    steps = np.array([0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85])
    ticks = np.unique(
        np.round(np.concatenate([steps, *(1 - 10.0**-n * np.array([1, 0.5, 0.2]) for n in range(1, 6))]), 7)
    )
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.7g}"))


def _by_height(curves: Mapping[str, tuple[list[float], list[float]]]) -> list[str]:
    """Names of the curves as they lie above each other where most of them run."""
    ends = [(math.log(min(rate)), math.log(max(rate))) for rate, _ in curves.values()]
    starts, stops = zip(*ends, strict=True)
    low, high = max(starts), min(stops)
    middle = (low + high) / 2 if low < high else float(np.median([start + stop for start, stop in ends])) / 2

    def height(name: str) -> float:
        rate, value = curves[name]
        return float(np.interp(middle, np.log(rate), value))

    return sorted(curves, key=height, reverse=True)


def _legend(
    figure: Figure,
    results: Results,
    names: Sequence[str],
    styles: Mapping[str, Look],
    extra: Sequence[Line2D | Patch] = (),
) -> None:
    handles = [Line2D([], [], **styles[name].line) for name in names]
    labels = [results.codecs[name].title for name in names]
    # Labels are set afterwards: the constructor leaves out those that begin with an underscore.
    legend = figure.legend(
        [*handles, *extra],
        [str(place) for place in range(len(names) + len(extra))],
        loc="outside right upper",
        frameon=False,
        handlelength=2.8,
    )
    for text, label in zip(
        legend.get_texts(), [*labels, *(str(each.get_label()) for each in extra)], strict=True
    ):
        text.set_text(label)


def _caption(results: Results, curves: Mapping[str, Any], metric: Metric) -> str:
    """Which codecs a plot does not show, and what dashes mean."""
    exact = [
        f"{codec.title} ({points[0]:.3g} {results.rate_unit})" if points else codec.title
        for codec in results.codecs.values()
        if codec.lossless and codec.kind != "identity"
        for points in [codec.curve(results.rate, results.rate)[0]]
    ]
    sentences = []
    if any(results.codecs[name].published for name in curves):
        sentences.append("Dashed: published.")
    if exact:
        sentences.append(f"Lossless, not drawn: {', '.join(exact)}.")
    if metric.better == "lower":
        sentences.append("Lower is better.")
    return " ".join(sentences)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


# ------------------------------------------------------------------------------------------------- speed


def _speed(results: Results) -> Plot | None:
    timed = [codec for codec in results.codecs.values() if codec.speed]
    if not timed:
        return None
    unit = str((results.speed or {}).get("unit", ""))

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        colors = {"encode": theme.measured[0], "decode": theme.measured[1]}
        for row, codec in enumerate(timed):
            for offset, (direction, color) in zip((-0.5, 0.5), colors.items(), strict=True):
                figures = (codec.speed or {}).get(direction) or {}
                median, low, high = (number(figures.get(key)) for key in ("median", "q1", "q3"))
                if median is None:
                    continue
                place = row + offset * _BAR
                axes.barh(place, median, _BAR, color=color, alpha=1.0 if codec.ours else 0.75)
                if low is not None and high is not None:
                    spread = [[max(0.0, median - low)], [max(0.0, high - median)]]
                    axes.errorbar(median, place, xerr=spread, color=theme.ink, capsize=2, linewidth=1)
                axes.annotate(
                    f"{median:.3g}",
                    (max(median, high or median), place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize="small",
                )
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(f"{_speed_name(results.medium)}, {unit}")
        _name_rows(axes, timed)
        axes.grid(axis="x")
        handles = [Patch(color=color) for color in colors.values()]
        figure.legend(handles, list(colors), loc="outside upper left", ncols=2, frameon=False)

    caption = "Medians; the lines span the middle half of the repetitions. Longer is faster."
    size = (_WIDTH, 1.3 + 0.42 * len(timed))
    return Plot("speed", "Speed of encoding and decoding", caption, draw, size)


def _stages(results: Results) -> Plot | None:
    names = list((results.speed or {}).get("stage_names") or ())
    split = [
        codec
        for codec in results.codecs.values()
        if "transform" in (((codec.speed or {}).get("stages") or {}).get("encode") or {})
    ]
    if not split:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        shown: dict[str, Patch] = {}
        for axes, direction in zip(panels, ("encode", "decode"), strict=True):
            for row, codec in enumerate(split):
                stages = (codec.speed or {})["stages"].get(direction) or {}
                left = 0.0
                for color, stage in zip(cycle((*theme.measured, theme.grid)), names, strict=False):
                    time = number(stages.get(stage))
                    if time:
                        axes.barh(
                            row, time, 0.62, left=left, color=color, edgecolor=theme.paper, linewidth=0.5
                        )
                        shown.setdefault(stage, Patch(color=color))
                        left += time
            axes.set(title=direction, xlabel="milliseconds an item")
            axes.grid(axis="x")
            axes.set_axisbelow(True)
        _name_rows(panels[0], split)
        labels = [stage for stage in names if stage in shown]
        figure.legend(
            [shown[stage] for stage in labels],
            [stage.replace("_", " ") for stage in labels],
            loc="outside upper left",
            ncols=len(labels),
            frameon=False,
        )

    size = (_WIDTH, 1.5 + 0.36 * len(split))
    return Plot("speed_stages", "Where the time goes", "Medians of each stage.", draw, size)


def _speed_name(medium: str) -> str:
    return "speed" if medium == "image" else "seconds of sound per second"


def _name_rows(axes: Axes, codecs: Sequence[Codec]) -> None:
    axes.set_yticks(range(len(codecs)), [codec.title for codec in codecs])
    for label, codec in zip(axes.get_yticklabels(), codecs, strict=True):
        label.set_fontweight("bold" if codec.ours else "normal")
    axes.set_ylim(len(codecs) - 0.4, -0.6)
    axes.set_axisbelow(True)
