"""Tokens as a product: of files and of packed sets, there and back, and what is said of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compand
from compand import audio_codec, cli, image_codec
from compand.coding import container
from compand.data import (
    Collate,
    PackedDataset,
    PackedLoader,
    PackedReader,
    RandomCrop,
    check_set,
    latent_stem,
)
from compand.data.info import SetInfo
from compand.data.payload import RowCodec
from compand.errors import BitstreamError, CompandError, PackedSetError, UsageError
from compand.sounds import Sound, read_sound
from compand.train.instruments import drum, note

RATE = 16000


def speech(channels: int = 1, length: int = 20_000, rate: int = RATE) -> Sound:
    generator = np.random.default_rng(1)
    sources = np.stack([np.tile(make(generator), 8)[:length] for make in (note, drum)])
    return Sound((generator.uniform(0.02, 0.1, (channels, 2)) @ sources).astype(np.float32), rate)


@pytest.fixture(scope="module")
def pictures(token_checkpoints):
    return compand.load(token_checkpoints["image"], device="cpu")


@pytest.fixture(scope="module")
def sounds(token_checkpoints):
    return compand.load(token_checkpoints["audio"], device="cpu")


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code


# --------------------------------------------------------------------------------------------------- pictures


def test_the_vocabulary_tells_every_level(pictures, sounds):
    assert pictures.vocabulary == ((8,), (32,), (128,))
    assert sounds.vocabulary == ((16,), (16,) * 2, (16,) * 3, (16,) * 4)
    assert sounds.level_vocabulary(2.9) == (16, 16)
    assert pictures.info.latent["vocabulary"] == [[8], [32], [128]]


@pytest.mark.parametrize("size", [(96, 130), (1, 1), (200, 70)])
@pytest.mark.parametrize("packets", [0, 3])
def test_tokens_of_a_picture_give_the_picture(pictures, scenery, size, packets, monkeypatch):
    monkeypatch.setattr(image_codec, "TILE", 128)
    pixels = scenery[: size[0], : size[1]]
    for quality in (1, 2.5, 3):
        data = pictures.encode(pixels, quality=quality, packets=packets)
        tokens = pictures.tokens(data)
        assert tokens.dtype == torch.int64
        assert tokens.shape == (math.ceil(size[0] / 16), math.ceil(size[1] / 16))
        assert int(tokens.max()) < pictures.level_vocabulary(quality)[0]
        assert torch.equal(tokens[None], torch.from_numpy(pictures.quantise(pixels, quality=quality)).long())
        geometry = pictures.token_geometry(data)
        assert geometry == {"size": size, "channels": 3, "quality": quality}
        # As a language model has them.
        back = pictures.detokenize(tokens.tolist(), **geometry)
        assert np.array_equal(back.pixels, pictures.decode(data).pixels)
        latents = pictures.dequantise(tokens[None], quality=quality)
        assert torch.equal(latents, pictures.latents(data))


def test_tokens_alone_give_whole_patches(pictures):
    tokens = np.random.default_rng(0).integers(0, 8, (3, 5))
    assert pictures.detokenize(tokens, quality=1).pixels.shape == (48, 80, 3)
    assert pictures.detokenize(tokens, quality=1, channels=1).pixels.shape == (48, 80, 1)


def test_wrong_tokens_of_pictures_are_told(pictures, exact, scenery):
    zeros = np.zeros((2, 3), dtype=int)
    for tokens, options, fact in (
        (zeros, {}, "qualities 1 to 3 all have tokens of 1 codebook: say which"),
        (zeros.astype(float), {"quality": 1}, "give integers"),
        (zeros[0], {"quality": 1}, r"\[height, width\]"),
        (zeros[:0], {"quality": 1}, "give integers"),
        (zeros - 1, {"quality": 1}, "run from -1 to -1: those of quality 1 are 0 to 7"),
        (zeros + 8, {"quality": 1}, "0 to 7"),
        (np.zeros((2, 2, 3), dtype=int), {"quality": 1}, "has 1 codebooks, tokens have 2"),
        (np.zeros((2, 2, 3), dtype=int), {}, "no quality has 2 codebooks"),
        (zeros, {"quality": 4}, "choose 1 to 3"),
        (zeros, {"quality": 1, "size": (33, 48)}, "are no picture of 33 x 48"),
    ):
        with pytest.raises(UsageError, match=fact):
            pictures.detokenize(tokens, **options)
    other = exact("factorized")
    assert other.vocabulary == ()
    data = other.encode(scenery[:32, :32])
    for call in (
        lambda: other.tokens(data),
        lambda: other.detokenize(zeros),
        lambda: other.encode(scenery[:32, :32], packets=2),
        lambda: other.decode(data, conceal=True),
        lambda: other.add_concealer(),
    ):
        with pytest.raises(UsageError, match="has no tokens"):
            call()
    with pytest.raises(UsageError, match="choose 0"):
        pictures.encode(scenery[:32, :32], quality=1, packets=256)
    with pytest.raises(UsageError, match="no amounts"):
        pictures.level_values(1)


def test_a_damaged_file_has_no_tokens(pictures, scenery):
    data = pictures.encode(scenery, quality=3, compact=False)
    with pytest.raises(BitstreamError, match="chunk 0"):
        pictures.tokens(data[:-5])


def test_flat_gray_takes_the_one_level_that_has_it():
    """Of this checkpoint the finest level has a code of gray, and needs fewer bytes for it than those below."""
    codec = compand.load("vqgan-f16-v1", device="cpu")
    gray = np.full((256, 256, 3), 128, np.uint8)
    finest = codec.encode(gray, quality=8)
    assert len(finest) < len(codec.encode(gray, quality=2)) < len(codec.encode(gray, quality=5))
    assert codec.encode(gray, bpp=8 * len(finest) / 256**2) == finest
    assert codec.encode(gray, psnr=24) == finest
    assert codec.encode(gray, psnr=35) == finest
    with pytest.raises(CompandError, match=r"0\.00\d bpp is the least"):
        codec.encode(gray, bpp=1e-5)


# ------------------------------------------------------------------------------------------------------ sounds


@pytest.mark.parametrize("packets", [0, 4])
@pytest.mark.parametrize(("channels", "rate"), [(1, RATE), (3, RATE), (1, 44100)])
def test_tokens_of_a_sound_give_the_sound(sounds, channels, rate, packets, monkeypatch):
    monkeypatch.setattr(audio_codec, "SEGMENT", 4096)
    sound = speech(channels, rate=rate)
    data = sounds.encode(sound, quality=3, packets=packets)
    tokens = sounds.tokens(data)
    frames = math.ceil(math.ceil(20_000 * RATE / rate) / 32)
    assert tokens.shape == ((3, frames) if channels == 1 else (channels, 3, frames))
    assert tokens.dtype == torch.int64
    geometry = sounds.token_geometry(data)
    assert (geometry["samples"], geometry["rate"], geometry["quality"]) == (20_000, rate, 3)
    assert geometry["gain"] < 1
    decoded = sounds.decode(data)
    assert np.array_equal(sounds.detokenize(tokens, **geometry).samples, decoded.samples)
    stream = sounds.encoder(rate, channels, quality=3, packets=packets)
    streamed = stream.push(sound.samples) + stream.finish()
    assert torch.equal(sounds.tokens(streamed), torch.from_numpy(sounds.quantise(sound, quality=3)).long())
    decoder = sounds.decoder()
    assert decoder.push(streamed).shape[1] + decoder.finish().shape[1] == 20_000


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_tokens_of_sounds_beyond_full_scale_give_them(sounds, rate, monkeypatch):
    monkeypatch.setattr(audio_codec, "SEGMENT", 4096)
    sound = speech(rate=rate)
    sound.samples[:] *= 0.9 / np.abs(sound.samples).max()
    sound.samples[:, 14_000:15_000] *= 20
    monkeypatch.setattr(sounds, "_synthesise", louder(sounds._synthesise))
    data = sounds.encode(sound, quality=4)
    geometry, decoded = sounds.token_geometry(data), sounds.decode(data).samples
    ((start, stop),) = geometry["loud"]
    assert 0 < start <= 14_000 and 15_000 <= stop <= 20_000
    beyond = np.abs(decoded).max(0) > 1
    assert beyond[start:stop].any() and not beyond[:start].any() and not beyond[stop:].any()
    assert np.array_equal(sounds.detokenize(sounds.tokens(data), **geometry).samples, decoded)
    clipped = sounds.detokenize(sounds.tokens(data), **{**geometry, "loud": ()}).samples
    assert np.array_equal(clipped, decoded.clip(-1, 1))


def louder(synthesise):
    """Synthesis of an untrained network made so loud that it is clipped throughout."""
    return lambda *arguments: synthesise(*arguments) * np.float32(1000)


def test_limits_choose_among_whole_levels(sounds):
    sound = speech()
    files = [sounds.encode(sound, quality=quality) for quality in (1, 2, 3, 4)]
    for data in files:
        limit = 8 * len(data) * RATE / (1000 * sound.length)
        assert sounds.encode(sound, kbps=limit) == data
        assert sounds.encode(sound, kbps=1.02 * limit) == data
    reached = [
        10 * math.log10(1 / np.square(sounds.decode(data).samples - sound.samples).mean()) for data in files
    ]
    for wanted in reached:
        fitting = [data for data, psnr in zip(files, reached, strict=True) if psnr >= wanted - 0.001]
        assert sounds.encode(sound, psnr=wanted - 0.001) == min(fitting, key=len)
    for target in ({"kbps": 0.01}, {"psnr": 99}):
        with pytest.raises(CompandError, match=r"cannot be reached.*(allow more|ask for less)"):
            sounds.encode(sound, **target)


def test_no_level_but_the_finest_fits(sounds, monkeypatch):
    """Bytes need not grow with the level."""
    sound, encode = speech(), sounds._encode

    def swapped(source, level, *rest):
        assert level % 32 == 0
        return encode(source, 5 * 32 - level, *rest)

    smallest = sounds.encode(sound, quality=1)
    monkeypatch.setattr(sounds, "_encode", swapped)
    data = sounds.encode(sound, kbps=8 * len(smallest) * RATE / (1000 * sound.length))
    assert container.read_header(data).settings[0] == 32 and data == smallest


def test_tokens_alone_give_a_sound(sounds):
    tokens = np.random.default_rng(0).integers(0, 16, (2, 50))
    sound = sounds.detokenize(tokens)
    assert sound.samples.shape == (1, 1600)
    assert sound.rate == RATE
    assert sounds.detokenize(tokens[None].repeat(2, 0)).samples.shape == (2, 1600)
    assert sounds.detokenize(tokens, rate=8000).samples.shape == (1, 800)
    # Lower qualities begin the higher ones.
    data = [sounds.encode(speech(), quality=quality) for quality in (2, 4)]
    assert torch.equal(sounds.tokens(data[0]), sounds.tokens(data[1])[:2])
    with pytest.raises(UsageError, match="no quality has 5 codebooks"):
        sounds.detokenize(np.zeros((5, 4), dtype=int))
    with pytest.raises(UsageError, match=r"\[codebooks, frames\]"):
        sounds.detokenize(np.zeros(5, dtype=int))
    with pytest.raises(UsageError, match="are no sound"):
        sounds.detokenize(tokens, samples=2000)


# ------------------------------------------------------------------------------------------------ packed sets


@pytest.fixture(scope="module")
def picture_folder(scenery, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(10):
        path = folder / ("left" if number % 2 else "right") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(scenery[8 * number : 8 * number + 64, 32 * number : 32 * number + 96]).save(path)
    return folder


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    for number in range(4):
        speech(2 if number == 3 else 1, 6000 + 32 * number).save(folder / f"{number}.wav")
    return folder


@pytest.mark.parametrize("profile", ["train", "archive", "cpd"])
def test_a_set_of_pictures_holds_tokens(picture_folder, pictures, tmp_path, capsys, profile):
    target = tmp_path / "set"
    packed = ("pack", picture_folder, target, "-c", pictures.info.path, "-q", "3", "--profile", profile)
    assert run(*packed, "--device", "cpu") == 0
    fields = ("tokens", "latents", "samples")
    dataset = PackedDataset(target, fields, codec=pictures)
    assert dataset.info.vocabulary == (128,)
    for item in dataset:
        with Image.open(picture_folder / f"{item['key']}.png") as image:
            data = pictures.encode(np.asarray(image), quality=3)
        assert item["tokens"].dtype == torch.int16
        assert torch.equal(item["tokens"].long(), pictures.tokens(data))
        assert torch.equal(item["latents"], pictures.latents(data))
        pixels = pictures.decode(data).pixels
        assert np.array_equal(item["samples"].permute(1, 2, 0).numpy(), pixels)
    batches = list(PackedLoader(dataset, batch_size=4, shuffle=False))
    assert [tuple(batch["tokens"].shape) for batch in batches] == [(4, 4, 6), (4, 4, 6), (2, 4, 6)]
    assert batches[0]["latents"].shape == (4, 12, 4, 6)
    cropped = PackedDataset(target, ("tokens",), transform=RandomCrop(3), codec=pictures)
    assert cropped[0]["tokens"].shape == (3, 3)
    assert check_set(target) == []
    capsys.readouterr()
    assert run("info", target) == 0
    assert "1 a position, of 128 codes" in capsys.readouterr().out
    assert run("info", target, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["vocabulary"] == [128]
    with pytest.raises(UsageError, match=r"nn\.Embedding"):
        latent_stem(PackedReader(target), field="tokens")


@pytest.mark.parametrize("profile", ["train", "archive", "cpd"])
def test_a_set_of_sounds_holds_tokens(sound_folder, sounds, tmp_path, profile):
    target = tmp_path / "set"
    packed = ("pack", sound_folder, target, "-c", sounds.info.path, "-q", "2", "--profile", profile)
    assert run(*packed, "--device", "cpu", "--quiet") == 0
    dataset = PackedDataset(target, ("tokens", "latents", "samples"), codec=sounds)
    for item in dataset:
        sound = read_sound(sound_folder / f"{item['key']}.wav")
        frames = math.ceil(sound.length / 32)
        groups = [2] if len(sound.samples) == 2 else []
        assert list(item["tokens"].shape) == [*groups, 2, frames]
        assert list(item["latents"].shape) == [*groups, 8, frames]
        assert item["samples"].shape == sound.samples.shape
        if profile != "cpd":  # whose files hold quiet sounds made louder
            assert np.array_equal(item["tokens"].numpy(), sounds.quantise(sound, quality=2))
        assert torch.equal(item["latents"], sounds.dequantise(item["tokens"].long(), quality=2).cpu())


def test_rows_of_tokens_of_other_sizes(picture_folder, pictures, tmp_path, scenery):
    Image.fromarray(scenery[:40, :40]).save(tmp_path / "a.png")
    Image.fromarray(scenery[:90, :40]).save(tmp_path / "b.png")
    target = tmp_path / "set"
    assert (
        run("pack", tmp_path, target, "-c", pictures.info.path, "-q", "1", "--device", "cpu", "--quiet") == 0
    )
    dataset = PackedDataset(target, ("tokens", "latents"), codec=pictures)
    batch = Collate("pad")(dataset.__getitems__([0, 1]))
    assert batch["tokens"].shape == (2, 6, 3)
    assert batch["latents"].shape == (2, 12, 6, 3)
    assert sorted(batch["tokens_mask"].flatten(1).sum(1).tolist()) == [9, 18]
    both = [batch["tokens"][batch["tokens_mask"]].max(), batch["tokens"].min()]
    assert 0 <= both[1] <= both[0] < 8


def test_archives_of_tokens_are_coded_and_damage_is_told(pictures, scenery):
    train = RowCodec(SetInfo.of(pictures.info, quality=3), pictures)
    archive = RowCodec(SetInfo.of(pictures.info, quality=3, profile="archive"), pictures)
    tokens = pictures.quantise(scenery, quality=3)
    shape = (12, *tokens.shape[1:])
    payloads = {coder: coder.encode(tokens) for coder in (train, archive)}
    assert len(payloads[archive]) <= math.ceil(tokens.size * 7 / 8) + 1 < tokens.size + 5
    for coder, payload in payloads.items():
        assert np.array_equal(coder.decode(payload, shape), tokens)
        with pytest.raises(PackedSetError):
            coder.decode(payload[:-4], shape)
        with pytest.raises(PackedSetError):
            coder.decode(b"", shape)
    with pytest.raises(PackedSetError, match="beyond 0 to 127"):
        train.decode(train.encode(tokens + 1000), shape)
    content = train.info.to_json()
    content["latent"]["vocabulary"] = [[8]]
    with pytest.raises(PackedSetError, match="damaged"):
        SetInfo.from_json(content)


# ---------------------------------------------------------------------------------------------- command line


def test_info_tells_the_tokens_of_files(pictures, sounds, scenery, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compand.checkpoint, "_shipped", lambda: (pictures.info, sounds.info))
    picture, sound = tmp_path / "a.cpd", tmp_path / "b.cpd"
    picture.write_bytes(pictures.encode(scenery[:100, :130], quality=2))
    sound.write_bytes(sounds.encode(speech(2), quality=3))
    assert run("info", picture, sound) == 0
    out = capsys.readouterr().out
    assert "7 x 9 of 32 codes\n" in out
    assert "2 x 3 x 625 of 16 codes, 500 frames/s\n" in out
    assert run("info", "--json", picture, sound) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["token_shape"], first["vocabulary"], first["token_rate"]) == ([7, 9], [32], None)
    assert second["token_shape"] == list(sounds.tokens(sound.read_bytes()).shape)
    assert run("codecs", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["vocabulary"] == [[8], [32], [128]]
