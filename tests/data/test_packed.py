"""Shards: rows that are found without reading others, and damage that is told by shard and key."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import compand
from compand.data.info import SetInfo
from compand.data.packed import INDEX, PackedReader, Shard, ShardWriter, check_set
from compand.data.payload import RowCodec
from compand.errors import PackedSetError, UsageError

INFO = SetInfo(
    "any-v1", "0011aabb", "ccdd0022", "image", 96, "train", "lz4", {"channels": 4, "stride": 8, "axes": 2}
)
COLUMNS = pa.schema(
    [("label", pa.int64()), ("weight", pa.float64()), ("name", pa.string()), ("tags", pa.list_(pa.int8()))]
)


def integers(number: int) -> np.ndarray:
    generator = np.random.default_rng(number)
    return np.round(generator.laplace(size=(4, 3 + number % 3, 5)) * 3).astype(np.int32)


def record(number: int) -> dict[str, Any]:
    item = integers(number)
    return {
        "key": f"folder/{number:05d}.png",
        "payload": RowCodec(INFO).encode(item),
        "height": item.shape[1] * 8 - number % 8,
        "width": 40,
        "channels": 3,
        "source_bytes": 1000 + number,
        "label": number % 7,
        "weight": number / 4 if number % 5 else None,
        "name": f"name {number % 3}",
        "tags": [number % 100, 1],
    }


def write_shard(path: Path, rows: Sequence[dict[str, Any]], info: SetInfo = INFO, **options: Any) -> None:
    with open(path, "wb") as stream, ShardWriter(stream, info, COLUMNS, **options) as writer:
        writer.write(rows)


def write_index(folder: Path, counts: Sequence[int]) -> None:
    names = sorted(folder.glob("*.parquet"))
    shards = [
        {"name": path.name, "rows": rows, "bytes": path.stat().st_size}
        for path, rows in zip(names, counts, strict=True)
    ]
    (folder / INDEX).write_text(json.dumps({"format": 1, "shards": shards}))


def write_set(
    folder: Path, counts: Sequence[int] = (50, 30, 7), group_rows: int = 16
) -> list[dict[str, Any]]:
    folder.mkdir()
    rows = [record(number) for number in range(sum(counts))]
    start = 0
    for shard, count in enumerate(counts):
        path = folder / f"part-{shard:05d}-0.parquet"
        write_shard(path, rows[start : start + count], group_rows=group_rows)
        start += count
    write_index(folder, counts)
    return rows


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path / "set"
    return folder, write_set(folder)


def same(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(row) == {*expected, "crc"}
    for name, value in expected.items():
        assert (bytes(row[name]) if name == "payload" else row[name]) == value, name
    assert row["crc"] == zlib.crc32(expected["payload"])


# --------------------------------------------------------------------------------------------- reading


def test_rows_in_any_order(packed):
    folder, rows = packed
    reader = PackedReader(folder)
    assert len(reader) == reader.rows == 87
    assert reader.info == INFO
    assert reader.columns[:3] == ["key", "payload", "crc"]
    for index in np.random.default_rng(0).permutation(87).tolist():
        same(reader.row(index), rows[index])
    assert [row["label"] for row in reader.take([86, 0, 50], ["label"])] == [86 % 7, 0, 50 % 7]
    assert isinstance(reader.payload(3), memoryview)
    assert reader.value(60, "name") == "name 0"
    for index in (-1, 87):
        with pytest.raises(IndexError):
            reader.row(index)


def test_whole_columns(packed):
    folder, rows = packed
    reader = PackedReader(folder)
    for name in ("label", "height", "source_bytes", "crc"):
        column = reader.column(name)
        assert isinstance(column, np.ndarray)
        expected = [zlib.crc32(row["payload"]) if name == "crc" else row[name] for row in rows]
        assert column.tolist() == expected
    for name in ("key", "weight", "name", "tags"):
        assert reader.column(name) == [row[name] for row in rows]
    with pytest.raises(UsageError, match="no column colour: it has key"):
        reader.column("colour")
    with pytest.raises(UsageError, match="no column colour"):
        reader.row(0, ["colour"])


def test_groups_and_shards_in_order(packed):
    folder, _ = packed
    reader = PackedReader(folder)
    groups = reader.groups()
    assert groups[:4] == [(0, 16), (16, 32), (32, 48), (48, 50)]
    assert [start for start, _ in groups[1:]] == [stop for _, stop in groups[:-1]]
    assert groups[-1][1] == 87
    assert reader.shard_rows()[1] == ("part-00001-0.parquet", range(50, 80))


def test_shards_are_parquet_that_others_read(packed):
    folder, rows = packed
    table = pq.read_table(folder / "part-00001-0.parquet")
    assert table.column("payload").to_pylist() == [row["payload"] for row in rows[50:80]]
    assert json.loads(table.schema.metadata[b"compand"])["quality"] == 96
    reader = PackedReader(sorted(folder.glob("*.parquet"))[1:])
    same(reader.row(0), rows[50])
    assert len(PackedReader(folder / "part-00002-0.parquet")) == 7


def test_large_payloads_and_many_pages(tmp_path):
    """What another writer's pages of the same kind look like: several of a row group."""
    rows = [record(number) | {"payload": bytes([number]) * (number * 7000)} for number in range(40)]
    write_shard(tmp_path / "one.parquet", rows)
    table = pq.read_table(tmp_path / "one.parquet")
    pq.write_table(
        table,
        tmp_path / "two.parquet",
        compression={name: "none" if name == "payload" else "snappy" for name in table.column_names},
        use_dictionary=["name", "label"],
        data_page_size=10_000,
    )
    assert pq.ParquetFile(tmp_path / "two.parquet").num_row_groups == 1
    for name in ("one", "two"):
        reader = PackedReader(tmp_path / f"{name}.parquet")
        for index in (39, 0, 1, 17):
            same(reader.row(index), rows[index])


