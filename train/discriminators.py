"""Discriminators of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from compand.train.adversarial import Discriminator


class PatchJudge(nn.Module):
    """Strided convolutions that give a logit for each patch of a picture (Isola et al. 2017, section 3.2.2).

    Spectral normalisation (Miyato et al. 2018) takes the place of batch normalisation, through which items of a batch,
    real and reconstructed ones among them, would see each other.

    Args:
        widths: channels of the layers; all but the last halve the resolution.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        strides = [2] * (len(widths) - 1) + [1]
        inputs = [3, *widths]
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4 if stride == 2 else 3, stride, 1))
            for a, b, stride in zip(inputs, widths, strides, strict=False)
        )
        self.head = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x: [batch, 3, h, w] around 0. Returns logits [batch, 1, h', w'] and the features of all layers."""
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.head(x), features


class PatchDiscriminator(Discriminator):
    """Patch judges of a picture at several scales (Wang et al. 2018, "pix2pixHD", section 3.2).

    Args:
        widths: channels of the layers of each judge.
        scales: number of judges; each sees half the resolution of the one before.
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 256), scales: int = 2) -> None:
        super().__init__()
        self.judges = nn.ModuleList(PatchJudge(widths) for _ in range(scales))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        logits: list[Tensor] = []
        features: list[Tensor] = []
        x = 2 * x - 1
        for number, judge in enumerate(self.judges):
            judged, seen = judge(F.avg_pool2d(x, 2**number) if number else x)
            logits.append(judged)
            features += seen
        return logits, features
