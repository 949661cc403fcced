"""A packed set of many rows: opening, random access, memory, and an epoch over many ranks and workers.

Rows are synthetic: payloads of valid latents of 224x224 pixels (Laplacian noise), each of a handful repeated. They
are written as `compand pack` writes them, row groups and shards alike. Everything is measured in a process of its own,
which imports no torch: opening is `PackedReader(FOLDER)`; a random access reads all columns of a row and compares the
payload with its checksum, the first time with most row groups unseen, then again in the same order. Files are in the
page cache. Memory is the resident set, and what of it is the process's own, not pages of the files.

An epoch is what 8 processes of a distributed training, one after the other here, get by DataLoaders of 2 workers each
over `PackedSampler`: rows are counted as the batches arrive, with the worker that each went through.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from compand import checkpoint
from compand.data import PackedReader, RowCodec, SetInfo, ShardWriter
from compand.errors import CompandError
from compand.eval.provenance import markdown_table, provenance, write_results

CODEC, QUALITY = "wavelet-rgb-16x", 3.0
EDGE = 224
SPREAD = 0.5
"""Scale of the Laplacian noise: a payload has about 2.6 KB."""

DISTINCT = 64
"""Payloads that differ."""

ROWS_A_SHARD = 4096
RANKS, WORKERS, BATCH = 8, 2, 64

LIMITS = {"open_s": 1.0, "access_ms": 0.5, "resident_mb": 500.0}
"""What may not be exceeded."""


def write_set(folder: Path, rows: int, seed: int = 0) -> dict[str, Any]:
    """Writes a set of so many rows. Returns bytes (of all shards) and payload_bytes (mean of a row)."""
    info = SetInfo.of(checkpoint.find(CODEC), quality=QUALITY)
    geometry = {"height": EDGE, "width": EDGE, "channels": 3}
    generator, codec = np.random.default_rng(seed), RowCodec(info)
    shape = info.latent_shape(geometry)
    payloads = [
        codec.encode(np.rint(generator.laplace(0, SPREAD, shape)).astype(np.int32)) for _ in range(DISTINCT)
    ]
    keys = iter(range(rows))
    shards: list[dict[str, Any]] = []
    while numbers := list(islice(keys, ROWS_A_SHARD)):
        path = folder / f"part-{len(shards):05d}-0.parquet"
        with path.open("wb") as stream, ShardWriter(stream, info) as writer:
            writer.write(
                {"key": f"{n:08d}", "payload": payloads[n % DISTINCT], "source_bytes": 0, **geometry}
                for n in numbers
            )
        shards.append({"name": path.name, "rows": len(numbers), "bytes": path.stat().st_size})
    (folder / "packed.json").write_text(
        json.dumps({"format": 1, "shards": shards, "compand": info.to_json()})
    )
    return {
        "bytes": sum(shard["bytes"] for shard in shards),
        "payload_bytes": statistics.fmean(map(len, payloads)),
    }


def measure_access(folder: Path, accesses: int, seed: int = 1) -> dict[str, Any]:
    """Opens a set and reads rows at random; meant for a fresh process.

    Returns:
        open_s; first and again (mean_ms, median_ms, p99_ms of an access); memory in MB after opening and at its
        highest (opened, peak: resident and own).
    """
    before = _memory()
    start = time.perf_counter()
    reader = PackedReader(folder)
    rows = len(reader)
    opened = time.perf_counter() - start
    memory = {"before": before, "opened": _memory()}
    order = np.random.default_rng(seed).integers(0, rows, accesses).tolist()
    passes = {}
    for name in ("first", "again"):
        milliseconds = []
        for index in order:
            start = time.perf_counter()
            row = reader.row(index)
            milliseconds.append(1e3 * (time.perf_counter() - start))
            if row["key"] != f"{index:08d}":
                raise CompandError(f"row {index} has key {row['key']}: the reader is at fault")
        passes[name] = {
            "mean_ms": statistics.fmean(milliseconds),
            "median_ms": statistics.median(milliseconds),
            "p99_ms": float(np.quantile(milliseconds, 0.99)),
        }
        memory[name] = _memory()
    return {"open_s": opened, **passes, "memory": memory}


def _memory() -> dict[str, float]:
    """Megabytes (10^6): the resident set now and at its highest, and what of it belongs to no file."""
    names = {"VmRSS": "resident", "VmHWM": "peak", "RssAnon": "own"}
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[names[name]] = int(value.split()[0]) * 1024 / 1e6
    return found


class Rows:
    """Tells which rows a batch has, and which worker made it."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitems__(self, batch: list[int]) -> Any:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        return np.array(batch, dtype=np.int64), worker.id if worker else -1


