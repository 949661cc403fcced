"""Keyword recognition: which of six words was said."""

from __future__ import annotations

from pathlib import Path

from compand.errors import MediaError
from compand.eval.items import find_items
from compand.eval.perception.task import ClassificationTask, TaskItem


class Keywords(ClassificationTask):
    """Six wake words of Picovoice's benchmark, many speakers, 16 kHz.

    The folder holds one folder a word with its recordings, or such folders below `val`.
    """

    name = "keywords"
    medium = "audio"
    kinds = ("sound-classifier", "recogniser")
    default_model = "keywords-classifier"
    labels = ("alexa", "computer", "jarvis", "smart mirror", "snowboy", "view glass")
    caveats = (
        "whether speakers of the test recordings were heard in training is unknown: their names do not say who speaks",
    )

    def items(self) -> list[TaskItem]:
        return self.labelled(self.data / "val" if (self.data / "val").is_dir() else self.data)

    @classmethod
    def labelled(cls, folder: Path) -> list[TaskItem]:
        """The recordings WORD/* of a folder with the index of their word. Raises MediaError if there is none."""
        found, _ = find_items(folder, "audio")
        places = {label: index for index, label in enumerate(cls.labels)}
        words = [(item, item.name.rpartition("/")[0]) for item in found]
        items = [TaskItem(item.name, item, places[word]) for item, word in words if word in places]
        if not items:
            raise MediaError(
                f"{folder} has no recordings in folders named {', '.join(cls.labels)}: "
                "give a folder laid out as WORD/*.flac or val/WORD/*.flac"
            )
        return items
