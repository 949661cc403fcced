"""Intervals, paired tests and rank correlations of scores, by resampling items.

Outcomes of items add and a score is a function of their sum (`compand.eval.perception.task`), so a bootstrap sample is
a vector of weights, how often each item was drawn, and all samples of all codec points are one matrix product. Every
quantity of one evaluation uses the same samples: differences between codecs are paired by construction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, rankdata

from compand.errors import UsageError

Array = NDArray[np.float64]
Score = Callable[[Array], Array]
"""Sums of outcomes [..., numbers] -> scores [...]."""

SAMPLES = 10_000
"""Samples of a bootstrap: with these, the smallest p is 0.0002, which a hundred comparisons leave significant."""

LEVEL = 0.95
_FEWEST_SAMPLES = 2000  # of very many items, whose draws would fill the memory
_DRAWS = 10**8
_BLOCK = 128  # samples whose weights are held in float64 at a time


class Interval(NamedTuple):
    """An estimate with its 95 % interval over items: percentile bootstrap (Efron 1979) where nothing else is said."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """The difference between two scores on the same items."""

    difference: Interval  # first minus second
    p: float  # two-sided, of no difference
    test: str  # what p is from


class Bootstrap:
    """Samples of items, drawn with replacement; the same for all that is computed with one object.

    Items that belong together are drawn together: a sample has as many groups as there are.

    Attributes:
        items: number of items n.
        grouped: whether a group holds more than one item.
        samples: number of samples B.
    """

    def __init__(
        self, items: int, samples: int | None = None, seed: int = 0, groups: Sequence[str] | None = None
    ) -> None:
        """Draws the samples.

        Args:
            items: number of items.
            samples: None for `SAMPLES`, and fewer of more than 10,000 items.
            seed: decides the samples.
            groups: group of each item, [items]; None: each is on its own.

        Raises:
            UsageError: there are no items.
        """
        if items < 1:
            raise UsageError("no item was measured at every point: see the problems listed, and add items")
        self.items = items
        self.samples = samples or max(_FEWEST_SAMPLES, min(SAMPLES, _DRAWS // items))
        generator = np.random.default_rng(seed)
        names: Sequence[Hashable] = groups if groups is not None else range(items)
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        member = np.array([places[name] for name in names])
        self.grouped = len(places) < items
        # 16 bits hold how often one item is drawn; 64 would take 800 MB for 10,000 items.
        self._weights = np.empty((self.samples, items), np.uint16)
        for row in self._weights:
            drawn = generator.integers(len(places), size=len(places))
            row[:] = np.bincount(drawn, minlength=len(places))[member]

    def sums(self, values: Array) -> Array:
        """Sums over the items of each sample: float64 [items, ...] -> [samples, ...]."""
        flat = values.reshape(self.items, -1)
        result = np.empty((self.samples, flat.shape[1]))
        for first in range(0, self.samples, _BLOCK):
            block = slice(first, first + _BLOCK)
            result[block] = self._weights[block].astype(np.float64) @ flat
        return result.reshape(self.samples, *values.shape[1:])

    def means(self, values: Array) -> Array:
        """Means over the items of each sample: float64 [items, ...] -> [samples, ...].

        Items that are NaN do not count; a sample of such items alone has the mean NaN. A sample that holds an infinite
        value has an infinite mean (the PSNR of equal pictures).
        """
        counted = self.sums((~np.isnan(values)).astype(np.float64))
        with np.errstate(invalid="ignore"):
            means = np.asarray(self.sums(np.where(np.isfinite(values), values, 0.0)) / counted)
        for infinite in (np.inf, -np.inf):
            if (values == infinite).any():
                means[self.sums((values == infinite).astype(np.float64)) > 0] = infinite
        return means


def interval(value: float, samples: Array, level: float = LEVEL) -> Interval:
    """The percentile interval of a quantity whose bootstrap samples are given, [samples]; those that are NaN do not
    count."""
    if np.isnan(samples).all():
        return Interval(value, np.nan, np.nan)
    low, high = np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


class Scored(NamedTuple):
    """Outcomes of one model on all items, damaged in one way, with their score."""

    outcomes: Array  # [items, numbers]
    score: Interval
    samples: Array  # scores of the bootstrap samples, [samples]


def scored(bootstrap: Bootstrap, score: Score, outcomes: Array, pairwise: str = "bootstrap") -> Scored:
    """Scores outcomes, [items, numbers].

    Args:
        pairwise: see `compare`. With "mcnemar" the interval is Wilson's score interval (Wilson 1927), which also holds
            where all items or none are right: there the bootstrap's has no width.

    Raises:
        UsageError: "mcnemar" with outcomes other than 0 and 1.
    """
    samples = score(bootstrap.sums(outcomes))
    value = float(score(outcomes.sum(0)))
    if pairwise != "mcnemar":
        return Scored(outcomes, interval(value, samples), samples)
    right = _right(outcomes)
    ends = binomtest(int(np.count_nonzero(right)), right.size).proportion_ci(LEVEL, method="wilson")
    return Scored(outcomes, Interval(value, float(ends.low), float(ends.high)), samples)


def _right(outcomes: Array) -> NDArray[np.bool_]:
    """Which items are right, [items]. Raises UsageError if the first number of an outcome is not 0 or 1."""
    first = outcomes[:, 0]
    if not np.isin(first, (0, 1)).all():
        raise UsageError("outcomes are not 0 or 1: the task must be compared by bootstrap")
    return np.asarray(first == 1)


def compare(first: Scored, second: Scored, pairwise: str = "bootstrap") -> Comparison:
    """Compares two sets of outcomes on the same items.

    Args:
        first, second: scored with the same bootstrap, items in the same order.
        pairwise: "mcnemar" for scores that are the mean of 0/1 outcomes (the first number): the exact test of McNemar
            (1947) on the items of which one is right and the other wrong. "bootstrap": twice the smaller share of
            samples whose difference is not positive, or not negative.

    Where "mcnemar" finds no item of which only one is right, no sample differs either, and the interval is that of the
    rule of three (Hanley and Lippman-Hand 1983), exactly 1 - 0.05^(1/n) to either side: a difference as large
    as that would have shown in one of n items with a probability of 95 %.

    Raises:
        UsageError: "mcnemar" with outcomes other than 0 and 1, or another test.
    """
    samples = first.samples - second.samples
    difference = interval(first.score.value - second.score.value, samples)
    if pairwise == "mcnemar":
        right, other = _right(first.outcomes), _right(second.outcomes)
        if np.array_equal(right, other):
            bound = 1 - (1 - LEVEL) ** (1 / right.size)
            difference = Interval(0.0, -bound, bound)
        return Comparison(difference, mcnemar(right, other), "McNemar exact")
    if pairwise != "bootstrap":
        raise UsageError(f"test {pairwise} does not exist: choose mcnemar or bootstrap")
    # The observed difference counts as one more sample, so that p is never 0 (Davison and Hinkley 1997, eq. 4.11).
    extreme = min(np.count_nonzero(samples <= 0), np.count_nonzero(samples >= 0))
    return Comparison(difference, min(1.0, 2 * (extreme + 1) / (samples.size + 1)), "paired bootstrap")


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Two-sided p of the exact test of McNemar: whether two answers to the same items are right equally often."""
    only_first = int(np.count_nonzero(first & ~second))
    only_second = int(np.count_nonzero(second & ~first))
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: rejecting below alpha errs in any of them with at most alpha (Holm 1979)."""
    adjusted = [0.0] * len(p)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = running
    return adjusted


def rank_correlation(x: Array, y: Array) -> Array:
    """Spearman's rho over the last axis, with mean ranks for ties (Spearman 1904); infinite values rank at the end.

    Args:
        x, y: [..., points], at least two points.

    Returns:
        [...], in -1 to 1; NaN where x or y is constant.
    """
    ranks = [rankdata(values, axis=-1) for values in (x, y)]
    a, b = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return np.asarray((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1)))


class Correlation(NamedTuple):
    """How a distortion metric orders codec points, against how the score drop orders them."""

    rho: Interval
    samples: Array  # bootstrap samples of rho, for differences between metrics


def drop_correlation(
    bootstrap: Bootstrap, points: Sequence[Scored], values: Array, better: str
) -> Correlation:
    """Spearman's rho of a distortion metric with the score drop, over codec points.

    Sign: +1 means that whenever the metric calls one point worse than another, its score drop is larger. A metric of
    which higher is better enters with its sign changed. The baseline is the same for all points, so ranks of drops
    are ranks of scores turned around.

    Args:
        bootstrap: what the points were scored with; a sample of items decides both metric and score.
        points: the scores.
        values: the metric, [items, points]; an item that is NaN at one point counts at none.
        better: "higher" or "lower", the metric's good end.
    """
    distortion = -values if better == "higher" else values
    distortion = np.where(np.isnan(values).any(1, keepdims=True), np.nan, distortion)
    drops = -np.array([point.score.value for point in points])
    drop_samples = -np.stack([point.samples for point in points], axis=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no item at all: the mean is NaN, and so is rho
        means = np.nanmean(distortion, axis=0)
    sample_means = bootstrap.means(distortion)
    samples = rank_correlation(sample_means, drop_samples)
    samples[np.isnan(sample_means).any(-1)] = np.nan
    rho = np.nan if np.isnan(means).any() else float(rank_correlation(means, drops))
    return Correlation(interval(rho, samples), samples)