def test_rewritten_shards_are_told(packed):
    folder, _ = packed
    path = folder / "part-00002-0.parquet"
    pq.write_table(pq.read_table(path), path, compression="gzip")
    reader = PackedReader(path)
    with pytest.raises(PackedSetError, match=r"not stored plain.*part-00002-0"):
        reader.payload(0)


def _sums(reader: PackedReader, start: int, results: Any) -> None:
    results.put([zlib.crc32(reader.payload(index)) for index in range(start, len(reader), 2)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_travel_to_other_processes(packed, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {method}")
    folder, rows = packed
    reader = PackedReader(folder)
    reader.payload(5)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    worker = context.Process(target=_sums, args=(reader, 1, results))
    worker.start()
    assert results.get(timeout=60) == [zlib.crc32(row["payload"]) for row in rows[1::2]]
    worker.join()
    same(pickle.loads(pickle.dumps(reader)).row(80), rows[80])


def test_views_outlive_what_was_released(packed, monkeypatch):
    monkeypatch.setattr("compand.data.packed.OPEN_SHARDS", 1)
    monkeypatch.setattr("compand.data.packed._READS_A_RELEASE", 1)
    folder, rows = packed
    reader = PackedReader(folder)
    views = {index: reader.payload(index) for index in (0, 60, 85, 1, 61)}
    assert len(reader._open) == 1
    del reader
    for index, view in views.items():
        assert bytes(view) == rows[index]["payload"]


def test_footers_are_read_when_a_row_is_asked_for(tmp_path, monkeypatch):
    write_set(tmp_path / "set", [3] * 30)
    opened: list[str] = []
    original = Shard.__init__

    def counting(self: Shard, path: Path) -> None:
        opened.append(path.name)
        original(self, path)

    monkeypatch.setattr(Shard, "__init__", counting)
    reader = PackedReader(tmp_path / "set")
    assert len(set(opened)) == 1
    reader.payload(88)
    assert set(opened) == {"part-00000-0.parquet", "part-00029-0.parquet"}


# ---------------------------------------------------------------------------------------------- faults


def test_a_damaged_payload_is_told_by_shard_and_key(packed):
    folder, rows = packed
    path = folder / "part-00001-0.parquet"
    content = bytearray(path.read_bytes())
    place = content.find(rows[64]["payload"])
    content[place + 3] ^= 8
    path.write_bytes(content)
    reader = PackedReader(folder)
    with pytest.raises(
        PackedSetError, match=r"checksum.*shard part-00001-0.parquet, key folder/00064.png"
    ) as caught:
        reader.payload(64)
    assert (caught.value.shard, caught.value.key) == ("part-00001-0.parquet", "folder/00064.png")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.shard, again.key) == (str(caught.value), caught.value.shard, caught.value.key)
    same(reader.row(63), rows[63])
    assert bytes(PackedReader(folder, verify=False).payload(64)) != rows[64]["payload"]
    assert [(fault.shard, fault.key) for fault in check_set(folder)] == [
        ("part-00001-0.parquet", "folder/00064.png")
    ]


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -400])
def test_a_shard_cut_short(packed, keep):
    folder, _ = packed
    path = folder / "part-00001-0.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PackedSetError, match=r"part-00001-0.parquet has \d+ bytes, the index says"):
        PackedReader(folder)
    with pytest.raises(PackedSetError, match=r"cut short or damaged.*pack the set again"):
        PackedReader(path)
    assert len(check_set(folder)) == 1


