"""Integers of latents: what codecs make of samples, and the payloads that keep them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import compand
from compand.codec import Codec
from compand.coding.ans import AnsReader, AnsWriter
from compand.coding.tables import TableSet
from compand.data.archive import ArchiveTables, learn_tables
from compand.data.info import SetInfo
from compand.data.payload import RowCodec
from compand.errors import BitstreamError, PackedSetError, UsageError
from compand.pictures import psnr
from compand.sounds import Sound

NAME = "wavelet-rgb-16x"
PROFILES = [("train", "zstd"), ("train", "lz4"), ("archive", None)]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return compand.load(NAME, device="cpu")


@pytest.fixture(scope="module")
def integers(codec, scenery) -> list[np.ndarray]:
    """Of crops of a photograph."""
    return [
        codec.quantise(scenery[y : y + 128, x : x + 160], quality=3)
        for y in range(0, 256, 64)
        for x in range(0, 448, 64)
    ]


@pytest.fixture(scope="module")
def tables(integers) -> bytes:
    return learn_tables(integers)


def row_codec(
    codec: Codec, profile: str, compression: str | None, tables: bytes, quality: float = 3
) -> RowCodec:
    assert codec.info is not None
    info = SetInfo.of(codec.info, quality=quality, profile=profile, compression=compression)
    return RowCodec(info.with_tables(tables) if profile == "archive" else info, codec)


def laplace(shape: Sequence[int], scales: np.ndarray, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).laplace(size=shape) * scales
    return np.round(values).astype(np.int32)


# ---------------------------------------------------------------------------------------------- codecs


def test_integers_are_latents_in_steps(codec, scenery):
    """The mean error of what the integers stand for is that of rounding, not more, in every channel."""
    whole = codec.quantise(scenery, quality=8)
    latents = codec.dequantise(whole, quality=8)
    coarse = codec.dequantise(codec.quantise(scenery, quality=3), quality=3)
    assert whole.dtype == np.int32
    assert latents.dtype == torch.float32
    assert whole.shape == tuple(latents.shape) == (12, 54, 80)
    fine = (latents - codec.latents(codec.encode(scenery, quality=8))).square().mean((1, 2))
    rough = (coarse - latents).square().mean((1, 2))
    assert (fine < rough).all()


@pytest.mark.parametrize("name", ["factorized", "wavelet-image"])
def test_a_picture_comes_back_as_well_as_from_a_file(exact, scenery, name):
    codec = exact(name)
    pixels = scenery[:67, :93]
    integers = codec.quantise(pixels, quality=8)
    picture = codec.reconstruct(
        codec.dequantise(integers, quality=8), height=67, width=93, channels=3, quality=8
    )
    reference = codec.decode(codec.encode(pixels, quality=8))
    assert psnr(pixels, picture.pixels) > psnr(pixels, reference.pixels) - 1


def test_batches_tiles_and_gray_pictures_hold_the_same(exact, scenery, monkeypatch):
    codec = exact("wavelet-image")
    single = codec.quantise(scenery[:100, :130], quality=5)
    pixels = torch.from_numpy(np.stack([scenery[:100, :130], scenery[100:200, :130]])).permute(0, 3, 1, 2)
    both = codec.quantise_batch(pixels, quality=5)
    assert both.dtype == torch.int32
    assert np.mean(both[0].numpy() != single) < 1e-3
    gray = codec.quantise_batch(pixels[:, :1], quality=5)
    assert np.mean(gray[1].numpy() != codec.quantise(scenery[100:200, :130, :1], quality=5)) < 1e-3
    whole = codec.dequantise(single, quality=5)
    picture = codec.reconstruct(whole, height=100, width=130, channels=3, quality=5)
    monkeypatch.setattr("compand.image_codec.TILE", 64)
    assert np.mean(codec.quantise(scenery[:100, :130], quality=5) != single) < 1e-3
    assert np.mean(codec.quantise_batch(pixels, quality=5)[0].numpy() != single) < 1e-3
    tiled = codec.reconstruct(whole, height=100, width=130, channels=3, quality=5)
    assert psnr(picture.pixels, tiled.pixels) > 60


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rate", [44100, 16000])
def test_a_sound_comes_back_at_its_rate(exact, channels, rate):
    codec = exact("wavelet-audio")
    time = np.arange(9000) / rate
    sound = Sound(
        np.stack([0.4 * np.sin(2 * math.pi * 500 * (1 + c) * time) for c in range(channels)]).astype(
            np.float32
        ),
        rate,
    )
    integers = codec.quantise(sound, quality=8)
    info = SetInfo.of(codec.info, quality=8)
    row = {"samples": 9000, "rate": rate, "channels": channels}
    assert integers.shape == info.latent_shape(row)
    again = RowCodec(info, codec)
    back = again.samples(again.encode(integers), row)
    assert back.samples.shape == sound.samples.shape
    assert back.rate == rate
    reference = codec.decode(codec.encode(sound, quality=8))

    def error(samples: np.ndarray) -> float:
        return float(np.square(samples - sound.samples)[:, 500:-500].mean())

    assert error(back.samples) < 4 * error(reference.samples) + 1e-5


def test_the_look_up_is_dequantising(codec):
    every = np.tile(np.arange(-128, 128, dtype=np.int32), (12, 3, 1))
    values = codec.level_values(2.5)
    assert values.shape == (12, 256)
    assert torch.equal(codec.dequantise(every, quality=2.5)[:, 0], values)
    assert (values[:, 129:].diff(dim=1) >= 0).all()
    assert torch.equal(values[:, 128], torch.zeros(12))


def test_wrong_shapes_are_told(codec):
    with pytest.raises(UsageError, match=r"give \[12, 2, 3\]"):
        codec.reconstruct(torch.zeros(12, 2, 2), height=16, width=24, channels=3, quality=3)
    with pytest.raises(UsageError, match="give uint8"):
        codec.quantise_batch(torch.zeros(1, 3, 8, 8), quality=3)


def test_what_decodes_a_sound_with_edges(trained):
    """A layout tells what is coded beyond the ends, and readers cut it off."""
    codec = trained("wavelet-audio", steps=1)
    codec.edge = codec.transform.edge = codec.transform.stride * 2
    integers = codec.quantise(Sound(np.zeros((2, 1000), np.float32), 44100), quality=3)
    layout = codec.latent_layout()
    assert layout["edge"] == 2 * layout["stride"]
    info = SetInfo("any", "00", "00", "audio", 96, "train", "zstd", layout)
    shape = info.latent_shape({"samples": 1000, "rate": 44100, "channels": 2})
    rows = RowCodec(info)
    assert integers.shape == (*shape[:-1], shape[-1] + 4)
    marked = np.arange(integers.size, dtype=np.int32).reshape(integers.shape)
    payload = rows.encode(marked)
    np.testing.assert_array_equal(rows.decode(payload, shape), marked[..., 2:-2])
    np.testing.assert_array_equal(rows.grid(payload, shape), marked)


# -------------------------------------------------------------------------------------------- payloads


def test_profiles_hold_the_same_integers(codec, integers, tables):
    for profile, compression in PROFILES:
        rows = pickle.loads(pickle.dumps(row_codec(codec, profile, compression, tables)))
        for item in integers:
            decoded = rows.decode(memoryview(rows.encode(item)), item.shape)
            assert decoded.dtype == np.int8
            np.testing.assert_array_equal(decoded, item)
            latents = codec.dequantise(item, quality=3).numpy()
            np.testing.assert_array_equal(rows.latents(rows.encode(item), item.shape), latents)


@pytest.mark.parametrize("shape", [(12, 1, 1), (12, 5, 3), (12, 31, 18)])
@pytest.mark.parametrize("reach", [0, 127, 128, 32767, 32768, 1 << 30])
def test_every_range_and_size_comes_back(codec, tables, shape, reach):
    values = laplace(shape, 1 + reach / 9).clip(-reach, reach)
    values.flat[0], values.flat[-1] = reach, -reach
    for profile, compression in PROFILES:
        rows = row_codec(codec, profile, compression, tables)
        decoded = rows.decode(rows.encode(values), shape)
        assert decoded.dtype.itemsize == (1 if reach < 128 else 2 if reach < 32768 else 4)
        np.testing.assert_array_equal(decoded, values)
        if reach < 1 << 20:
            expected = codec.dequantise(values, quality=3).numpy()
            np.testing.assert_array_equal(rows.latents(rows.encode(values), shape), expected)


@pytest.mark.parametrize(("axes", "shape"), [(1, (7, 50)), (1, (3, 7, 16)), (2, (5, 9, 14)), (1, (20, 1))])
def test_archive_of_sounds_and_other_channels(axes, shape):
    scales = np.linspace(0.1, 40, shape[-axes - 1]).reshape(-1, *[1] * axes)
    rows = [laplace(shape, scales, seed).clip(-127, 127) for seed in range(20)]
    made = ArchiveTables.from_bytes(learn_tables(rows, axes=axes))
    for item in rows:
        np.testing.assert_array_equal(made.decode(made.encode(item), item.shape), item)


def test_archive_is_small(codec, scenery, integers, tables):
    """Below the entropy of the integers of each channel, which costs more than its tables here."""
    fitted = sum(len(row_codec(codec, "archive", None, tables).encode(item)) for item in integers)
    stacked = np.stack(integers)
    bits = 0.0
    for channel in range(12):
        counts = np.unique(stacked[:, channel], return_counts=True)[1]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    assert fitted < 0.9 * bits / 8
    assert learn_tables(integers) == tables
    assert len(tables) < 30_000


def test_adaptive_classes_follow_the_activity():
    """Rows of one scale among rows of all scales cost little more than with tables of their own."""
    scales = [0.3, 1.0, 4.0]
    rows = [laplace((8, 16, 16), scale, seed) for seed in range(60) for scale in scales]
    made = ArchiveTables.from_bytes(learn_tables(rows))
    for scale in scales:
        item = laplace((8, 64, 64), scale, 1000)
        counts = np.unique(item, return_counts=True)[1]
        entropy = -float((counts * np.log2(counts / counts.sum())).sum()) / 8
        assert len(made.encode(item)) < 1.08 * entropy + 30


@pytest.mark.parametrize(("profile", "compression"), PROFILES)
def test_damaged_payloads_are_refused_or_decode_to_the_shape(codec, integers, tables, profile, compression):
    rows = row_codec(codec, profile, compression, tables)
    item = integers[0]
    payload = rows.encode(item)
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(150):
        damaged = bytearray(payload)
        if trial % 3 == 0:
            del damaged[int(generator.integers(0, len(payload))) :]
        else:
            place = int(generator.integers(0, len(payload) if trial % 3 == 1 else 8))
            damaged[place] ^= int(generator.integers(1, 256))
        try:
            assert rows.decode(bytes(damaged), item.shape).shape == item.shape
        except PackedSetError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= (50 if compression == "zstd" or profile == "archive" else 40)
    for shape in ((12, 16, 21), (12, 4000, 4000)):
        with pytest.raises(PackedSetError, match=r"its row says|cannot hold|does not end|due"):
            rows.decode(payload, shape)
    with pytest.raises(PackedSetError):
        rows.decode(b"", item.shape)


def test_damaged_tables_are_refused(codec, tables):
    assert codec.info is not None
    info = SetInfo.of(codec.info, quality=3, profile="archive")
    generator = np.random.default_rng(0)
    refused = 0
    for trial in range(120):
        damaged = bytearray(tables)
        if trial % 2:
            del damaged[int(generator.integers(0, len(tables))) :]
        else:
            damaged[int(generator.integers(0, len(tables)))] ^= int(generator.integers(1, 256))
        try:
            RowCodec(info.with_tables(bytes(damaged)), codec)
        except PackedSetError:
            refused += 1
    assert refused > 100
    other = learn_tables([laplace((3, 8, 8), 2)])
    with pytest.raises(PackedSetError, match="other latents"):
        RowCodec(info.with_tables(other), codec)
    huge = tables.split(b"\n", 1)[0].replace(b'"channels": 12', b'"channels": 65000') + b"\n" + b"x" * 99
    with pytest.raises(PackedSetError, match="damaged"):
        RowCodec(info.with_tables(huge), codec)


def test_tables_need_rows_of_one_kind():
    with pytest.raises(UsageError, match="no rows"):
        learn_tables([])
    with pytest.raises(UsageError, match="different numbers of channels"):
        learn_tables([laplace((3, 8, 8), 2), laplace((4, 8, 8), 2)])


def test_files_as_payloads(codec, scenery):
    rows = row_codec(codec, "cpd", None, b"")
    pixels = scenery[:64, :80]
    data = codec.encode(pixels, quality=3)
    row = {"height": 64, "width": 80, "channels": 3}
    shape = rows.info.latent_shape(row)
    np.testing.assert_array_equal(rows.latents(data, shape), codec.latents(data).numpy())
    np.testing.assert_array_equal(rows.samples(data, row).pixels, codec.decode(data).pixels)
    with pytest.raises(UsageError, match="no integers"):
        rows.decode(data, shape)
    with pytest.raises(PackedSetError, match="does not decode"):
        rows.latents(data[:-9], shape)
    with pytest.raises(PackedSetError, match="its row says"):
        rows.latents(data, (12, 8, 9))


def test_another_codec_is_refused(codec, exact):
    assert codec.info is not None
    info = SetInfo.of(codec.info, quality=3)
    with pytest.raises(PackedSetError, match=r"packed with wavelet-rgb-16x.*install the checkpoint"):
        RowCodec(info, exact("wavelet-image"))
    missing = SetInfo.from_json(info.to_json() | {"checkpoint": "nowhere-v7"})
    with pytest.raises(PackedSetError, match="nowhere-v7"):
        RowCodec(missing).values  # noqa: B018
    other = SetInfo.from_json(info.to_json() | {"synthesis": "00000000"})
    with pytest.raises(PackedSetError, match="00000000"):
        RowCodec(other).latents(RowCodec(info).encode(laplace((12, 2, 2), 2)), (12, 2, 2))


# ------------------------------------------------------------------------------------------------ coder


@pytest.mark.parametrize(("writes", "reads"), [("constriction", "reference"), ("reference", "constriction")])
def test_runs_are_the_same_in_every_coder(writes, reads):
    pytest.importorskip("constriction")
    generator = np.random.default_rng(0)
    masses = [generator.dirichlet(np.full(size, 0.2)) for size in (3, 40, 700)]
    tables = TableSet.from_masses([*masses, np.sort(masses[2])[::-1]], np.zeros(4, np.int32), [1e-6] * 4)
    runs = [(2, 50), (0, 1), (3, 80), (1, 7), (2, 3)]
    sizes = [3, 40, 700, 700]
    symbols = np.concatenate([generator.integers(0, sizes[table], n) for table, n in runs]).astype(np.int32)
    writer = AnsWriter(writes)
    writer.push_runs(symbols, runs, tables)
    reader = AnsReader(writer.finish(), reads)
    np.testing.assert_array_equal(reader.pull_runs(runs, tables), symbols)
    reader.finish()
    with pytest.raises(UsageError, match="give as many"):
        writer.push_runs(symbols[1:], runs, tables)
    with pytest.raises(BitstreamError):
        AnsReader(writer.finish()[:-3], reads).finish()
