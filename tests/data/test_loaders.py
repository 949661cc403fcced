"""Loaders of packed sets: the right values, every row exactly once, exact resumption, no silently wrong batch."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import multiprocessing
from torch.utils.data import DataLoader

import compand
from compand.codec import Codec
from compand.data.collate import Collate
from compand.data.dataset import PackedDataset
from compand.data.iterable import PackedIterable
from compand.data.loader import PackedLoader
from compand.data.packed import PackedReader, SetInfo, ShardWriter
from compand.data.payload import RowCodec, learn_tables
from compand.data.sampling import PackedSampler
from compand.data.transforms import (
    CenterCrop,
    Flip,
    FlipFit,
    LatentTransform,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    measure_flip,
)
from compand.errors import PackedSetError, UsageError
from compand.train.images import read_rgb

QUALITY = 3.0
ROWS = 90
EDGE = 64


def write_set(
    folder: Path, codec: Codec, sources: Sequence[Any], profile: str = "train", shard_rows: int = 40
) -> Path:
    """A packed set of pictures or sounds with labels 0 .. 4, in shards of row groups of 16."""
    assert codec.info is not None
    folder.mkdir()
    info = SetInfo.of(codec.info, quality=QUALITY, profile=profile)
    integers = [codec.quantise(source, quality=QUALITY) for source in sources]
    if profile == "archive":
        info = info.with_tables(learn_tables(integers))
    rows = RowCodec(info, codec)
    shards = []
    for first in range(0, len(sources), shard_rows):
        name = f"part-{first // shard_rows:05d}-0.parquet"
        columns = pa.schema([("label", pa.int64()), ("note", pa.string())])
        with (
            open(folder / name, "wb") as stream,
            ShardWriter(stream, info, columns, group_rows=16) as writer,
        ):
            for number, source in list(enumerate(sources))[first : first + shard_rows]:
                cpd = profile == "cpd"
                payload = codec.encode(source, quality=QUALITY) if cpd else rows.encode(integers[number])
                size = (
                    dict(zip(("height", "width", "channels"), source.shape, strict=True))
                    if info.medium == "image"
                    else {
                        "samples": source.samples.shape[1],
                        "rate": source.rate,
                        "channels": len(source.samples),
                    }
                )
                writer.write(
                    [
                        {
                            "key": f"k{number:03d}",
                            "payload": payload,
                            "source_bytes": 1,
                            "label": number % 5,
                            "note": f"n{number}" if number % 2 else None,
                            **size,
                        }
                    ]
                )
            writer.close()
        shards.append({"name": name, "rows": writer.rows, "bytes": (folder / name).stat().st_size})
    (folder / "packed.json").write_text(json.dumps({"format": 1, "shards": shards}))
    return folder


@pytest.fixture(scope="module")
def codec() -> Codec:
    return compand.load("wavelet-rgb-16x", device="cpu")


@pytest.fixture(scope="module")
def pictures(china: Path, flower: Path, hopper: Path) -> list[np.ndarray]:
    """Crops of three photographs, uint8 [64, 64, 3]."""
    photographs = [read_rgb(path) for path in (china, flower, hopper)]
    generator = np.random.default_rng(0)
    crops = []
    for number in range(ROWS):
        pixels = photographs[number % 3]
        y, x = (int(generator.integers(0, edge - EDGE)) for edge in pixels.shape[:2])
        crops.append(np.ascontiguousarray(pixels[y : y + EDGE, x : x + EDGE]))
    return crops


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, codec: Codec, pictures: list[np.ndarray]) -> Path:
    """Three shards of 40, 40 and 10 rows with latents [12, 8, 8]."""
    return write_set(tmp_path_factory.mktemp("packed") / "train", codec, pictures)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, codec: Codec, pictures: list[np.ndarray]) -> Path:
    """Eight rows of three sizes: latents [12, 8, 8], [12, 5, 8] and [12, 8, 7]."""
    sizes = [(64, 64), (40, 64), (61, 50)]
    sources = [picture[: sizes[i % 3][0], : sizes[i % 3][1]] for i, picture in enumerate(pictures[:8])]
    return write_set(tmp_path_factory.mktemp("mixed") / "train", codec, sources)


def keys_of(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def damage(folder: Path, target: Path, number: int) -> tuple[str, str]:
    """Copies a set and changes a byte in the payload of a row; gives shard and key of the row."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    reader = PackedReader(folder)
    shard, key = reader.place(number)
    payload = bytes(reader.payload(number))
    content = bytearray((target / shard).read_bytes())
    place = content.index(payload) + len(payload) // 2
    content[place] ^= 0x55
    (target / shard).write_bytes(content)
    return shard, str(key)


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("grid", [(8, 8), (7, 8), (7, 7), (0, 4)])
def test_integers_looked_up_in_pairs_stand_for_the_same(
    packed: Path, codec: Codec, grid: tuple[int, int]
) -> None:
    dataset = PackedDataset(packed)
    integers = np.random.default_rng(0).integers(-128, 128, (3, 12, *grid), dtype=np.int8)
    found = dataset._looked_up(torch.from_numpy(integers))
    levels = codec.level_values(QUALITY).cpu().numpy()
    expected = levels[np.arange(12)[:, None, None], integers.astype(int) + 128]
    assert found.numpy().tobytes() == expected.tobytes() and found.shape == integers.shape
    # A table of pairs does not travel to workers.
    assert pickle.loads(pickle.dumps(dataset))._pairs is None


