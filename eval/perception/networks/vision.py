"""Networks of the image tasks: a residual classifier, and a segmenter on the same encoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from compand.eval.perception.models import TaskNetwork

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
"""Mean and standard deviation of the channels of photographs (ImageNet), in units of full scale."""


def as_batch(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """RGB pixels [h, w, 3] as a batch of one, float32 [1, 3, h, w] in [0, 1], in channels-last memory."""
    return torch.tensor(pixels, device=device).permute(2, 0, 1)[None].float() / 255


def convolution(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    activation: bool = True,
) -> nn.Sequential:
    """Convolution without bias, batch norm and, if wanted, ReLU."""
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, (rows, columns), stride, (rows // 2, columns // 2), bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if activation else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Scales every channel by a gate that the means of all channels decide (Hu et al. 2018, eq. 2 to 4)."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, max(channels // reduction, 8), 1)
        self.excite = nn.Conv2d(max(channels // reduction, 8), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class ResidualBlock(nn.Module):
    """Two convolutions, a squeeze-and-excitation gate and a shortcut that averages where it reduces (ResNet-D).

    Args:
        inputs, outputs: channels.
        stride: 1 or 2.
        drop_path: probability with which the branch is left out for an item in training (stochastic depth).
        kernel: extent of the convolutions; (1, n) serves signals of one row.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        drop_path: float,
        kernel: int | tuple[int, int] = 3,
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            convolution(inputs, outputs, kernel, stride),
            convolution(outputs, outputs, kernel, activation=False),
            SqueezeExcitation(outputs),
        )
        shortcut: list[nn.Module] = []
        if stride == 2:
            shortcut.append(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False))
        if stride == 2 or inputs != outputs:
            shortcut.append(convolution(inputs, outputs, 1, activation=False))
        self.shortcut = nn.Sequential(*shortcut)
        self.drop_path = drop_path
        nn.init.zeros_(self.branch[1][1].weight)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        if self.training and self.drop_path:
            kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop_path
            branch = branch * (kept / (1 - self.drop_path)).to(branch.dtype)
        return F.relu(self.shortcut(x) + branch)


