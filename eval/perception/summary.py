"""From measurements of a perception run to what is claimed: scores, correlations, comparisons and three findings.

All figures of a summary are over the same items: those measured at every codec point that counts. A point that lacks
more than `MISSING_SHARE` of the items is left out, so that one codec's failures do not shrink everybody's test set.
Nothing is interpolated: codecs are compared between points that were measured.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from compand.errors import UsageError
from compand.eval.measurements import MISSING_SHARE, RATES, Row
from compand.eval.metrics import Metric
from compand.eval.perception.statistics import (
    LEVEL,
    Array,
    Bootstrap,
    Comparison,
    Correlation,
    Interval,
    Scored,
    compare,
    drop_correlation,
    holm,
    interval,
    scored,
)
from compand.eval.perception.task import Task

OUTCOME = "outcome"
"""Column of the task model's outcomes on decoded items; `column` names those of the others."""

MATCHED = 1.1
"""Largest ratio of two rates that count as matched."""

ALPHA = 0.05
FEW_POINTS = 8
"""A rank correlation over fewer points than this is marked as such."""

SIGNAL = {"image": "psnr", "audio": "si_sdr"}
"""The metric of the error of samples, which the others are held against."""
_SIGNAL_METRICS = frozenset({"psnr", "si_sdr", "sdr"})
DEEP = frozenset({"lpips", "dists"})
"""Metrics that compare features of deep networks."""

SPEARMAN_SIGN = "+1: more distortion by the metric always goes with a larger drop of the score"
CONTAINERS = "rates include the container"
PAIRS_DIFFERENCE = (
    "score of b minus score of a, on the same items; p adjusted by Holm's method for all pairs together"
)

LOSSY_KINDS = ("compand", "classical")


def column(model: str | None = None, *, undamaged: bool = False) -> str:
    """Name of the column of a model's outcomes; None is the task model itself.

    >>> column(), column("other", undamaged=True)
    ('outcome', 'outcome_undamaged_other')
    """
    return "_".join(filter(None, (OUTCOME, "undamaged" if undamaged else "", model)))


class TrainedOn(NamedTuple):
    """A second task model and the decoded items that it was trained on."""

    name: str
    codec: str | None  # None: clean items
    quality: float | None

    @property
    def label(self) -> str:
        """For people: "jpeg q5"."""
        return "clean items" if self.codec is None else f"{self.codec} q{self.quality:g}"


@dataclass(frozen=True)
class Point:
    """One codec at one quality, over the common items."""

    codec: str
    title: str
    kind: str
    quality: float
    rate: float  # mean, bpp or kbps
    means: Mapping[str, float]  # bytes, rates and metrics
    scored: Scored

    @property
    def label(self) -> str:
        """For people: "jpeg q5"."""
        return f"{self.codec} q{self.quality:g}"


class NoCommonItemsError(UsageError):
    """So much failed that there is nothing to summarise: the problems of the run say what."""


class SecondModel(NamedTuple):
    """What a second task model makes of undamaged items and of every lossy point."""

    rows: list[dict[str, Any]]  # the first one is of undamaged items
    own: dict[str, Any] | None  # the row of the codec that it was trained on, at that quality


class Pair(NamedTuple):
    """Two points and the difference of their scores, second minus first."""

    first: Point
    second: Point
    comparison: Comparison


def summarise(
    task: Task,
    items: Sequence[str],
    rows: Sequence[Row],
    codecs: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[Metric],
    model: str,
    lossy_models: Sequence[TrainedOn] = (),
    groups: Mapping[str, str] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], list[str]]:
    """Scores and everything that follows from them.

    Args:
        task: gives the score of sums of outcomes, and the test of pairs.
        items: names of all test items, in the task's order.
        rows: measurements with the outcomes of all models.
        codecs: title, kind and note of each codec, in the order of tables.
        metrics: distortion metrics that were measured.
        model: name of the task model.
        lossy_models: the others that judged the same items.
        groups: group of each item (`compand.eval.perception.task.Task.group`); None: each is on its own.

    Returns:
        `codecs` and `perception` of the summary (README.md of `compand.eval` documents both), and notices.

    Raises:
        NoCommonItemsError: no item was measured at all points.
    """
    table, common, notices = _common(items, rows, codecs)
    bootstrap = Bootstrap(len(common), groups=[groups[item] for item in common] if groups else None)
    evidence = _Evidence(task, bootstrap, table, common, codecs, metrics)
    baseline = evidence.undamaged()
    lossy = [point for point in evidence.points if point.kind in LOSSY_KINDS]
    correlations = evidence.correlations(lossy)
    matched = _matched(lossy)
    pairs = [Pair(a, b, compare(b.scored, a.scored, evidence.pairwise)) for a, b in matched]
    trained = [evidence.second_model(other, baseline) for other in lossy_models]
    perception = {
        "task": task.name,
        "score": task.score_name,
        "model": model,
        "items": len(common),
        "baseline": baseline.score.value,
        "baseline_low": baseline.score.low,
        "baseline_high": baseline.score.high,
        "spearman_sign": SPEARMAN_SIGN,
        "spearman": _spearman_rows(correlations, len(lossy), task.medium),
        "pairs_difference": PAIRS_DIFFERENCE
        + (f"; {CONTAINERS}, rate_payload is without it" if task.medium == "audio" else ""),
        "pairs": _pair_rows(pairs),
        "lossy_training": [row for each in trained for row in each.rows],
        "findings": [
            _first_finding(lossy, evidence.pairwise, task.medium),
            _second_finding(correlations, lossy, metrics, task.medium),
            _third_finding(lossy_models, trained, task.score_name),
        ],
    }
    return evidence.codec_entries(baseline), perception, notices


