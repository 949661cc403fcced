"""Training of the reference models of the image tasks: classification on Imagenette, segmentation on CamVid.

The data sets are small, so they stay on the device in 8 bits, and batches are cut and distorted there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from compand.errors import MediaError, UsageError
from compand.eval.perception.models import TaskNetwork
from compand.eval.perception.tasks import camvid, imagenette
from compand.pictures import Picture
from compand.train import augmentation
from compand.train.decoded import decoded_items
from compand.train.images import read_rgb
from compand.train.tasks import TaskTraining

Batch = tuple[Tensor, Tensor]


# ------------------------------------------------------------------------------------------------------- modules


class ClassifierTraining(TaskTraining):
    """Trains an image classifier by cross-entropy with soft targets. For the arguments see `TaskTraining`."""

    def __init__(
        self,
        network: TaskNetwork,
        task: str = "imagenette",
        output: str = "runs/imagenette-classifier-v1",
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_steps: int = 200,
        minutes: float | None = None,
    ) -> None:
        super().__init__(network, task, output, lr, momentum, weight_decay, warmup_steps, minutes)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs: [batch, 3, h, w] in [0, 1]; targets: class probabilities [batch, classes]."""
        return F.cross_entropy(self.network(inputs).float(), targets)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        images, labels = batch
        correct = self.network(images.float() / 255).argmax(1) == labels
        self.log("val/accuracy", correct.float().mean(), batch_size=len(labels), prog_bar=True)


