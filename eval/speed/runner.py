"""Runs all contenders in turns and writes what they report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compand import files
from compand.errors import CompandError, UsageError
from compand.eval import subjects
from compand.eval.items import MEDIA, Item, Problem, find_items, load
from compand.eval.provenance import as_markdown, provenance
from compand.eval.report import write as write_page
from compand.eval.speed import contenders, peers, results
from compand.eval.speed.results import Amounts, Entry
from compand.eval.speed.stages import STAGES
from compand.eval.speed.worker import Job
from compand.pictures import Picture

DEFAULT_PEERS = ("mbt2018-mean@4", "mbt2018-mean@4:tuned")
"""Peers of image codecs unless others are asked for: a published codec of the size of ours, as it comes and tuned."""

DEFAULT_REFERENCES = ("jpeg", "opus")
"""What ratios are relative to where there is no peer."""

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_PRIOR = (
    "the prior is all of the bottleneck but entropy coding: hyper networks, quantisation, choice of tables"
)


@dataclass(frozen=True)
class Options:
    """What to time, and how.

    Attributes:
        output: folder for results.csv and results.json, plots and report.html.
        data: a file or a folder; None: a photograph or a synthetic sound (`material`).
        medium: "image" or "audio"; None: that of the data or of the codecs, else images.
        codecs: contenders (`contenders.parse`); None: all subjects of the medium.
        peers: contenders among the models of compressai; None: DEFAULT_PEERS for images.
        reference: contender that ratios are relative to, by its text or name; None: the first peer, else JPEG or Opus.
        device: of codecs of compand and of peers, as `compand.load` takes it.
        threads: cores that a process may use; None: all.
        rounds: processes of each contender.
        warm_up, repetitions: passes over the data in each process and direction, before those that count, and that
            count.
        plugins: modules that register codecs.
        force: replace existing results.
        quiet: no progress, no tables.
    """

    output: Path
    data: Path | None = None
    medium: str | None = None
    codecs: Sequence[str] | None = None
    peers: Sequence[str] | None = None
    reference: str | None = None
    device: str = "auto"
    threads: int | None = None
    rounds: int = 3
    warm_up: int = 3
    repetitions: int = 9
    plugins: Sequence[str] = ()
    force: bool = False
    quiet: bool = False


def run(options: Options) -> int:
    """Time all contenders, write the results and print them as Markdown.

    Returns:
        Exit code: 0, or 1 if a file could not be read or a contender failed (listed on standard error).

    Raises:
        UsageError: results exist, or something that was named does not.
        MediaError: the results cannot be written.
    """
    targets = [options.output / name for name in ("results.csv", "results.json")]
    for target in targets:
        if target.exists() and not options.force:
            raise UsageError(f"{target} exists: choose another -o, or pass --force to replace these results")
        files.check_target(target, force=options.force)
    threads = _threads(options.threads)
    subjects.load_plugins(options.plugins)
    with tempfile.TemporaryDirectory(prefix="compand-", ignore_cleanup_errors=True) as place:
        items, data, problems = _items(options, Path(place))
        medium = items[0].medium
        amounts, unreadable = _amounts(items)
        problems += unreadable
        readable = [item for item in items if item.name not in {problem.item for problem in unreadable}]
        if options.data is not None and options.data.is_dir():
            data = f"{len(readable)} item{'s' * (len(readable) != 1)} of {data}"
        entries, notices = _entries(options, medium)
        if readable:
            reference = _reference(entries, options.reference)
            problems += _measure(entries, readable, options, threads, Path(place))
    finished = [entry for entry in entries if len(entry.rounds) == options.rounds] if readable else []
    if finished:
        if all(entry.key != reference for entry in finished):
            notices.append(f"{reference} failed: ratios are relative to {finished[0].key} instead")
            reference = finished[0].key
        summary = {
            "kind": "speed",
            "title": f"Speed on {data}, {threads} thread{'s' * (threads != 1)}",
            "medium": medium,
            "data": data,
            "metrics": [],
            "speed": {
                "unit": amounts.unit,
                "reference": reference,
                "threads": threads,
                "device": next((d for d in map(_device, finished) if d != "cpu"), "cpu"),
                "rounds": options.rounds,
                "repetitions": options.repetitions,
                "warm_up": options.warm_up,
                "items": len(amounts.items),
                "amount": amounts.total,
                "stage_names": list(STAGES),
                "conditions": list(_conditions(options, threads, finished)),
            },
            "codecs": results.codec_summaries(finished, amounts, reference),
            "problems": [problem._asdict() for problem in problems],
            "notices": notices,
        }
        _write(targets, summary, results.rows(finished, amounts), options)
    files.report_failures([files.Failure(problem.item, problem.message) for problem in problems])
    return 1 if problems or not finished else 0


def _threads(wanted: int | None) -> int:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if wanted is not None and not 1 <= wanted <= cores:
        raise UsageError(f"{wanted} threads do not fit {cores} cores: choose 1 to {cores}")
    return wanted or cores


def _items(options: Options, place: Path) -> tuple[list[Item], str, list[Problem]]:
    """The files to be coded, what their folder or the one file is in a few words, and what is wrong with others."""
    if options.data is not None:
        items, problems = find_items(options.data.resolve(), options.medium)
        return items, options.data.resolve().name, problems

    from compand.eval.speed import material

    medium = options.medium or _medium_of(options.codecs or ())
    if medium not in MEDIA:
        raise UsageError(f"medium {medium} does not exist: choose image or audio")
    path, data = (material.write_picture if medium == "image" else material.write_sound)(place)
    return [Item(path.name, path, medium)], data, []


def _medium_of(codecs: Sequence[str]) -> str:
    """The medium of the first codec that has one alone; images where none has."""
    for text in codecs:
        media = [medium for medium in MEDIA if _exists(contenders.parse(text).name, medium)]
        if len(media) == 1:
            return media[0]
    return "image"


def _exists(name: str, medium: str) -> bool:
    try:
        subjects.find(name, medium)
    except CompandError:
        return False
    return True


def _amounts(items: Sequence[Item]) -> tuple[Amounts, list[Problem]]:
    """Megapixels or seconds of the items that can be read, and a problem for each of the others."""
    amounts, problems = [], []
    for item in items:
        try:
            signal = load(item)
        except CompandError as error:
            problems.append(Problem(item.name, "", None, files.explain(error, item.name)))
            continue
        amounts.append(signal.height * signal.width / 1e6 if isinstance(signal, Picture) else signal.seconds)
    return Amounts(items[0].medium, amounts), problems


def _entries(options: Options, medium: str) -> tuple[list[Entry], list[str]]:
    """All contenders, codecs first, and notices about those that are left out."""
    names = subjects.names(medium) if options.codecs is None else options.codecs
    chosen = [contenders.parse(name) for name in names]
    notices = []
    wanted = options.peers
    if wanted is None:
        wanted = DEFAULT_PEERS if medium == "image" else ()
    elif wanted and medium != "image":
        raise UsageError("the peers of compressai code images: leave --peers out for sounds")
    if wanted and not peers.installed():
        notices.append(peers.NOT_INSTALLED)
        print(f"note: {peers.NOT_INSTALLED}", file=sys.stderr)
    else:
        chosen += [contenders.parse(name, peer=True) for name in wanted]
    entries = [Entry(contender, contender.subject(medium, options.device)) for contender in chosen]
    keys = [entry.key for entry in entries]
    if not entries:
        raise UsageError("there is nothing to time: name a codec with --codecs")
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"{key} is named twice: name it once, or with different settings")
    return entries, notices


def _reference(entries: Sequence[Entry], wanted: str | None) -> str:
    """Key of the contender that ratios are relative to."""
    if wanted is not None:
        names = [
            (entry.key, entry.contender.text_for(entry.contender.name), entry.subject.name)
            for entry in entries
        ]
        for entry, known in zip(entries, names, strict=True):
            if wanted in known:
                return entry.key
        keys = ", ".join(entry.key for entry in entries)
        raise UsageError(f"the reference {wanted} does not take part: choose one of {keys}")
    first = [entry for entry in entries if entry.contender.peer]
    first += [entry for entry in entries if entry.subject.name in DEFAULT_REFERENCES]
    return (first or list(entries))[0].key


def _measure(
    entries: Sequence[Entry], items: Sequence[Item], options: Options, threads: int, place: Path
) -> list[Problem]:
    """Runs all rounds. A contender that fails is left out from then on."""
    problems: dict[str, Problem] = {}
    with _progress(options.rounds * len(entries), shown=not options.quiet) as advance:
        for _ in range(options.rounds):
            for entry in entries:
                advance(entry.key)
                if entry.key in problems:
                    continue
                report = _report(_job(entry, items, options, threads, place), place)
                if "error" in report:
                    message = report["error"]
                    problems[entry.key] = Problem("", entry.key, entry.contender.quality, message)
                else:
                    entry.rounds.append(report)
    return list(problems.values())


def _job(entry: Entry, items: Sequence[Item], options: Options, threads: int, place: Path) -> Job:
    return Job(
        contender=entry.contender.text_for(entry.subject.source),
        peer=entry.contender.peer,
        medium=items[0].medium,
        paths=[str(item.path) for item in items],
        device=options.device,
        threads=threads,
        warm_up=options.warm_up,
        repetitions=options.repetitions,
        plugins=list(options.plugins),
        python_path=[os.path.abspath(entry) for entry in sys.path],
        folder=str(place),
    )


def _report(job: Job, place: Path) -> dict[str, Any]:
    """What a process says about its job: the result of `worker.measure`, or {"error": one line}."""
    told, answer = place / "job.json", place / "result.json"
    told.write_text(json.dumps(asdict(job)), encoding="utf-8")
    answer.unlink(missing_ok=True)
    process = subprocess.run(
        [sys.executable, "-m", "compand.eval.speed.worker", str(told), str(answer)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=place,
        env=os.environ | dict.fromkeys(_THREAD_VARIABLES, str(job.threads)),
        check=False,
    )
    if process.returncode == 0 and answer.exists():
        report: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return report
    lines = process.stdout.decode(errors="replace").strip().splitlines()
    last = f": {lines[-1].strip()}" if lines else ""
    return {"error": f"{job.contender} ended its process (exit status {process.returncode}){last}"}


def _conditions(options: Options, threads: int, entries: Sequence[Entry]) -> Iterator[str]:
    """What a reader has to know of the figures, one sentence each."""
    yield (
        f"Rounds: {options.rounds}. In each, every codec in turn has a fresh process, where {options.repetitions} "
        f"passes over the data count in each direction, after {options.warm_up} to warm up. Figures are medians over "
        "all passes, with quartiles."
    )
    yield (
        "Encoding goes from 8-bit pixels (or float32 samples) in memory to a closed file, decoding from the file to "
        "all samples in memory, for peers too. Files are new, stay in the system's cache and are not flushed to the "
        "disk. Loading a model and reading the originals do not count."
    )
    yield f"Each process may use {threads} core{'s' * (threads != 1)}."
    yield (
        f"Stages are medians over further passes, in which each stage is timed; {_PRIOR}; IO is the container and the "
        'file; "other" is what remains, conversion of samples for the most part. Of codecs of other libraries, only '
        "the file is told from the codec."
    )
    yield (
        "Resident memory is that of a whole process with its libraries; after loading, the model and the originals "
        "are in it."
    )
    if any(_device(entry) != "cpu" for entry in entries):
        yield "The GPU is synchronized at both ends of every pass and, where stages are timed, of every stage."
    if any(entry.contender.peer for entry in entries):
        yield (
            "Peers have random weights, since trained ones must be downloaded. Their networks take the same time with "
            "any weights; their coder works on as many symbols, but on nearly constant ones, so trained models would "
            "be no faster."
        )


def _device(entry: Entry) -> str:
    return str(entry.rounds[0]["device"])


def _write(
    targets: Sequence[Path], summary: dict[str, Any], rows: list[dict[str, Any]], options: Options
) -> None:
    """Writes the CSV and the JSON file, both or neither, then plots and the page, and prints the tables."""
    origin = provenance(summary["data"])
    origin["hardware"]["torch_threads"] = summary["speed"]["threads"]
    document = {"provenance": origin, "schema": results.COLUMNS, "rows": rows, "summary": summary}
    with (
        files.atomic_write(targets[0], force=options.force) as table,
        files.atomic_write(targets[1], force=options.force) as whole,
    ):
        table.write(results.as_csv(rows).encode())
        whole.write(json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")
    written = [*targets, *write_page(options.output)]
    if not options.quiet:
        print(f"written: {', '.join(map(str, written))}", file=sys.stderr)
        print(f"{results.render(summary)}\n{as_markdown(origin)}")


@contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """A bar on standard error, where that is a terminal; yields a function that names what is about to be done."""
    if not shown or not sys.stderr.isatty():
        yield lambda name: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def advance(name: str) -> None:
            bar.update(task, advance=1, description=name)

        yield advance
