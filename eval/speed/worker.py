"""One contender timed in a process of its own: `python -m compand.eval.speed.worker JOB RESULT` (two JSON files).

Its process has one contender, so that allocator settings, loaded libraries and memory are that contender's alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compand import files
from compand.errors import MediaError
from compand.eval import items, subjects
from compand.eval.items import Item, Signal
from compand.eval.speed import contenders
from compand.eval.speed.contenders import Contender
from compand.eval.speed.stages import Hook, Stopwatch, codec_hooks, hooked, peer_hooks
from compand.eval.subjects import CompandSubject, Subject
from compand.pictures import Picture

_STAGED_SHARE = 3  # one staged pass for so many plain ones


@dataclass(frozen=True)
class Job:
    """What a process is to time.

    Attributes:
        contender, peer: its text, and whether it is a peer.
        medium: "image" or "audio".
        paths: the files to be coded.
        device, threads: of the computation.
        warm_up, repetitions: passes over all files, in each direction, before those that count, and that count.
        plugins: modules that register codecs.
        python_path: where this process finds modules.
        folder: where coded files are written.
    """

    contender: str
    peer: bool
    medium: str
    paths: Sequence[str]
    device: str
    threads: int
    warm_up: int
    repetitions: int
    plugins: Sequence[str]
    python_path: Sequence[str]
    folder: str


Enter = Callable[[str], AbstractContextManager[None]]
"""Enters a stage by name."""


class Coder:
    """Passes of one codec over signals and files."""

    def __init__(self, subject: Subject, quality: float, signals: Sequence[Signal], folder: Path) -> None:
        self._subject = subject
        self._quality = quality
        self._signals = signals
        self._paths = [folder / f"{number}{subject.suffix}" for number in range(len(signals))]

    def clear(self) -> None:
        """Removes the files. To replace a file can take longer than to encode it: the disk is made to catch up."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def encode(self, enter: Enter) -> None:
        """Samples in memory to files."""
        for signal, path in zip(self._signals, self._paths, strict=True):
            data = self._subject.encode(signal, self._quality)
            with enter("io"):
                path.write_bytes(data)

    def decode(self, enter: Enter) -> None:
        """Files to samples in memory."""
        for path in self._paths:
            with enter("io"):
                data = path.read_bytes()
            samples(self._subject.decode(data))

    def check(self) -> None:
        """Raises MediaError unless every file gives a signal of the shape that was encoded."""
        for signal, path in zip(self._signals, self._paths, strict=True):
            decoded = self._subject.decode(path.read_bytes())
            if samples(decoded).shape != samples(signal).shape:
                shapes = f"{samples(signal).shape} became {samples(decoded).shape}"
                raise MediaError(f"{self._subject.name} does not restore the signal's shape: {shapes}")

    def sizes(self) -> list[int]:
        """Bytes of each file."""
        return [path.stat().st_size for path in self._paths]


def samples(signal: Signal) -> np.ndarray[Any, Any]:
    """The samples themselves, in memory: what a codec put off is done here, within the timed pass."""
    return np.asarray(signal.pixels if isinstance(signal, Picture) else signal.samples)


