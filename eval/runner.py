"""Measures items with codecs in several processes, and keeps every row as soon as there is one.

Each worker process encodes and measures; beside it runs a decoding process of its own (`compand.eval.decoder`). This
process only hands out work and stores rows, so Ctrl-C ends a run at once and loses what was in flight alone.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from compand import files
from compand.errors import CompandError, MediaError, UsageError
from compand.eval import subjects as known
from compand.eval.decoder import Decoder
from compand.eval.items import Item, Problem, Signal, load, reason
from compand.eval.measurements import (
    Key,
    Row,
    Store,
    bits_per_pixel,
    kilobits_per_second,
    row_problems,
)
from compand.eval.metrics import for_medium, measure
from compand.eval.provenance import provenance
from compand.eval.subjects import Subject
from compand.pictures import Picture

_POLL_SECONDS = 0.5  # an endless wait cannot be interrupted on Windows
_END_SECONDS = 5  # that a worker may take to end its decoder


class Judge(Protocol):
    """Makes further columns from a decoded item, in a worker process."""

    def __call__(self, item_name: str, decoded: Signal) -> Mapping[str, Any]: ...


class Unit(NamedTuple):
    """One item with one codec: what a worker is handed at a time."""

    item: Item
    source: str  # the codec as `subjects.find` takes it
    codec: str  # its name
    qualities: tuple[float, ...]
    examples: Path | None  # folder for the original and the decoded files, if they are kept


@dataclass(frozen=True)
class Setup:
    """What a worker knows from its start; it is pickled."""

    metrics: tuple[str, ...]
    plugins: tuple[str, ...]
    judge_factory: Callable[[], Judge] | None
    loader: Callable[[Item], Signal]
    threads: int
    folder: Path  # for temporary files


class Finished(NamedTuple):
    """A worker is done with its unit."""


class Unable(NamedTuple):
    """A worker cannot start, for a reason that all would meet."""

    message: str


Message = Row | Problem | Finished | Unable


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_all(
    items: Sequence[Item],
    subjects: Mapping[str, Sequence[float]],
    metrics: Sequence[str],
    store: Store,
    *,
    jobs: int | None = None,
    plugins: Sequence[str] = (),
    judge_factory: Callable[[], Judge] | None = None,
    loader: Callable[[Item], Signal] = load,
    examples: Path | None = None,
    example_items: int = 0,
    quiet: bool = False,
) -> list[Problem]:
    """Encode, decode and measure every item with every codec at every quality that the store does not have yet.

    A row is made only where the whole chain worked; what failed is tried again when the run is continued.

    Args:
        items: of one medium.
        subjects: qualities by codec, as `compand.eval.subjects.find` takes it.
        metrics: columns that a row must have to count as measured. Rows that are made now have those of the whole run
            (earlier calls for the same store included), as far as they can be computed here. Where an item is unfit for
            one, the column is None and a problem says why; where a metric fails otherwise, there is no such column.
        store: where rows go, and where they are looked for.
        jobs: worker processes; None: as many as there are cores.
        plugins: modules that register codecs and anchors, imported in every process.
        judge_factory: makes, in each worker, the function that gives further columns; must be picklable.
        loader: gives the signal of an item; must be picklable.
        examples: folder in which originals and decoded files of `example_items` items, evenly spaced, are kept.
        quiet: no progress bar.

    Returns:
        The problems of these items with these codecs, those of earlier runs included.

    Raises:
        UsageError: a codec or a plug-in does not exist.
        CompandError: workers cannot start.
    """
    known.load_plugins(plugins)
    medium = items[0].medium
    found = {source: known.find(source, medium) for source in subjects}
    store.add_codecs({subject.name: facts(subject) for subject in found.values()})
    kept = example_folders(items, example_items if examples else 0)
    if examples:
        store.add_written((examples / folder).relative_to(store.out).as_posix() for folder in kept.values())
    units = []
    for item in items:
        for source, qualities in subjects.items():
            subject = found[source]
            left = tuple(
                quality
                for quality in qualities
                if not store.done(Key(item.name, subject.name, subject.identity, quality), metrics)
            )
            if left:
                place = examples / kept[item.name] if examples and item.name in kept else None
                units.append(Unit(item, source, subject.name, left, place))
    jobs = max(1, min(jobs or cores(), len(units)))
    # A row replaces the one before it: it must not have less.
    together = list(dict.fromkeys([*store.description["metrics"], *metrics]))
    columns = [metric.name for metric in for_medium(medium, together)[0]] if units else []
    problems: dict[Problem, None] = {}
    with tempfile.TemporaryDirectory(prefix="compand-eval-", ignore_cleanup_errors=True) as folder:
        setup = Setup(
            tuple(columns), tuple(plugins), judge_factory, loader, max(1, cores() // jobs), Path(folder)
        )
        with (
            _progress(sum(len(unit.qualities) for unit in units), shown=not quiet) as advance,
            closing(_messages(units, setup, jobs)) as messages,
        ):
            for message, done in messages:
                if isinstance(message, dict):
                    if not store.measured:  # from the first row on, so that a killed run is on record too
                        store.add_origin(provenance(f"{len(items)} items of {store.description['data']}"))
                    store.append(message, columns)
                elif isinstance(message, Problem):
                    problems[message] = None
                elif isinstance(message, Unable):
                    raise CompandError(message.message)
                advance(done)
    wanted = {
        (item.name, found[source].name, quality)
        for item in items
        for source, qualities in subjects.items()
        for quality in qualities
    }
    rows = [row for row in store.rows() if (row["item"], row["codec"], row["quality"]) in wanted]
    return [*problems, *row_problems(rows)]


def facts(subject: Subject) -> dict[str, Any]:
    """What results say of a codec."""
    return {
        "title": subject.title,
        "kind": subject.kind,
        "note": subject.settings_note,
        "identity": subject.identity,
    }


def example_folders(items: Sequence[Item], count: int) -> dict[str, str]:
    """Evenly spaced items whose files are kept, with the name of the folder of each."""
    count = min(count, len(items))
    chosen = [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]
    names: dict[str, str] = {}
    for item in chosen:
        short = "_".join(PurePosixPath(item.name).with_suffix("").parts)
        names[item.name] = short if short not in names.values() else item.name.replace("/", "_")
    return names


# ---------------------------------------------------------------------------------------------- the pool


class _Worker:
    """A process and the unit that it works on. SIGINT does not reach it: this process decides what ends."""

    def __init__(self, setup: Setup) -> None:
        context = get_context("spawn")  # a fork would share the encoder's memory and this process's threads
        self.channel, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, setup), daemon=True)
        with _ignored_interrupt():
            self.process.start()
        theirs.close()  # so that the channel ends with the process
        self.unit: Unit | None = None
        self.left = 0

    def assign(self, unit: Unit) -> None:
        self.unit, self.left = unit, len(unit.qualities)
        with suppress(OSError):  # where the process is gone, its channel will tell
            self.channel.send(unit)

    def stop(self) -> None:
        """Have the process end now, whatever it does."""
        self.process.terminate()

    def join(self) -> None:
        """Wait for the end of a process that has no unit, or was stopped."""
        self.channel.close()
        self.process.join(_END_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _messages(units: Sequence[Unit], setup: Setup, jobs: int) -> Generator[tuple[Message, int], None, None]:
    """What workers report, with the number of measurements that are done by it. All workers have ended after it."""
    waiting = deque(units)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker(setup))
                workers[-1].assign(waiting.popleft())
            ready = connection.wait([worker.channel for worker in workers], timeout=_POLL_SECONDS)
            for worker in [worker for worker in workers if worker.channel in ready]:
                try:
                    message: Message = worker.channel.recv()
                except (EOFError, OSError):
                    yield _death(worker), worker.left
                    worker.join()
                    workers.remove(worker)
                    continue
                if not isinstance(message, Finished):
                    done = 1 if isinstance(message, dict) or _is_of_a_quality(message) else 0
                    worker.left -= done
                    yield message, done
                    continue
                yield message, worker.left
                if waiting:
                    worker.assign(waiting.popleft())
                else:
                    worker.join()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()


def _is_of_a_quality(message: Message) -> bool:
    return isinstance(message, Problem) and message.quality is not None


def _death(worker: _Worker) -> Problem:
    worker.process.join(_END_SECONDS)
    unit = worker.unit
    assert unit is not None
    fact = f"{unit.codec} ended its process (exit status {worker.process.exitcode})"
    return Problem(unit.item.name, unit.codec, None, f"{unit.item.name}: encoding with {fact}")


@contextmanager
def _ignored_interrupt() -> Iterator[None]:
    """Processes started meanwhile, and those that they start, ignore SIGINT from their first moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that moves a bar on standard error, where that is a terminal."""
    if not shown or not total or sys.stderr is None or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)


# -------------------------------------------------------------------------------------------- the worker


def _work(channel: connection.Connection, setup: Setup) -> None:
    """Main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit_threads(setup.threads)
    with Decoder(setup.plugins, threads=setup.threads, folder=setup.folder) as decoder:
        try:
            measurer = _Measurer(setup, decoder)
        except Exception as error:
            channel.send(Unable(files.explain(error, "evaluation")))
            return
        with suppress(EOFError, OSError):  # until the other side closes the channel
            while True:
                unit: Unit = channel.recv()
                for message in measurer.measured(unit):
                    channel.send(message)
                channel.send(Finished())


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however it ended; the decoder then sees its input end."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _limit_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:  # imported before the variable was set
        torch.set_num_threads(threads)