@pytest.mark.parametrize("profile", ["train", "archive", "cpd"])
def test_items_are_what_the_codec_makes(
    profile: str, tmp_path: Path, codec: Codec, pictures: list[np.ndarray]
) -> None:
    folder = write_set(tmp_path / "set", codec, pictures[:5], profile, shard_rows=3)
    fields = ("latents", "samples") if profile == "cpd" else ("latents", "tokens", "samples")
    dataset = PackedDataset(folder, fields, columns=("key", "label", "note", "width"))
    assert len(dataset) == 5
    for number, item in enumerate(dataset[i] for i in range(5)):
        assert (item["key"], item["label"], item["width"]) == (f"k{number:03d}", number % 5, EDGE)
        assert item["note"] == (f"n{number}" if number % 2 else None)
        if profile == "cpd":
            data = codec.encode(pictures[number], quality=QUALITY)
            np.testing.assert_array_equal(item["latents"], codec.latents(data))
            pixels = codec.decode(data).pixels
        else:
            integers = codec.quantise(pictures[number], quality=QUALITY)
            latents = codec.dequantise(integers, quality=QUALITY)
            assert item["tokens"].dtype == torch.int16
            np.testing.assert_array_equal(item["tokens"], integers)
            torch.testing.assert_close(item["latents"], latents, rtol=1e-6, atol=1e-7)
            pixels = codec.reconstruct(latents, height=EDGE, width=EDGE, channels=3, quality=QUALITY).pixels
        assert item["latents"].dtype == torch.float32 and item["samples"].dtype == torch.uint8
        assert np.abs(item["samples"].permute(1, 2, 0).numpy().astype(int) - pixels).max() <= 1


def test_a_batch_is_its_items_in_the_order_asked_for(packed: Path) -> None:
    dataset = PackedDataset(packed, ("latents", "tokens"))
    wanted = [85, 3, 41, 3, 0, 89]
    rows = dataset.__getitems__(wanted)
    batch = Collate()(rows)
    assert batch["key"] == [f"k{i:03d}" for i in wanted] and len(rows) == 6
    assert batch["label"].tolist() == [i % 5 for i in wanted]
    for place, number in enumerate(wanted):
        item = dataset[number]
        assert torch.equal(batch["latents"][place], item["latents"])
        assert torch.equal(batch["tokens"][place], item["tokens"])
        assert torch.equal(rows[place]["latents"], item["latents"])


def test_torch_collates_rows_by_itself(packed: Path) -> None:
    dataset = PackedDataset(packed)
    batches = list(DataLoader(dataset, batch_size=32))
    assert [tuple(batch["latents"].shape) for batch in batches] == [(32, 12, 8, 8)] * 2 + [(26, 12, 8, 8)]
    assert torch.equal(batches[1]["latents"][3], dataset[35]["latents"])


