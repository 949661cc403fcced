"""Files of the command line: which to read, what to write where, and how never to leave half a file.

Nothing here knows a codec: commands hand in one function that turns a job's input into bytes.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import FrameType, TracebackType
from typing import Any, BinaryIO, TextIO
from weakref import WeakKeyDictionary

from compand.errors import CompandError, MediaError, UsageError

STREAM = "-"
"""The argument that means standard input or standard output."""

TEMPORARY_PREFIX = ".compand-"
"""Unfinished outputs are hidden files with this prefix; one stays behind only if the process is killed."""

DISK_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})

REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "check its permissions or choose another place with -o",
    errno.EPERM: "check its permissions or choose another place with -o",
    errno.EROFS: "choose another place with -o",
    errno.ENOTDIR: "choose another place with -o",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "choose a shorter name with -o",
}


# ---------------------------------------------------------------------------------------------- inputs


_openings: WeakKeyDictionary[BinaryIO, bytes] = WeakKeyDictionary()
"""What `Input.opening` has taken from standard input, until the rest is read."""


@dataclass(frozen=True)
class Input:
    """One thing to read."""

    path: Path | None  # None: standard input
    place: PurePath  # of its output below an output folder: the part below the folder named, or the name

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)

    def read(self) -> bytes:
        """All bytes of the input; OSError where it cannot be read."""
        if self.path is None:
            return _openings.pop(sys.stdin.buffer, b"") + sys.stdin.buffer.read()
        return self.path.read_bytes()

    def opening(self, size: int) -> bytes:
        """The first `size` bytes, fewer where there are no more; `read` and `spooled_stdin` give them again. None where
        the input cannot be read."""
        try:
            if self.path is None:
                # Not peek: what is there at once of a pipe may be less.
                stream = sys.stdin.buffer
                held = _openings.get(stream, b"")
                _openings[stream] = held + stream.read(max(size - len(held), 0))
                return _openings[stream][:size]
            with open(self.path, "rb") as stream:
                return stream.read(size)
        except OSError:
            return b""


@contextmanager
def spooled_stdin() -> Iterator[BinaryIO]:
    """Standard input as a stream that can seek: a copy of it in an unnamed temporary file."""
    with _write_errors(Path("temporary file")), tempfile.TemporaryFile() as spool:
        spool.write(_openings.pop(sys.stdin.buffer, b""))
        shutil.copyfileobj(sys.stdin.buffer, spool)
        yield spool


@dataclass(frozen=True)
class Failure:
    """An input that could not be handled, and why, in one line."""

    name: str
    message: str


def expand(
    arguments: Sequence[str], accept: Callable[[Path], bool], *, recursive: bool = False
) -> tuple[list[Input], list[Failure]]:
    """Turn arguments (files, folders, glob patterns, `-`) into inputs, each once, in the order given.

    A file that is named is taken whatever its suffix; a folder gives the files that `accept` takes, sorted,
    without hidden ones, and with `recursive` those of its subfolders too. A pattern is expanded here where
    the shell left it alone. What cannot be found becomes a failure, so that the rest still runs.

    Raises:
        UsageError: `-` is given twice, or standard input is a terminal.
    """
    inputs: list[Input] = []
    failures: list[Failure] = []
    for argument in arguments:
        if argument == STREAM:
            if sys.stdin is None or sys.stdin.isatty():
                raise UsageError("- reads standard input, which is a terminal here: pipe a file into it")
            inputs.append(Input(None, PurePath("stdin")))
            continue
        paths = [Path(argument)]
        if not os.path.lexists(argument) and glob.has_magic(argument):
            paths = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
            if not paths:
                failures.append(Failure(argument, f"no file matches {argument}: check the pattern"))
        for path in paths:
            if path.is_dir():
                found = [
                    Input(file, file.relative_to(path)) for file in _walk(path, recursive) if accept(file)
                ]
                if not found:
                    hint = "check the folder" if recursive else "use -r to search its subfolders"
                    failures.append(Failure(str(path), f"{path}: no fitting file in this folder; {hint}"))
                inputs.extend(found)
            elif path.exists():
                inputs.append(Input(path, PurePath(path.name)))
            elif "://" in argument:
                failures.append(Failure(argument, f"{argument} is not on this machine: copy it here first"))
            else:
                failures.append(Failure(str(path), f"{path}: no such file; check the path"))
    return _once(inputs), failures


def means_several(arguments: Sequence[str]) -> bool:
    """Whether arguments can mean more than one file: several of them, a folder or a pattern."""
    return len(arguments) > 1 or any(
        os.path.isdir(item) or (glob.has_magic(item) and not os.path.lexists(item)) for item in arguments
    )


def _walk(folder: Path, recursive: bool) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _once(inputs: list[Input]) -> list[Input]:
    if sum(item.path is None for item in inputs) > 1:
        raise UsageError("- is given twice: standard input can be read once")
    seen: dict[str, Input] = {}
    for item in inputs:
        seen.setdefault(STREAM if item.path is None else os.path.realpath(item.path), item)
    return list(seen.values())


# --------------------------------------------------------------------------------------------- outputs


@dataclass(frozen=True)
class Job:
    """One input and where its output goes."""

    source: Input
    target: Path | None  # None: standard output


def plan(
    inputs: Sequence[Input], output: str | None, suffix: str | Callable[[Input], str], *, several: bool
) -> list[Job]:
    """Give every input its output, before anything is read or written.

    The output is the input with its suffix replaced by `suffix`, beside the input or below the folder
    `output`. Two inputs in one place that differ by suffix alone (photo.png, photo.jpg) both keep their full
    name (photo.png.cpd, photo.jpg.cpd); a name that already ends in `suffix` below another one (photo.png.cpd
    to .png) is not given it twice.

    Args:
        inputs: what `expand` returned.
        output: None, `-`, a file (one input) or a folder (made when missing).
        suffix: with its dot, e.g. ".cpd"; or a function that gives each input's.
        several: what `means_several` says of the arguments; if so, `output` is a folder.

    Raises:
        UsageError: outputs would collide or overwrite an input, or `output` does not fit the inputs.
    """
    if not inputs:
        return []
    if output == STREAM or (output is None and any(item.path is None for item in inputs)):
        if len(inputs) > 1:
            raise UsageError(
                f"standard output takes one file and {len(inputs)} are given: name a folder with -o"
            )
        if sys.stdout is None or sys.stdout.isatty():
            raise UsageError("standard output is a terminal: name a file with -o or redirect it")
        return [Job(inputs[0], None)]
    if output is not None and not several and not _is_folder(output):
        targets = [Path(output)]
    else:
        folder = None if output is None else Path(output)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UsageError(f"-o {output} is a file and the output is more than one: name a folder")
        suffixes = [suffix if isinstance(suffix, str) else suffix(item) for item in inputs]
        targets = _names(inputs, folder, suffixes)
    _refuse_collisions(inputs, targets)
    return [Job(item, target) for item, target in zip(inputs, targets, strict=True)]


def _is_folder(output: str) -> bool:
    return Path(output).is_dir() or output.endswith(("/", os.sep))


def _names(inputs: Sequence[Input], folder: Path | None, suffixes: Sequence[str]) -> list[Path]:
    def place(item: Input) -> Path:
        return item.path if folder is None and item.path is not None else Path(folder or "", item.place)

    def short(path: Path, suffix: str) -> Path:
        inner = path.with_suffix("")
        return inner if inner.suffix.lower() == suffix.lower() else path.with_suffix(suffix)

    places = [place(item) for item in inputs]
    names = list(map(short, places, suffixes))
    # Folded, because photo.cpd and Photo.cpd are one file on Windows and macOS.
    folded = [str(name).casefold() for name in names]
    shared = {name for name in folded if folded.count(name) > 1} if len(set(folded)) < len(folded) else set()
    return [
        path.with_name(path.name + suffix) if key in shared else name
        for path, name, suffix, key in zip(places, names, suffixes, folded, strict=True)
    ]


def _refuse_collisions(inputs: Sequence[Input], targets: Sequence[Path]) -> None:
    sources = {os.path.realpath(item.path) for item in inputs if item.path is not None}
    owners: dict[str, Input] = {}
    for item, target in zip(inputs, targets, strict=True):
        real = os.path.realpath(target)
        if real in sources and not _is_special(target):
            raise UsageError(f"{target} is an input and would be overwritten: choose another output with -o")
        other = owners.setdefault(os.path.normcase(real), item)
        if other is not item:
            raise UsageError(
                f"{other.name} and {item.name} would both be written to {target}: give them separate folders"
            )


def _is_special(path: Path) -> bool:
    """Whether the path is a device or a pipe, which is written to and never replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_target(target: Path, *, force: bool) -> None:
    """Refuse an output that cannot be written, before time goes into its content, with a MediaError."""
    if target.is_dir():
        raise MediaError(f"{target} is a folder: name a file with -o")
    if target.exists() and not force and not _is_special(target):
        raise MediaError(f"{target} exists: -f overwrites it, --skip-existing leaves it")
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise MediaError(f"cannot write {target}: {folder} is not a folder; choose another place with -o")
    if not _is_special(target) and not os.access(folder, os.W_OK | os.X_OK):
        raise MediaError(f"cannot write {target}: {folder} is not writable; choose another place with -o")


