"""`compand eval perception`: the score of a frozen task model on decoded items, against rate and distortion.

Encoding, decoding and rows are those of every evaluation (`compand.eval.runner`); a judge in each worker adds the
outcomes of the task models on the decoded item, and on the undamaged one as the task loads it, which never passes
through a codec. The baseline is made of the latter, by the same function: the identity codec scores exactly as much.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compand.cli import table
from compand.errors import MediaError, UsageError
from compand.eval import subjects
from compand.eval.anchors import MISSING
from compand.eval.items import Item, Problem, Signal, reason
from compand.eval.measurements import EXAMPLES, RATES, Store, row_notices, write_results
from compand.eval.metrics import Metric, for_medium
from compand.eval.perception import adapters
from compand.eval.perception import task as tasks
from compand.eval.perception.summary import NoCommonItemsError, TrainedOn, column, summarise
from compand.eval.perception.task import Task, TaskItem, TaskModel
from compand.eval.provenance import provenance
from compand.eval.rd import kept_examples, report_problems, write_page
from compand.eval.runner import measure_all
from compand.eval.selection import select

_KEPT_BASELINES = 64
"""Items whose undamaged outcomes a worker remembers: codecs follow each other on one item."""


@dataclass(frozen=True)
class Options:
    """What `compand eval perception` was asked for; see `compand.eval.cli`."""

    task: str
    data: Path
    output: Path
    codecs: Sequence[str] | None = None
    qualities: str | None = None
    metrics: Sequence[str] | None = None
    model: str | None = None
    lossy_models: tuple[str, ...] = ()
    device: str = "cpu"
    examples: int = 3
    plugins: tuple[str, ...] = ()
    jobs: int | None = None
    force: bool = False
    quiet: bool = False


def run(options: Options) -> int:
    """Measure, write the results and the page, and print a summary.

    Returns:
        The exit status: 1 if anything could not be measured, else 0.

    Raises:
        UsageError: an option cannot be used, or the output folder holds something else.
        CheckpointError: a task model cannot be loaded.
        CompandError: measuring cannot start.
    """
    source = TaskSource(options.task, options.data, options.plugins)
    task, items = source.task(), list(source.items().values())
    names = (options.model or task.default_model, *options.lossy_models)
    factory = JudgeFactory(source, names, options.device)
    models = factory.models()
    chosen = select(options.codecs, options.qualities, task.medium)
    metrics, notices = for_medium(task.medium, options.metrics)
    notices += [*_model_notices(models), *_item_notices(task, items)]
    if options.codecs is None:
        notices += [
            f"{name} is left out: {why}" for name, (kind, why) in MISSING.items() if kind == task.medium
        ]
    hashes, problems = _hashed(task, items)
    readable = [item.item for item in items if item.name in hashes]
    description: dict[str, Any] = {
        "kind": "perception",
        "medium": task.medium,
        "task": task.name,
        "models": [{"name": model.name, "identity": model.identity} for model in models],
        "data": options.data.resolve().name,
        "items": hashes,
        "metrics": [metric.name for metric in metrics],
        "plugins": list(options.plugins),
    }
    # What says nothing new is left out, so that runs from before these were described go on.
    if options.device != "cpu":
        description["device"] = options.device
    if task.version:
        description["task_version"] = task.version
    with Store.open(options.output, description, force=options.force) as store:
        problems += measure_all(
            readable,
            chosen,
            [metric.name for metric in metrics],
            store,
            jobs=options.jobs,
            plugins=options.plugins,
            judge_factory=factory,
            loader=source.load,
            examples=options.output / EXAMPLES,
            example_items=options.examples,
            quiet=options.quiet,
        )
        rows = store.rows()
        try:
            codecs, perception, left_out = summarise(
                task,
                list(hashes),
                rows,
                store.codecs,
                metrics,
                models[0].name,
                _trained_on(models[1:]),
                {item.name: task.group(item) for item in items},
            )
        except NoCommonItemsError as error:
            print(f"compand: {error}", file=sys.stderr)
            report_problems([problem._asdict() for problem in problems])
            return 1
        perception["model_identity"] = models[0].identity
        data = f"{len(hashes)} items of {description['data']}"
        summary = {
            "kind": "perception",
            "title": f"{task.score_name[0].upper()}{task.score_name[1:]} of {models[0].name}",
            "medium": task.medium,
            "data": data,
            "codecs": codecs,
            "metrics": [_described(metric) for metric in metrics],
            "perception": perception,
            "problems": [problem._asdict() for problem in problems],
            "notices": [*notices, *left_out, *row_notices(rows)],
            "examples": kept_examples(options.output, readable, options.examples),
        }
        written = write_results(store, summary, provenance(data))
        written += write_page(store)
    _report(summary, written, quiet=options.quiet)
    return 1 if problems else 0


def _hashed(task: Task, items: Sequence[TaskItem]) -> tuple[dict[str, str], list[Problem]]:
    """Hashes of the items' content by name, and a problem for each that cannot be read."""
    hashes, problems = {}, []
    for item in items:
        try:
            hashes[item.name] = task.content_hash(item)
        except MediaError as error:
            problems.append(Problem(item.name, "", None, reason(error, item.item)))
    if not hashes:
        raise UsageError(
            f"no item of {task.name} can be read, {problems[0].message if problems else 'none found'}"
        )
    return hashes, problems