def test_a_missing_shard_and_an_unfinished_set(packed):
    folder, _ = packed
    (folder / "part-00002-0.parquet").unlink()
    with pytest.raises(PackedSetError, match=r"part-00002-0\.parquet cannot be read"):
        PackedReader(folder)
    (folder / INDEX).unlink()
    with pytest.raises(PackedSetError, match="no finished packed set"):
        PackedReader(folder)
    for content in (
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 1, "shards": [{"name": "../x", "rows": 1, "bytes": 2}]}',
    ):
        (folder / INDEX).write_text(content)
        with pytest.raises(PackedSetError, match="damaged"):
            PackedReader(folder)
    (folder / INDEX).write_text('{"format": 2, "shards": []}')
    with pytest.raises(PackedSetError, match="newer compand"):
        PackedReader(folder)


@pytest.mark.parametrize(
    ("fact", "change"),
    [
        ("symbols 0011aabc", {"symbols": "0011aabc"}),
        ("synthesis 00", {"synthesis": "00"}),
        (r"quality 3\.03125, not 3", {"quality": 97}),
        ("other classes", {"classes": ["cat"]}),
        ("other latent", {"latent": {"channels": 4, "stride": 16, "axes": 2}}),
    ],
)
def test_shards_of_two_sets(packed, fact, change):
    folder, rows = packed
    other = SetInfo.from_json(INFO.to_json() | change)
    write_shard(folder / "part-00001-0.parquet", rows[50:80], other)
    write_index(folder, (50, 30, 7))
    reader = PackedReader(folder)
    same(reader.row(49), rows[49])
    with pytest.raises(PackedSetError, match=rf"another set \({fact}") as caught:
        reader.row(50)
    assert caught.value.shard == "part-00001-0.parquet"
    with pytest.raises(PackedSetError, match="another set"):
        PackedReader(sorted(folder.glob("*.parquet")))
    assert [fault.shard for fault in check_set(folder)] == ["part-00001-0.parquet"]


def test_other_columns_and_other_counts(packed):
    folder, rows = packed
    path = folder / "part-00001-0.parquet"
    write_index(folder, (50, 31, 7))
    with pytest.raises(PackedSetError, match="has 30 rows, the index says 31"):
        PackedReader(folder).row(60)
    with open(path, "wb") as stream, ShardWriter(stream, INFO) as writer:
        writer.write(rows[50:80])
    write_index(folder, (50, 30, 7))
    with pytest.raises(PackedSetError, match="another set"):
        PackedReader(folder).row(60)


def test_keys_that_occur_twice(packed):
    folder, rows = packed
    write_shard(folder / "part-00002-0.parquet", [*rows[80:86], rows[5]])
    write_index(folder, (50, 30, 7))
    (fault,) = check_set(folder)
    assert (fault.shard, fault.key) == ("part-00002-0.parquet", "folder/00005.png")
    assert "part-00000-0.parquet" in str(fault)


def test_geometry_that_does_not_fit_its_payload(packed):
    folder, rows = packed
    wrong = [
        rows[80] | {"height": 8000},
        rows[81] | {"height": 0},
        rows[82] | {"height": 1 << 30, "width": 1 << 30},
    ]
    write_shard(folder / "part-00002-0.parquet", [*wrong, *rows[83:87]])
    write_index(folder, (50, 30, 7))
    faults = check_set(folder)
    assert [fault.key for fault in faults] == [f"folder/{number:05d}.png" for number in (80, 81, 82)]
    for fault, fact in zip(faults, ("its row says", "no geometry", "beyond the limit"), strict=True):
        assert fact in str(fault)
        assert fault.shard == "part-00002-0.parquet"


def test_an_intact_set_has_no_faults(packed):
    assert check_set(packed[0]) == []


