"""Distortion of pictures, all on RGB with 8 bits a sample."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compand.errors import UsageError
from compand.eval.items import to_rgb
from compand.pictures import Picture
from compand.pictures import psnr as psnr_of

if TYPE_CHECKING:
    from torch import Tensor, nn

PATIENCE = 3.0
"""Seconds that a server has to answer, once a process."""


class Backbone(NamedTuple):
    """A classifier whose features a metric compares, with weights that torchvision publishes."""

    name: str  # of torchvision's function
    url: str  # ends with the first 8 digits of the file's SHA-256
    taps: tuple[int, ...]  # layers of `features` whose outputs are compared


_BACKBONES = {
    "lpips": Backbone(
        "alexnet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11)
    ),
    "dists": Backbone("vgg16", "https://download.pytorch.org/models/vgg16-397923af.pth", (3, 8, 15, 22, 29)),
}
_SHORTEST_EDGES = {"psnr": 1, "ms_ssim": 161, "lpips": 31, "dists": 16}
"""In pixels: MS-SSIM has five scales with windows of 11 pixels; the networks need one sample in their last layer."""


def psnr(original: Picture, decoded: Picture) -> float:
    """Peak signal-to-noise ratio in dB over all samples of RGB; infinite for equal pictures."""
    return psnr_of(original.pixels, decoded.pixels)


def ms_ssim(original: Picture, decoded: Picture) -> float:
    """Multi-scale structural similarity, mean over R, G and B; 1 for equal pictures.

    Wang, Simoncelli, Bovik: "Multi-scale structural similarity for image quality assessment" (2003), with the weights
    given there; float32 arithmetic on 8-bit values, by pytorch_msssim.
    """
    import torch
    from pytorch_msssim import ms_ssim as ms_ssim_of

    with torch.inference_mode():
        return float(ms_ssim_of(*_tensors(original, decoded), data_range=255.0, size_average=True))


def lpips(original: Picture, decoded: Picture) -> float:
    """Learned perceptual image patch similarity, version 0.1 with AlexNet; 0 for equal pictures.

    Zhang et al.: "The unreasonable effectiveness of deep features as a perceptual metric" (2018), equation 1.
    """
    import torch

    weights = _packaged_weights("lpips_models/alex.pth")
    layers = [weights[f"lin{index}.model.1.weight"] for index in range(len(_BACKBONES["lpips"].taps))]
    with torch.inference_mode():
        x, y = (tensor / 255 for tensor in _tensors(original, decoded))
        return float(lpips_of(x, y, _network("lpips"), layers))


def dists(original: Picture, decoded: Picture) -> float:
    """Deep image structure and texture similarity, with VGG-16, of pictures in full size; 0 for equal pictures.

    Ding et al.: "Image quality assessment: unifying structure and texture similarity" (2020), equation 6.
    """
    import torch

    weights = _packaged_weights("dists_models/weights.pt")
    with torch.inference_mode():
        x, y = (tensor / 255 for tensor in _tensors(original, decoded))
        return float(dists_of(x, y, _network("dists"), weights["alpha"], weights["beta"]))


def lpips_of(x: Tensor, y: Tensor, network: nn.Sequential, layers: Sequence[Tensor]) -> Tensor:
    """LPIPS of two pictures, [1, 3, H, W] in [0, 1], from AlexNet's features.

    Args:
        x, y: the pictures.
        network: AlexNet's `features`.
        layers: for each tap, the weights of its channels, [1, C, 1, 1].
    """
    shift, scale = x.new_tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1)
    features = [_features(network, "lpips", (2 * each - 1 - shift) / scale) for each in (x, y)]
    total = x.new_zeros(())
    for of_x, of_y, weight in zip(*features, layers, strict=True):
        unit_x, unit_y = (each / (each.square().sum(1, keepdim=True) + 1e-8).sqrt() for each in (of_x, of_y))
        total = total + (weight * (unit_x - unit_y).square()).sum(1).mean()
    return total


def dists_of(x: Tensor, y: Tensor, network: nn.Sequential, alpha: Tensor, beta: Tensor) -> Tensor:
    """DISTS of two pictures, [1, 3, H, W] in [0, 1], from VGG-16's features with L2 pooling.

    Args:
        x, y: the pictures.
        network: VGG-16's `features`.
        alpha, beta: weights of texture and structure, [1, C, 1, 1] for the channels of the picture and of all taps.
    """
    import torch

    mean, deviation = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    pair = [[each, *_features(network, "dists", (each - mean) / deviation)] for each in (x, y)]
    textures, structures = [], []
    for of_x, of_y in zip(*pair, strict=True):
        mean_x, mean_y = of_x.mean((2, 3)), of_y.mean((2, 3))
        variance_x, variance_y = of_x.var((2, 3), correction=0), of_y.var((2, 3), correction=0)
        covariance = (of_x * of_y).mean((2, 3)) - mean_x * mean_y
        textures.append((2 * mean_x * mean_y + 1e-6) / (mean_x.square() + mean_y.square() + 1e-6))
        structures.append((2 * covariance + 1e-6) / (variance_x + variance_y + 1e-6))
    similarity = alpha.flatten() @ torch.cat(textures, 1)[0] + beta.flatten() @ torch.cat(structures, 1)[0]
    return 1 - similarity / (alpha.sum() + beta.sum())


_FUNCTIONS: Mapping[str, Callable[[Picture, Picture], float]] = MappingProxyType(
    {"psnr": psnr, "ms_ssim": ms_ssim, "lpips": lpips, "dists": dists}
)


def measure(metric: str, original: Picture, decoded: Picture) -> float:
    """See `compand.eval.metrics.measure`."""
    original, decoded = to_rgb(original), to_rgb(decoded)
    if original.pixels.shape != decoded.pixels.shape:
        sizes = f"{decoded.width}x{decoded.height} instead of {original.width}x{original.height}"
        raise UsageError(f"the decoded picture has {sizes} pixels: the codec must restore the size")
    edge, needed = min(original.height, original.width), _SHORTEST_EDGES[metric]
    if edge < needed:
        raise UsageError(f"{metric} needs edges of {needed} pixels, the shorter has {edge}: leave it out")
    return _FUNCTIONS[metric](original, decoded)


def lacking(metric: str) -> str:
    """Why a metric cannot be computed here, with the remedy; "" where it can. May download weights."""
    package = {"ms_ssim": "pytorch_msssim", "lpips": "torchmetrics", "dists": "torchmetrics"}.get(metric)
    if package is not None and importlib.util.find_spec(package) is None:
        return f'{package} is not installed: pip install "compand[eval]"'
    return "" if metric not in _BACKBONES else _obtain(_BACKBONES[metric])


def _tensors(original: Picture, decoded: Picture) -> list[Tensor]:
    """Both pictures as float32 [1, 3, H, W], 0 to 255."""
    import torch

    return [
        torch.from_numpy(np.array(picture.pixels)).permute(2, 0, 1)[None].float()
        for picture in (original, decoded)
    ]


def _features(network: nn.Sequential, metric: str, x: Tensor) -> list[Tensor]:
    """The outputs of a backbone's taps; DISTS has L2 pooling where the classifier has maximum pooling."""
    from torch import nn

    taps = _BACKBONES[metric].taps
    outputs = []
    for index, layer in enumerate(list(network.children())[: taps[-1] + 1]):
        pools = metric == "dists" and isinstance(layer, nn.MaxPool2d)
        x = _l2_pool(x) if pools else layer(x)
        if index in taps:
            outputs.append(x.clone())  # the next layer may work in place
    return outputs