def test_integers_beyond_a_byte_are_exact(tmp_path: Path, codec: Codec, pictures: list[np.ndarray]) -> None:
    assert codec.info is not None
    integers = [codec.quantise(picture, quality=QUALITY) for picture in pictures[:3]]
    integers[1][3, 2, 2] = -300
    integers[2][0, 0, 0] = 70000
    info = SetInfo.of(codec.info, quality=QUALITY)
    rows = RowCodec(info)
    with open(tmp_path / "a.parquet", "wb") as stream, ShardWriter(stream, info) as writer:
        for number, each in enumerate(integers):
            size = {"height": EDGE, "width": EDGE, "channels": 3, "source_bytes": 1}
            writer.write([{"key": str(number), "payload": rows.encode(each), **size}])
    dataset = PackedDataset(tmp_path / "a.parquet", ("latents", "tokens"))
    batch = Collate()(dataset.__getitems__([0, 1, 2]))
    assert batch["tokens"].dtype == torch.int32
    for place, each in enumerate(integers):
        np.testing.assert_array_equal(batch["tokens"][place], each)
        expected = codec.dequantise(each, quality=QUALITY)
        torch.testing.assert_close(batch["latents"][place], expected, rtol=1e-6, atol=1e-7)


def test_gray_pictures_come_in_the_channels_of_the_codec(
    tmp_path: Path, codec: Codec, pictures: list[np.ndarray]
) -> None:
    folder = write_set(tmp_path / "set", codec, [pictures[0][:, :, :1], pictures[1]])
    gray, color = (PackedDataset(folder, ("samples",))[i]["samples"] for i in (0, 1))
    assert gray.shape == color.shape == (3, EDGE, EDGE)
    assert torch.equal(gray[0], gray[2]) and not torch.equal(color[0], color[2])


