"""What `codebook-audio` promises beyond other audio codecs: tokens that nest, rates by books, any quantiser."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import compand
from compand import registry
from compand.checkpoint import read_info
from compand.codebook_audio import CodebookAudioCodec
from compand.coding import container
from compand.errors import CompandError
from compand.sounds import Sound
from compand.train.instruments import note
from compand.weights import save

CONFIGS = Path(__file__).parents[1] / "train" / "configs"
SHIPPED = ["speech-rvq", "music-rvq"]
OVERLAYS = ["speech-grvq", "speech-mcrvq", "speech-fsq"]  # of speech-rvq
TRUNK = {
    "encoder_width": 4,
    "encoder_stages": [[4, 8, [1]], [8, 12, [1]]],
    "encoder_depth": 0,
    "decoder_stages": [[2, 16, 1]],
    "kernel": 3,
}
KINDS = {
    "vq": {"size": 32},
    "product": {"groups": 3, "size": 16},
    "rvq": {"layers": 4, "size": 32},
    "grvq": {"groups": 2, "layers": 2, "size": 16},
    "mcrvq": {"parallel": 3, "residual": 2, "size": 16},
    "fsq": {"levels": [5, 3], "groups": 2, "layers": 2},
}


def speech(seconds: float, rate: int = 16000) -> np.ndarray:
    """Notes, float32 [1, N]."""
    generator = np.random.default_rng(3)
    waves = np.concatenate([note(generator) for _ in range(math.ceil(seconds / 2) + 1)])
    return 0.6 * waves[None, : round(seconds * rate)]


@pytest.fixture(scope="module")
def codec(checkpoint_of):
    return compand.load(checkpoint_of("codebook-audio"), device="cpu")


@pytest.fixture(scope="module", params=KINDS)
def plain(request, tmp_path_factory):
    """A codec of each quantiser, for mono sounds at 16 kHz, untrained: tokens do not ask how it sounds."""
    torch.manual_seed(0)
    quantiser = {"kind": request.param, **KINDS[request.param]}
    made = CodebookAudioCodec(
        latent_channels=12, quantiser=quantiser, prior={"kind": "static"}, transform=TRUNK
    ).eval()
    x = torch.from_numpy(speech(2.0))[None, :, None]
    with torch.no_grad():
        made.bottleneck.quantiser.initialise(made.transform.analysis(x, torch.tensor([32])))
    made.bottleneck.freeze()
    folder = tmp_path_factory.mktemp(request.param) / "codebook-audio-v1"
    save(made, folder)
    return compand.load(folder, device="cpu")


def test_every_kind_of_quantiser_makes_a_codec(plain):
    sound = Sound(speech(1.3), 16000)
    sizes = plain.bottleneck.quantiser.sizes
    assert plain.levels == len(sizes)
    for level in range(1, plain.levels + 1):
        data = plain.encode(sound, quality=level)
        assert plain.decode(data).samples.shape == sound.samples.shape
        frames = math.ceil(sound.length / plain.transform.stride)
        bits = frames * sum(map(math.log2, sizes[level - 1]))
        assert sum(map(len, container.read(data).chunks)) <= bits / 8 + 8
    assert plain.encode(sound) == plain.encode(sound, quality=min(4, plain.levels))


def test_tokens_of_a_level_begin_those_of_the_next(plain):
    y = plain.analyse(speech(0.7), 32)
    deepest = plain.bottleneck.indices(y, 32 * plain.levels)
    for level in range(1, plain.levels + 1):
        own = plain.bottleneck.indices(y, 32 * level)
        assert torch.equal(own, deepest[:, : own.shape[1]])


def test_a_quality_between_levels_is_the_lower_one(codec):
    sound = Sound(speech(0.5, 44100), 44100)
    data, lower = codec.encode(sound, quality=3.75), codec.encode(sound, quality=3)
    assert container.read(data).chunks == container.read(lower).chunks
    assert np.array_equal(codec.decode(data).samples, codec.decode(lower).samples)


def test_kbps_chooses_the_number_of_books(codec):
    sound = Sound(speech(1.0, 44100), 44100)
    files = [codec.encode(sound, quality=level) for level in range(1, codec.levels + 1)]
    rates = [8 * len(data) / 1000 for data in files]
    assert rates == sorted(rates)
    for data, rate in zip(files, rates, strict=True):
        found = codec.encode(sound, kbps=rate + 0.01)
        assert container.read(found).chunks == container.read(data).chunks
    with pytest.raises(CompandError, match="is the least"):
        codec.encode(sound, kbps=0.5 * rates[0])


def test_the_architecture_says_it_all(checkpoint_of):
    info = read_info(checkpoint_of("codebook-audio"))
    entry = registry.by_name("codebook-audio")
    built = entry.load_class().from_architecture(info.architecture, trainable=True)
    assert built.codec_id == entry.codec_id == 6
    assert built.architecture == info.architecture and info.qualities == (1, built.levels)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_describe_a_codec(name):
    described = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    arguments, data = described["model"]["init_args"], described["data"]["init_args"]
    codec = CodebookAudioCodec(**arguments["codec"]["init_args"])
    stated = described["trainer"]["logger"]["init_args"]["name"]
    assert stated == name and codec.levels > 3
    assert (codec.rate, codec.channels) == (data["rate"], data["channels"])
    assert arguments["distance"]["init_args"]["rate"] == codec.rate
    assert data["crop"] % codec.transform.stride == 0 and len(data["shares"]) == len(data["roots"])
    assert all(size <= 1024 for sizes in codec.bottleneck.quantiser.sizes for size in sizes)


@pytest.mark.parametrize("name", OVERLAYS)
def test_shipped_overlays_change_the_quantiser_alone(name):
    base, changed = (yaml.safe_load((CONFIGS / f"{file}.yaml").read_text()) for file in ("speech-rvq", name))
    quantiser = changed["model"]["init_args"]["codec"]["init_args"]["quantiser"]
    assert changed == {
        "trainer": {"logger": {"init_args": {"name": name}}},
        "model": {"init_args": {"codec": {"init_args": {"quantiser": quantiser}}}},
    }
    codec = CodebookAudioCodec(**base["model"]["init_args"]["codec"]["init_args"] | {"quantiser": quantiser})
    assert codec.levels > 3
    assert all(size <= 1024 for sizes in codec.bottleneck.quantiser.sizes for size in sizes)


def test_speech_has_fifty_frames_a_second_and_twelve_books_have_six_kbps():
    codec = CodebookAudioCodec(quantiser={"kind": "rvq", "layers": 12, "size": 1024})
    frames = codec.rate / codec.transform.stride
    assert frames == 50 and codec.levels * 10 * frames == 6000
    assert codec.transform.context < 0.5 * codec.rate
