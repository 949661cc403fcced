"""Real photographs, and a checkpoint of every registered codec that was trained for a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compand import checkpoint, registry
from compand.codec import Codec
from compand.train.export import export
from compand.train.images import CropDataset, read_rgb
from compand.train.rate_distortion import RateDistortion
from compand.weights import build

SHARED_IMAGES = Path(__file__).parents[1].parent / "shared" / "data" / "images"

SMALL: dict[str, dict[str, Any]] = {
    "hyperprior": {
        "latent_channels": 48,
        "stages": [[8, 24, 1], [16, 32, 1]],
        "hyper_channels": 16,
        "hyper_widths": [16, 16, 24],
    },
    "factorized": {"latent_channels": 48, "stages": [[8, 24, 1], [16, 32, 1]]},
}
"""Constructor arguments that make a codec small; one that is not named here is tested as it comes."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These networks are too small to gain from more threads, which would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def china() -> Path:
    """A photograph of 640x427 pixels."""
    return Path(str(resources.files("sklearn.datasets.images") / "china.jpg"))


@pytest.fixture(scope="session")
def flower() -> Path:
    """Another photograph of 640x427 pixels."""
    return Path(str(resources.files("sklearn.datasets.images") / "flower.jpg"))


@pytest.fixture(scope="session")
def hopper() -> Path:
    """A portrait of 512x600 pixels."""
    return Path(str(resources.files("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg"))


@pytest.fixture(scope="session")
def kodak() -> list[Path]:
    """The Kodak images, where the machine has them."""
    paths = sorted((SHARED_IMAGES / "kodak").glob("*.png"))
    if not paths:
        pytest.skip("the Kodak images are not on this machine")
    return paths


@pytest.fixture(scope="session")
def scenery(china: Path) -> np.ndarray:
    """Pixels of a photograph, uint8 [427, 640, 3]."""
    return read_rgb(china)


@pytest.fixture(scope="session")
def trained(china: Path, flower: Path) -> Callable[..., Codec]:
    """trained(name, seed=0, steps=60) -> a small codec of that name in its trainable state, trained briefly."""

    def train(name: str, seed: int = 0, steps: int = 60) -> Codec:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            codec = registry.by_name(name).load_class()(**SMALL.get(name, {}))
            module = RateDistortion(codec)
            crops = iter(CropDataset([read_rgb(china), read_rgb(flower)], 8, 64, torch.device("cpu"), seed))
            densities = [p for n, p in codec.named_parameters() if "density" in n]
            others = [p for n, p in codec.named_parameters() if "density" not in n]
            # Untrained densities are far too wide; they have to settle within these few steps.
            groups = [{"params": others, "lr": 2e-3}, {"params": densities, "lr": 0.03}]
            optimizer = torch.optim.Adam([group for group in groups if group["params"]])
            for _ in range(steps):
                loss, _ = module.loss(next(crops))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(others, 1.0)
                optimizer.step()
        return codec.eval()

    return train


@pytest.fixture(scope="session")
def checkpoint_of(
    trained: Callable[..., Codec], scenery: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """checkpoint_of(name) -> the folder of that codec's checkpoint, exported once a session."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / f"{name}-v1"
            crops = tmp_path_factory.mktemp("counted")
            pixels = next(iter(CropDataset([scenery], 16, 96, torch.device("cpu"), 1)))
            for i, crop in enumerate(pixels):
                Image.fromarray(crop.permute(1, 2, 0).numpy()).save(crops / f"{i}.png")
            export(trained(name), folder, sorted(crops.iterdir()), "cpu")
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="session")
def exact(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Codec]:
    """exact(name) -> that codec on the CPU, with its transforms in float32."""
    return lambda name: build(checkpoint.read_info(checkpoint_of(name)), "cpu", reduced=False)
