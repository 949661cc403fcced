"""Image folders as endless batches of random crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from compand.errors import MediaError
from compand.pictures import is_image_path, read_picture


def find_images(root: str | Path | Sequence[str]) -> list[Path]:
    """All image files below a folder, or below each of several, sorted. Raises MediaError if there is none."""
    if not isinstance(root, (str, Path)):
        return [path for folder in root for path in find_images(folder)]
    paths = sorted(path for path in Path(root).rglob("*") if path.is_file() and is_image_path(path))
    if not paths:
        raise MediaError(f"{root}: no image found; give --data.root a folder with images")
    return paths


def read_rgb(path: Path) -> np.ndarray:
    """Pixels of an image file as uint8 [height, width, 3], sRGB."""
    pixels = read_picture(path, strip=True).pixels
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


class CropDataset(IterableDataset[Tensor]):
    """Endless batches of random crops, cut on the device that holds the images.

    Every image is kept decoded in one flat uint8 array, once as it is and once reduced by a random factor, which is the
    mild rescaling (it also averages away artefacts of earlier JPEG compression). A crop's image is drawn in proportion
    to its number of pixels; half the crops are mirrored.

    Args:
        images: uint8 [height, width, 3] arrays; those smaller than `crop` are left out.
        batch_size, crop: crops a batch, and their edge in pixels.
        device: where the images are kept and the batches arise.
        seed: seed of the crops; processes of a distributed run get different ones.
    """

    def __init__(
        self, images: list[np.ndarray], batch_size: int, crop: int, device: torch.device, seed: int
    ) -> None:
        kept = [image for image in images if min(image.shape[:2]) >= crop]
        if not kept:
            raise MediaError(f"no image has both edges of at least {crop} pixels; lower --data.crop")
        sizes = torch.tensor([image.shape[:2] for image in kept], dtype=torch.int64)
        lengths = torch.tensor([image.size for image in kept], dtype=torch.int64)
        self.pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in kept])).to(device)
        self.starts = (lengths.cumsum(0) - lengths).to(device)
        self.height, self.width = sizes[:, 0].to(device), sizes[:, 1].to(device)
        self.weight = (lengths / lengths.sum()).to(device)
        self.batch_size, self.crop, self.seed = batch_size, crop, seed

    def __iter__(self) -> Iterator[Tensor]:
        device, n, edge = self.pixels.device, self.batch_size, self.crop
        generator = torch.Generator(device).manual_seed(self.seed)
        steps = torch.arange(edge, device=device)
        colours = torch.arange(3, device=device)

        def below(limit: Tensor) -> Tensor:
            return (torch.rand(n, device=device, generator=generator) * limit).long()

        while True:
            item = torch.multinomial(self.weight, n, replacement=True, generator=generator)
            top, left = below(self.height[item] - edge + 1), below(self.width[item] - edge + 1)
            rows, columns = top[:, None] + steps, left[:, None] + steps
            mirrored = torch.rand(n, device=device, generator=generator) < 0.5
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
            pixel = rows[:, :, None] * self.width[item][:, None, None] + columns[:, None, :]
            index = self.starts[item][:, None, None, None] + 3 * pixel[..., None] + colours
            yield self.pixels[index].permute(0, 3, 1, 2)


class ImageFolder(pl.LightningDataModule):
    """Crops of all images below a folder for training, whole images held out from it for validation.

    Args:
        root: folder with images, searched through all subfolders, or several.
        batch_size: crops a batch and device.
        crop: edge of the crops in pixels, a multiple of 64.
        held_out: number of images, evenly spaced in the sorted list, that are kept for validation.
        reduce: range of the random factor by which the second copy of every image is reduced.
        keep_on_device: keep the decoded images (3 bytes a pixel, about 1.5 times) in the accelerator's memory.
        validation: another folder for validation instead of held-out images.
        seed: seed of crops and reductions.
    """

    def __init__(
        self,
        root: str | list[str],
        batch_size: int = 32,
        crop: int = 256,
        held_out: int = 16,
        reduce: tuple[float, float] = (0.5, 0.85),
        keep_on_device: bool = True,
        validation: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.root, self.batch_size, self.crop, self.held_out = root, batch_size, crop, held_out
        self.reduce, self.keep_on_device, self.validation, self.seed = (
            reduce,
            keep_on_device,
            validation,
            seed,
        )
        self._train: list[np.ndarray] = []
        self._held_out: list[np.ndarray] = []

    def setup(self, stage: str | None = None) -> None:
        paths = find_images(self.root)
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(read_rgb, paths))
            if self.validation is not None:
                self._held_out = list(pool.map(read_rgb, find_images(self.validation)))
            elif self.held_out:
                every = max(len(images) // self.held_out, 2)
                self._held_out = images[::every][: self.held_out]
                images = [image for i, image in enumerate(images) if i % every or i // every >= self.held_out]
            factors = np.random.default_rng(self.seed).uniform(*self.reduce, len(images))
            self._train = images + list(pool.map(_reduced, images, factors))

    def train_dataloader(self) -> DataLoader[Tensor]:
        trainer = self.trainer
        device = (
            trainer.strategy.root_device
            if trainer is not None and self.keep_on_device
            else torch.device("cpu")
        )
        rank = trainer.global_rank if trainer is not None else 0
        # The step count shifts the seed so that a resumed run does not see its first crops again.
        step = trainer.global_step if trainer is not None else 0
        seed = (self.seed * 1_000_003 + step) * 1_000 + rank
        return DataLoader(CropDataset(self._train, self.batch_size, self.crop, device, seed), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        tensors = [torch.from_numpy(image).permute(2, 0, 1)[None] for image in self._held_out]
        return DataLoader(tensors, batch_size=None)  # type: ignore[arg-type]


def _reduced(image: np.ndarray, factor: float) -> np.ndarray:
    height, width = image.shape[:2]
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