def test_sounds_of_mixed_lengths(tmp_path: Path) -> None:
    codec = compand.load("wavelet-stereo-20x", device="cpu")
    generator = np.random.default_rng(0)
    sounds = [
        compand.Sound((0.1 * generator.standard_normal((2, length))).astype(np.float32), 44100)
        for length in (8192, 6000, 8192)
    ]
    folder = write_set(tmp_path / "set", codec, sounds)
    dataset = PackedDataset(folder, ("latents", "samples"))
    item = dataset[1]
    assert item["samples"].shape == (2, 6000) and item["latents"].shape == (27, -(-6000 // 256))
    loader = PackedLoader(dataset, batch_size=3, shuffle=False, mixed="pad")
    batch = next(iter(loader))
    assert batch["latents"].shape == (3, 27, 32) and batch["samples"].shape == (3, 2, 8192)
    assert batch["latents_mask"].sum(1).tolist() == [32, 24, 32]
    assert batch["samples_mask"].sum(1).tolist() == [8192, 6000, 8192]
    assert torch.equal(batch["latents"][1, :, :24], item["latents"])
    assert not batch["latents"][1, :, 24:].any()
    cropped = PackedDataset(folder, transform=RandomCrop(16))
    assert Collate()(cropped.__getitems__([0, 1, 2]))["latents"].shape == (3, 27, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fields": ("pixels",)}, "field pixels does not exist"),
        ({"columns": ("class",)}, "no column class"),
        ({"columns": ("payload",)}, "no column payload"),
        ({"on_error": "ignore"}, "on_error"),
        ({"fields": ("tokens",), "transform": Normalize(0, 1)}, "tokens can be cropped"),
        ({"fields": ("tokens",), "transform": RandomResizedCrop(4)}, "tokens can be cropped"),
        ({"fields": ("samples",), "transform": RandomCrop(4)}, "do nothing to samples"),
        ({"transform": [dict, RandomCrop(4)]}, "reorder"),
        ({"transform": CenterCrop((1, 2))}, None),
    ],
)
def test_what_cannot_be_read_is_refused(packed: Path, arguments: dict[str, Any], message: str | None) -> None:
    if message is None:
        PackedDataset(packed, **arguments)
        return
    with pytest.raises(UsageError, match=message):
        PackedDataset(packed, **arguments)


# ------------------------------------------------------------------------------------------------ transforms


def test_a_crop_takes_a_window_of_the_grid(packed: Path) -> None:
    whole = PackedDataset(packed, ("latents", "tokens"))
    dataset = PackedDataset(packed, ("latents", "tokens"), transform=RandomCrop((5, 3)))
    places = set()
    for _ in range(6):
        rows = dataset.__getitems__(range(40))
        assert rows.values["latents"].shape == (40, 12, 5, 3)
        for number in range(40):
            full, window = whole[number], rows[number]
            found = [
                (y, x)
                for y in range(4)
                for x in range(6)
                if torch.equal(full["latents"][:, y : y + 5, x : x + 3], window["latents"])
            ]
            assert found
            y, x = found[0]
            assert torch.equal(full["tokens"][:, y : y + 5, x : x + 3], window["tokens"])
            places.update(found)
    assert len(places) == 24
    centre = PackedDataset(packed, transform=CenterCrop(4))[7]["latents"]
    assert torch.equal(centre, whole[7]["latents"][:, 2:6, 2:6])


def test_a_crop_beyond_the_grid_names_the_row_or_pads(mixed: Path) -> None:
    with pytest.raises(UsageError, match=r"5x8 is smaller.*shard part-00000-0.parquet, key k001"):
        PackedDataset(mixed, transform=RandomCrop(8)).__getitems__([0, 1])
    rows = PackedDataset(mixed, ("latents", "tokens"), transform=RandomCrop(8, pad=True)).__getitems__(
        range(8)
    )
    assert rows.values["latents"].shape == rows.values["tokens"].shape == (8, 12, 8, 8)
    whole = PackedDataset(mixed)[1]["latents"]
    assert torch.equal(rows[1]["latents"][:, :5], whole) and not rows[1]["latents"][:, 5:].any()


def test_resized_crops_have_one_size_and_follow_the_latents(packed: Path, mixed: Path) -> None:
    dataset = PackedDataset(mixed, transform=RandomResizedCrop(6, scale=(0.3, 1)))
    assert Collate()(dataset.__getitems__(range(8)))["latents"].shape == (8, 12, 6, 6)
    same = PackedDataset(packed, transform=RandomResizedCrop(8, scale=(1, 1), ratio=(1, 1)))
    assert torch.equal(same[3]["latents"], PackedDataset(packed)[3]["latents"])


def test_normalized_latents_have_the_wanted_statistics(packed: Path) -> None:
    latents = Collate()(PackedDataset(packed).__getitems__(range(ROWS)))["latents"]
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    dataset = PackedDataset(packed, transform=Normalize(mean, deviation))
    normal = Collate()(dataset.__getitems__(range(ROWS)))["latents"]
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(12), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def flip_fit(codec: Codec, china: Path, flower: Path, hopper: Path) -> FlipFit:
    photographs = [read_rgb(path) for path in (china, flower, hopper)]
    return measure_flip(codec, [photographs[i][j : j + 320] for j in (0, 100) for i in range(3)], quality=3)


def test_a_measured_flip_is_near_the_latents_of_the_mirrored_picture(
    flip_fit: FlipFit, codec: Codec, pictures: list[np.ndarray]
) -> None:
    """Three neighbours are needed: the grid of the packets is not its own mirror image."""
    assert flip_fit.kernel.shape == (12, 12, 3)
    assert flip_fit.error < 0.3
    assert flip_fit.error < 0.7 * flip_fit.matrix_error < 0.7 * flip_fit.reversed_error
    assert 0.1 < flip_fit.quantisation_error < 0.3

    def latents(pixels: np.ndarray) -> torch.Tensor:
        return codec.dequantise(codec.quantise(pixels, quality=QUALITY), quality=QUALITY)

    given = torch.stack([latents(picture) for picture in pictures])
    wanted = torch.stack([latents(np.ascontiguousarray(picture[:, ::-1])) for picture in pictures])
    made = Flip(flip_fit, probability=1)(given.clone(), np.random.default_rng(0), 2)
    assert ((made - wanted).square().sum() / wanted.square().sum()).sqrt() < 0.35
    half = Flip(flip_fit)(given.clone(), np.random.default_rng(0), 2)
    mirrored = (half - made).abs().amax((1, 2, 3)) < 1e-4
    kept = (half == given).all(3).all(2).all(1)
    assert (mirrored ^ kept).all() and 20 < mirrored.sum() < 70


def test_a_flip_that_is_too_far_off_is_refused(flip_fit: FlipFit, codec: Codec) -> None:
    bad = FlipFit(flip_fit.kernel, 0.5, 0.6, 0.7, 0.2)
    with pytest.raises(UsageError, match=r"miss 0\.50"):
        Flip(bad)
    with pytest.raises(UsageError, match="sounds have no left"):
        Flip(flip_fit)(torch.zeros(2, 12, 5), np.random.default_rng(0), 1)
    with pytest.raises(UsageError, match="give more"):
        measure_flip(codec, [np.zeros((64, 64, 3), np.uint8)], quality=3)


def test_functions_of_items_come_last(packed: Path) -> None:
    dataset = PackedDataset(
        packed, transform=[CenterCrop(4), lambda item: {"x": item["latents"].mean(), "y": item["label"] + 1}]
    )
    batch = Collate()(dataset.__getitems__([4, 8]))
    plain = PackedDataset(packed, transform=CenterCrop(4))
    assert batch["y"].tolist() == [5, 4]
    torch.testing.assert_close(batch["x"], torch.stack([plain[i]["latents"].mean() for i in (4, 8)]))


# ------------------------------------------------------------------------------------------------ collation


def test_mixed_sizes_are_refused_padded_or_sorted(mixed: Path) -> None:
    dataset = PackedDataset(mixed, ("latents", "tokens"))
    rows = dataset.__getitems__(range(8))
    with pytest.raises(UsageError, match=r"12x8x8 and 12x5x8: crop"):
        Collate()(rows)
    padded = Collate("pad")(rows)
    assert padded["latents"].shape == padded["tokens"].shape == (8, 12, 8, 8)
    assert padded["latents_mask"].sum((1, 2)).tolist() == [64, 40, 56, 64, 40, 56, 64, 40]
    for number in range(8):
        whole = dataset[number]["latents"]
        kept = padded["latents"][number][:, padded["latents_mask"][number]]
        assert torch.equal(kept, whole.flatten(1))
    assert not padded["latents"].masked_select(~padded["latents_mask"][:, None]).any()
    alike = Collate("pad")(dataset.__getitems__([0, 3]))
    assert alike["latents_mask"].shape == (2, 8, 8) and alike["tokens_mask"].all()
    buckets = Collate("bucket")(rows)
    assert [len(bucket["key"]) for bucket in buckets] == [3, 3, 2]
    for bucket in buckets:
        for place, key in enumerate(bucket["key"]):
            assert torch.equal(bucket["latents"][place], dataset[int(key[1:])]["latents"])
    with pytest.raises(UsageError, match="mixed='fill'"):
        Collate("fill")


# ------------------------------------------------------------------------------------------------ processes


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same_batches(packed: Path, context: str) -> None:
    """The dataset was used before: what it has open must not be shared with workers. Crops are the same too."""
    dataset = PackedDataset(packed, transform=RandomCrop(4))
    alone = list(PackedLoader(dataset, batch_size=16, seed=1))
    loader = PackedLoader(
        dataset,
        batch_size=16,
        seed=1,
        num_workers=2,
        multiprocessing_context=context,
        persistent_workers=True,
    )
    for epoch in range(2):
        loader.set_epoch(0)
        batches = list(loader)
        assert keys_of(batches) == keys_of(alone) and loader.epoch == 1, epoch
        assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(batches, alone, strict=True))
    assert sorted(keys_of(alone)) == [f"k{i:03d}" for i in range(ROWS)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_dataloader_works_with_the_sampler(packed: Path, workers: int) -> None:
    dataset = PackedDataset(packed)
    sampler = PackedSampler(len(dataset), batch_size=16, seed=1)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=Collate())
    first, second = keys_of(loader), keys_of(loader)
    assert sorted(first) == sorted(second) and first != second
    assert first == keys_of(PackedLoader(dataset, batch_size=16, seed=1))
    assert second == keys_of(PackedLoader(dataset, batch_size=16, seed=1, epoch=1))


