"""Image classification: the ten classes of Imagenette (fast.ai, 2019), a part of ImageNet."""

from __future__ import annotations

from pathlib import Path

from compand.errors import MediaError
from compand.eval.items import Item
from compand.eval.perception.task import JPEG_CAVEAT, ClassificationTask, TaskItem
from compand.pictures import is_image_path

SYNSETS = {
    "n01440764": "tench",
    "n02102040": "english_springer",
    "n02979186": "cassette_player",
    "n03000684": "chain_saw",
    "n03028079": "church",
    "n03394916": "french_horn",
    "n03417042": "garbage_truck",
    "n03425413": "gas_pump",
    "n03445777": "golf_ball",
    "n03888257": "parachute",
}
"""WordNet ids, which name the folders of the original data set, and names of the classes, in ImageNet's order."""

IMAGENET = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
"""Their indexes among the 1000 classes of ImageNet."""


class Imagenette(ClassificationTask):
    """Top-1 accuracy on FOLDER/val/CLASS/*, or on FOLDER/CLASS/* where there is no `val`.

    Class folders bear a class's name or its WordNet id.
    """

    name = "imagenette"
    medium = "image"
    kinds = ("image-classifier",)
    default_model = "imagenette-classifier"
    labels = tuple(SYNSETS.values())
    caveats = (JPEG_CAVEAT,)
    foreign_classes = {1000: dict(zip(IMAGENET, range(10), strict=True))}  # noqa: RUF012 (ClassVar of the base)

    def items(self) -> list[TaskItem]:
        root = self.data / "val" if (self.data / "val").is_dir() else self.data
        return [
            TaskItem(name, Item(name, path, "image"), label)
            for path, label in labelled_images(root)
            for name in [path.relative_to(self.data).as_posix()]
        ]


def labelled_images(root: Path) -> list[tuple[Path, int]]:
    """The images below a folder of class folders, class by class, each with its index into `Imagenette.labels`.

    Raises:
        MediaError: no class folder with an image in it.
    """
    found = []
    for label, (synset, name) in enumerate(SYNSETS.items()):
        paths = [
            path for folder in (name, synset) for path in (root / folder).rglob("*") if is_image_path(path)
        ]
        found += [(path, label) for path in sorted(paths)]
    if not found:
        raise MediaError(
            f"{root} has no images in folders named {', '.join(SYNSETS.values())}: give the folder of Imagenette"
        )
    return found