_unfinished: set[Path] = set()
_creating = threading.Lock()
"""Held while a hidden file is created, and from an interrupt on until the process ends."""


@contextmanager
def atomic_write(target: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """A binary stream whose content appears as `target` whole, or not at all.

    The content goes to a hidden file in the same folder (made when missing), is flushed to the disk and
    renamed. Any exception, an interrupt included, removes the hidden file. Without `force`, a file that
    exists, or that appears meanwhile, is left alone. Devices and pipes are written to directly; a symbolic
    link's file is replaced, not the link.

    Raises:
        MediaError: the target exists, or cannot be written (folder, permission, full disk).
    """
    check_target(target, force=force)
    if _is_special(target):
        with _write_errors(target), open(target, "wb") as stream:
            yield stream
        return
    final = Path(os.path.realpath(target))
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{os.urandom(8).hex()}.tmp")
    _unfinished.add(temporary)
    try:
        with _write_errors(target):
            final.parent.mkdir(parents=True, exist_ok=True)
            # os.open, not tempfile: the file gets the permissions that the umask gives any new file.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            with _creating:
                descriptor = os.open(temporary, flags, 0o666)
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            _publish(temporary, final, force=force)
    finally:
        with suppress(OSError):
            temporary.unlink()
        _unfinished.discard(temporary)


def _publish(temporary: Path, final: Path, *, force: bool) -> None:
    if force:
        os.replace(temporary, final)
        return
    # A hard link fails where the name is taken; a rename would silently replace it on POSIX.
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise MediaError(f"{final} exists: -f overwrites it, --skip-existing leaves it") from None
    except OSError:
        # FAT and some network file systems have no hard links.
        if final.exists():
            raise MediaError(f"{final} exists: -f overwrites it, --skip-existing leaves it") from None
        os.rename(temporary, final)


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MediaError(f"cannot write {target}: {_reason(error)}") from error


def write_output(job: Job, content: bytes, *, force: bool = False) -> None:
    """Write a job's output to its file (atomically) or to standard output. MediaError as `atomic_write`."""
    if job.target is None:
        with _write_errors(Path("standard output")):
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        return
    with atomic_write(job.target, force=force) as stream:
        stream.write(content)


@contextmanager
def open_output(job: Job, *, force: bool = False) -> Iterator[BinaryIO]:
    """A stream that can seek, for an output that is written block by block; it appears whole, or not at all.

    Standard output, devices and pipes get the content at the end: until then it is in an unnamed temporary file.

    Raises:
        MediaError: as `atomic_write`.
    """
    if job.target is not None and not _is_special(job.target):
        with atomic_write(job.target, force=force) as stream:
            yield stream
        return
    with _write_errors(Path("temporary file")), tempfile.TemporaryFile() as spool:
        yield spool
        spool.seek(0)
        if job.target is not None:
            with atomic_write(job.target, force=force) as stream:
                shutil.copyfileobj(spool, stream)
            return
        with _write_errors(Path("standard output")):
            shutil.copyfileobj(spool, sys.stdout.buffer)
            sys.stdout.buffer.flush()


def discard_unfinished() -> None:
    """Remove the hidden files of writes that will not be finished, after an interrupt.

    The process must end after this: worker threads go on until then, and can begin no other file.
    """
    _creating.acquire()
    for temporary in tuple(_unfinished):
        with suppress(OSError):
            temporary.unlink()


# ---------------------------------------------------------------------------------------------- errors


def explain(error: BaseException, name: str) -> str:
    """An exception as one line that names the object, the fact and, where there is one, the remedy."""
    if isinstance(error, CompandError):
        text = " ".join(str(error).split())
        return text if name in text else f"{name}: {text}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or name}: {_reason(error)}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"{name}: not enough memory; use -j 1, or --device cpu where a GPU is full"
    text = " ".join(str(error).split())
    return f"{name}: unexpected {type(error).__name__}: {text}; COMPAND_DEBUG=1 shows where"


def _reason(error: OSError) -> str:
    fact = (error.strerror or str(error)).lower()
    if error.errno in DISK_FULL:
        return f"{fact}; free some space or choose another place with -o"
    remedy = REMEDIES.get(error.errno or 0)
    return f"{fact}; {remedy}" if remedy else fact


def debugging() -> bool:
    """Whether COMPAND_DEBUG asks for tracebacks."""
    return os.environ.get("COMPAND_DEBUG", "") not in ("", "0")


def _disk_is_full(error: BaseException) -> bool:
    chain = (error, error.__cause__)
    return any(isinstance(link, OSError) and link.errno in DISK_FULL for link in chain)


# ------------------------------------------------------------------------------------------- interrupts


class Interrupted(BaseException):
    """SIGINT (Ctrl-C) or SIGTERM; not an Exception, so that nothing mistakes it for a file's fault."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


@contextmanager
def interrupts() -> Iterator[None]:
    """Raise Interrupted in the main thread on SIGINT and SIGTERM, so that unfinished outputs are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_signals() -> None:
    """Give SIGINT and SIGTERM back to Python's own handling, for code that has its own."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# -------------------------------------------------------------------------------------------- the batch


@dataclass(frozen=True)
class Done:
    """What a finished job has to say."""

    line: str = ""  # the result, one line; "" says nothing
    notes: tuple[str, ...] = ()  # what was converted or is remarkable
    warnings: tuple[str, ...] = ()  # what was lost: the output was written, yet the batch counts as failed


Progress = Callable[[int, int], None]
"""Called by a job with the parts done and the parts in all."""

Work = Callable[[Job, Progress], Done]


def run_batch(
    jobs: Sequence[Job],
    work: Work,
    *,
    failures: Sequence[Failure] = (),
    workers: int = 1,
    quiet: bool = False,
    results: TextIO | None = None,
    prepare_worker: Callable[[], None] | None = None,
) -> bool:
    """Run `work` on every job, past the bad ones, and report; whether all went well.

    Results go to `results` (standard output unless that carries data), one line each as they come; notes,
    progress (on a terminal) and the closing list of failures go to standard error. A full disk ends the
    batch, and so does a UsageError, which is raised: it would be the same for every file.

    Workers are threads: the tensor library releases the interpreter lock where the time goes, and one loaded
    codec serves all, while a process each would load its own copy of library and weights. `prepare_worker`
    runs first in every worker thread (and not at all with one worker, which is the calling thread).
    """
    failed = list(failures)
    with (
        ProgressBar(len(jobs), shown=not quiet and bool(jobs)) as bar,
        closing(_outcomes(jobs, work, bar, workers, prepare_worker)) as outcomes,
    ):
        for job, outcome in outcomes:
            bar.finish(job)
            if isinstance(outcome, UsageError):
                raise outcome
            if isinstance(outcome, Exception):
                failed.append(Failure(job.source.name, explain(outcome, job.source.name)))
                if debugging():
                    traceback.print_exception(outcome)
                continue
            failed.extend(Failure(job.source.name, warning) for warning in outcome.warnings)
            if not quiet:
                for note in outcome.notes:
                    print(f"note: {job.source.name}: {note}", file=sys.stderr)
                if outcome.line:
                    say(outcome.line, results or sys.stdout)
    report_failures(failed)
    return not failed


def say(line: str, stream: TextIO) -> None:
    """Prints a line. Once the reader of a pipe has gone away, work goes on and its lines are dropped."""
    try:
        print(line, file=stream, flush=True)
    except OSError:
        abandon(stream)


def abandon(stream: TextIO) -> None:
    """Sends a stream, and what is left in its buffer, to nowhere, so that flushing it cannot fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def report_failures(failed: Sequence[Failure]) -> None:
    """The failures on standard error: one line for one, else a count and a list."""
    if len(failed) == 1:
        print(f"compand: {failed[0].message}", file=sys.stderr)
    elif failed:
        print(f"compand: {len(failed)} failures:", file=sys.stderr)
        for failure in failed:
            print(f"  {failure.message}", file=sys.stderr)


def _outcomes(
    jobs: Sequence[Job],
    work: Work,
    bar: ProgressBar,
    workers: int,
    prepare_worker: Callable[[], None] | None,
) -> Generator[tuple[Job, Done | Exception], None, None]:
    outcome: Done | Exception
    if workers == 1 or len(jobs) < 2:
        for number, job in enumerate(jobs):
            try:
                outcome = work(job, bar.of(job))
            except Exception as error:
                outcome = error
            yield job, outcome
            if isinstance(outcome, Exception) and _disk_is_full(outcome):
                yield from _not_tried(jobs[number + 1 :])
                return
        return
    pool = ThreadPoolExecutor(workers, initializer=prepare_worker)
    try:
        pending: dict[Future[Done], Job] = {pool.submit(work, job, bar.of(job)): job for job in jobs}
        while pending:
            # The timeout lets Ctrl-C through on Windows, where an endless wait cannot be interrupted.
            finished, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                job = pending.pop(future)
                try:
                    outcome = future.result()
                except Exception as error:
                    outcome = error
                yield job, outcome
                if isinstance(outcome, Exception) and _disk_is_full(outcome):
                    cancelled = [waiting for waiting in pending if waiting.cancel()]
                    yield from _not_tried([pending.pop(waiting) for waiting in cancelled])
                    break
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _not_tried(jobs: Sequence[Job]) -> Iterator[tuple[Job, Exception]]:
    for job in jobs:
        yield job, MediaError(f"{job.source.name}: not tried, the disk is full")


class ProgressBar:
    """A bar over a batch on standard error, where that is a terminal; silent elsewhere."""

    def __init__(self, jobs: int, *, shown: bool) -> None:
        self._shown = shown and sys.stderr is not None and sys.stderr.isatty()
        self._jobs = jobs
        self._finished = 0
        self._parts: dict[Job, float] = {}
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                BarColumn(),
                TextColumn("{task.fields[finished]}/{task.fields[jobs]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._jobs, finished=0, jobs=self._jobs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def of(self, job: Job) -> Progress:
        """The callback for one job's own progress."""

        def update(done: int, total: int) -> None:
            if self._bar is not None:
                self._parts[job] = done / max(total, 1)
                self._show()

        return update

    def finish(self, job: Job) -> None:
        """Count a job as finished, well or not."""
        self._finished += 1
        self._parts.pop(job, None)
        self._show()

    def _show(self) -> None:
        if self._bar is not None:
            completed = self._finished + sum(tuple(self._parts.values()))
            self._bar.update(self._task, completed=completed, finished=self._finished)
