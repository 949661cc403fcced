"""Real photographs, and a checkpoint of every registered codec that was trained for a few seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from compand import checkpoint
from compand.sounds import Sound
from compand.train.instruments import drum, note

# Nothing here imports torch before a test needs it: the process that hands out tests to others runs none.
if TYPE_CHECKING:
    from compand.codec import Codec

# Tests run on all cores already: threads of the processes that they start would only wait for each other, and those
# that wait must not do so at full load.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
    "context": {
        "latent_channels": 48,
        "stages": [[8, 24, 1], [16, 32, 1]],
        "hyper_channels": 16,
        "hyper_widths": [16, 16, 24],
        "context": {
            "slices": [6, 12, 30],
            "sizes": {"channel": [12, 8], "local": 8, "attention": 6, "hidden": [24, 16], "correction": 8},
        },
    },
    "compressai": {"width": 16, "latent_channels": 48, "lambdas": [0.01 * 1.7**i for i in range(8)]},
}
"""Constructor arguments that make a codec small; one that is not named here is tested as it comes."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test draws the same numbers whichever tests ran before it in its process: what fails once fails again."""
    seed = crc32(item.nodeid.encode())
    np.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These networks are too small to gain from more threads, which would only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make) -> a folder of that name that make(folder) has written, in whichever of the processes of this
    run came first; the others wait for it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / "once" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                unfinished = tmp_path_factory.mktemp("unfinished") / name
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return get


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
    with Image.open(china) as image:
        return np.array(image.convert("RGB"))


def stereo(generator: np.random.Generator) -> np.ndarray:
    """Two seconds of a note and a drum at different places between left and right, float32 [2, N]."""
    balance = generator.uniform(0.2, 0.8, (2, 1))
    sources = np.stack([note(generator), drum(generator)])
    mixture = np.stack([(balance * sources).sum(0), ((1 - balance) * sources).sum(0)])
    return (generator.uniform(0.05, 0.45) * mixture).astype(np.float32)


@pytest.fixture(scope="session")
def trained(china: Path, flower: Path) -> Callable[..., Codec]:
    """trained(name, seed=0, steps=60) -> a small codec of that name in its trainable state, trained briefly."""
    from small_codecs import train

    return lambda name, seed=0, steps=60: train(name, SMALL.get(name, {}), [china, flower], seed, steps)


@pytest.fixture(scope="session")
def checkpoint_of(
    trained: Callable[..., Codec],
    scenery: np.ndarray,
    tmp_path_factory: pytest.TempPathFactory,
    once: Callable[..., Path],
) -> Callable[[str], Path]:
    """checkpoint_of(name) -> the folder of that codec's checkpoint, exported once a session."""
    from small_codecs import export_counted

    def make(name: str) -> Path:
        def export(folder: Path) -> None:
            export_counted(trained(name), folder, tmp_path_factory.mktemp("counted"), scenery)

        return once(f"{name}-v1", export)

    return make


@pytest.fixture(scope="session")
def exact(checkpoint_of: Callable[[str], Path]) -> Callable[[str], Codec]:
    """exact(name) -> that codec on the CPU, with its transforms in float32."""
    from compand.weights import build

    return lambda name: build(checkpoint.read_info(checkpoint_of(name)), "cpu", reduced=False)


@pytest.fixture(scope="session")
def token_checkpoints(scenery: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of checkpoints with codebooks, by medium: of 8, 32 and 128 codes, one at a time ("image"), and of 16, up
    to four one after the other ("audio"). Their networks are untrained."""
    from small_codecs import untrained

    from compand.train.export import export

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
        codec = untrained(name, options, scenery)
        made[codec.medium] = folder / f"{name}-tokens-v1"
        export(codec, made[codec.medium], [seen[codec.medium]], "cpu")
    return made