def measure(job: Job) -> dict[str, Any]:
    """Time a contender in this process.

    Returns:
        quality, device, note (on its setting), sizes (bytes of each file), baseline_rss, peak_rss and peak_gpu (bytes
        or None), totals (direction -> seconds of each pass), stages (direction -> stage -> seconds of each staged
        pass).
    """
    contender = contenders.parse(job.contender, peer=job.peer)
    subject = contender.subject(job.medium, job.device)
    quality = contenders.middle_quality(subject) if contender.quality is None else contender.quality
    signals = [items.load(Item(Path(path).name, Path(path), job.medium)) for path in job.paths]
    device, hooks, note = _load(contender, subject, quality, job)
    cuda = _cuda() if device.startswith("cuda") else None
    synchronize = partial(cuda.synchronize, device) if cuda else _nothing
    if cuda:
        cuda.reset_peak_memory_stats(device)
    baseline = resident("VmRSS")

    coder = Coder(subject, quality, signals, Path(job.folder))
    result: dict[str, Any] = {"quality": quality, "device": device, "note": note, "totals": {}, "stages": {}}
    coder.encode(_no_stage)
    coder.check()
    staged = -(-job.repetitions // _STAGED_SHARE)
    for direction, action, prepare in (
        ("encode", coder.encode, coder.clear),
        ("decode", coder.decode, _nothing),
    ):
        timing = Timing(action, prepare, synchronize)
        result["totals"][direction] = timing.passes(job.warm_up, job.repetitions)
        result["stages"][direction] = timing.stages(hooks, staged)
    return result | {
        "sizes": coder.sizes(),
        "baseline_rss": baseline,
        "peak_rss": resident("VmHWM"),
        "peak_gpu": cuda.max_memory_allocated(device) if cuda else None,
    }


class Timing(NamedTuple):
    """How one direction is timed.

    Attributes:
        action: a pass over all items.
        prepare: called before each pass, not timed.
        synchronize: waits until the device has finished; called at both ends of whatever is timed.
    """

    action: Callable[[Enter], None]
    prepare: Callable[[], None]
    synchronize: Callable[[], None]

    def passes(self, warm_up: int, repetitions: int) -> list[float]:
        """Seconds of each pass after `warm_up` others."""
        seconds = []
        for _ in range(warm_up + repetitions):
            self.prepare()
            self.synchronize()
            start = time.perf_counter()
            self.action(_no_stage)
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds[warm_up:]

    def stages(self, hooks: Sequence[Hook], repetitions: int) -> dict[str, list[float]]:
        """Seconds of each stage in each pass. What no hook claims is "other" or, without any hooks, "codec"."""
        stopwatch = Stopwatch(self.synchronize)
        seconds = []
        with hooked(hooks, stopwatch):
            for _ in range(repetitions):
                self.prepare()
                stopwatch.seconds.clear()
                with stopwatch.stage("other" if hooks else "codec"):
                    self.action(stopwatch.stage)
                seconds.append(dict(stopwatch.seconds))
        found = dict.fromkeys(chain(*seconds))
        return {name: [one.get(name, 0.0) for one in seconds] for name in found}


def resident(field: str) -> int | None:
    """Resident memory of this process in bytes: "VmRSS" now, "VmHWM" at its highest; None where it is not known.

    Linux' getrusage would tell a process that another one has started the latter's memory if that was more.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def limit_threads(count: int) -> None:
    """Lets this process use `count` cores and no more, whatever its libraries would like, where the system can."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _load(contender: Contender, subject: Subject, quality: float, job: Job) -> tuple[str, list[Hook], str]:
    """Loads the subject's model in the contender's setting. Returns its device, its hooks and a note on the setting."""
    if not isinstance(subject, CompandSubject) and not contender.peer:
        return "cpu", [], ""

    from compand.allocator import tune_allocator

    tuned = contender.tuned and tune_allocator()
    allocator = "allocator tuned" if tuned else "allocator as it comes"
    if isinstance(subject, CompandSubject):
        from compand import checkpoint
        from compand.weights import build, choose_device, native_bfloat16

        place = choose_device(job.device)
        reduced = native_bfloat16(place) if contender.reduced is None else contender.reduced
        codec = build(checkpoint.find(subject.source), str(place), reduced=reduced)
        subject.codec = codec
        note = f"{'bfloat16' if reduced else 'float32'} transforms, {allocator}"
        return str(codec.device), codec_hooks(codec), note

    from compand.eval.speed.peers import Peer

    assert isinstance(subject, Peer)
    subject.load(quality)
    return str(subject.device), peer_hooks(subject.model), allocator


def _no_stage(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def _nothing() -> None:
    pass


def _cuda() -> Any:
    import torch

    return torch.cuda


def main(argv: Sequence[str] | None = None) -> None:
    """Do the job of the first file and write the second: what `measure` returns, or {"error": one line}."""
    job_path, result_path = map(Path, sys.argv[1:] if argv is None else argv)
    job = Job(**json.loads(job_path.read_text(encoding="utf-8")))
    sys.path[:] = job.python_path
    limit_threads(job.threads)
    try:
        subjects.load_plugins(job.plugins)
        result = measure(job)
    except Exception as error:
        result = {"error": files.explain(error, job.contender)}
    result_path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
