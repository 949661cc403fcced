"""Small codecs of every name, trained for a few seconds on photographs or on synthetic sounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import stereo
from PIL import Image

from compand import registry
from compand.bottlenecks.codebook import CodebookBottleneck
from compand.codec import QUALITY_STEPS, Codec
from compand.sounds import Sound
from compand.train.codec_training import as_samples
from compand.train.export import export
from compand.train.images import CropDataset, read_rgb
from compand.train.instruments import RATE
from compand.train.rate_distortion import RateDistortion

SOUND_CROP = 2048


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


def sound_crops(seed: int, count: int) -> Iterator[torch.Tensor]:
    """Batches of short synthetic sounds, float32 [8, 2, 1, N]."""
    generator = np.random.default_rng(seed)
    sounds = np.stack([stereo(generator) for _ in range(8)])[:, :, None]
    for start in generator.integers(0, sounds.shape[-1] - SOUND_CROP, count):
        yield torch.from_numpy(sounds[..., start : start + SOUND_CROP].copy())


def train(name: str, options: Mapping[str, Any], pictures: Sequence[Path], seed: int, steps: int) -> Codec:
    """A codec with these constructor arguments in its trainable state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = registry.by_name(name).load_class()(**options)
        module = RateDistortion(codec)
        if codec.medium == "audio":
            crops = sound_crops(seed, 4 * steps + 1)
        else:
            crops = iter(CropDataset([read_rgb(path) for path in pictures], 8, 64, torch.device("cpu"), seed))
        # What does not start as something like a transform coder.
        if isinstance(codec.bottleneck, CodebookBottleneck):
            settle(codec, crops, steps if codec.medium == "audio" else 2 * steps)
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


def export_counted(codec: Codec, folder: Path, counted: Path, scenery: np.ndarray) -> None:
    """Exports a codec whose tables are counted on files that are written to the folder `counted`."""
    if codec.medium == "audio":
        generator = np.random.default_rng(1)
        for i in range(4):
            Sound(stereo(generator), RATE).save(counted / f"{i}.wav")
    else:
        pixels = next(iter(CropDataset([scenery], 16, 96, torch.device("cpu"), 1)))
        for i, crop in enumerate(pixels):
            Image.fromarray(crop.permute(1, 2, 0).numpy()).save(counted / f"{i}.png")
    export(codec, folder, sorted(counted.iterdir()), "cpu")


def untrained(name: str, options: Mapping[str, Any], scenery: np.ndarray) -> Codec:
    """A codec whose codebooks are of latents of its untrained networks."""
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
    return codec
