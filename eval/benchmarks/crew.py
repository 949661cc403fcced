"""Work on many items by several processes, each of which prepares once what all items need."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, Generic, TypeVar

import torch

from compand.weights import choose_device

T = TypeVar("T")
Work = Callable[..., Any]
"""A function of a module: called with what was prepared, an item, and further arguments; all can be pickled."""

_prepared: Any = None
"""What a process of several has."""


def _start(prepare: Callable[[Any], Any], options: Any) -> None:
    global _prepared
    torch.set_num_threads(1)  # every process has a core of its own
    _prepared = prepare(options)


def _done(work: Work, item: Any, arguments: tuple[Any, ...]) -> Any:
    return work(_prepared, item, *arguments)


class Crew(Generic[T]):
    """Does work, in this process or in several.

    Args:
        prepare: what makes of `options` what the work needs, once a process.
        options: its argument.
        pool: the processes, started with `_start`; None: this one.
    """

    def __init__(
        self, prepare: Callable[[Any], Any], options: Any, pool: ProcessPoolExecutor | None = None
    ) -> None:
        self._pool = pool
        self._own = prepare(options) if pool is None else None

    def each(self, work: Work, items: Sequence[T], *arguments: Any) -> Iterator[tuple[int, Any]]:
        """Number and outcome of every item, as they are done."""
        if self._pool is None:
            for number, item in enumerate(items):
                yield number, work(self._own, item, *arguments)
            return
        waiting = {
            self._pool.submit(_done, work, item, arguments): number for number, item in enumerate(items)
        }
        for future in as_completed(waiting):
            yield waiting[future], future.result()

    def all(self, work: Work, items: Sequence[T], *arguments: Any) -> list[Any]:
        """The outcomes of all items in their order."""
        return [
            outcome for _, outcome in sorted(self.each(work, items, *arguments), key=lambda pair: pair[0])
        ]


@contextmanager
def crew(prepare: Callable[[Any], Any], options: Any, jobs: int) -> Iterator[Crew[Any]]:
    """A crew of so many processes, which end with the block; 1: this process alone."""
    if jobs == 1:
        yield Crew(prepare, options)
        return
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _start, (prepare, options))
    try:
        yield Crew(prepare, options, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def processes(jobs: int | None, device: str) -> int:
    """So many as asked for; unless told, one a core, and on a GPU one."""
    return jobs or ((os.cpu_count() or 1) if choose_device(device).type == "cpu" else 1)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
