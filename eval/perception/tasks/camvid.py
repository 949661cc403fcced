"""Semantic segmentation: street scenes of CamVid (Brostow et al. 2009) with the 11 classes of SegNet."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from compand.errors import MediaError, UsageError
from compand.eval.items import Item, content_hash
from compand.eval.perception.task import JPEG_CAVEAT, Task, TaskItem, TaskModel, model_input
from compand.pictures import Picture, is_image_path
from compand.sounds import Sound

LABELS = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
"""Classes 0 to 10 of the label maps; 11 stands for unlabelled pixels, which do not count."""

CITYSCAPES = {
    0: 3, 1: 4, 2: 1, 3: 1, 4: 7, 5: 2, 6: 6, 7: 6, 8: 5, 10: 0, 11: 9, 12: 10, 13: 8, 14: 8, 15: 8, 18: 10,
}  # fmt: skip
"""Training classes of Cityscapes -> ours; walls count as buildings and traffic lights as signs, as in SegNet."""

ADE20K = {
    0: 1, 1: 1, 2: 0, 4: 5, 6: 3, 11: 4, 12: 9, 20: 8, 32: 7, 43: 6, 80: 8, 83: 8, 93: 2, 102: 8, 127: 10, 136: 6,
}  # fmt: skip
"""The 150 classes of the ADE20K scene-parsing benchmark -> ours."""

CLASSES = len(LABELS)

BLOCK = 10
"""Consecutive frames that are resampled together, as a block bootstrap of dependent data does (Kuensch 1989). The clip
that the validation frames are from was labelled at 15 frames a second, in which a street hardly changes: single frames
are no independent items. Longer blocks would leave too few to draw from: of 60 frames these are 6."""

_FRAME = re.compile(r"(?P<sequence>.*?)(?P<number>\d+)\D*")
"""Names of frames: the sequence, and the number of the frame within its clip ("0016E5_07961")."""


class CamVid(Task):
    """Mean intersection over union on FOLDER/val/{image,label}, or on FOLDER/{image,label} where there is no `val`.

    Every image has a label map of the same name and size: an 8-bit PNG with a class a pixel. An outcome is the
    confusion matrix of one picture, [true class][answer] in rows; the last answer stands for none of the classes.
    Intersections and unions are summed over pictures before they are divided, as the field does.
    """

    name = "camvid"
    medium = "image"
    kinds = ("segmenter",)
    score_name = "mean IoU"
    outcome_names = tuple(f"{true} as {answer}" for true in LABELS for answer in (*LABELS, "none"))
    pairwise = "bootstrap"
    default_model = "camvid-segmenter"
    labels = LABELS
    foreign_classes: ClassVar[Mapping[int, Mapping[int, int]]] = {19: CITYSCAPES, 150: ADE20K}
    caveats = (
        f"the validation frames of CamVid are one clip: intervals are from resampling blocks of {BLOCK} consecutive "
        "frames, which are few, and nothing is said of other streets, cameras or weather",
        JPEG_CAVEAT,
    )

    def items(self) -> list[TaskItem]:
        root = self.data / "val" if (self.data / "val").is_dir() else self.data
        return [
            TaskItem(name, Item(name, image, "image"), label)
            for image, label in labelled_images(root)
            for name in [image.relative_to(self.data).as_posix()]
        ]

    def content_hash(self, item: TaskItem) -> str:
        """Of the image and its label map: other labels make other outcomes."""
        label = Item(item.target.name, item.target, "image")
        return hashlib.sha256(f"{content_hash(item.item)} {content_hash(label)}".encode()).hexdigest()[:16]

    def group(self, item: TaskItem) -> str:
        """`BLOCK` consecutive frames of one sequence, in order of frame number."""
        return self._groups[item.name]

    @cached_property
    def _groups(self) -> dict[str, str]:
        sequences: dict[str, list[tuple[int, str]]] = {}
        for item in self.items():
            match = _FRAME.fullmatch(Path(item.name).stem)
            sequence, number = (match["sequence"], int(match["number"])) if match else (item.name, 0)
            sequences.setdefault(sequence, []).append((number, item.name))
        return {
            name: f"{sequence}/{place // BLOCK}"
            for sequence, frames in sequences.items()
            for place, (_, name) in enumerate(sorted(frames))
        }

    def outcome(self, model: TaskModel, decoded: Picture | Sound, item: TaskItem) -> list[float]:
        answer = model(model_input(decoded))
        truth = read_labels(item.target)
        if answer.shape != truth.shape:
            raise UsageError(
                f"{item.name}: answer of {model.name} is {list(answer.shape)}, the label map {list(truth.shape)}"
            )
        return confusion(truth, answer).astype(np.float64).ravel().tolist()

    def score(self, total: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(mean_iou(total.reshape(*total.shape[:-1], CLASSES, CLASSES + 1)))


def confusion(truth: NDArray[np.integer], answer: NDArray[np.integer]) -> NDArray[np.int64]:
    """How many labelled pixels of each class were answered how: [CLASSES, CLASSES + 1], last column none of them."""
    counted = truth < CLASSES
    known = (answer >= 0) & (answer < CLASSES)
    column = np.where(known, answer, CLASSES)[counted].astype(np.int64)
    index = truth[counted].astype(np.int64) * (CLASSES + 1) + column
    return np.bincount(index, minlength=CLASSES * (CLASSES + 1)).reshape(CLASSES, CLASSES + 1)


def mean_iou(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean intersection over union from confusion matrices [..., CLASSES, CLASSES + 1].

    Classes that are neither there nor answered are left out of the mean.
    """
    common = np.diagonal(matrix, axis1=-2, axis2=-1)
    union = matrix.sum(-1) + matrix[..., :CLASSES].sum(-2) - common
    present = union > 0
    ratio = np.where(present, common / np.where(present, union, 1), 0)
    return np.asarray(ratio.sum(-1) / present.sum(-1))


def labelled_images(root: Path) -> list[tuple[Path, Path]]:
    """The images of FOLDER/image, in order of name, each with its label map in FOLDER/label.

    Raises:
        MediaError: no image, or an image without a label map.
    """
    images = sorted(path for path in (root / "image").glob("*") if is_image_path(path))
    if not images:
        raise MediaError(
            f"{root}/image has no images: give the folder of CamVid, with val/image and val/label"
        )
    pairs = [(image, root / "label" / f"{image.stem}.png") for image in images]
    for image, label in pairs:
        if not label.is_file():
            raise MediaError(f"{image} has no label map {label}: add it or remove the image")
    return pairs


def read_labels(path: Path) -> NDArray[np.uint8]:
    """A label map, uint8 [h, w]. Raises MediaError if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise MediaError(f"{path} is no label map of 8 bits a pixel (mode {image.mode}): convert it")
            return np.asarray(image)
    except (OSError, UnidentifiedImageError) as error:
        raise MediaError(f"{path} cannot be read ({error}): restore the label map") from None