def _as_it_is(batch: Any) -> Any:
    return batch


def measure_epoch(rows: int, ranks: int = RANKS, workers: int = WORKERS, seed: int = 0) -> dict[str, Any]:
    """An epoch over all ranks and workers, shuffled.

    Returns:
        rows, seconds; missing and repeated (numbers of rows), batches (by worker of a rank, for all ranks),
        neighbours: share of rows followed by the next one of the set, near 0 where it is shuffled.
    """
    from torch.utils.data import DataLoader

    from compand.data import PackedSampler

    seen = np.zeros(rows, dtype=np.int64)
    batches, neighbours = [], 0
    start = time.perf_counter()
    for rank in range(ranks):
        sampler = PackedSampler(rows, batch_size=BATCH, seed=seed, rank=rank, world_size=ranks)
        loader: Any = DataLoader(
            Rows(rows),  # type: ignore[arg-type]
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,
        )
        by_worker = [0] * max(workers, 1)
        for numbers, worker in loader:
            np.add.at(seen, numbers, 1)
            by_worker[max(worker, 0)] += 1
            neighbours += int((np.diff(numbers) == 1).sum())
        batches.append(by_worker)
    return {
        "rows": rows,
        "seconds": time.perf_counter() - start,
        "missing": int((seen == 0).sum()),
        "repeated": int((seen > 1).sum()),
        "batches": batches,
        "neighbours": neighbours / rows,
    }


def render(results: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    access, epoch, size = results["access"], results["epoch"], results["set"]
    memory = access["memory"]
    peak = max(memory[name]["peak"] for name in memory)
    reached = [
        ("opening, s", LIMITS["open_s"], access["open_s"]),
        ("random access, mean of the first pass, ms", LIMITS["access_ms"], access["first"]["mean_ms"]),
        ("resident memory at its highest, MB", LIMITS["resident_mb"], peak),
        ("rows missing in an epoch", 0, epoch["missing"]),
        ("rows repeated in an epoch", 0, epoch["repeated"]),
    ]
    rows = [
        [name, f"{limit:g}", f"{found:.3g}", "yes" if (found < limit or found == limit == 0) else "no"]
        for name, limit, found in reached
    ]
    passes = [
        [name, *(f"{access[name][key]:.3f}" for key in ("mean_ms", "median_ms", "p99_ms"))]
        for name in ("first", "again")
    ]
    stages = [
        [title, *(f"{memory[name][key]:.0f}" for key in ("resident", "own", "peak"))]
        for name, title in (
            ("before", "before opening"),
            ("opened", "after opening"),
            ("first", "after the first pass"),
            ("again", "after the second"),
        )
    ]
    parts = [
        "# Packed sets of many rows",
        (__doc__ or "").strip(),
        f"{epoch['rows']:,} rows, {size['bytes'] / 1e9:.2f} GB in {size['shards']} shards, "
        f"payloads of {size['payload_bytes']:,.0f} bytes.",
        markdown_table(["", "below", "reached", ""], rows),
        markdown_table(["random access, ms", "mean", "median", "99 %"], passes),
        markdown_table(["memory, MB", "resident", "own", "highest so far"], stages),
        f"Epoch: {RANKS} ranks x {WORKERS} workers, batches of {BATCH}, {epoch['seconds']:.0f} s; "
        f"{100 * epoch['neighbours']:.2f} % of rows are followed by the next one of the set.",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    from compand.eval.benchmarks import (
        program,
    )  # imports torch, which processes that measure memory do without

    parser = program.parser(__doc__ or "", "packed_scale")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--accesses", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="for the set, 2.7 KB a row; default: the system's")
    arguments = program.parse(parser, argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        size = write_set(folder, arguments.rows)
        size["shards"] = len(list(folder.glob("*.parquet")))
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            access = pool.apply(measure_access, (folder, arguments.accesses))
    results = {"set": size, "access": access, "epoch": measure_epoch(arguments.rows)}
    report = render(results)
    origin = provenance(f"{arguments.rows:,} synthetic rows, {arguments.accesses:,} accesses, seeds 0 and 1")
    write_results(arguments.output, results, origin, report=report, force=arguments.force)
    print(report)


if __name__ == "__main__":
    main()