# ------------------------------------------------------------------------------------------------- common items

Table = dict[tuple[str, float], dict[str, Row]]
"""Rows by point and item."""


def _common(
    items: Sequence[str], rows: Sequence[Row], codecs: Mapping[str, Mapping[str, Any]]
) -> tuple[Table, list[str], list[str]]:
    """The points that count, the items that all of them have, and notices about what is left out."""
    table: Table = {}
    known = set(items)
    for row in rows:
        if row["codec"] in codecs and row["item"] in known:
            table.setdefault((row["codec"], row["quality"]), {})[row["item"]] = row
    order = {name: place for place, name in enumerate(codecs)}
    kept: Table = {}
    notices = []
    for (codec, quality), found in sorted(table.items(), key=lambda entry: (order[entry[0][0]], entry[0][1])):
        if len(found) < (1 - MISSING_SHARE) * len(items):
            notices.append(
                f"{codec} q{quality:g} is left out: it has {len(found)} of {len(items)} items, see the problems"
            )
        else:
            kept[codec, quality] = found
    if not kept:
        raise NoCommonItemsError("no codec point has nine tenths of the items: see the problems listed")
    common = [item for item in items if all(item in found for found in kept.values())]
    if not common:
        raise NoCommonItemsError(
            "no item was measured at every point: see the problems listed, and add items"
        )
    if len(common) < len(items):
        notices.append(f"scores are over {len(common)} of {len(items)} items, those measured at every point")
    return kept, common, notices


