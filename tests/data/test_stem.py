"""The input layer of models that learn from latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import compand
from compand.data.info import SetInfo
from compand.data.packed import PackedReader, ShardWriter
from compand.data.payload import RowCodec
from compand.data.stem import FLOOR, LatentExpansion, LatentPreview, LatentStem, latent_stem
from compand.errors import CheckpointError, UsageError


def test_a_stem_normalises_every_channel_and_widens():
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([5.0, 0.5, 1.0]), torch.tensor([1.0, -2.0, 0.0])
    x = torch.randn(16, 3, 20, 20, generator=generator) * scale.view(3, 1, 1) + shift.view(3, 1, 1)
    stem = LatentStem(x.mean((0, 2, 3)), x.std((0, 2, 3)), 8)
    y = stem(x)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(y.std((0, 2, 3)), torch.ones(3), atol=1e-4)
    assert (stem.channels, stem.stride, stem.axes) == (3, 8, 2)
    assert LatentStem(shift, scale, 8, width=7)(x).shape == (16, 7, 20, 20)
    assert LatentStem(shift, scale, 256, 1, width=7)(x[:, :, 0]).shape == (16, 7, 20)


def test_a_channel_that_is_nearly_always_zero_does_not_drown_the_others():
    stem = LatentStem(torch.zeros(2), torch.tensor([10.0, 0.0]), 8)
    assert stem(torch.ones(1, 2, 1, 1)).flatten().tolist() == pytest.approx([0.1, 1 / (10 * FLOOR)])


@pytest.fixture(scope="module")
def codec():
    return compand.load("wavelet-rgb-16x", device="cpu")


@pytest.mark.parametrize("field", ["latents", "tokens"])
def test_statistics_of_a_codec_are_near_those_of_photographs(codec, scenery, field):
    stem = latent_stem(codec, field, quality=3)
    assert (stem.channels, stem.stride, stem.axes) == (12, 8, 2)
    integers = codec.quantise(scenery[:416, :640], quality=3)
    values = (
        torch.from_numpy(integers)[None] if field == "tokens" else codec.dequantise(integers, quality=3)[None]
    )
    spread = stem(values).std((0, 2, 3))
    assert spread.min() > 0.2 and spread.max() < 3
    assert stem(values).mean((0, 2, 3)).abs().max() < 1


def test_statistics_of_a_sound_codec():
    stem = compand.latent_stem("wavelet-stereo-20x", width=5)
    assert (stem.axes, stem.stride) == (1, 256)
    assert stem(torch.randn(2, 27, 9)).shape == (2, 5, 9)
    assert stem.scale.min() > 0 and torch.isfinite(stem.scale).all()


@pytest.mark.parametrize("field", ["latents", "tokens"])
def test_statistics_of_a_set_are_measured(codec, scenery, tmp_path, field):
    info = SetInfo.of(codec.info, quality=3)
    coder = RowCodec(info, codec)
    grids = [codec.quantise(scenery[top : top + 64, :96], quality=3) for top in (0, 100, 200, 300)]
    rows = [
        {
            "key": str(i),
            "payload": coder.encode(grid),
            "height": 64,
            "width": 96,
            "channels": 3,
            "source_bytes": 1,
        }
        for i, grid in enumerate(grids)
    ]
    with ShardWriter(tmp_path / "part.parquet", info) as writer:
        writer.write(rows)
    stem = latent_stem(PackedReader(tmp_path / "part.parquet"), field)
    stacked = np.stack(grids)
    values = torch.from_numpy(stacked) if field == "tokens" else codec.dequantise(stacked, quality=3)
    y = stem(values)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(12), atol=1e-4)
    assert torch.allclose(y.std((0, 2, 3), correction=0), torch.ones(12), atol=1e-3)
    # A part of the rows has other statistics.
    assert not torch.allclose(latent_stem(tmp_path / "part.parquet", field, rows=2).mean, stem.mean)


def test_what_is_no_source():
    with pytest.raises(UsageError, match="field samples"):
        latent_stem("wavelet-rgb-16x", "samples")
    with pytest.raises(CheckpointError):
        latent_stem("no-such-codec")


def test_expanded_latents_are_the_linear_synthesis(codec, scenery):
    integers = codec.quantise(scenery[:256, :320], quality=3)
    latents = codec.dequantise(integers, quality=3)[None]
    expansion = LatentExpansion(codec)
    with torch.no_grad():
        samples, expected = expansion(latents), codec.transform.linear_synthesis(latents)
    assert samples.shape == expected.shape == (1, 3, 256, 320) and (expansion.channels, expansion.stride) == (
        3,
        1,
    )
    # At the borders the transform reflects, a convolution sees zeros.
    inside = (slice(None), slice(None), slice(40, -40), slice(40, -40))
    assert (samples - expected)[inside].abs().max() < 0.02
    picture = torch.from_numpy(scenery[:256, :320].copy()).permute(2, 0, 1)[None] / 255
    assert (samples - picture)[inside].square().mean() < 0.01
    assert all(p.requires_grad for p in expansion.parameters())


def test_previews_are_near_the_linear_synthesis_up_to_the_borders(codec, scenery):
    latents = codec.dequantise(codec.quantise(scenery[:224, :256], quality=3), quality=3)[None]
    preview = LatentPreview(codec)
    with torch.no_grad():
        expected = codec.transform.linear_synthesis(latents).clamp(0, 1)
        zeros = LatentExpansion(codec)(latents).clamp(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        pictures = preview(latents)
    assert pictures.dtype == torch.float32 and pictures.min() >= 0 and pictures.max() <= 1
    error = F.mse_loss(pictures, expected)
    assert error < 1e-3 and error < F.mse_loss(zeros, expected) / 2
    assert not any(p.requires_grad for p in preview.parameters())


def test_latents_of_sounds_and_of_learned_synthesis_are_not_expanded():
    for name in ("wavelet-stereo-20x", "hyperprior"):
        with pytest.raises(UsageError, match="no linear synthesis of pictures: use latent_stem"):
            LatentExpansion(compand.load(name, device="cpu"))
