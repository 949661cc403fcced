"""The codec `vqgan` and its transform."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import SMALL

import compand
from compand.errors import UsageError
from compand.transforms.token_image import TokenImageTransform
from compand.vqgan import VqganCodec


def varied(**arguments) -> TokenImageTransform:
    """A small transform whose parameters have all left their initial values."""
    torch.manual_seed(0)
    stages = {"analysis_stages": [[4, 12, 1], [8, 16, 1]], "synthesis_stages": [[2, 8, 1], [8, 16, 1]]}
    transform = TokenImageTransform(10, **stages | arguments)
    with torch.no_grad():
        for p in transform.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return transform.eval()


def test_shapes_and_facts():
    transform = varied()
    assert (transform.stride, transform.latent_channels, transform.context) == (8, 10, 24)
    x, quality = torch.rand(2, 3, 40, 24), torch.tensor([32, 64])
    with torch.no_grad():
        y = transform.analysis(x, quality)
        assert y.shape == (2, 10, 5, 3) and y.dtype == torch.float32
        x_hat = transform.synthesis(y, quality)
        assert x_hat.shape == x.shape and x_hat.dtype == torch.float32
    encoder = {name for name in transform.state_dict() if name.startswith(transform.encoder_parts)}
    assert encoder and all("analysis" in name for name in encoder)
    assert any("synthesis" in name for name in transform.state_dict().keys() - encoder)


def test_nothing_reaches_beyond_the_context():
    """Both directions; and a tile with its context is as the whole."""
    transform, quality = varied(), torch.tensor([32])
    near = transform.context // transform.stride
    with torch.no_grad():
        y_hat = torch.rand(1, 10, 15, 15)
        whole = transform.synthesis(y_hat, quality)
        other = y_hat.clone()
        other[:, :, 7, 7] += 10
        moved = (transform.synthesis(other, quality) - whole).abs().amax((0, 1)) > 0
        inside = torch.zeros_like(moved)
        inside[(7 - near) * 8 : (8 + near) * 8, (7 - near) * 8 : (8 + near) * 8] = True
        assert moved.any() and not (moved & ~inside).any()
        part = transform.synthesis(y_hat[:, :, 5 - near :, 4 - near :], quality)
        same = part[:, :, near * 8 :, near * 8 :]
        torch.testing.assert_close(same, whole[:, :, 40:, 32:], atol=1e-5, rtol=0)
        x = torch.rand(1, 3, 120, 120)
        y = transform.analysis(x, quality)
        part = transform.analysis(x[:, :, 40 - 24 :, 32 - 24 :], quality)[:, :, near:, near:]
        torch.testing.assert_close(part, y[:, :, 5:, 4:], atol=1e-5, rtol=0)


def test_the_published_architecture_keeps_its_budget():
    transform = TokenImageTransform()
    encoding, decoding = transform.multiply_adds()
    assert encoding < decoding < 55_000
    assert 4e6 < sum(p.numel() for p in transform.parameters()) < 7e6


def test_multiply_adds_are_those_of_the_convolutions():
    transform, counted = varied(), []

    def count(layer: torch.nn.Conv2d, _: object, result: torch.Tensor) -> None:
        counted.append(layer.weight.numel() * result.shape[2] * result.shape[3])

    for layer in transform.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        y = transform.analysis(torch.rand(1, 3, 32, 48), torch.tensor([32]))
        encoding = sum(counted) / (32 * 48)
        transform.synthesis(y, torch.tensor([32]))
    assert transform.multiply_adds() == pytest.approx((encoding, sum(counted) / (32 * 48) - encoding))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"analysis_stages": []}, "do not fold"),
        ({"analysis_stages": [[8, 4, 1], [12, 4, 1]]}, "do not fold"),
        ({"synthesis_stages": [[8, 4, 1], [8, 4, 1]]}, "do not fold"),
        ({"synthesis_stages": [[4, 4, 1]]}, "ends at stride 8, synthesis at 4"),
    ],
)
def test_stages_that_do_not_fit(arguments, message):
    with pytest.raises(UsageError, match=message):
        varied(**arguments)


def test_levels_are_codebooks():
    codec = VqganCodec(**SMALL["vqgan"])
    sizes = SMALL["vqgan"]["quantiser"]["sizes"]
    assert codec.levels == len(sizes) and codec.vocabulary == tuple((size,) for size in sizes)
    full = VqganCodec()
    assert full.levels == 8 and full.vocabulary[-1] == (1024,) and full.transform.stride == 16


def test_rates_follow_the_codebooks(checkpoint_of, scenery):
    """No file is longer than log2 K bits a position, beside its frame."""
    codec = compand.load(checkpoint_of("vqgan"), device="cpu")
    pixels = scenery[:128, :192]
    positions = 128 * 192 // codec.transform.stride**2
    for level in range(1, codec.levels + 1):
        data = codec.encode(pixels, quality=level)
        assert 8 * len(data) <= positions * math.log2(codec.vocabulary[level - 1][0]) + 8 * 32
        assert codec.decode(data).pixels.shape == pixels.shape


def test_qualities_in_between_are_the_level_below(checkpoint_of, scenery):
    codec = compand.load(checkpoint_of("vqgan"), device="cpu")
    pixels = scenery[:64, :64]
    low, between = (codec.latents(codec.encode(pixels, quality=q)) for q in (2, 2.9))
    assert torch.equal(low, between)
