"""Spoken-digit recognition: which of the ten digits was said."""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType

from compand.errors import MediaError
from compand.eval.items import find_items
from compand.eval.perception.task import ClassificationTask, TaskItem

NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<take>\d+)\.\w+")
"""File names of the free spoken digit dataset."""


class Digits(ClassificationTask):
    """Digits 0 to 9 of the free spoken digit dataset, 8 kHz.

    The folder holds recordings named DIGIT_SPEAKER_TAKE, or has them below `val`.
    """

    name = "digits"
    medium = "audio"
    kinds = ("sound-classifier", "recogniser")
    default_model = "digits-classifier"
    labels = tuple("0123456789")
    caveats = (
        "speakers of the test recordings are those of the training set, and few: intervals, which are over recordings, "
        "say nothing of other speakers",
        "recordings last about half a second, so that the container's overhead is most of a file at low rates: compare "
        "rates without it, where they are known",
    )
    spellings = MappingProxyType(
        {
            "zero": 0, "oh": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
            "eight": 8, "nine": 9,
        }
    )  # fmt: skip

    def items(self) -> list[TaskItem]:
        return self.labelled(self.data / "val" if (self.data / "val").is_dir() else self.data)

    @classmethod
    def labelled(cls, folder: Path) -> list[TaskItem]:
        """The recordings of a folder whose names say their digit. Raises MediaError if there is none."""
        found, _ = find_items(folder, "audio")
        matches = [(item, NAME.fullmatch(item.path.name)) for item in found]
        items = [TaskItem(item.name, item, int(match["digit"])) for item, match in matches if match]
        if not items:
            raise MediaError(
                f"{folder} has no recordings named DIGIT_SPEAKER_TAKE, such as 7_george_0.flac: "
                "give the folder of the free spoken digit dataset or its val folder"
            )
        return items