def _model_notices(models: Sequence[TaskModel]) -> list[str]:
    notices = [f"{model.name}: {note}" for model in models if (note := getattr(model, "note", ""))]
    if trained_on := models[0].trained_on:
        notices.append(
            f"{models[0].name} was itself trained on decoded items "
            f"({trained_on['codec']} q{trained_on['quality']:g}): scores favor that codec"
        )
    return notices


def _item_notices(task: Task, items: Sequence[TaskItem]) -> list[str]:
    """What a reader of the scores should know of the items."""
    notices = list(task.caveats)
    below = {folder for item in items for folder in item.name.split("/")[:-1]}
    if "train" in {task.data.resolve().name, *below}:
        notices.append(
            "items of a folder named train are judged: scores on training items say little of others"
        )
    return notices


def _trained_on(models: Sequence[TaskModel]) -> list[TrainedOn]:
    return [
        TrainedOn(
            model.name,
            model.trained_on["codec"] if model.trained_on else None,
            model.trained_on["quality"] if model.trained_on else None,
        )
        for model in models
    ]


def _described(metric: Metric) -> dict[str, str]:
    return {"name": metric.name, "title": metric.title, "unit": metric.unit, "better": metric.better}


# --------------------------------------------------------------------------------------------- in the workers


@dataclass(frozen=True)
class TaskSource:
    """A task on a folder, by name: what a worker needs to make it again."""

    name: str
    data: Path
    plugins: tuple[str, ...] = ()

    def task(self) -> Task:
        """The task; made once a process. Raises UsageError if there is none of that name."""
        return _made(self)[0]

    def items(self) -> dict[str, TaskItem]:
        """Its items by name, in its order. Raises MediaError if the folder is not laid out for it."""
        return _made(self)[1]

    def load(self, item: Item) -> Signal:
        """The undamaged signal of an item."""
        return self.task().load(self.items()[item.name])


@lru_cache(maxsize=1)
def _made(source: TaskSource) -> tuple[Task, dict[str, TaskItem]]:
    subjects.load_plugins(source.plugins)
    task = tasks.find(source.name)(source.data)
    items = task.items()
    named = {item.name: item for item in items}
    if len(named) < len(items) or any(item.name != item.item.name for item in items):
        raise UsageError(
            f"task {source.name} has items whose names are not unique: its module has to be corrected"
        )
    return task, named