class Encoder(nn.Module):
    """A residual network (He et al. 2016) with the stem and shortcuts of ResNet-D (He et al. 2019).

    Args:
        stem: channels of the first two convolutions.
        widths: channels of the four stages, at strides 4, 8, 16 and 32.
        blocks: residual blocks of each stage.
        drop_path: probability of leaving out the last block's branch; it rises linearly from 0 at the first.
    """

    def __init__(self, stem: int, widths: Sequence[int], blocks: Sequence[int], drop_path: float) -> None:
        super().__init__()
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)
        self.stem = nn.Sequential(convolution(3, stem, stride=2), convolution(stem, stem))
        self.widen = nn.Sequential(convolution(stem, widths[0]), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList()
        inputs, depth = widths[0], 0
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = []
            for j in range(count):
                rate = drop_path * depth / max(sum(blocks) - 1, 1)
                stage.append(ResidualBlock(inputs, width, 2 if i > 0 and j == 0 else 1, rate))
                inputs, depth = width, depth + 1
            self.stages.append(nn.Sequential(*stage))

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: [batch, 3, h, w] in [0, 1]. Returns features at strides 2, 4, 8, 16 and 32, edges rounded up."""
        features = [self.stem((x - self.mean) / self.deviation)]
        x = self.widen(features[0])
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class ResidualClassifier(TaskNetwork):
    """Encoder, mean over the picture, linear layer.

    Args:
        classes: number of classes.
        stem, widths, blocks, drop_path: see `Encoder`.
        dropout: probability with which a feature is left out in training.

    Attributes:
        architecture: those of these arguments that a trained network depends on.
    """

    kind = "image-classifier"

    def __init__(
        self,
        classes: int,
        stem: int = 24,
        widths: Sequence[int] = (48, 96, 160, 224),
        blocks: Sequence[int] = (2, 2, 2, 2),
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.architecture: dict[str, Any] = {
            "classes": classes,
            "stem": stem,
            "widths": list(widths),
            "blocks": list(blocks),
        }
        self.encoder = Encoder(stem, widths, blocks, drop_path)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 3, h, w] in [0, 1]. Returns logits [batch, classes]."""
        return self.head(self.dropout(self.encoder(x)[-1].mean((2, 3))))

    def predict(self, signal: NDArray[np.uint8]) -> NDArray[np.float32]:
        """signal: RGB pixels [h, w, 3] of any size, seen whole. Returns logits [classes]."""
        return self(as_batch(signal, self.head.weight.device))[0].float().cpu().numpy()


class PlainClassifier(TaskNetwork):
    """Convolutions and poolings alone (Simonyan and Zisserman 2015, with batch norm), mean over the picture, linear
    layer.

    A second opinion: without shortcuts, gates and strided convolutions it shares no structure with
    `ResidualClassifier`, on whose features codecs here are trained.

    Args:
        classes: number of classes.
        widths: channels of the stages, each of two convolutions and, but for the last, a pooling by two.
        dropout: probability with which a feature is left out in training.

    Attributes:
        architecture: those of these arguments that a trained network depends on.
    """

    kind = "image-classifier"

    def __init__(
        self, classes: int, widths: Sequence[int] = (32, 64, 128, 192, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.architecture: dict[str, Any] = {"classes": classes, "widths": list(widths)}
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)
        self.stages = nn.ModuleList(
            nn.Sequential(convolution(inputs, width), convolution(width, width))
            for inputs, width in pairwise((3, *widths))
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 3, h, w] in [0, 1]. Returns logits [batch, classes]."""
        x = (x - self.mean) / self.deviation
        for number, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2, ceil_mode=True) if number else x)
        return self.head(self.dropout(x.mean((2, 3))))

    def predict(self, signal: NDArray[np.uint8]) -> NDArray[np.float32]:
        """signal: RGB pixels [h, w, 3] of any size, seen whole. Returns logits [classes]."""
        return self(as_batch(signal, self.head.weight.device))[0].float().cpu().numpy()


class PyramidSegmenter(TaskNetwork):
    """Encoder and a feature pyramid (Lin et al. 2017) with the context of the whole picture at its top.

    Args:
        classes: number of classes.
        stem, widths, blocks, drop_path: see `Encoder`.
        pyramid: channels of the pyramid; the finest level, at stride 2, has half as many.

    Attributes:
        architecture: those of these arguments that a trained network depends on.
    """

    kind = "segmenter"

    def __init__(
        self,
        classes: int,
        stem: int = 32,
        widths: Sequence[int] = (48, 80, 128, 160),
        blocks: Sequence[int] = (2, 2, 2, 2),
        pyramid: int = 64,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.architecture: dict[str, Any] = {
            "classes": classes,
            "stem": stem,
            "widths": list(widths),
            "blocks": list(blocks),
            "pyramid": pyramid,
        }
        self.encoder = Encoder(stem, widths, blocks, drop_path)
        self.context = nn.Conv2d(widths[-1], widths[-1], 1)
        self.top = convolution(widths[-1], pyramid, 1)
        skips = [*reversed(widths[:-1]), stem]
        outputs = [pyramid] * (len(skips) - 1) + [pyramid // 2]
        self.lateral = nn.ModuleList(convolution(skip, pyramid, 1, activation=False) for skip in skips)
        self.merge = nn.ModuleList(convolution(pyramid, width) for width in outputs)
        self.refine = convolution(pyramid // 2, pyramid // 2)
        self.head = nn.Conv2d(pyramid // 2, classes, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 3, h, w] in [0, 1]. Returns logits [batch, classes, h, w]."""
        *features, top = self.encoder(x)
        context = F.relu(self.context(top.mean((2, 3), keepdim=True)))
        y = self.top(top + context)
        for skip, lateral, merge in zip(reversed(features), self.lateral, self.merge, strict=True):
            enlarged = F.interpolate(y, size=skip.shape[2:], mode="bilinear", align_corners=False)
            y = merge(F.relu(lateral(skip) + enlarged))
        logits = self.head(self.refine(y))
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)

    def predict(self, signal: NDArray[np.uint8]) -> NDArray[np.int64]:
        """signal: RGB pixels [h, w, 3] of any size. Returns the class of every pixel, [h, w]."""
        return self(as_batch(signal, self.head.weight.device))[0].argmax(0).cpu().numpy()