def test_a_dataset_travels_light_and_without_the_network(packed: Path) -> None:
    dataset = PackedDataset(packed, transform=RandomCrop(4))
    before = dataset[5]["key"]
    data = pickle.dumps(dataset)
    assert len(data) < 60_000
    copy = pickle.loads(data)
    assert copy[5]["key"] == before
    assert torch.equal(copy.__getitems__(range(9))[3]["latents"].new_zeros(1), torch.zeros(1))


def test_random_numbers_differ_between_workers_and_processes(packed: Path) -> None:
    """Without a PackedSampler too, no two workers draw the same crops."""
    dataset = PackedDataset(packed, transform=RandomCrop(1))
    dataset.__getitems__([0, 1])
    loader = DataLoader(dataset, sampler=[0] * 64, batch_size=16, num_workers=2, collate_fn=Collate())
    batches = [batch["latents"] for batch in loader]
    assert not any(torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])


@pytest.mark.parametrize("window", [0, 256])
def test_simulated_ranks_and_workers_share_every_row_once(packed: Path, window: int) -> None:
    dataset = PackedDataset(packed, ())
    for workers in (0, 2):
        keys = [
            keys_of(
                PackedLoader(
                    dataset, batch_size=7, rank=rank, world_size=4, window=window, num_workers=workers
                )
            )
            for rank in range(4)
        ]
        assert sorted(key for rank in keys for key in rank) == [f"k{i:03d}" for i in range(ROWS)]
        assert {len(rank) for rank in keys} == {22, 23}


