"""Real photographs, and a checkpoint of every registered codec that was trained for a few seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compand import checkpoint, registry
from compand.bottlenecks.codebook import CodebookBottleneck
from compand.codec import QUALITY_STEPS, Codec
from compand.sounds import Sound
from compand.train.codec_training import as_samples
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
    "vqgan": {
        "latent_channels": 12,
        "quantiser": {"kind": "nested", "sizes": [8, 12, 16, 24, 32, 48, 64, 96]},
        "prior": {"kind": "context", "embedding": 4, "hidden": 8},
        "transform": {
            "analysis_stages": [[8, 16, 1], [16, 24, 1]],
            "synthesis_stages": [[8, 16, 1], [16, 24, 1]],
        },
    },
    "codebook-audio": {
        "channels": 2,
        "rate": 44100,
        "latent_channels": 24,
        "quantiser": {"kind": "rvq", "layers": 8, "size": 64},
        "prior": {"kind": "static"},
        "transform": {
            "encoder_width": 8,
            "encoder_stages": [[2, 16, [1]], [4, 32, [1]]],
            "encoder_depth": 1,
            "decoder_stages": [[1, 48, 1]],
            "kernel": 3,
            "expansion": 2,
            "overlap": 2,
        },
    },
    "compressai": {"width": 16, "latent_channels": 48, "lambdas": [0.01 * 1.7**i for i in range(8)]},
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


def settle(codec: Codec, crops: Iterator[torch.Tensor], steps: int) -> None:
    """Trains the transform of a codec by itself, then makes the codebooks, if it has any, of its latents: vectors of a
    transform that has not settled teach them little."""
    optimizer = torch.optim.Adam(codec.transform.parameters(), 4e-3)

    def latents(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quality = torch.full((len(x),), codec.levels * QUALITY_STEPS)
        return codec.transform.analysis(x, quality), quality

    def crop() -> torch.Tensor:
        x = as_samples(next(crops))
        # As loud as files are coded.
        return x / x.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-3)

    for _ in range(steps):
        x = crop()
        loss = (codec.transform.synthesis(*latents(x)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if isinstance(codec.bottleneck, CodebookBottleneck):
        with torch.no_grad():
            codec.bottleneck.quantiser.initialise(latents(crop())[0])


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
                    for start in generator.integers(0, sounds.shape[-1] - 4096, 4 * steps)
                )
            else:
                images = [read_rgb(china), read_rgb(flower)]
                crops = iter(CropDataset(images, 8, 64, torch.device("cpu"), seed))
            # What does not start as something like a transform coder.
            if isinstance(codec.bottleneck, CodebookBottleneck):
                settle(codec, crops, 2 * steps)
            elif name == "compressai":
                settle(codec, crops, 3 * steps)
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
            if isinstance(codec.bottleneck, CodebookBottleneck) and codec.medium == "image":
                # Each codebook learns from the items of its own level, of which there were few.
                settle(codec, crops, 0)
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


@pytest.fixture(scope="session")
def token_checkpoints(scenery: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of checkpoints with codebooks, by medium: of 8, 32 and 128 codes, one at a time ("image"), and of 16, up
    to four one after the other ("audio"). Their networks are untrained."""
    pictures: dict[str, Any] = {
        "latent_channels": 12,
        "quantiser": {"kind": "nested", "sizes": [8, 32, 128]},
        "prior": {"kind": "static"},
        "transform": {
            "analysis_stages": [[8, 16, 1], [16, 24, 1]],
            "synthesis_stages": [[8, 16, 1], [16, 24, 1]],
        },
    }
    sounds: dict[str, Any] = {
        "latent_channels": 8,
        "quantiser": {"kind": "rvq", "layers": 4, "size": 16},
        "prior": {"kind": "static"},
        "transform": {
            "encoder_width": 8,
            "encoder_stages": [[4, 12, [1]], [8, 16, [1]]],
            "encoder_depth": 1,
            "decoder_stages": [[1, 24, 1]],
            "kernel": 3,
        },
    }
    folder = tmp_path_factory.mktemp("tokens")
    seen = {"image": folder / "seen.png", "audio": folder / "seen.wav"}
    Image.fromarray(scenery[:416, :640]).save(seen["image"])
    Sound(stereo(np.random.default_rng(0)), 16000).save(seen["audio"])
    made = {}
    for name, options in (("vqgan", pictures), ("codebook-audio", sounds)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            codec = registry.by_name(name).load_class()(**options)
            if codec.medium == "image":
                x = torch.from_numpy(scenery[:416, :640]).permute(2, 0, 1)[None].float() / 255
            else:
                x = torch.from_numpy(stereo(np.random.default_rng(0)))[:, None, None, :32000]
            with torch.no_grad():
                y = codec.transform.analysis(x, torch.full((len(x),), 32 * codec.levels))
                codec.bottleneck.quantiser.initialise(y)
                if codec.medium == "image":
                    codec.bottleneck.quantiser.recluster()
        made[codec.medium] = folder / f"{name}-tokens-v1"
        export(codec, made[codec.medium], [seen[codec.medium]], "cpu")
    return made