def test_parquet_that_is_no_shard(tmp_path):
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(PackedSetError, match="no shard of a packed set"):
        PackedReader(tmp_path / "a.parquet")
    metadata = {b"compand": json.dumps(INFO.to_json()).encode()}
    pq.write_table(pa.table({"key": ["a"]}).replace_schema_metadata(metadata), tmp_path / "a.parquet")
    with pytest.raises(PackedSetError, match="column payload is missing"):
        PackedReader(tmp_path / "a.parquet")


def test_no_byte_of_a_shard_brings_down_its_reader(tmp_path):
    """Whatever is wrong with the file, an error of compand's own or intact rows."""
    rows = [record(number) for number in range(12)]
    path = tmp_path / "a.parquet"
    write_shard(path, rows, group_rows=6)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    told = 0
    for trial in range(400):
        damaged = bytearray(content)
        # The pages' headers and the footer are where it hurts.
        place = int(generator.integers(len(content) // 2 if trial % 2 else 0, len(content)))
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            reader = PackedReader(path)
            for index in range(len(reader)):
                assert bytes(reader.payload(index)) == rows[index]["payload"]
        except PackedSetError as error:
            told += 1
            assert "\n" not in str(error)
    assert told > 50


def test_no_bit_of_a_page_changes_a_value(tmp_path):
    """Labels and keys have no checksum in the row; their pages have one."""
    rows = [record(number) for number in range(12)]
    path = tmp_path / "a.parquet"
    write_shard(path, rows, group_rows=6)
    content = path.read_bytes()
    pages = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    generator = np.random.default_rng(0)
    told = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[int(generator.integers(4, pages))] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        reader = PackedReader(path)
        try:
            for index, row in enumerate(rows):
                same(reader.row(index), row)
        except PackedSetError as error:
            told += 1
            assert "a.parquet" in str(error)
    assert told > 350


def test_the_first_shard_is_held_against_the_index(packed):
    folder, _ = packed
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"compand": INFO.to_json()}))
    assert PackedReader(folder).info == INFO
    (folder / INDEX).write_text(json.dumps(index | {"compand": INFO.to_json() | {"quality": 97}}))
    with pytest.raises(PackedSetError, match=r"another set \(quality 3, not 3\.03125\).*part-00000-0"):
        PackedReader(folder)


# ------------------------------------------------------------------------------------------ description


def test_descriptions_come_back():
    described = SetInfo.from_json(json.loads(json.dumps(INFO.with_classes(["a", "b"]).to_json())))
    assert described == INFO.with_classes(("a", "b"))
    tables = SetInfo.from_json(INFO.to_json() | {"profile": "archive", "compression": None}).with_tables(
        b"\0\xff"
    )
    assert SetInfo.from_json(json.loads(json.dumps(tables.to_json()))) == tables
    assert described.difference(described) is None
    assert described.level == 3.0


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"medium": "smell"},
        {"profile": "fast"},
        {"compression": "none"},
        {"profile": "cpd"},
        {"symbols": "xyz"},
        {"latent": {"channels": 0, "stride": 8, "axes": 2}},
        {"latent": {"channels": 4, "stride": 8, "axes": 1}},
        {"latent": {"channels": 4, "stride": 8, "axes": 2, "edge": 8}},
        {"latent": {}},
        {"latent": None},
        {"tables": "%%%"},
        {"classes": 7},
        {"quality": "high"},
    ],
)
def test_damaged_descriptions(change):
    with pytest.raises(PackedSetError):
        SetInfo.from_json(INFO.to_json() | change)


def test_shapes_follow_the_geometry():
    assert INFO.latent_shape({"height": 17, "width": 16, "channels": 1}) == (4, 3, 2)
    layout = {"channels": 6, "stride": 256, "axes": 1, "group": 2, "rate": 44100}
    sound = SetInfo("any-v1", "00", "00", "audio", 96, "train", "zstd", layout)
    assert sound.latent_shape({"samples": 16000, "rate": 16000, "channels": 1}) == (6, 173)
    assert sound.latent_shape({"samples": 257, "rate": 44100, "channels": 5}) == (3, 6, 2)


def test_import_without_torch():
    import subprocess
    import sys

    code = "import sys, compand.data.packed as p; p.PackedReader; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_release_that_does_not_tell_its_layout():
    """The first checkpoints do not say what their latents look like, and never change."""
    info = compand.checkpoint.find("hyperprior-v1")
    assert info.latent is None
    described = SetInfo.of(info, quality=4)
    assert described.latent == {"channels": 256, "stride": 16, "axes": 2}