def test_whoever_takes_the_last_batch_gets_the_next_epoch_then(packed: Path) -> None:
    for loader in (PackedLoader(PackedDataset(packed), batch_size=30), PackedIterable(packed, batch_size=30)):
        epochs = [[next(batches) for _ in range(3)] for batches in (iter(loader), iter(loader))]
        assert sorted(keys_of(epochs[0])) == sorted(keys_of(epochs[1]))
        assert keys_of(epochs[0]) != keys_of(epochs[1])


def gathered(rank: int, folder: str, packed: str) -> None:
    """What one of two processes reads, as a file of keys."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    loader = PackedLoader(PackedDataset(packed), batch_size=8, seed=5, num_workers=rank)
    keys: list[Any] = [None, None]
    torch.distributed.all_gather_object(keys, keys_of(loader))
    lengths = [None, None]
    torch.distributed.all_gather_object(
        lengths, len(PackedLoader(PackedDataset(packed), batch_size=8, even=True))
    )
    streamed: list[Any] = [None, None]
    torch.distributed.all_gather_object(streamed, keys_of(PackedIterable(packed, batch_size=8)))
    (Path(folder) / f"{rank}.json").write_text(json.dumps([keys, lengths, streamed]))
    torch.distributed.destroy_process_group()


def test_two_real_processes_share_every_row_once(packed: Path, tmp_path: Path) -> None:
    multiprocessing.start_processes(gathered, (str(tmp_path), str(packed)), nprocs=2, start_method="fork")
    keys, lengths, streamed = json.loads((tmp_path / "0.json").read_text())
    assert [keys, lengths, streamed] == json.loads((tmp_path / "1.json").read_text())
    assert (
        sorted(keys[0] + keys[1]) == sorted(streamed[0] + streamed[1]) == [f"k{i:03d}" for i in range(ROWS)]
    )
    assert lengths == [6, 6]


# ------------------------------------------------------------------------------------------------ resumption


@pytest.mark.parametrize(
    ("stop", "before", "after"),
    [(1, 0, 0), (9, 0, 0), (4, 2, 0), (9, 2, 0), (1, 0, 2), (10, 0, 2), (4, 2, 1), (9, 2, 1), (10, 2, 1)],
)
def test_a_loader_goes_on_behind_what_was_delivered(packed: Path, stop: int, before: int, after: int) -> None:
    """Nine batches an epoch; workers are ahead of what was delivered."""

    def loader(workers: int, epoch: int = 0) -> PackedLoader:
        dataset = PackedDataset(packed, transform=RandomCrop(3))
        return PackedLoader(dataset, batch_size=10, seed=3, num_workers=workers, epoch=epoch)

    def until(loader: PackedLoader, epochs: int, most: int = 1000) -> tuple[list[Any], dict[str, Any]]:
        batches = []
        while loader.epoch < epochs:
            for batch in loader:
                batches.append(batch)
                if len(batches) == most:
                    return batches, json.loads(json.dumps(loader.state_dict()))
        return batches, loader.state_dict()

    whole, _ = until(loader(0), 2)
    first, state = until(loader(before), 2, stop)
    resumed = loader(after)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    rest, _ = until(resumed, 2)
    assert keys_of(first) + keys_of(rest) == keys_of(whole)
    for mine, expected in zip(first + rest, whole, strict=True):
        assert torch.equal(mine["latents"], expected["latents"])


def deliver(folder: Path, workers: int, state: Any, connection: Any) -> None:
    """Sends the keys of each batch and the state behind it."""
    os.setsid()
    loader = PackedLoader(PackedDataset(folder), batch_size=4, seed=9, num_workers=workers)
    if state:
        loader.load_state_dict(state)
    while loader.epoch < 2:
        for batch in loader:
            connection.send(json.dumps([batch["key"], loader.state_dict()]))
    connection.close()


def test_a_process_that_was_killed_is_resumed_by_another(packed: Path) -> None:
    context = multiprocessing.get_context("fork")

    def begin(workers: int, state: Any) -> tuple[Any, Any]:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=deliver, args=(packed, workers, state, theirs))
        process.start()
        theirs.close()
        return process, ours

    keys: list[str] = []
    state = None
    for stop in (17, 11):
        victim, connection = begin(2, state)
        for _ in range(stop):
            batch, state = json.loads(connection.recv())
            keys += batch
        os.killpg(victim.pid, signal.SIGKILL)
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
    last, connection = begin(0, state)
    with suppress(EOFError):
        while True:
            keys += json.loads(connection.recv())[0]
    last.join()
    dataset = PackedDataset(packed)
    whole = [keys_of(PackedLoader(dataset, batch_size=4, seed=9, epoch=epoch)) for epoch in range(2)]
    assert keys == whole[0] + whole[1]


def test_lightning_goes_on_behind_the_last_batch(packed: Path, tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from compand.data.module import PackedDataModule

    class Model(pl.LightningModule):
        def __init__(self, stop: int = 0) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(12, 5)
            self.seen: list[str] = []
            self.validated: list[str] = []
            self.stop = stop

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            self.seen += batch["key"]
            return torch.nn.functional.cross_entropy(
                self.layer(batch["latents"].mean((2, 3))), batch["label"]
            )

        def validation_step(self, batch: Any, index: int) -> None:
            self.validated += batch["key"]

        def on_train_batch_end(self, *arguments: Any) -> None:
            if self.global_step == self.stop:
                self.trainer.save_checkpoint(tmp_path / f"{self.stop}.ckpt")
                self.trainer.should_stop = True
                raise StopIteration("killed")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    def fit(model: Model, **options: Any) -> Model:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, PackedDataModule(packed, packed, batch_size=30), **options)
        return model

    whole = fit(Model())
    assert len(whole.seen) == 2 * ROWS and whole.seen[:ROWS] != whole.seen[ROWS:]
    assert sorted(set(whole.validated)) == sorted(whole.seen[:ROWS])
    for stop in (1, 3, 5):
        killed = Model(stop)
        with suppress(StopIteration):
            fit(killed)
        assert len(killed.seen) == 30 * stop
        resumed = fit(Model(), ckpt_path=tmp_path / f"{stop}.ckpt", weights_only=False)
        assert killed.seen + resumed.seen == whole.seen


# ------------------------------------------------------------------------------------------------ streams


def test_a_stream_gives_every_row_once_in_an_order_that_workers_do_not_change(packed: Path) -> None:
    def stream(**options: Any) -> PackedIterable:
        return PackedIterable(packed, shuffle_buffer=64, seed=2, **options)

    alone = [item["key"] for item in stream()]
    assert sorted(alone) == [f"k{i:03d}" for i in range(ROWS)] != alone
    for workers in (0, 2):
        items = DataLoader(stream(), batch_size=64, num_workers=workers, collate_fn=Collate())
        batches = DataLoader(stream(batch_size=20), batch_size=None, num_workers=workers)
        assert keys_of(items) == alone
        assert keys_of(batches) == alone
        assert keys_of(PackedLoader(stream(), batch_size=20, num_workers=workers)) == alone
    assert [item["key"] for item in PackedIterable(packed, shuffle_buffer=0)] == sorted(alone)
    ranks = [[item["key"] for item in stream(rank=rank, world_size=3)] for rank in range(3)]
    assert [key for rank in ranks for key in rank] == alone


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize("stop", [1, 11, 12, 64, 90])
def test_a_stream_resumes_exactly(packed: Path, batch_size: int | None, stop: int) -> None:
    def keys(stream: PackedIterable, most: int = 10_000) -> list[str]:
        found: list[str] = []
        while stream.sampler.epoch < 2 and len(found) < most:
            for item in stream:
                found += [item["key"]] if batch_size is None else item["key"]
                if len(found) >= most:
                    break
        return found

    def stream() -> PackedIterable:
        return PackedIterable(packed, shuffle_buffer=64, batch_size=batch_size, columns=("key",), fields=())

    whole = keys(stream())
    first = stream()
    begun = keys(first, stop)
    second = stream()
    second.load_state_dict(first.state_dict())
    assert begun + keys(second) == whole and len(whole) == 2 * ROWS
    first = stream()
    assert keys(first, 1) == keys(first, 1)


# ------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_row_is_named(packed: Path, tmp_path: Path, workers: int) -> None:
    shard, key = damage(packed, tmp_path / "set", 43)
    loader = PackedLoader(PackedDataset(tmp_path / "set"), batch_size=8, num_workers=workers)
    with pytest.raises(PackedSetError, match=rf"shard {shard}, key {key}") as caught:
        list(loader)
    assert (caught.value.shard, caught.value.key) == (shard, key) and "\n" not in str(caught.value)


def test_an_error_of_collation_comes_out_of_workers_as_it_is(mixed: Path) -> None:
    with pytest.raises(UsageError, match=r"^latents of a batch have sizes"):
        list(PackedLoader(PackedDataset(mixed), batch_size=8, num_workers=1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:row left out")
def test_a_damaged_row_is_left_out_and_reported(packed: Path, tmp_path: Path, workers: int) -> None:
    shard, key = damage(packed, tmp_path / "set", 43)
    intact = {item["key"]: item["latents"] for item in PackedIterable(packed)}
    dataset = PackedDataset(tmp_path / "set", on_error="skip")
    loader = PackedLoader(dataset, batch_size=8, num_workers=workers)
    batches = list(loader)
    assert sorted([*keys_of(batches), key]) == sorted(intact)
    assert [(error.shard, error.key) for error in loader.skipped] == [(shard, key)]
    for batch in batches:
        for place, name in enumerate(batch["key"]):
            assert batch["label"][place] == int(name[1:]) % 5
            assert torch.equal(batch["latents"][place], intact[name])
    with pytest.raises(PackedSetError, match=key):
        dataset[43]


def test_a_row_left_out_is_warned_of_and_counted(packed: Path, tmp_path: Path) -> None:
    shard, key = damage(packed, tmp_path / "set", 43)
    dataset = PackedDataset(tmp_path / "set", on_error="skip")
    with pytest.warns(UserWarning, match=rf"left out.*shard {shard}, key {key}"):
        rows = dataset.__getitems__([42, 43, 44])
    assert [item["key"] for item in rows] == ["k042", "k044"] and dataset.skipped == 1


@pytest.mark.filterwarnings("ignore:row left out")
def test_a_batch_of_damaged_rows_is_none(packed: Path, tmp_path: Path) -> None:
    damage(packed, tmp_path / "set", 43)
    dataset = PackedDataset(tmp_path / "set", on_error="skip")
    loader = PackedLoader(dataset, batch_size=1, shuffle=False)
    assert len(keys_of(loader)) == ROWS - 1 and len(loader.skipped) == 1
    with pytest.raises(PackedSetError, match="no row of the batch"):
        list(DataLoader(dataset, batch_size=1, collate_fn=Collate()))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_shard_cut_short_or_a_missing_one_is_named(packed: Path, tmp_path: Path, on_error: str) -> None:
    damage(packed, tmp_path / "set", 0)
    shard = tmp_path / "set" / "part-00001-0.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(PackedSetError, match=r"part-00001-0\.parquet.*cut short"):
        PackedDataset(tmp_path / "set", on_error=on_error)
    shard.unlink()
    with pytest.raises(PackedSetError, match=r"part-00001-0\.parquet"):
        PackedDataset(tmp_path / "set", on_error=on_error)
    (tmp_path / "set" / "packed.json").unlink()
    with pytest.raises(PackedSetError, match="no finished packed set"):
        PackedDataset(tmp_path / "set", on_error=on_error)


def test_shards_of_another_set_are_never_mixed_in(
    packed: Path, tmp_path: Path, codec: Codec, pictures: list[np.ndarray]
) -> None:
    other = write_set(tmp_path / "archive", codec, pictures[:40], "archive")
    shards = [packed / "part-00000-0.parquet", other / "part-00000-0.parquet"]
    with pytest.raises(PackedSetError, match=r"another set.*part-00000-0\.parquet"):
        list(PackedLoader(PackedDataset(shards), batch_size=8))


def test_another_codec_is_refused(packed: Path, checkpoint_of: Callable[[str], Path]) -> None:
    other = compand.load("wavelet-rgb-4x", device="cpu")
    with pytest.raises(PackedSetError, match="packed with wavelet-rgb-16x"):
        PackedDataset(packed, codec=other)


class Widen(LatentTransform):
    """A user's own transform."""

    def __call__(self, latents: torch.Tensor, generator: np.random.Generator, axes: int) -> torch.Tensor:
        return torch.cat([latents, -latents], dim=-axes - 1)


def test_own_transforms_of_latents_work_on_batches_and_mixed_sizes(mixed: Path) -> None:
    rows = PackedDataset(mixed, transform=Widen()).__getitems__(range(3))
    plain = PackedDataset(mixed)
    for number in range(3):
        latents = plain[number]["latents"]
        assert torch.equal(rows[number]["latents"], torch.cat([latents, -latents]))