@dataclass(frozen=True)
class JudgeFactory:
    """Makes the judge of a worker process.

    Attributes:
        source: the task.
        names: of the task model and of the others, as `compand.eval.perception.adapters.load` takes them.
        device: where they run.
    """

    source: TaskSource
    names: tuple[str, ...]
    device: str

    def models(self) -> list[TaskModel]:
        """The task model and the others. Raises UsageError if two have one name."""
        models = [adapters.load(name, type(self.source.task()), self.device) for name in self.names]
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise UsageError(f"two task models are named {max(names, key=names.count)}: rename a folder")
        return models

    def __call__(self) -> TaskJudge:
        return TaskJudge(self.source, self.models())


class TaskJudge:
    """Adds the outcomes of task models to a row: `compand.eval.perception.summary.column` names the columns."""

    def __init__(self, source: TaskSource, models: Sequence[TaskModel]) -> None:
        self._task, self._items = source.task(), source.items()
        self._models = {model.name if place else None: model for place, model in enumerate(models)}
        self._undamaged = lru_cache(_KEPT_BASELINES)(self._judged_undamaged)

    def __call__(self, item_name: str, decoded: Signal) -> Mapping[str, Any]:
        return self._outcomes(item_name, decoded, undamaged=False) | self._undamaged(item_name)

    def _judged_undamaged(self, name: str) -> dict[str, list[float]]:
        return self._outcomes(name, self._task.load(self._items[name]), undamaged=True)

    def _outcomes(self, name: str, signal: Signal, *, undamaged: bool) -> dict[str, list[float]]:
        return {
            column(key, undamaged=undamaged): self._outcome(model, signal, self._items[name])
            for key, model in self._models.items()
        }

    def _outcome(self, model: TaskModel, signal: Signal, item: TaskItem) -> list[float]:
        with _one_thread():
            outcome = [float(number) for number in self._task.outcome(model, signal, item)]
        if len(outcome) != len(self._task.outcome_names) or not np.isfinite(outcome).all():
            raise UsageError(
                f"{item.name}: outcome of {model.name} is not {len(self._task.outcome_names)} finite numbers"
            )
        return outcome


@contextmanager
def _one_thread() -> Iterator[None]:
    """Task models compute in one thread: with more, the last digits of an answer would depend on their number, and
    so an outcome on how many processes a run was given."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- output


def _report(summary: Mapping[str, Any], written: Sequence[Path], *, quiet: bool) -> None:
    """Figures and findings on standard output, notices and problems on standard error."""
    if not quiet:
        for notice in summary["notices"]:
            print(f"note: {notice}", file=sys.stderr)
        perception = summary["perception"]
        ends = f"[{perception['baseline_low']:.4f}, {perception['baseline_high']:.4f}]"
        print(
            f"{perception['model']}, undamaged: {perception['score']} {perception['baseline']:.4f} {ends}\n"
        )
        print(_points_table(summary))
        print("\n" + "\n".join(perception["findings"]))
        print(f"\nwritten: {', '.join(map(str, written))}")
    report_problems(summary["problems"])


def _points_table(summary: Mapping[str, Any]) -> str:
    """Scores, intervals and means of every codec and quality as text."""
    rate, metrics = RATES[summary["medium"]], summary["metrics"]
    head = [
        "CODEC",
        "QUALITY",
        rate.upper(),
        "SCORE",
        "95 %",
        "DROP",
        *(metric["title"] for metric in metrics),
    ]
    rows = [
        [
            name,
            f"{point['quality']:g}",
            f"{point[rate]:.4g}",
            f"{point['score']:.4f}",
            f"[{point['score_low']:.4f}, {point['score_high']:.4f}]",
            f"{point['score_drop']:+.4f}",
            *(f"{point[metric['name']]:.4g}" if metric["name"] in point else "" for metric in metrics),
        ]
        for name, codec in summary["codecs"].items()
        for point in codec["points"]
    ]
    return table([head, *rows])
