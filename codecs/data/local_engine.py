"""Packing on this machine: in this process, or in several where codecs run on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

from compand.data import encoder
from compand.data.pack import Packing, PackSpec, Progress, pack_chunk
from compand.data.sources import Record
from compand.errors import CompandError


def run_local(packing: Packing, *, jobs: int = 1, progress: Progress | None = None) -> None:
    """Packs all that is left on this machine.

    Args:
        jobs: processes that read and code; on a GPU, which one process uses, threads that read.
        progress: called with the rows, payload bytes, pixels or seconds, and failures of each block.

    Raises:
        CompandError: see `pack_chunk`; or a worker was killed.
    """
    spec, todo = packing.spec, packing.todo()
    if jobs == 1 or not _on_cpu(spec.device):
        for index, records in todo:
            pack_chunk(spec, index, records, encoder.code_blocks(spec, records, jobs), progress)
        return
    with closing(_pooled(spec, todo, jobs)) as blocks:
        for index, records in todo:
            own = islice(blocks, -(-len(records) // encoder.BLOCK))
            pack_chunk(spec, index, records, own, progress)
            for _ in own:
                pass  # of a chunk that was finished elsewhere meanwhile


def _on_cpu(device: str) -> bool:
    if device == "cpu":
        return True
    from compand.weights import choose_device

    return choose_device(device).type == "cpu"


def _pooled(
    spec: PackSpec, todo: Sequence[tuple[int, Sequence[Record]]], jobs: int
) -> Generator[encoder.Block, None, None]:
    """The blocks of all chunks, in order, coded by processes of their own."""
    lists = (
        records[first : first + encoder.BLOCK]
        for _, records in todo
        for first in range(0, len(records), encoder.BLOCK)
    )
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin_worker, initargs=(threads,))
    try:
        yield from encoder.in_order(pool, partial(encoder.code_list, spec), lists, 2 * jobs)
    except BrokenProcessPool:
        raise CompandError(
            f"{spec.target}: a worker was killed, perhaps for want of memory; the same command, with fewer -j, goes on"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker(threads: int) -> None:
    """Signals are the parent's to handle, and a worker ends with it, even if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
