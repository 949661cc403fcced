"""The wavelet transform and what its codecs add to the contract: any number of channels, latents that lose nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import compand
from compand.bottlenecks.companding import CompandingBottleneck, GaussianCompander, LaplaceCompander
from compand.bottlenecks.factorized import FactorizedBottleneck
from compand.bottlenecks.hyperprior import HyperpriorBottleneck
from compand.coding import container
from compand.errors import MediaError, UsageError
from compand.image_codec import tile_rows
from compand.pictures import Picture, read_picture
from compand.train.rate_distortion import RateDistortion
from compand.transforms.wavelet import SpaceToDepth, WaveletTransform, band_frequencies, low_band_basis
from compand.transforms.wavelet_packets import WaveletPackets
from compand.wavelet import WaveletAudioCodec, WaveletImageCodec
from compand.weights import build, save

QUALITY = torch.tensor([100])
SMALL_NETWORKS = {"analysis_width": 8, "analysis_depth": 1, "synthesis_width": 16, "synthesis_depth": 1}


def linear(channels: int, latent_channels: int, **options) -> WaveletTransform:
    return WaveletTransform(channels, latent_channels, analysis_depth=0, synthesis_depth=0, **options)


# --------------------------------------------------------------------------------------------------- transform


@pytest.mark.parametrize("wavelet", ["bior4.4", "bior2.2", None])
@pytest.mark.parametrize(
    ("channels", "dimensions", "shape"), [(3, 2, (40, 56)), (1, 2, (8, 16)), (2, 1, (1, 96))]
)
def test_all_coefficients_restore_everything(wavelet, channels, dimensions, shape):
    bands = 8**dimensions * channels
    transform = linear(channels, bands, dimensions=dimensions, wavelet=wavelet)
    x = torch.rand(2, channels, *shape)
    y = transform.analysis(x, QUALITY)
    assert y.shape == (2, bands, shape[0] // (8 if dimensions == 2 else 1), shape[1] // 8)
    assert float((transform.synthesis(y, QUALITY) - x).abs().max()) < 1e-5


def test_frequencies_of_the_bands_are_where_tones_fall():
    """A tone in the middle of a band has most of its energy there."""
    packets = WaveletPackets(1, 3, "sym20", "periodization")
    places = band_frequencies(1, 3)[:, 0]
    time = torch.arange(4096, dtype=torch.float64)
    for place in range(8):
        tone = torch.cos(torch.pi * (place + 0.5) / 8 * time)[None, None, None]
        energy = packets.analysis(tone)[0, :, 0].square().sum(1)
        assert int(places[energy.argmax()]) == place and float(energy.max() / energy.sum()) > 0.85
    rows, columns = band_frequencies(2, 2).unbind(1)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (i, j) for i in range(4) for j in range(4)
    ]
    # Of the four bands of one level, 1 (h) is high along the height and 2 (v) along the width, as in pywavelets.
    assert band_frequencies(2, 1).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("channels", "latent_channels", "dimensions"), [(3, 12, 2), (3, 48, 2), (2, 27, 1), (5, 9, 1), (1, 3, 2)]
)
def test_training_starts_from_the_lowest_bands(channels, latent_channels, dimensions):
    basis = low_band_basis(channels, latent_channels, dimensions, 4)
    assert torch.allclose(basis @ basis.T, torch.eye(latent_channels), atol=1e-6)
    constant = torch.ones(1, channels, 64 if dimensions == 2 else 1, 64)
    transform = linear(channels, latent_channels, dimensions=dimensions, packet_levels=4, offset=0.0)
    restored = transform.synthesis(transform.analysis(constant, QUALITY), QUALITY)
    assert float((restored - constant).abs().max()) < 1e-3


def test_impossible_transforms_are_refused():
    for latent_channels in (0, 193):
        with pytest.raises(UsageError, match="of 64 bands have no"):
            linear(3, latent_channels)
    with pytest.raises(UsageError, match="compander cubic"):
        WaveletImageCodec(compander="cubic")


def test_space_to_depth_is_a_permutation():
    for dimensions, shape in ((2, (16, 24)), (1, (1, 40))):
        fold = SpaceToDepth(dimensions, 3)
        x = torch.arange(2 * shape[0] * shape[1]).float().view(1, 2, *shape)
        y = fold.analysis(x)
        assert (
            torch.equal(fold.synthesis(y, shape), x) and sorted(y.flatten().tolist()) == x.flatten().tolist()
        )
        assert y[0, 0, 0, 0] == 0 and y[0, 1, 0, 0] == 1


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize(("dimensions", "shape"), [(2, (32, 48)), (1, (1, 256))])
def test_encoding_analyses_as_training_does(odd, dimensions, shape):
    """Without gradients, analysis on a CPU takes a faster way to the same numbers; bytes of pictures as well."""
    transform = WaveletTransform(3, 12, dimensions, odd=odd, analysis_width=16)
    x = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    slow = transform.analysis(x.float() / 255, torch.tensor([60, 200]))
    with torch.no_grad():
        fast = transform.analysis(x.float() / 255, torch.tensor([60, 200]))
        bytewise = transform.analysis(x, torch.tensor([60, 200]))
    assert slow.requires_grad and not fast.requires_grad
    assert float((fast - slow).abs().max()) < 1e-4 and float((bytewise - slow).abs().max()) < 1e-4


def test_an_odd_transform_keeps_silence_and_signs():
    transform = WaveletTransform(2, 8, 1, odd=True, offset=0.0, synthesis_width=32)
    with torch.no_grad():
        for network in ("analysis_out", "synthesis_out"):
            getattr(transform, network).bias.fill_(1.0)
        x = torch.randn(1, 2, 1, 512)
        y = transform.analysis(x, QUALITY)
        assert not transform.analysis(0 * x, QUALITY).any() and not transform.synthesis(0 * y, QUALITY).any()
        assert torch.allclose(transform.analysis(-x, QUALITY), -y, atol=1e-5)
        restored = transform.synthesis(y, QUALITY)
        assert torch.allclose(transform.synthesis(-y, QUALITY), -restored, atol=1e-5)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_context_is_all_that_a_position_looks_at(dimensions):
    transform = WaveletTransform(1, 4, dimensions, analysis_depth=2, synthesis_depth=3, synthesis_width=16)
    stride, margin = transform.stride, transform.context // transform.stride
    size = 2 * margin + 3
    shape = (size * stride, size * stride) if dimensions == 2 else (1, size * stride)
    x = torch.rand(1, 1, *shape)
    with torch.no_grad():
        y = transform.analysis(x, QUALITY)
        far = x.clone()
        far[..., :stride] += 1
        assert not torch.allclose(transform.analysis(far, QUALITY)[..., :1], y[..., :1], atol=1e-3)
        changed = (transform.analysis(far, QUALITY) - y).abs().amax((0, 1, 2))
        assert float(changed[margin + 1 :].max()) < 1e-5
        other = y.clone()
        other[..., 0] += 1
        changed = (
            (transform.synthesis(other, QUALITY) - transform.synthesis(y, QUALITY)).abs().amax((0, 1, 2))
        )
        assert float(changed[(margin + 1) * stride :].max()) < 1e-5 < float(changed[:stride].max())


# ------------------------------------------------------------------------------------------------------ codecs


def test_the_bottleneck_is_what_was_asked_for():
    plain = WaveletImageCodec(compander=None, transform=SMALL_NETWORKS).bottleneck
    assert isinstance(plain, FactorizedBottleneck)
    prior = {"hyper_channels": 8, "widths": [8, 8, 8]}
    for name, compander in (("gaussian", GaussianCompander), ("laplace", LaplaceCompander)):
        bottleneck = WaveletImageCodec(compander=name, prior=prior, transform=SMALL_NETWORKS).bottleneck
        assert isinstance(bottleneck, CompandingBottleneck) and isinstance(bottleneck.compander, compander)
        assert isinstance(bottleneck.inner, HyperpriorBottleneck)


def bands_of(generator: np.random.Generator, channels: int, edge: int = 64) -> np.ndarray:
    """A synthetic scene seen in several bands: smooth shapes whose materials reflect each band differently."""
    y, x = np.mgrid[:edge, :edge] / edge
    scene = np.zeros((edge, edge, channels))
    for _ in range(6):
        centre, radius, angle = generator.random(2), generator.uniform(0.1, 0.5), generator.uniform(0, np.pi)
        inside = np.hypot(x - centre[0], y - centre[1]) < radius
        texture = 1 + 0.2 * np.sin(40 * (x * np.cos(angle) + y * np.sin(angle)))
        scene[inside] = (texture[..., None] * generator.uniform(20, 200, channels))[inside]
    return scene.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def four_bands(tmp_path_factory):
    """A codec of four bands, trained for some seconds on synthetic scenes, and the scenes it has not seen."""
    generator = np.random.default_rng(0)
    scenes = np.stack([bands_of(generator, 4) for _ in range(40)])
    prior = {"hyper_channels": 8, "widths": [8, 8, 16]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = WaveletImageCodec(4, 16, prior=prior, lambda_range=[0.005, 0.5], transform=SMALL_NETWORKS)
        module = RateDistortion(codec)
        crops = torch.from_numpy(scenes[:32]).permute(0, 3, 1, 2)
        optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
        losses = []
        for _ in range(80):
            loss, shown = module.loss(crops[torch.randint(0, 32, (8,))])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(shown[0]))
    assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:20])
    codec.eval().bottleneck.freeze()
    folder = tmp_path_factory.mktemp("bands") / "scenes-v1"
    save(codec, folder)
    return folder, scenes[32:]


def test_a_codec_of_four_bands(four_bands, tmp_path):
    folder, scenes = four_bands
    codec = compand.load(folder, device="cpu")
    errors = []
    for quality in (1, 8):
        data = codec.encode(scenes[0], quality=quality)
        assert container.read_header(data).geometry.channels == 4
        decoded = codec.decode(data)
        assert decoded.pixels.shape == scenes[0].shape and decoded.alpha is None
        errors.append(float(np.square(decoded.pixels.astype(float) - scenes[0]).mean()))
    assert errors[1] < errors[0] < scenes[0].astype(float).var() / 10
    odd = codec.encode(scenes[1][:37, :51])
    assert codec.decode(odd).pixels.shape == (37, 51, 4) and codec.latents(odd).shape == (16, 5, 7)
    tensor = torch.from_numpy(scenes[0]).permute(2, 0, 1)
    assert codec.encode(tensor, quality=8) == codec.encode(scenes[0], quality=8) == data
    with pytest.raises(UsageError, match="3 channels, this codec codes 4"):
        codec.encode(scenes[0][..., :3].copy())
    decoded.save(tmp_path / "bands.npy")
    assert np.array_equal(read_picture(tmp_path / "bands.npy").pixels, decoded.pixels)
    with pytest.raises(MediaError, match=r"4 bands: save as \.npy"):
        decoded.save(tmp_path / "bands.png")


def test_rgb_codecs_refuse_bands_and_band_codecs_refuse_files_of_others(four_bands, checkpoint_of, scenery):
    bands = compand.load(four_bands[0], device="cpu")
    rgb = compand.load(checkpoint_of("wavelet-image"), device="cpu")
    with pytest.raises(UsageError, match="5 channels, this codec codes 3"):
        rgb.encode(Picture(np.zeros((8, 8, 5), np.uint8), None, None))
    with pytest.raises(compand.CheckpointError):
        bands.decode(rgb.encode(scenery[:32, :32]))


def test_gray_pictures_and_gray_codecs(scenery):
    codec = WaveletImageCodec(1, 6, transform=SMALL_NETWORKS).eval()
    gray = scenery[:64, :96].mean(2).astype(np.uint8)
    with pytest.raises(UsageError, match="3 channels, this codec codes 1"):
        codec.encode(scenery[:64, :96])
    tile = tile_rows(*gray.shape, 0)[0][0]
    assert codec.analyse(gray[..., None], tile, 100).shape == (1, 6, 8, 12)


def test_a_sensor_signal_is_taken_at_its_own_rate(tmp_path):
    codec = WaveletAudioCodec(6, None, 12, 4, transform=SMALL_NETWORKS).eval()
    codec.bottleneck.freeze()
    save(codec, tmp_path / "sensors-v1")
    loaded = compand.load(tmp_path / "sensors-v1", device="cpu")
    time = np.arange(1000) / 100
    signal = np.stack([0.3 * np.sin(time * (k + 1)) for k in range(6)]).astype(np.float32)
    data = loaded.encode(signal, rate=100, quality=8)
    decoded = loaded.decode(data)
    assert decoded.samples.shape == signal.shape and decoded.rate == 100
    assert loaded.latents(data).shape == (12, 63)
    assert float(np.square(decoded.samples - signal).mean()) < 0.05 * float(np.square(signal).mean())


def test_released_codecs_are_of_their_dimension():
    expected = {
        "wavelet-rgb-16x": (12, 8, 16), "wavelet-rgb-4x": (48, 8, 4),
        "wavelet-stereo-20x": (27, 256, 512 / 27), "wavelet-stereo-5x": (108, 256, 512 / 108),
        "wavelet-stereo-2x": (512, 512, 2),
    }  # fmt: skip
    for name, (channels, stride, reduction) in expected.items():
        info = compand.checkpoint.find(name)
        assert info.latent is not None and info.family == name
        assert (info.latent["channels"], info.latent["stride"]) == (channels, stride)
        samples = 3 * stride**2 if info.medium == "image" else 2 * stride
        assert samples / channels == reduction


def test_released_music_codec_keeps_silence(tmp_path):
    codec = build(compand.checkpoint.find("wavelet-stereo-20x"), "cpu", reduced=False)
    for quality in (1, 8):
        decoded = codec.decode(codec.encode(np.zeros((2, 5000), np.float32), quality=quality))
        assert decoded.samples.shape == (2, 5000) and not decoded.samples.any()
