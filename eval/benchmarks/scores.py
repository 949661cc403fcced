"""Metrics of many decoded items, by several processes, and paired differences between codecs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from compand.errors import UsageError
from compand.eval import metrics
from compand.eval.items import Signal

Scores = dict[str, float | None]
"""A figure by the name of its metric; None where the metric cannot judge the item."""


def _scores(original: Signal, decoded: Signal, names: Sequence[str]) -> Scores:
    found: Scores = {}
    for name in names:
        try:
            found[name] = metrics.measure(name, original, decoded)
        except UsageError:  # too short, without speech
            found[name] = None
    return found


def _alone() -> None:
    """Prepares a process that is one of several."""
    import torch

    torch.set_num_threads(1)


Mapper = Callable[..., Iterator[Any]]
"""Called as the built-in `map`; functions are those of a module, what they are given and give can be pickled."""


@contextmanager
def mapper(workers: int) -> Iterator[Mapper]:
    """`map` by so many processes of one thread each, which stay for the length of the block."""
    if workers < 2:
        yield map
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_alone) as pool:
        yield partial(pool.map, chunksize=4)


def score(
    pairs: Sequence[tuple[Signal, Signal]], names: Sequence[str], workers: int | Mapper = 1
) -> list[Scores]:
    """Metrics of pairs of an original and what was decoded, by so many processes or by a `mapper`."""
    if isinstance(workers, int):
        with mapper(workers) as mapped:
            return score(pairs, names, mapped)
    originals, decoded = zip(*pairs, strict=True)
    return list(workers(_scores, originals, decoded, [names] * len(pairs)))


def judged(lists: Sequence[Sequence[float | None]]) -> list[int]:
    """The items that a metric has a finite value of in all lists."""
    return [
        place
        for place, values in enumerate(zip(*lists, strict=True))
        if all(value is not None and math.isfinite(value) for value in values)
    ]


class Difference(NamedTuple):
    """Mean of paired differences."""

    mean: float
    low: float  # of the 95 % interval
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def difference(first: Sequence[float | None], second: Sequence[float | None]) -> Difference | None:
    """First minus second over the items that both have, with the interval of a bootstrap over items; None of none."""
    places = judged([first, second])
    if not places:
        return None
    values = np.array([float(first[i] or 0) - float(second[i] or 0) for i in places])
    drawn = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return Difference(fmean(values.tolist()), float(low), float(high))