def _l2_pool(x: Tensor) -> Tensor:
    """Square root of the squares, blurred by a Hann window of 3 x 3 and halved in size. Ding et al., equation 1."""
    from torch.nn import functional as F

    window = x.new_tensor([0.25, 0.5, 0.25])
    kernel = (window[:, None] * window).expand(x.shape[1], 1, 3, 3)
    return (F.conv2d(x.square(), kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


@lru_cache(maxsize=2)
def _network(metric: str) -> nn.Sequential:
    """A backbone's pretrained `features`, in evaluation mode."""
    import torch
    import torchvision

    backbone = _BACKBONES[metric]
    features: nn.Sequential = getattr(torchvision.models, backbone.name)(weights=None).features
    state = torch.load(_weights_path(backbone), map_location="cpu", weights_only=True)
    prefix = "features."
    features.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    return features.eval()


@lru_cache(maxsize=2)
def _packaged_weights(path: str) -> dict[str, Tensor]:
    """Weights of a metric itself, which torchmetrics brings along."""
    import torch

    specification = importlib.util.find_spec("torchmetrics")
    assert specification is not None and specification.origin is not None
    full = Path(specification.origin).parent / "functional" / "image" / path
    weights: dict[str, Tensor] = torch.load(full, map_location="cpu", weights_only=True)
    return weights


def _weights_path(backbone: Backbone) -> Path:
    """Where torchvision keeps the file too."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / backbone.url.rpartition("/")[2]


def _obtain(backbone: Backbone) -> str:
    """Makes sure that a backbone's weights are here. Returns why they are not, or ""."""
    path = _weights_path(backbone)
    if path.is_file():
        return ""
    address = urllib.parse.urlsplit(backbone.url)
    fact = "cannot be reached"
    if _reachable(f"{address.scheme}://{address.netloc}/"):
        try:
            _download(backbone.url, path)
            return ""
        except (OSError, ValueError) as error:
            fact = f"fails ({error})"
    place = f"save {backbone.url} in the checkpoints folder of torch's hub folder"
    return f"its {backbone.name} weights are not here and {address.hostname} {fact}; {place}"


@lru_cache(maxsize=1)
def _reachable(server: str) -> bool:
    """Whether a server answers within PATIENCE; the name look-up alone may take longer, and cannot be stopped."""
    answers: list[int] = []

    def ask() -> None:
        request = urllib.request.Request(server, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                answers.append(response.status)
        except urllib.error.HTTPError as error:
            answers.append(error.code)
        except (OSError, ValueError):
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answers)


def _download(url: str, path: Path) -> None:
    """Fetches a file, showing progress, and puts it in place if its SHA-256 begins as its name ends."""
    import rich.progress
    from rich.console import Console

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=10 * PATIENCE) as response, open(partial, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            console = Console(stderr=True)
            with rich.progress.wrap_file(response, size, description=path.name, console=console) as source:
                while block := source.read(2**20):
                    digest.update(block)
                    file.write(block)
        if not digest.hexdigest().startswith(path.stem.rpartition("-")[2]):
            raise ValueError("the file is not what its name says")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
