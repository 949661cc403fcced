"""Distances of pictures by what networks see in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compand.errors import UsageError
from compand.eval.perception.models import load_model
from compand.eval.perception.networks.vision import Encoder, PyramidSegmenter, ResidualClassifier


class FeatureDistance(nn.Module):
    """Distance of the features of a trained network: LPIPS (Zhang et al. 2018, equation 1) without learned weights.

    The features of each stage, at strides 2 to 32, are normalised to unit length at each position; the squared
    distance, summed over channels, is averaged over positions and stages. Published LPIPS needs the weights of networks
    trained on ImageNet, which no package carries; here the networks are reference models trained in this repository.

    Args:
        model: name or folder of a reference model with an image encoder.

    Raises:
        UsageError: the model has none.
        CheckpointError: there is no such model.
    """

    def __init__(self, model: str = "imagenette-classifier") -> None:
        super().__init__()
        reference = load_model(model)
        network = reference.network
        if not isinstance(network, (ResidualClassifier, PyramidSegmenter)):
            raise UsageError(f"{reference.name} does not look at pictures: give a model of an image task")
        self.name = reference.name
        self.encoder: Encoder = network.encoder

    def train(self, mode: bool = True) -> FeatureDistance:
        """The network stays as it was trained."""
        return super().train(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """What is compared of a batch [batch, 3, h, w] in [0, 1], of any size from 32 x 32 on."""
        return [_unit(stage.float()) for stage in self.encoder(x)]

    def between(self, x_hat: Tensor, wanted: Sequence[Tensor]) -> Tensor:
        """The distance of a batch from one of which `features` are given: scalar."""
        parts = [(a - b).square().sum(1).mean() for a, b in zip(self.features(x_hat), wanted, strict=True)]
        return torch.stack(parts).mean()

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Two batches [batch, 3, h, w] in [0, 1] of any size from 32 x 32 on -> scalar."""
        with torch.no_grad():
            wanted = self.features(x)
        return self.between(x_hat, wanted)


def _unit(features: Tensor) -> Tensor:
    """Vectors of length 1 along the channels."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-8)


class ImageDistance(nn.Module):
    """Terms of a picture's distance: "pixel" and "perceptual".

    - pixel: mean absolute error, or mean squared error;
    - perceptual: mean of `FeatureDistance` over networks and scales. In training both pictures are moved by the same
      random number of pixels first, below 16, so that the networks' strides leave no grid of their own.

    Args:
        models: names or folders of reference models.
        scales: number of scales; each is seen at half the resolution of the one before.
        squared: whether "pixel" is the squared error.

    Raises:
        UsageError, CheckpointError: as `FeatureDistance`.
    """

    SHIFT = 16

    def __init__(
        self, models: Sequence[str] = ("imagenette-classifier",), scales: int = 2, squared: bool = False
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(FeatureDistance(model) for model in models)
        self.scales, self.squared = scales, squared

    @property
    def description(self) -> str:
        """What the distance is, in words."""
        names = ", ".join(network.name for network in self.networks if isinstance(network, FeatureDistance))
        error = "squared" if self.squared else "absolute"
        return f"mean {error} error; features of {names} at {self.scales} scales in place of LPIPS"

    def forward(self, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
        """x_hat, x: [batch, 3, h, w] in [0, 1], float32. Returns scalars."""
        a, b = x_hat, x
        if x_hat.requires_grad:
            a, b = _shifted(a, b, self.SHIFT)
        error = x_hat - x
        pixel = error.square().mean() if self.squared else error.abs().mean()
        return {"pixel": pixel, "perceptual": self.between(a, self.features(b))}

    @torch.no_grad()
    def features(self, x: Tensor) -> list[list[Tensor]]:
        """What "perceptual" compares of a batch, for each scale and network; see `between`."""
        return [network.features(scaled) for scaled, network in self._seen(x)]

    def between(self, x_hat: Tensor, wanted: Sequence[Sequence[Tensor]]) -> Tensor:
        """The term "perceptual" for a batch of which `features` are given."""
        pairs = zip(self._seen(x_hat), wanted, strict=True)
        return torch.stack([network.between(scaled, given) for (scaled, network), given in pairs]).mean()

    def _seen(self, x: Tensor) -> Iterator[tuple[Tensor, FeatureDistance]]:
        """A batch at every scale, with every network."""
        for scale in range(self.scales):
            if scale:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            for network in self.networks:
                assert isinstance(network, FeatureDistance)
                yield x, network


def _shifted(a: Tensor, b: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Both pictures without a random number of rows and columns, below `limit`, at their beginning.

    By indices on the device: which ones is not known to the host, so that a captured step draws anew each time.
    """
    height, width = (max(edge - limit + 1, -(-edge // 2)) for edge in a.shape[2:])
    offsets = [
        (torch.rand((), device=a.device) * (edge - kept + 1)).long()
        for edge, kept in zip(a.shape[2:], (height, width), strict=True)
    ]
    rows = torch.arange(height, device=a.device) + offsets[0]
    columns = torch.arange(width, device=a.device) + offsets[1]
    return tuple(x.index_select(2, rows).index_select(3, columns) for x in (a, b))  # type: ignore[return-value]