class _Evidence:
    """Outcomes and metrics of the common items as arrays."""

    def __init__(
        self,
        task: Task,
        bootstrap: Bootstrap,
        table: Table,
        items: Sequence[str],
        codecs: Mapping[str, Mapping[str, Any]],
        metrics: Sequence[Metric],
    ) -> None:
        self._task, self._bootstrap, self._items = task, bootstrap, items
        self._codecs, self._metrics = codecs, metrics
        # McNemar's test and Wilson's interval take items as independent.
        self.pairwise = "bootstrap" if bootstrap.grouped else task.pairwise
        self._rows = {key: [found[item] for item in items] for key, found in table.items()}
        self.points = [self._point(key, rows) for key, rows in self._rows.items()]

    def _point(self, key: tuple[str, float], rows: Sequence[Row]) -> Point:
        codec, quality = key
        names = ["bytes", "bpp", "kbps", "kbps_payload", *(metric.name for metric in self._metrics)]
        means = {}
        for name in names:
            values = [row[name] for row in rows if row.get(name) is not None]
            # A rate without the container is a mean over all items or none; a metric may be unfit for some.
            if values and (len(values) == len(rows) or name not in names[:4]):
                means[name] = sum(values) / len(values)
        facts = self._codecs[codec]
        return Point(
            codec,
            facts["title"],
            facts["kind"],
            quality,
            means[RATES[self._task.medium]],
            means,
            self._scored([row[column()] for row in rows]),
        )

    def _scored(self, outcomes: Sequence[Sequence[float]]) -> Scored:
        numbers = np.asarray(outcomes, dtype=np.float64)
        return scored(self._bootstrap, self._task.score, numbers, self.pairwise)

    def _judged(self, key: tuple[str, float] | None, model: str | None) -> Scored:
        """What a model makes of a point; of undamaged items where there is none."""
        rows = self._rows[key] if key is not None else next(iter(self._rows.values()))
        name = column(model, undamaged=key is None)
        return self._scored([row[name] for row in rows])

    def undamaged(self) -> Scored:
        """The baseline: the task model on undamaged items."""
        return self._judged(None, None)

    def correlations(self, points: Sequence[Point]) -> dict[str, Correlation]:
        """Rank correlation of each metric with the score drop, where it has one."""
        found = {}
        for metric in self._metrics if len(points) > 2 else ():
            correlation = drop_correlation(
                self._bootstrap,
                [point.scored for point in points],
                self._values(metric, points),
                metric.better,
            )
            if not math.isnan(correlation.rho.value):
                found[metric.name] = correlation
        return found

    def _values(self, metric: Metric, points: Sequence[Point]) -> Array:
        """A metric, [items, points]; NaN where an item is unfit for it."""
        rows = [self._rows[point.codec, point.quality] for point in points]
        values = [
            [math.nan if row.get(metric.name) is None else row[metric.name] for row in each] for each in rows
        ]
        return np.asarray(values, dtype=np.float64).T

    def second_model(self, other: TrainedOn, baseline: Scored) -> SecondModel:
        """Scores of a second model, with their differences to those of the task model."""
        trained = _trained_point(other, self.points)
        rows = [self._compared(other, None, baseline)]
        own = None
        for point in self.points:
            if point.kind in LOSSY_KINDS:
                rows.append(self._compared(other, point, point.scored))
                own = rows[-1] if point is trained else own
        return SecondModel(rows, own)

    def _compared(self, other: TrainedOn, point: Point | None, reference: Scored) -> dict[str, Any]:
        judged = self._judged(None if point is None else (point.codec, point.quality), other.name)
        return {
            "model": other.name,
            "trained_on": other.label,
            "codec": "undamaged" if point is None else point.codec,
            "quality": None if point is None else point.quality,
            "rate": None if point is None else point.rate,
            "score": judged.score.value,
            "score_low": judged.score.low,
            "score_high": judged.score.high,
            "reference": reference.score.value,
            **_difference(compare(judged, reference, self.pairwise)),
        }

    def codec_entries(self, baseline: Scored) -> dict[str, dict[str, Any]]:
        """`codecs` of the summary."""
        entries: dict[str, dict[str, Any]] = {}
        for name, facts in self._codecs.items():
            own = [point for point in self.points if point.codec == name]
            entries[name] = {
                "title": facts["title"],
                "kind": facts["kind"],
                "note": facts["note"],
                "published": False,
                "points": [self._entry(point, baseline) for point in own],
            }
        return entries

    def _entry(self, point: Point, baseline: Scored) -> dict[str, Any]:
        score = point.scored.score
        drop = compare(baseline, point.scored, self.pairwise).difference
        if point.kind not in LOSSY_KINDS:
            # An item that is the same by construction is judged the same, which no rule of three has to allow for.
            drop = interval(drop.value, baseline.samples - point.scored.samples)
        return {
            "quality": point.quality,
            "items": len(self._items),
            **point.means,
            "score": score.value,
            "score_low": score.low,
            "score_high": score.high,
            "score_drop": drop.value,
            "score_drop_low": drop.low,
            "score_drop_high": drop.high,
        }


def _trained_point(other: TrainedOn, points: Sequence[Point]) -> Point | None:
    """The measured point whose items a model was trained on; None if it is not there."""
    if other.codec is None:
        return None
    own = [point for point in points if point.quality == other.quality and point.kind in LOSSY_KINDS]
    exact = [point for point in own if point.codec == other.codec]
    # A model may name the codec without its version: "hyperprior" is then the one version that is in the run.
    versions = [point for point in own if re.fullmatch(re.escape(other.codec) + r"-v\d+", point.codec)]
    found = exact or versions
    return found[0] if len(found) == 1 else None


# ------------------------------------------------------------------------------------------------- tables


def _difference(comparison: Comparison) -> dict[str, Any]:
    difference = comparison.difference
    return {
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
        "p": comparison.p,
        "test": comparison.test,
    }


