"""The contract of a perception task, and the tasks by name.

A task knows its test items, what is coded, and how one answer of a task model is judged. The judgement of one item is
a list of numbers, its *outcome*, and outcomes add: the score is a function of their sum over items. So a bootstrap
over items needs sums alone, and every score (accuracy, mean intersection over union, word accuracy, mean SDR) is
treated alike. To add a task, write a `Task`, call `register` in its module, and `models.register_network` for the
network of its model, and name the module with --plugin.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from compand.errors import UsageError
from compand.eval.items import Item, Signal, content_hash, load, to_rgb
from compand.pictures import Picture

KINDS: Mapping[str, str] = {
    "image-classifier": "uint8 RGB pixels [H, W, 3] -> float32 logits [classes]",
    "segmenter": "uint8 RGB pixels [H, W, 3] -> integer class map [H, W]; -1 where no class of the task fits",
    "sound-classifier": "Sound -> float32 logits [classes]",
    "recogniser": "Sound -> transcript, a string",
    "separator": "Sound with one channel, N samples -> float32 [sources, N]",
}
"""What each kind of task model takes and gives."""

JPEG_CAVEAT = (
    "the undamaged images are JPEG files themselves, on whose 8x8 grid JPEG codes again, which favors JPEG"
)
"""For tasks whose images were published as JPEG files; see `Task.caveats`."""


class TaskItem(NamedTuple):
    """One test item of a task."""

    name: str  # equal to item.name, the key in every table; unique within the task
    item: Item
    target: Any  # the truth: a label index, the path of a label map, the reference sources, ...


class TaskModel(Protocol):
    """A frozen model that solves a task; calling it is deterministic.

    Attributes:
        name: name for tables.
        identity: fingerprint of the weights, hexadecimal.
        kind: a key of `KINDS`, which says what the call takes and gives.
        trained_on: {"codec": ..., "quality": ...} where it was trained on decoded items, None for clean ones.
    """

    name: str
    identity: str
    kind: str
    trained_on: Mapping[str, Any] | None

    def __call__(self, signal: Any, /) -> Any: ...


class Task(ABC):
    """What is recognised, on which items, and how answers are judged.

    Attributes:
        name: name on the command line.
        medium: "image" or "audio".
        kinds: the kinds of model (keys of `KINDS`) that `outcome` can judge; the first is the reference model's.
        score_name: the score in words ("top-1 accuracy"); higher is better.
        outcome_names: what the numbers of an outcome are; outcomes add over items.
        pairwise: how two codecs are compared on the same items: "mcnemar" where the first number of an outcome is 0
            or 1 and the score is its mean (which also decides how the score's interval is made), else "bootstrap".
        default_model: folder of the reference model below `checkpoints/`, with or without its version.
        labels: names of the classes in the order of logits; () where there are none.
        foreign_classes: for models that were trained on other label sets: number of their classes -> {their class:
            class of this task}. Several of theirs may be one of ours.
        version: counts the changes of what makes items out of files (mixtures out of samples), so that results of
            other items are not mixed in; 0 where items are files as they are.
        caveats: sentences that a reader of any score of this task should know; they stand among the notices.
    """

    name: ClassVar[str]
    medium: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    score_name: ClassVar[str]
    outcome_names: ClassVar[tuple[str, ...]]
    pairwise: ClassVar[str]
    default_model: ClassVar[str]
    labels: ClassVar[tuple[str, ...]] = ()
    foreign_classes: ClassVar[Mapping[int, Mapping[int, int]]] = {}
    version: ClassVar[int] = 0
    caveats: ClassVar[tuple[str, ...]] = ()

    def __init__(self, data: Path) -> None:
        """data: the folder that --data names. It is read by `items` only."""
        self.data = data

    @abstractmethod
    def items(self) -> list[TaskItem]:
        """The test items in a fixed order. Raises MediaError, with the remedy, if the folder is not laid out so."""

    def load(self, item: TaskItem) -> Signal:
        """The undamaged signal of an item, which is coded. Raises MediaError if it cannot be read."""
        return load(item.item)

    def content_hash(self, item: TaskItem) -> str:
        """Hexadecimal digest of all that decides the item's signal and its truth; stored results are reused only where
        it agrees. A truth that the item's name says needs no part in it."""
        return content_hash(item.item)

    def group(self, item: TaskItem) -> str:
        """Name of the group of items that an item is drawn with when items are resampled.

        By default an item is on its own, as items that are independent have to be. Where groups hold several items,
        codecs are compared by bootstrap whatever `pairwise` says, since McNemar's test takes items as independent.
        """
        return item.name

    @abstractmethod
    def outcome(self, model: TaskModel, decoded: Signal, item: TaskItem) -> list[float]:
        """Judges the model's answer on a decoded item: one finite number for each of `outcome_names`."""

    @abstractmethod
    def score(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        """The score from sums of outcomes over items.

        Args:
            total: float64 [..., len(outcome_names)]; leading axes are independent sums (bootstrap resamples).

        Returns:
            float64 [...], higher is better.
        """


class ClassificationTask(Task):
    """A task whose answer is one of `labels`, scored by top-1 accuracy.

    `TaskItem.target` is an index into `labels`. A recogniser's transcript counts as the label that is spoken in it, if
    there is exactly one.

    Attributes:
        spellings: further spellings of labels in transcripts, {"7": 7, "seven": 7}, to indexes into `labels`.
    """

    score_name = "top-1 accuracy"
    outcome_names = ("correct", "items")
    pairwise = "mcnemar"
    spellings: ClassVar[Mapping[str, int]] = {}

    def outcome(self, model: TaskModel, decoded: Signal, item: TaskItem) -> list[float]:
        answer = model(model_input(decoded))
        if isinstance(answer, str):
            spoken = {label: index for index, label in enumerate(self.labels)} | dict(self.spellings)
            found: int | None = label_spoken(answer, spoken)
        else:
            found = int(np.argmax(answer))
        return [float(found == item.target), 1.0]

    def score(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(total[..., 0] / total[..., 1])


def model_input(signal: Signal) -> Any:
    """What a task model takes: uint8 RGB [H, W, 3] of a picture (gray is repeated, alpha dropped), a Sound as it is."""
    return to_rgb(signal).pixels if isinstance(signal, Picture) else signal


def label_spoken(transcript: str, spellings: Mapping[str, int]) -> int | None:
    """The index of the one label that is spoken in a transcript; None if there is none, or more than one.

    Case, punctuation and the spaces within a label do not count.

    >>> label_spoken("Um, snow boy!", {"snowboy": 0, "view glass": 1})
    0
    >>> label_spoken("weight", {"eight": 8}) is None
    True
    """
    words = re.findall(r"\w+", transcript.lower())
    runs = {
        "".join(words[first:last])
        for first in range(len(words))
        for last in range(first + 1, min(first + 4, len(words)) + 1)
    }
    found = {index for text, index in spellings.items() if "".join(re.findall(r"\w+", text.lower())) in runs}
    return found.pop() if len(found) == 1 else None


_TASKS = {
    "imagenette": "compand.eval.perception.tasks.imagenette:Imagenette",
    "camvid": "compand.eval.perception.tasks.camvid:CamVid",
    "keywords": "compand.eval.perception.tasks.keywords:Keywords",
    "digits": "compand.eval.perception.tasks.digits:Digits",
    "separation": "compand.eval.perception.tasks.separation:Separation",
}


def names() -> list[str]:
    """The tasks known here."""
    return list(_TASKS)


def register(name: str, target: str) -> None:
    """Adds a task of another package; target is "module:Class". Raises UsageError if the name is taken."""
    if _TASKS.get(name, target) != target:
        raise UsageError(f"a task named {name} exists already: choose another name")
    _TASKS[name] = target


def find(name: str) -> type[Task]:
    """The task of that name. Raises UsageError if there is none."""
    if name not in _TASKS:
        raise UsageError(
            f"task {name} is unknown: choose from {', '.join(_TASKS)}, or name its module with --plugin"
        )
    module, _, attribute = _TASKS[name].partition(":")
    task: type[Task] = getattr(import_module(module), attribute)
    return task