class _Measurer:
    """Turns units into rows."""

    def __init__(self, setup: Setup, decoder: Decoder) -> None:
        from compand.allocator import tune_allocator

        tune_allocator()
        known.load_plugins(setup.plugins)
        self._setup = setup
        self._decoder = decoder
        self._judge = setup.judge_factory() if setup.judge_factory else None
        self._subjects: dict[tuple[str, str], Subject] = {}

    def measured(self, unit: Unit) -> Iterator[Row | Problem]:
        """Rows and problems of a unit."""
        item = unit.item
        try:
            original = self._setup.loader(item)
            if unit.examples is not None:
                _keep(original, unit.examples / "original")
        except Exception as error:
            yield Problem(item.name, "", None, reason(error, item))
            return
        try:
            subject = self._subject(unit.source, item.medium)
        except Exception as error:
            yield Problem(item.name, unit.codec, None, reason(error, item))
            return
        for quality in unit.qualities:
            try:
                yield self._measure(item, original, subject, quality, unit.examples)
            except Exception as error:
                yield Problem(item.name, subject.name, quality, reason(error, item))

    def _subject(self, source: str, medium: str) -> Subject:
        if (source, medium) not in self._subjects:
            subject = known.find(source, medium)
            subject.prepare()
            self._subjects[source, medium] = subject
        return self._subjects[source, medium]

    def _measure(
        self, item: Item, original: Signal, subject: Subject, quality: float, examples: Path | None
    ) -> Row:
        start = time.perf_counter()
        data = subject.encode(original, quality)
        encode_seconds = time.perf_counter() - start
        decoded, size, decode_seconds = self._decoder.decode(subject.source, data, medium=subject.medium)
        row: Row = {
            "item": item.name,
            "medium": item.medium,
            "codec": subject.name,
            "identity": subject.identity,
            "quality": quality,
            "bytes": size,
            "overhead_bytes": subject.overhead(data),
        }
        row |= _extent(original, row)
        if _extent(decoded, row) != _extent(original, row):
            raise MediaError(f"{subject.name} decodes to {_shape(decoded)} what was {_shape(original)}")
        row |= {"encode_seconds": encode_seconds, "decode_seconds": decode_seconds}
        problems = []
        for metric in self._setup.metrics:
            try:
                value = float(measure(metric, original, decoded))
                row[metric] = None if math.isnan(value) else value
                if math.isnan(value):
                    problems.append(f"{item.name}: {metric} is not a number")
            except UsageError as error:  # an item may be unfit for one metric and right for the others
                row[metric] = None
                problems.append(reason(error, item))
            except Exception as error:  # no column: a continued run measures it again
                problems.append(reason(error, item))
        if self._judge is not None:
            row |= self._judge(item.name, decoded)
        if original.notes:
            row["notes"] = list(original.notes)
        if problems:
            row["problems"] = problems
        if examples is not None:
            _keep(decoded, examples / f"{subject.name}-{quality:g}")
        return row


def _extent(signal: Signal, row: Row) -> Row:
    """Columns that say how large a signal is, and the rate that makes of the file."""
    size = row["bytes"]
    if isinstance(signal, Picture):
        return {
            "bpp": bits_per_pixel(size, signal.height, signal.width),
            "height": signal.height,
            "width": signal.width,
        }
    columns = {
        "kbps": kilobits_per_second(size, signal.seconds),
        "seconds": signal.seconds,
        "rate": signal.rate,
        "channels": signal.channels,
    }
    if row["overhead_bytes"]:
        columns["kbps_payload"] = kilobits_per_second(size - row["overhead_bytes"], signal.seconds)
    return columns


def _shape(signal: Signal) -> str:
    if isinstance(signal, Picture):
        return f"{signal.width} x {signal.height} pixels"
    return f"{signal.length} samples of {signal.channels} channels at {signal.rate} Hz"


def _keep(signal: Signal, path: Path) -> None:
    """Keep an example as .png or .flac; whole or not at all, since two workers may write the same original."""
    suffix, kind = (".png", "PNG") if isinstance(signal, Picture) else (".flac", "FLAC")
    with files.atomic_write(path.with_name(path.name + suffix), force=True) as stream:
        signal.save(stream, format=kind)
