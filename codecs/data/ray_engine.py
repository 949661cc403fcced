"""Packing on Ray Data: `compand pack --engine ray`, on this machine or on a cluster.

Chunks go through a pool of actors, each of which holds one codec and writes its shards by itself. Where a worker dies,
Ray starts another one and hands it the chunk again; since a chunk always becomes the same files, nothing is lost or
doubled. All workers have to reach source and target by the same path or URL.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from compand import errors
from compand.checkpoint import find
from compand.data import storage
from compand.data.pack import ChunkReport, Packing, PackSpec, Summary, pack_chunk
from compand.data.sources import Record
from compand.errors import CompandError, UsageError

Batch = dict[str, Any]


class ChunkPacker:
    """An actor of the pool.

    Args:
        spec: of the packing.
        records: by number of the chunk, references to its records in Ray's object store.
    """

    def __init__(self, spec: PackSpec, records: Mapping[int, Any]) -> None:
        self._spec = spec
        self._records = records

    def __call__(self, batch: Batch) -> Batch:
        """{"index": int64 [1]} -> {"index": the same, "report": JSON of the `ChunkReport`, "error": JSON of class name
        and message of what ended it, or ""}."""
        import ray

        index = int(batch["index"][0])
        report, error = "", ""
        try:
            report = json.dumps(asdict(pack_chunk(self._spec, index, ray.get(self._records[index]))))
        except CompandError as raised:
            # A result like others: to Ray, an exception would be a fault of the pool.
            error = json.dumps([type(raised).__name__, str(raised)])
        return {"index": batch["index"], "report": np.array([report]), "error": np.array([error])}


def pack(
    packing: Packing,
    *,
    workers: int | None = None,
    progress: Callable[[ChunkReport], None] | None = None,
) -> Summary:
    """Packs all that is left with Ray, and completes the set.

    Ray is used as this process has initialised it, else as the environment says (RAY_ADDRESS, a cluster that runs
    here), else it is started on this machine.

    Args:
        packing: what to do.
        workers: at most so many actors; None: one for each GPU where the cluster has some and the device is not the
            CPU, else one for each core.
        progress: called with the report of each chunk when it is finished, in no certain order.

    Raises:
        UsageError: Ray is not installed, or workers is below 1.
        CompandError: see `pack_chunk` and `Packing.finish`.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise UsageError('--engine ray needs Ray: pip install "compand[ray]"') from None
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers cannot pack: give at least 1")
    todo = packing.todo()
    if not todo:
        return packing.finish()
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    resources = ray.cluster_resources()
    on_gpu = packing.spec.device != "cpu" and resources.get("GPU", 0) >= 1
    available = max(int(resources.get("GPU" if on_gpu else "CPU", 1)), 1)
    actors = min(workers or available, available, len(todo))
    spec = replace(
        packing.spec,
        # Workers may be in another folder.
        target=storage.absolute(packing.spec.target),
        codec=_anywhere_codec(packing.spec.codec),
    )
    with _quiet(ray.data.DataContext.get_current()):
        indexes = [{"index": index} for index, _ in todo]
        packed = ray.data.from_items(indexes, override_num_blocks=len(todo)).map_batches(
            ChunkPacker,
            fn_constructor_args=(spec, {index: ray.put(_found(records)) for index, records in todo}),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=actors, max_size=actors),
            num_cpus=1,
            num_gpus=1 if on_gpu else None,
        )
        for report in _reports(packed):
            if progress is not None:
                progress(report)
    return packing.finish()


def _anywhere_codec(name: str) -> str:
    """A released name as it is, a folder by a path that does not depend on a process's folder."""
    folder = os.path.abspath(name)
    return folder if os.path.realpath(find(name).path) == os.path.realpath(folder) else name


def _found(records: Sequence[Record]) -> list[Record]:
    return [replace(record, place=storage.absolute(record.place)) for record in records]


def _reports(packed: Any) -> Iterator[ChunkReport]:
    """The reports, as the chunks are finished. Raises what ended a chunk."""
    for row in packed.iter_rows():
        if row["error"]:
            name, message = json.loads(row["error"])
            raise getattr(errors, name, CompandError)(message)
        fields = json.loads(row["report"])
        for name in ("shards", "failures"):
            fields[name] = tuple(map(tuple, fields[name]))
        yield ChunkReport(**fields)


@contextmanager
def _quiet(context: Any) -> Iterator[None]:
    """Within the block Ray Data draws no bars and tells no steps of its own, only errors."""
    logger = logging.getLogger("ray.data")
    shown, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = shown
        logger.setLevel(level)