class SegmenterTraining(TaskTraining):
    """Trains a segmenter by cross-entropy with class weights. For the other arguments see `TaskTraining`.

    Args:
        balance: exponent of the class weights: a class that covers a fraction f of the labelled training pixels has the
            weight f^-balance, scaled so that the mean weight of a pixel is 1. 0 counts pixels alike, 1 classes alike.
    """

    def __init__(
        self,
        network: TaskNetwork,
        task: str = "camvid",
        output: str = "runs/camvid-segmenter-v1",
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_steps: int = 200,
        minutes: float | None = None,
        balance: float = 0.5,
    ) -> None:
        super().__init__(network, task, output, lr, momentum, weight_decay, warmup_steps, minutes)
        self.balance = balance
        self.weights: Tensor
        self.register_buffer("weights", torch.ones(camvid.CLASSES))
        self._confusion = np.zeros((camvid.CLASSES, camvid.CLASSES + 1))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data: CamVidData = self.trainer.datamodule  # type: ignore[attr-defined]
        self.weights.copy_(class_weights(data.class_counts, self.balance))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs: [batch, 3, h, w] in [0, 1]; targets: classes [batch, h, w], `camvid.CLASSES` where unlabelled."""
        logits = self.network(inputs).float()
        loss = F.cross_entropy(logits, targets, self.weights, ignore_index=camvid.CLASSES, reduction="sum")
        return loss / (targets != camvid.CLASSES).sum().clamp(min=1)

    def on_validation_epoch_start(self) -> None:
        self._confusion[:] = 0

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        images, labels = batch
        answers = self.network(images.float() / 255).argmax(1)
        self._confusion += camvid.confusion(labels.cpu().numpy(), answers.cpu().numpy())

    def on_validation_epoch_end(self) -> None:
        self.log("val/mean_iou", float(camvid.mean_iou(self._confusion)), prog_bar=True)


def class_weights(counts: NDArray[np.int64], balance: float) -> Tensor:
    """Weights of classes with these numbers of pixels, see `SegmenterTraining`; classes without a pixel have 0."""
    share = counts / counts.sum()
    weight = np.where(share > 0, np.where(share > 0, share, 1.0) ** -balance, 0.0)
    return torch.from_numpy(weight / (weight * share).sum()).float()


# ---------------------------------------------------------------------------------------------------------- data


class Batches(IterableDataset[Batch]):
    """Endless batches in random order; every item comes once before any comes again.

    Args:
        items: number of items.
        batch_size: items a batch.
        device: where the order is drawn.
        make: what turns item numbers [batch] into a batch.
    """

    def __init__(
        self, items: int, batch_size: int, device: torch.device, make: Callable[[Tensor], Batch]
    ) -> None:
        self.items, self.batch_size, self.device, self.make = items, batch_size, device, make

    def __iter__(self) -> Iterator[Batch]:
        order = torch.empty(0, dtype=torch.int64, device=self.device)
        while True:
            while len(order) < self.batch_size:
                order = torch.cat([order, torch.randperm(self.items, device=self.device)])
            yield self.make(order[: self.batch_size])
            order = order[self.batch_size :]


class ResidentImages(pl.LightningDataModule):
    """Training and test images that stay decoded on the device; a subclass says what targets and distortions they have.

    Args:
        root: folder of the task.
        batch_size: items a batch and device.
        plain: distort by cropping and mirroring alone, for a baseline.
        codec, quality: train on images that this codec (see `compand.eval.subjects.find`) has decoded at this quality;
            None: on undamaged ones. Test images are undamaged.
        jobs: processes that code them; None: one a core.
    """

    def __init__(
        self,
        root: str,
        batch_size: int,
        plain: bool,
        codec: str | None,
        quality: float | None,
        jobs: int | None,
    ) -> None:
        super().__init__()
        if (codec is None) != (quality is None):
            raise UsageError("--data.codec and --data.quality belong together: give both or neither")
        self.root, self.batch_size, self.plain = root, batch_size, plain
        self.codec, self.quality, self.jobs = codec, quality, jobs
        self._train: Batch | None = None
        self._test: list[Batch] = []

    @abstractmethod
    def distorted(self, images: Tensor, targets: Tensor) -> Batch:
        """images: uint8 [batch, 3, h, w]. Returns a training batch: images in [0, 1], and targets."""

    def pixels(self, paths: Sequence[Path], decoded: bool) -> list[NDArray[np.uint8]]:
        """RGB pixels [h, w, 3] of image files, as they are or decoded from the codec."""
        if not decoded or self.codec is None or self.quality is None:
            with ThreadPoolExecutor() as pool:
                return list(pool.map(read_rgb, paths))
        signals = decoded_items(paths, "image", self.codec, self.quality, self.jobs)
        return [signal.pixels for signal in signals if isinstance(signal, Picture)]

    def train_dataloader(self) -> DataLoader[Batch]:
        if self._train is None:
            raise RuntimeError("setup has not run")
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        images, targets = (tensor.to(device) for tensor in self._train)

        def make(chosen: Tensor) -> Batch:
            distorted, wanted = self.distorted(images[chosen], targets[chosen])
            return distorted.contiguous(memory_format=torch.channels_last), wanted

        return DataLoader(Batches(len(images), self.batch_size, device, make), batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self._test, batch_size=None)  # type: ignore[arg-type]


class ImagenetteData(ResidentImages):
    """Imagenette: FOLDER/{train,val}/CLASS/*.

    Distortions: crops of random area and aspect, rotated and sheared; mirroring; color; random erasing; mixup and
    CutMix; label smoothing. A plain run cuts crops at the images' own scale, mirrors them, and smooths no labels.

    Args:
        root, batch_size, plain, codec, quality, jobs: see `ResidentImages`.
        edge: the images are reduced or enlarged to squares of this edge.
        crop: edge of the crops, smaller than `edge`: crops enlarge what they show, so that objects have the same size
            in the mean as in whole test images (Touvron et al. 2019).
        area: least fraction of the area that a crop shows.
        rotation: largest angle in degrees.
        shear: largest shear, as a tangent.
        color: strength of brightness, contrast and saturation; hue turns by a fifth of it at most.
        erasing: probability of random erasing.
        mixing: probability of mixup or CutMix.
        mixup_alpha: parameter of mixup's Beta distribution.
        smoothing: share of the target that is spread over all classes.

    Attributes:
        classes: number of classes.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 256,
        plain: bool = False,
        codec: str | None = None,
        quality: float | None = None,
        jobs: int | None = None,
        edge: int = 224,
        crop: int = 176,
        area: float = 0.25,
        rotation: float = 15.0,
        shear: float = 0.15,
        color: float = 0.4,
        erasing: float = 0.25,
        mixing: float = 0.8,
        mixup_alpha: float = 0.4,
        smoothing: float = 0.1,
    ) -> None:
        super().__init__(root, batch_size, plain, codec, quality, jobs)
        self.edge, self.crop, self.area = edge, crop, area
        self.rotation, self.shear, self.color = np.deg2rad(rotation), shear, color
        self.erasing, self.mixing, self.mixup_alpha, self.smoothing = erasing, mixing, mixup_alpha, smoothing
        self.classes = len(imagenette.Imagenette.labels)

    def setup(self, stage: str | None = None) -> None:
        for split in ("train", "val"):
            found = imagenette.labelled_images(Path(self.root, split))
            pixels = self.pixels([path for path, _ in found], decoded=split == "train")
            images = torch.from_numpy(np.stack([squared(image, self.edge) for image in pixels]))
            batch = images.permute(0, 3, 1, 2), torch.tensor([label for _, label in found])
            if split == "train":
                self._train = batch
            else:
                self._test = list(zip(*(tensor.split(100) for tensor in batch), strict=True))

    def distorted(self, images: Tensor, targets: Tensor) -> Batch:
        items, device = images.shape[0], images.device
        source, size = (self.edge, self.edge), (self.crop, self.crop)
        wanted = F.one_hot(targets, self.classes).float()
        if self.plain:
            maps = augmentation.crop_maps(
                torch.full((items, 2), self.crop / self.edge, device=device), source
            )
            return augmentation.resample(images.float() / 255, maps, size), wanted
        extent = augmentation.area_extents(items, (self.area, 1.0), 4 / 3, device)
        maps = augmentation.crop_maps(extent, source, rotation=self.rotation, shear=self.shear)
        crops = augmentation.resample(images.float() / 255, maps, size)
        crops = augmentation.color_jitter(crops, self.color, self.color / 5, gray=0.1, solarize=0.05)
        crops = augmentation.erase(crops, self.erasing)
        wanted = torch.lerp(wanted, torch.full_like(wanted, 1 / wanted.shape[1]), self.smoothing)
        return augmentation.mix(crops, wanted, self.mixing, self.mixup_alpha)


def squared(pixels: NDArray[np.uint8], edge: int) -> NDArray[np.uint8]:
    """The middle square of an image, at this edge: uint8 [edge, edge, 3]."""
    height, width = pixels.shape[:2]
    if height == width == edge:
        return pixels
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(pixels).resize((edge, edge), Image.Resampling.LANCZOS, box))


class CamVidData(ResidentImages):
    """CamVid: FOLDER/{train,val}/{image,label}, all images of one size.

    Distortions: crops at a random scale, slightly rotated; mirroring; color. A plain run cuts crops at the images' own
    scale and mirrors them.

    Args:
        root, batch_size, plain, codec, quality, jobs: see `ResidentImages`.
        crop: height and width of the crops.
        scale: least and greatest factor by which the images are enlarged before they are cropped.
        rotation: largest angle in degrees.
        color: strength of brightness, contrast and saturation; hue turns by an eighth of it at most.

    Attributes:
        class_counts: labelled training pixels of each class.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 32,
        plain: bool = False,
        codec: str | None = None,
        quality: float | None = None,
        jobs: int | None = None,
        crop: tuple[int, int] = (288, 384),
        scale: tuple[float, float] = (0.5, 2.0),
        rotation: float = 5.0,
        color: float = 0.4,
    ) -> None:
        super().__init__(root, batch_size, plain, codec, quality, jobs)
        self.crop, self.scale, self.rotation, self.color = crop, scale, np.deg2rad(rotation), color
        self.class_counts = np.zeros(camvid.CLASSES, np.int64)

    def setup(self, stage: str | None = None) -> None:
        for split in ("train", "val"):
            found = camvid.labelled_images(Path(self.root, split))
            pixels = self.pixels([image for image, _ in found], decoded=split == "train")
            labels = [camvid.read_labels(label) for _, label in found]
            sizes = {array.shape[:2] for array in (*pixels, *labels)}
            if len(sizes) > 1:
                raise MediaError(
                    f"{self.root}/{split} has images or label maps of several sizes: make them one size"
                )
            batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(labels))
            if split == "train":
                self._train = batch
                counts = torch.bincount(batch[1].flatten().long(), minlength=camvid.CLASSES)
                self.class_counts = counts[: camvid.CLASSES].numpy()
            else:
                self._test = list(zip(*(tensor.split(4) for tensor in batch), strict=True))

    def distorted(self, images: Tensor, targets: Tensor) -> Batch:
        items, device = images.shape[0], images.device
        source = (images.shape[2], images.shape[3])
        share = torch.tensor([self.crop[0] / source[0], self.crop[1] / source[1]], device=device)
        pictures = images.float() / 255
        if self.plain:
            maps = augmentation.crop_maps(share.expand(items, 2), source)
        else:
            low, high = self.scale
            scale = low * (high / low) ** torch.rand(items, 1, device=device)
            # Bilinear samples of a picture that shrinks much would alias.
            smooth = F.interpolate(F.avg_pool2d(pictures, 2), source, mode="bilinear", align_corners=False)
            pictures = torch.where(scale[:, :, None, None] < 0.7, smooth, pictures)
            maps = augmentation.crop_maps(share / scale, source, rotation=self.rotation)
        crops = augmentation.resample(pictures, maps, self.crop)
        wanted = augmentation.resample_labels(targets, maps, self.crop, outside=camvid.CLASSES)
        if not self.plain:
            crops = augmentation.color_jitter(crops, self.color, self.color / 8)
        return crops, wanted
