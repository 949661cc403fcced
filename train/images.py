"""Image folders as endless batches of random crops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from compand.errors import MediaError, UsageError
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


Size = tuple[int, int]
"""Height and width of crops, in pixels."""


def as_size(crop: int | Sequence[int]) -> Size:
    """The height and width of crops that are given as one edge or as both. Raises UsageError for anything else."""
    edges = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if len(edges) != 2 or min(edges) < 1:
        raise UsageError(f"crops of {list(edges)} pixels do not exist: give an edge, or height and width")
    return edges[0], edges[1]


class Stage(NamedTuple):
    """What crops are like from some point of a training on."""

    begins: float  # share of the training that is done by then, 0 .. 1
    crops: int  # of a batch
    size: Size


class CropDataset(IterableDataset[Tensor]):
    """Endless batches of random crops, cut on the device that holds the images.

    Every image is kept decoded in one flat uint8 array. A crop's image is drawn in proportion to its number of pixels,
    among those that hold a crop of its size, upright or transposed; half the crops are mirrored.

    Args:
        images: uint8 [height, width, 3] arrays; those that hold no crop of the first size are left out.
        batch_size, crop: crops a batch, and their edge in pixels or their height and width.
        device: where the images are kept and the batches arise.
        seed: seed of the crops; processes of a distributed run get different ones.
        transposed: share of crops that are transposed, of images that hold them either way. Those of images that hold
            them transposed alone always are.
        later: further stages, in order of their beginning.
        progress: share of the training that is done; asked before each batch if there are stages.

    Raises:
        MediaError: no image holds a crop.
    """

    def __init__(
        self,
        images: list[np.ndarray],
        batch_size: int,
        crop: int | Sequence[int],
        device: torch.device,
        seed: int,
        transposed: float = 0.0,
        later: Sequence[Stage] = (),
        progress: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.stages = [Stage(0.0, batch_size, as_size(crop)), *later]
        smallest = self.stages[0].size
        images = [image for image in images if any(_holds(image.shape, smallest))]
        for stage in self.stages:
            if not any(any(_holds(image.shape, stage.size)) for image in images):
                edges = f"both edges of at least {stage.size[0]}"
                if stage.size[0] != stage.size[1]:
                    edges = f"edges of at least {stage.size[0]} and {stage.size[1]}"
                raise MediaError(f"no image has {edges} pixels; lower --data.crop")
        sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64)
        lengths = torch.tensor([image.size for image in images], dtype=torch.int64)
        self.pixels = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])).to(device)
        self.starts = (lengths.cumsum(0) - lengths).to(device)
        self.height, self.width = sizes[:, 0].to(device), sizes[:, 1].to(device)
        self.weight = (lengths / lengths.sum()).to(device)
        self.seed, self.transposed, self.progress = seed, transposed, progress

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator(self.pixels.device).manual_seed(self.seed)
        while True:
            done = self.progress() if len(self.stages) > 1 else 0.0
            yield self._cut([stage for stage in self.stages if stage.begins <= done][-1], generator)

    def _cut(self, stage: Stage, generator: torch.Generator) -> Tensor:
        """A batch, uint8 [count, 3, height, width]."""
        device, n, (height, width) = self.pixels.device, stage.crops, stage.size
        upright, turned = _holds((self.height, self.width), stage.size)
        weight = self.weight * (upright | turned)

        def random() -> Tensor:
            return torch.rand(n, device=device, generator=generator)

        item = torch.multinomial(weight, n, replacement=True, generator=generator)
        turn = turned[item] & ((random() < self.transposed) | ~upright[item])
        tall, wide = torch.where(turn, width, height), torch.where(turn, height, width)
        top = (random() * (self.height[item] - tall + 1)).long()
        left = (random() * (self.width[item] - wide + 1)).long()
        columns = torch.arange(width, device=device).expand(n, -1)
        columns = torch.where((random() < 0.5)[:, None], columns.flip(1), columns)[:, None, :]
        rows = torch.arange(height, device=device)[:, None]
        down, across = (torch.where(turn[:, None, None], a, b) for a, b in ((columns, rows), (rows, columns)))
        place = (top[:, None, None] + down) * self.width[item][:, None, None] + left[:, None, None] + across
        index = self.starts[item][:, None, None, None] + 3 * place[..., None]
        return self.pixels[index + torch.arange(3, device=device)].permute(0, 3, 1, 2)


def _holds(shape: Sequence[Any], size: Size) -> tuple[Any, Any]:
    """Whether images of a shape (height, width, ...), numbers or tensors of them, hold a crop as it is, and
    transposed."""
    height, width = shape[:2]
    return (height >= size[0]) & (width >= size[1]), (height >= size[1]) & (width >= size[0])


class ImageFolder(pl.LightningDataModule):
    """Crops of all images below a folder for training, whole images held out from it for validation.

    Images are kept as they are and reduced by random factors, which is the mild rescaling (it also averages away
    artefacts of earlier JPEG compression).

    Args:
        root: folder with images, searched through all subfolders, or several.
        batch_size: crops a batch and device.
        crop: edge of the crops in pixels, or their height and width; multiples of 64.
        held_out: number of images, evenly spaced in the sorted list, that are kept for validation.
        reduce: range of the random factor by which further copies of every image are reduced.
        keep_on_device: keep the decoded images (3 bytes a pixel, about 1.5 times) in the accelerator's memory.
        validation: another folder for validation instead of held-out images.
        seed: seed of crops and reductions.
        copies: reduced copies of every image, each by a factor of its own.
        transposed: share of crops that are transposed, see `CropDataset`.
        late_crop: size of the crops in the last part of the training, in batches of about as many pixels: contexts that
            reach far learn from larger ones, and small ones have more edges than pictures. None: `crop` throughout.
        late_share: how large that part is, 0 .. 1.
        seen: number of training images, evenly spaced, that validation looks at as well, apart from the others: the gap
            between both grows where a network over-fits.
    """

    def __init__(
        self,
        root: str | list[str],
        batch_size: int = 32,
        crop: int | tuple[int, int] = 256,
        held_out: int = 16,
        reduce: tuple[float, float] = (0.5, 0.85),
        keep_on_device: bool = True,
        validation: str | None = None,
        seed: int = 0,
        copies: int = 1,
        transposed: float = 0.0,
        late_crop: int | tuple[int, int] | None = None,
        late_share: float = 0.2,
        seen: int = 0,
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
        self.copies, self.transposed, self.seen = copies, transposed, seen
        self.later: list[Stage] = []
        if late_crop is not None:
            (height, width), late = as_size(crop), as_size(late_crop)
            count = max(round(batch_size * height * width / (late[0] * late[1])), 1)
            self.later = [Stage(1 - late_share, count, late)]
        self._train: list[np.ndarray] = []
        self._held_out: list[np.ndarray] = []
        self._seen: list[np.ndarray] = []

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
            self._seen = images[:: max(len(images) // self.seen, 1)][: self.seen] if self.seen else []
            factors = np.random.default_rng(self.seed).uniform(*self.reduce, self.copies * len(images))
            self._train = images + list(pool.map(_reduced, self.copies * images, factors))

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
        crops = CropDataset(
            self._train,
            self.batch_size,
            self.crop,
            device,
            seed,
            transposed=self.transposed,
            later=self.later,
            progress=self._progress,
        )
        return DataLoader(crops, batch_size=None)

    def _progress(self) -> float:
        """How far the training is: modules of `TimedModule` know."""
        return float(getattr(self.trainer and self.trainer.lightning_module, "progress", 0.0))

    def val_dataloader(self) -> DataLoader[Tensor] | list[DataLoader[Tensor]]:
        held_out = _whole(self._held_out)
        return [held_out, _whole(self._seen)] if self._seen else held_out


def _whole(images: Sequence[np.ndarray]) -> DataLoader[Tensor]:
    """Images one by one, uint8 [1, 3, height, width]."""
    tensors = [torch.from_numpy(image).permute(2, 0, 1)[None] for image in images]
    return DataLoader(tensors, batch_size=None)  # type: ignore[arg-type]


def _reduced(image: np.ndarray, factor: float) -> np.ndarray:
    height, width = image.shape[:2]
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
