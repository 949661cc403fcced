"""Items as a codec returns them, for training on lossy data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from compand.eval.items import Item, Signal, load

if TYPE_CHECKING:
    from compand.eval.subjects import Subject

_subject: Subject | None = None
"""The codec of a worker process."""


def _start_worker(codec: str, medium: str) -> None:
    # Every process codes on a core of its own; torch, which reads this once, is not loaded yet.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from compand.eval import subjects

    global _subject
    _subject = subjects.find(codec, medium)


def _decoded(path: Path, medium: str, quality: float) -> Signal:
    assert _subject is not None
    return _subject.decode(_subject.encode(load(Item(path.name, path, medium)), quality))


def decoded_items(
    paths: Sequence[Path], medium: str, codec: str, quality: float, jobs: int | None = None
) -> list[Signal]:
    """Codes every file and decodes it again, in parallel processes.

    Args:
        paths: images or sounds.
        medium: "image" or "audio".
        codec: an anchor, a codec's name or a checkpoint (see `compand.eval.subjects.find`).
        quality: the codec's own.
        jobs: number of processes; None: one a core.

    Returns:
        The decoded signals in the order of `paths`.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(paths))
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (codec, medium)) as pool:
        chunk = max(len(paths) // (8 * jobs), 1)
        return list(pool.map(_decoded, paths, [medium] * len(paths), [quality] * len(paths), chunksize=chunk))
