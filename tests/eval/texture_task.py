"""A perception task of another package: is a crop of a photograph textured or smooth? Lossy coding takes texture away.

It comes with its network, whose two numbers need no training, and with a second, blind one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compand.errors import MediaError
from compand.eval.items import Item
from compand.eval.perception import models
from compand.eval.perception.task import ClassificationTask, TaskItem

LABELS = ("smooth", "textured")


class TextureNetwork(models.TaskNetwork):
    """Two logits from the mean magnitude of the Laplacian, in 8-bit levels."""

    kind = "image-classifier"

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.architecture = {"threshold": threshold}
        self.threshold = threshold
        kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        self.laplacian = torch.nn.Conv2d(1, 1, 3, bias=False)
        self.laplacian.weight.data.copy_(kernel[None, None])

    def predict(self, signal):
        gray = torch.from_numpy(signal.copy()).float().mean(2)[None, None]
        strength = self.laplacian(gray).abs().mean() - self.threshold
        return torch.stack([-strength, strength]).numpy()


class Texture(ClassificationTask):
    """Crops named LABEL_*.png; on purpose some are named wrongly, so that no model is always right."""

    name = "texture"
    medium = "image"
    kinds = ("image-classifier",)
    default_model = "texture-v1"
    labels = LABELS

    def items(self) -> list[TaskItem]:
        paths = sorted(self.data.glob("*.png"))
        if not paths:
            raise MediaError(f"{self.data} has no crops: make some")
        return [
            TaskItem(path.name, Item(path.name, path, "image"), LABELS.index(path.name.partition("_")[0]))
            for path in paths
        ]


THRESHOLD = 8.0


def make_crops(pictures: list[np.ndarray], folder: Path, size: int = 64, count: int = 30) -> None:
    """Crops whose class is decided by their own texture; every tenth is named wrongly."""
    folder.mkdir()
    network = TextureNetwork(THRESHOLD)
    generator = np.random.default_rng(0)
    with torch.inference_mode():
        for place in range(count):
            pixels = pictures[place % len(pictures)]
            top, left = (int(generator.integers(edge - size)) for edge in pixels.shape[:2])
            crop = np.ascontiguousarray(pixels[top : top + size, left : left + size])
            label = int(network.predict(crop).argmax()) ^ (place % 10 == 9)
            Image.fromarray(crop).save(folder / f"{LABELS[label]}_{place:02}.png")


models.register_network("texture-network", f"{__name__}:TextureNetwork")