def _matched(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Points of two codecs whose rates are each other's nearest and differ by a factor of `MATCHED` at most.

    A classical codec stands before a learned one.
    """
    names = sorted({point.codec: point.kind for point in points}.items(), key=lambda entry: entry[1])
    found = []
    for (first, _), (second, _) in combinations(names, 2):
        ours, theirs = ([p for p in points if p.codec == name and p.rate > 0] for name in (first, second))
        for point in ours:
            nearest = min(theirs, key=lambda other: _ratio(point, other), default=None)
            if nearest is None or _ratio(point, nearest) > MATCHED:
                continue
            if min(ours, key=lambda other: _ratio(nearest, other)) is point:
                found.append((point, nearest))
    return found


def _ratio(first: Point, second: Point) -> float:
    """Ratio of the larger rate to the smaller."""
    return max(first.rate, second.rate) / min(first.rate, second.rate)


def _pair_rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    adjusted = holm([pair.comparison.p for pair in pairs])
    return [
        {
            "a": pair.first.label,
            "b": pair.second.label,
            "rate_a": pair.first.rate,
            "rate_b": pair.second.rate,
            "rate_ratio": pair.second.rate / pair.first.rate,
            **{
                f"rate_payload_{name}": point.means["kbps_payload"]
                for name, point in (("a", pair.first), ("b", pair.second))
                if "kbps_payload" in point.means
            },
            "score_a": pair.first.scored.score.value,
            "score_b": pair.second.scored.score.value,
            **_difference(pair.comparison),
            "p_adjusted": p,
        }
        for pair, p in zip(pairs, adjusted, strict=True)
    ]


def _spearman_rows(correlations: Mapping[str, Correlation], points: int, medium: str) -> list[dict[str, Any]]:
    reference = correlations.get(SIGNAL[medium])
    rows = []
    for name, correlation in correlations.items():
        row: dict[str, Any] = {"metric": name, **correlation.rho._asdict(), "points": points}
        row["rho"] = row.pop("value")
        if reference is not None and reference is not correlation:
            gap = _gap(correlation, reference)
            row |= {
                "against": SIGNAL[medium],
                **{f"against_{end}": value for end, value in gap._asdict().items()},
            }
        rows.append(row)
    return rows


def _gap(first: Correlation, second: Correlation, level: float = LEVEL) -> Interval:
    """The difference of two correlations, on the same samples of items."""
    return interval(first.rho.value - second.rho.value, first.samples - second.samples, level)


# ------------------------------------------------------------------------------------------------- findings


def _first_finding(points: Sequence[Point], pairwise: str, medium: str) -> str:
    claim = "Finding 1 of MPQ (learned codecs beat classical ones on the score at an equal or lower rate)"
    learned = {point.codec: point.title for point in points if point.kind == "compand"}
    classical = {point.codec: point.title for point in points if point.kind == "classical"}
    if not learned or not classical:
        return f"{claim}: not tested: no {'classical' if learned else 'learned'} codec in the run."
    trials = [
        (ours, theirs, winner == ours, comparison)
        for ours in learned
        for theirs in classical
        for winner, loser in ((ours, theirs), (theirs, ours))
        for comparison in _dominations(points, winner, loser, pairwise)
    ]
    adjusted = holm([comparison.p for *_, comparison in trials])
    numbers = Counter(point.codec for point in points)
    tallies = {
        (ours, theirs): _Tally(numbers[ours], numbers[theirs]) for ours in learned for theirs in classical
    }
    for (ours, theirs, forward, comparison), p in zip(trials, adjusted, strict=True):
        higher = p < ALPHA and comparison.difference.value > 0
        if higher and forward:
            tallies[ours, theirs].won += 1
        elif higher:
            tallies[ours, theirs].lost += 1
    if any(tally.lost for tally in tallies.values()):
        verdict = "does not hold"
    elif all(2 * tally.won > tally.won_of for tally in tallies.values()):
        verdict = "holds"
    else:
        verdict = "holds in part" if any(tally.won for tally in tallies.values()) else "is undecided"
    details = "; ".join(
        f"{title} is above "
        + ", ".join(
            f"{classical[theirs]} at {tally.won} of {tally.won_of} points ({tally.lost} of {tally.lost_of} in reverse)"
            for (other, theirs), tally in tallies.items()
            if other == ours
        )
        for ours, title in learned.items()
    )
    return (
        f"{claim} {verdict}: {details}, each point against the other codec's next one of no lower rate "
        f"(one that has none is not above; paired tests, Holm-adjusted p < {ALPHA:g})"
        f"{_containers(points) if medium == 'audio' else ''}."
    )


def _containers(points: Sequence[Point]) -> str:
    """What rates of sound files include, and the range of those without it, where they are known."""
    known: dict[str, list[float]] = {}
    for point in points:
        if "kbps_payload" in point.means:
            known.setdefault(point.title, []).append(point.means["kbps_payload"])
    payload = ", ".join(f"{title} {min(rates):.3g} to {max(rates):.3g}" for title, rates in known.items())
    return f"; {CONTAINERS}" + (f", without which they are, in kbps: {payload}" if payload else "")


@dataclass
class _Tally:
    """How often a learned codec was significantly above a classical one at no higher rate, and the other way round."""

    won_of: int  # points of the learned codec
    lost_of: int  # points of the classical one
    won: int = 0
    lost: int = 0


def _dominations(points: Sequence[Point], winner: str, loser: str, pairwise: str) -> list[Comparison]:
    """Each point of one codec against the cheapest point of the other that needs no lower rate."""
    theirs = sorted((point for point in points if point.codec == loser), key=lambda point: point.rate)
    found = []
    for point in (point for point in points if point.codec == winner):
        dearer = next((other for other in theirs if other.rate >= point.rate), None)
        if dearer is not None:
            found.append(compare(point.scored, dearer.scored, pairwise))
    return found


def _second_finding(
    correlations: Mapping[str, Correlation], points: Sequence[Point], metrics: Sequence[Metric], medium: str
) -> str:
    titles = {metric.name: metric.title for metric in metrics}
    signal = SIGNAL[medium]
    against = titles.get(signal, signal)
    claim = f"Finding 2 of MPQ (a deep or perceptual metric tracks the score drop better than {against})"
    deep = [name for name in correlations if name in DEEP]
    others = deep or [name for name in correlations if name not in _SIGNAL_METRICS]
    if signal not in correlations or not others:
        if len(points) < 3:
            why = "want of three lossy points"
        elif len({point.scored.score.value for point in points}) == 1:
            why = "the score is the same at every point"
        else:
            why = f"want of {against} or of a metric to hold against it"
        return f"{claim}: not tested, for {why}."
    best = max(others, key=lambda name: correlations[name].rho.value)
    # The best of several is favored by chance: each interval leaves out its share of the 5 % alone (Bonferroni).
    level = 1 - (1 - LEVEL) / len(others)
    gap = _gap(correlations[best], correlations[signal], level)
    verdict = "holds" if gap.low > 0 else "does not hold" if gap.high < 0 else "is undecided"
    kind = "the best deep metric" if deep else "the best perceptual metric, no deep one being measured"
    families = len({point.codec for point in points})
    few = ", few for a rank correlation" if len(points) < FEW_POINTS else ""
    first, second = correlations[best].rho, correlations[signal].rho
    return (
        f"{claim} {verdict}: over {len(points)} points of {families} codecs{few}, rho is {_with_interval(first)} for "
        f"{titles[best]} ({kind}) and {_with_interval(second)} for {titles[signal]}, a difference of "
        f"{_with_interval(gap, signed=True)}"
        + (
            f" (the best of {len(others)} candidates: the interval of the difference is Bonferroni-adjusted for them)."
            if len(others) > 1
            else " (the only candidate)."
        )
    )


def _third_finding(models: Sequence[TrainedOn], trained: Sequence[SecondModel], score_name: str) -> str:
    claim = "Finding 3 of MPQ (a task model trained on lossy items scores higher on lossy items)"
    tested, verdicts = [], set()
    owned = [own for _, own in trained if own is not None]
    adjusted = dict(zip(map(id, owned), holm([own["p"] for own in owned]), strict=True))
    for model, (rows, own) in zip(models, trained, strict=True):
        if model.codec is None:
            continue
        name = f"{model.name}, trained on {model.label},"
        if own is None:
            tested.append(f"{name} was not tested at the trained quality, which is not in the run")
            continue
        p = adjusted[id(own)]
        significant = p < ALPHA
        verdicts.add("open" if not significant else "holds" if own["difference"] > 0 else "fails")
        clean = rows[0]
        tested.append(
            f"{name} has a {score_name} of {own['score']:.3f} on {own['codec']} q{own['quality']:g} where the task "
            f"model has {own['reference']:.3f} ({_gain(own)}, {p:.2g} by Holm's method over {len(owned)} models), and "
            f"{clean['score']:.3f} on undamaged items where that has {clean['reference']:.3f} ({_gain(clean)})"
        )
    if not tested:
        return f"{claim}: not tested, for want of a --lossy-model that was trained on decoded items."
    if not verdicts:
        return f"{claim}: {'; '.join(tested)}."
    verdict = {
        frozenset({"holds"}): "holds",
        frozenset({"fails"}): "does not hold",
        frozenset({"open"}): "is undecided",
    }.get(frozenset(verdicts), "holds in part" if "holds" in verdicts else "does not hold")
    return f"{claim} {verdict}: {'; '.join(tested)}."


def _gain(row: Mapping[str, Any]) -> str:
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], p = {row['p']:.2g}"


def _with_interval(value: Interval, *, signed: bool = False) -> str:
    form = "+.2f" if signed else ".2f"
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
