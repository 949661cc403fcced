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
from compand.sounds import Sound
from compand.train.export import export
from compand.train.images import CropDataset, read_rgb
from compand.train.instruments import RATE, drum, note
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
    "wavelet-image": {
        "prior": {"hyper_channels": 8, "widths": [8, 8, 16]},
        "lambda_range": [0.002, 0.2],
        "transform": {"analysis_width": 16, "analysis_depth": 1, "synthesis_width": 24, "synthesis_depth": 1},
    },
    "wavelet-audio": {
        "latent_channels": 24,
        "packet_levels": 5,
        "wavelet": "bior4.4",
        "prior": {"hyper_channels": 8, "widths": [8, 8, 16]},
        "transform": {
            "analysis_width": 16,
            "analysis_depth": 1,
            "analysis_kernel": 3,
            "synthesis_width": 24,
            "synthesis_depth": 1,
            "synthesis_kernel": 3,
        },
    },
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


def stereo(generator: np.random.Generator) -> np.ndarray:
    """Two seconds of a note and a drum at different places between left and right, float32 [2, N]."""
    balance = generator.uniform(0.2, 0.8, (2, 1))
    sources = np.stack([note(generator), drum(generator)])
    mixture = np.stack([(balance * sources).sum(0), ((1 - balance) * sources).sum(0)])
    return (generator.uniform(0.05, 0.45) * mixture).astype(np.float32)


@pytest.fixture(scope="session")
def trained(china: Path, flower: Path) -> Callable[..., Codec]:
    """trained(name, seed=0, steps=60) -> a small codec of that name in its trainable state, trained briefly."""

    def train(name: str, seed: int = 0, steps: int = 60) -> Codec:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            codec = registry.by_name(name).load_class()(**SMALL.get(name, {}))
            module = RateDistortion(codec)
            if codec.medium == "audio":
                generator = np.random.default_rng(seed)
                sounds = np.stack([stereo(generator) for _ in range(8)])[:, :, None]
                crops = (
                    torch.from_numpy(sounds[..., start : start + 4096].copy())
                    for start in generator.integers(0, sounds.shape[-1] - 4096, steps)
                )
            else:
                images = [read_rgb(china), read_rgb(flower)]
                crops = iter(CropDataset(images, 8, 64, torch.device("cpu"), seed))
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
            codec = trained(name)
            if codec.medium == "audio":
                generator = np.random.default_rng(1)
                for i in range(4):
                    Sound(stereo(generator), RATE).save(crops / f"{i}.wav")
                export(codec, folder, sorted(crops.iterdir()), "cpu")
                made[name] = folder
                return folder
            pixels = next(iter(CropDataset([scenery], 16, 96, torch.device("cpu"), 1)))
            for i, crop in enumerate(pixels):
                Image.fromarray(crop.permute(1, 2, 0).numpy()).save(crops / f"{i}.png")
            export(codec, folder, sorted(crops.iterdir()), "cpu")
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="session")
def exact(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Codec]:
    """exact(name) -> that codec on the CPU, with its transforms in float32."""
    return lambda name: build(checkpoint.read_info(checkpoint_of(name)), "cpu", reduced=False)
