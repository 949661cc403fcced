"""Packing: sets that come out the same however often packing is killed, and files that come back from them."""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import compand
from compand.codec import Codec
from compand.data import encoder, local_engine, pack, storage
from compand.data.packed import PackedReader, check_set
from compand.data.payload import RowCodec
from compand.data.unpack import file_name, unpack
from compand.errors import CheckpointError, MediaError, PackedSetError, UsageError
from compand.pictures import read_picture
from compand.sounds import Sound

CODEC = "wavelet-rgb-16x"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return compand.load(CODEC, device="cpu")


@pytest.fixture(scope="module")
def pictures(china: Path, flower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty crops of two photographs in class folders, of three sizes, one of them gray and one transparent."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, path in (("china", china), ("flower", flower)):
        (folder / name).mkdir()
        with Image.open(path) as image:
            for number in range(15):
                width, height = [(64, 48), (48, 48), (50, 33)][number % 3]
                left, top = int(generator.integers(0, 500)), int(generator.integers(0, 300))
                crop = image.crop((left, top, left + width, top + height))
                if name == "china" and number == 0:
                    crop = crop.convert("L")
                if name == "china" and number == 1:
                    crop.putalpha(Image.new("L", crop.size, 99))
                crop.save(folder / name / f"{number:02d}.png")
    return folder


def begin(source: Path, target: Path | str, **settings) -> pack.Packing:
    settings = {"codec": CODEC, "quality": 3, "device": "cpu", "rows_per_shard": 8} | settings
    return pack.start(str(source), str(target), **settings)


def packed(source: Path, target: Path | str, *, jobs: int = 1, **settings) -> pack.Summary:
    packing = begin(source, target, **settings)
    local_engine.run_local(packing, jobs=jobs)
    return packing.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# ------------------------------------------------------------------------------------------------ what is in a set


def test_rows_hold_what_the_codec_gives(codec, pictures, tmp_path):
    summary = packed(pictures, tmp_path / "set")
    assert (summary.rows, len(summary.shards), summary.failures) == (30, 4, 0)
    assert set(content(tmp_path / "set")) == {"packed.json", *(f"part-0000{i}-0.parquet" for i in range(4))}
    reader = PackedReader(tmp_path / "set")
    rows = RowCodec(reader.info, codec)
    assert reader.info.classes == ("china", "flower")
    keys = []
    for index in range(len(reader)):
        row = reader.row(index)
        path = pictures / f"{row['key']}.png"
        picture = read_picture(path)
        assert (row["height"], row["width"], row["channels"]) == picture.pixels.shape
        assert row["source_bytes"] == path.stat().st_size
        assert reader.info.classes[row["label"]] == path.parent.name
        integers = rows.decode(row["payload"], reader.info.latent_shape(row))
        # The batch is another than one picture, so that a value between two integers may fall to either side.
        difference = integers.astype(int) - codec.quantise(picture, quality=3)
        assert np.abs(difference).max() <= 1 and np.mean(difference != 0) < 1e-3
        keys.append(row["key"])
    assert sorted(keys) == sorted(
        f"{name}/{number:02d}" for name in ("china", "flower") for number in range(15)
    )
    assert 3 < sum(key.startswith("china") for key in keys[:15]) < 12
    assert summary.extent == sum(reader.column("height").astype(int) * reader.column("width"))
    assert not check_set(tmp_path / "set")


def test_profiles_hold_the_same_integers(codec, pictures, tmp_path):
    for profile in ("train", "archive"):
        packed(pictures, tmp_path / profile, profile=profile)
    packed(pictures, tmp_path / "lz4", compression="lz4")
    readers = [PackedReader(tmp_path / name) for name in ("train", "archive", "lz4")]
    coders = [RowCodec(reader.info, codec) for reader in readers]
    for index in range(30):
        integers = []
        for reader, coder in zip(readers, coders, strict=True):
            row = reader.row(index)
            integers.append(coder.decode(row["payload"], reader.info.latent_shape(row)))
        assert all(np.array_equal(integers[0], other) for other in integers[1:])


def test_cpd_rows_are_files_as_encode_writes_them(codec, pictures, tmp_path):
    packed(pictures, tmp_path / "set", profile="cpd")
    reader = PackedReader(tmp_path / "set")
    for index in range(len(reader)):
        row = reader.row(index)
        picture = read_picture(pictures / f"{row['key']}.png")
        assert bytes(row["payload"]) == codec.encode(picture, quality=3)


def test_processes_change_nothing(pictures, tmp_path):
    packed(pictures, tmp_path / "one")
    calls = []
    packing = begin(pictures, tmp_path / "two")
    local_engine.run_local(packing, jobs=2, progress=lambda *numbers: calls.append(numbers))
    packing.finish()
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert [rows for rows, _, _, _ in calls] == [8, 8, 8, 6]
    assert sum(size for _, size, _, _ in calls) == packing.finish().payload_bytes


def test_a_chunk_that_another_process_finished_meanwhile(pictures, tmp_path):
    """Its rows, which were coded here as well, must not become those of the next chunk."""
    packed(pictures, tmp_path / "whole")
    packing = begin(pictures, tmp_path / "set")

    def elsewhere(*_: float) -> None:
        pack.pack_chunk(packing.spec, 1, packing.records(1))

    local_engine.run_local(packing, jobs=2, progress=elsewhere)
    packing.finish()
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_shards_are_bounded(pictures, tmp_path):
    summary = packed(pictures, tmp_path / "set", rows_per_shard=16, shard_mb=0.0006)
    assert len(summary.shards) > 5
    for name, rows, _ in summary.shards:
        sizes = list(map(len, pq.read_table(tmp_path / "set" / name)["payload"].to_pylist()))
        assert len(sizes) == rows and (sum(sizes) <= 0.0006 * (1 << 20) or rows == 1)
    assert not check_set(tmp_path / "set")


def test_sounds(tmp_path):
    generator = np.random.default_rng(0)
    for name, rate, channels, length in (("a", 16000, 1, 4000), ("b", 44100, 2, 9000), ("c", 8000, 3, 1000)):
        (tmp_path / "in").mkdir(exist_ok=True)
        sound = Sound((0.1 * generator.standard_normal((channels, length))).astype(np.float32), rate)
        sound.save(tmp_path / "in" / f"{name}.wav")
    Sound(np.zeros((1, 0), np.float32), 8000).save(tmp_path / "in" / "empty.wav")
    (tmp_path / "in" / "photo.png").touch()
    summary = packed(tmp_path / "in", tmp_path / "set", codec="wavelet-stereo-5x")
    assert (summary.rows, summary.failures) == (3, 1)
    assert summary.extent == pytest.approx(0.25 + 9000 / 44100 + 0.125)
    count, damaged = unpack(str(tmp_path / "set"), str(tmp_path / "out"), device="cpu")
    assert (count, damaged) == (3, [])
    for name, shape in (("a", (1, 4000)), ("b", (2, 9000)), ("c", (3, 1000))):
        assert compand.sounds.read_sound(tmp_path / "out" / f"{name}.wav").samples.shape == shape


# ------------------------------------------------------------------------------------------------ kills and faults


class Killed(BaseException):
    """In the place of SIGKILL: nothing that packing could handle."""


def dies_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """Lets packing die before the given write or removal; the list of all that came before."""
    done: list[str] = []
    real = {name: getattr(storage, name) for name in ("write", "remove", "writing")}

    def dying(name):
        def call(place, *arguments):
            if len(done) == moment:
                raise Killed
            done.append(f"{name} {Path(place).name}")
            return real[name](place, *arguments)

        return call

    for name in real:
        monkeypatch.setattr(storage, name, dying(name))
    return done


def test_a_kill_before_any_write_costs_nothing(pictures, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for path in sorted(pictures.rglob("*.png"))[::3]:
        (tmp_path / "in" / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    (tmp_path / "in" / "bad.png").write_text("no picture")
    settings = {"rows_per_shard": 4, "shard_mb": 0.0004}
    packed(tmp_path / "in", tmp_path / "whole", **settings)
    expected = content(tmp_path / "whole")
    assert "failures.csv" in expected and len(expected) > 6
    moment, ended = 0, False
    while not ended:
        target = tmp_path / f"set{moment}"
        with monkeypatch.context() as context:
            dies_at(context, moment)
            try:
                packed(tmp_path / "in", target, **settings)
                ended = True
            except Killed:
                pass
        packed(tmp_path / "in", target, **settings)
        assert content(target) == expected, f"killed before write {moment}"
        moment += 1
    assert moment > 15


def test_a_set_that_is_overwritten_leaves_nothing_behind(pictures, tmp_path, monkeypatch):
    packed(pictures, tmp_path / "whole", quality=2, rows_per_shard=16)
    expected = content(tmp_path / "whole")
    for moment in range(0, 12, 2):
        target = tmp_path / f"set{moment}"
        packed(pictures, target, rows_per_shard=8)
        with monkeypatch.context() as context:
            dies_at(context, moment)
            try:
                packed(pictures, target, quality=2, rows_per_shard=16, force=True)
            except Killed:
                if moment:
                    with pytest.raises(UsageError, match="holds a set with"):
                        begin(pictures, target, rows_per_shard=8)
        packed(pictures, target, quality=2, rows_per_shard=16, force=True)
        assert content(target) == expected


def test_a_shard_that_was_lost_is_packed_again(pictures, tmp_path):
    packed(pictures, tmp_path / "whole")
    packing = begin(pictures, tmp_path / "set")
    for index, records in packing.todo()[:3]:
        pack.pack_chunk(packing.spec, index, records)
    (tmp_path / "set" / "part-00001-0.parquet").write_bytes(b"PAR1")
    again = begin(pictures, tmp_path / "set")
    assert [index for index, _ in again.todo()] == [1, 3]
    with pytest.raises(PackedSetError, match="chunk 1 was not packed"):
        again.finish()
    local_engine.run_local(again)
    again.finish()
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_a_chunk_can_travel_and_be_packed_twice(pictures, tmp_path):
    packing = begin(pictures, tmp_path / "set")
    spec, (index, records) = pickle.loads(pickle.dumps((packing.spec, packing.todo()[2])))
    first = pack.pack_chunk(spec, index, records)
    before = content(tmp_path / "set")
    assert pack.pack_chunk(spec, index, records) == first
    (tmp_path / "set" / ".packing" / "00002.json").unlink()
    assert pack.pack_chunk(spec, index, records) == first
    assert content(tmp_path / "set") == before


def test_other_settings_or_inputs_do_not_go_on(pictures, tmp_path):
    begin(pictures, tmp_path / "set")
    begin(pictures, tmp_path / "set")
    with pytest.raises(UsageError, match=r"holds a set with quality 3, not 2\.5.*-f"):
        begin(pictures, tmp_path / "set", quality=2.5)
    with pytest.raises(UsageError, match="rows_per_shard 8, not 9"):
        begin(pictures, tmp_path / "set", rows_per_shard=9)
    with pytest.raises(UsageError, match="order hashed, not sorted"):
        begin(pictures, tmp_path / "set", order="sorted")
    with pytest.raises(UsageError, match="a set of other inputs"):
        begin(pictures / "china", tmp_path / "set")
    shutil.copytree(pictures, tmp_path / "copy")
    with pytest.raises(UsageError, match="a set of other inputs"):
        begin(tmp_path / "copy", tmp_path / "set")  # of the same names, perhaps of other pictures
    packed(pictures, tmp_path / "set")
    with pytest.raises(UsageError, match=r"quality 3, not 2\.5"):
        begin(pictures, tmp_path / "set", quality=2.5)
    before = content(tmp_path / "set")
    again = begin(pictures, tmp_path / "set")
    assert again.complete and again.todo() == [] and again.finish().rows == 30
    assert content(tmp_path / "set") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for force in (False, True):
        with pytest.raises(UsageError, match=r"other files \(thesis\.txt\)"):
            begin(pictures, tmp_path / "mine", force=force)
    assert content(tmp_path / "mine") == {"thesis.txt": b""}


def test_bad_inputs_are_listed(pictures, tmp_path):
    (tmp_path / "in").mkdir()
    whole = (pictures / "china" / "02.png").read_bytes()
    (tmp_path / "in" / "a.png").write_bytes(whole)
    (tmp_path / "in" / "b.png").write_bytes(whole[:-200])
    (tmp_path / "in" / "c.png").write_bytes(b"")
    rows = "path\nin/a.png\nin/b.png\nin/c.png\nin/missing.png\n"
    (tmp_path / "list.csv").write_text(rows)
    summary = packed(tmp_path / "list.csv", tmp_path / "set")
    assert (summary.rows, summary.failures) == (1, 3)
    with open(tmp_path / "set" / "failures.csv", newline="", encoding="utf-8") as stream:
        failures = {row["key"]: row["reason"] for row in csv.DictReader(stream)}
    assert set(failures) == {"in/b", "in/c", "in/missing"}
    assert "empty" in failures["in/c"] and "no such file" in failures["in/missing"]
    with pytest.raises(MediaError, match=r"^in/"):
        packed(tmp_path / "list.csv", tmp_path / "fast", fail_fast=True)
    (tmp_path / "in" / "a.png").write_bytes(b"")
    with pytest.raises(PackedSetError, match=r"none of 4 inputs could be packed; the first: "):
        packed(tmp_path / "list.csv", tmp_path / "none")
    assert "packed.json" not in content(tmp_path / "none")


def test_faults_of_the_call(pictures, tmp_path):
    for settings, fact in (
        ({"quality": 99}, "quality 99 does not exist"),
        ({"profile": "zip"}, "profile zip does not exist"),
        ({"compression": "gzip"}, "compression gzip"),
        ({"order": "random"}, "order random does not exist"),
        ({"shard_mb": 0}, "cannot be written"),
        ({"rows_per_shard": 0}, "cannot be written"),
        ({"codec": "wavelet-stereo-5x"}, "nothing to pack"),
    ):
        with pytest.raises(UsageError, match=fact):
            begin(pictures, tmp_path / "set", **settings)
    assert not (tmp_path / "set").exists()
    packing = begin(pictures, tmp_path / "set")
    other = dataclasses.replace(
        packing.spec, info=dataclasses.replace(packing.spec.info, symbols="00000000"), plan="x"
    )
    with pytest.raises(CheckpointError, match="another checkpoint here"):
        pack.pack_chunk(other, 0, packing.records(0))


def test_large_batches_are_cut(monkeypatch, pictures, tmp_path):
    packed(pictures, tmp_path / "whole")
    monkeypatch.setattr(encoder, "BATCH_PIXELS", 5000)
    packed(pictures, tmp_path / "cut")
    readers = [PackedReader(tmp_path / name) for name in ("whole", "cut")]
    assert readers[0].column("key") == readers[1].column("key")
    assert np.array_equal(readers[0].column("height"), readers[1].column("height"))


def test_urls(pictures, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in pictures.rglob("*.png"):
        memory.pipe_file(f"/pack-in/{path.relative_to(pictures)}", path.read_bytes())
    packed("memory://pack-in", "memory://pack-out/set")
    assert packed("memory://pack-in", "memory://pack-out/set").rows == 30
    packed(pictures, tmp_path / "set")
    found = {path.rpartition("/")[2]: memory.cat_file(path) for path in memory.find("/pack-out")}
    expected = content(tmp_path / "set")
    # The index says which inputs it was.
    assert (
        json.loads(found.pop("packed.json"))["rows"] == json.loads(expected.pop("packed.json"))["rows"] == 30
    )
    assert found == expected


# ------------------------------------------------------------------------------------------------ unpacking


def test_files_come_back_under_their_keys(codec, pictures, tmp_path):
    packed(pictures, tmp_path / "set")
    assert unpack(str(tmp_path / "set"), str(tmp_path / "out"), device="cpu") == (30, [])
    assert set(content(tmp_path / "out")) == set(content(pictures))
    for path in pictures.rglob("*.png"):
        picture = read_picture(path)
        decoded = codec.reconstruct(
            codec.dequantise(codec.quantise(picture, quality=3), quality=3),
            height=picture.height, width=picture.width, channels=picture.pixels.shape[2], quality=3,
        )  # fmt: skip
        found = read_picture(tmp_path / "out" / path.relative_to(pictures))
        assert np.abs(found.pixels.astype(int) - decoded.pixels).mean() < 0.1
    with pytest.raises(UsageError, match="exists: overwrite it with -f"):
        unpack(str(tmp_path / "set"), str(tmp_path / "out"), device="cpu")
    for wanted, fact in (("cpd", "--profile cpd"), ("wav", "--format png"), ("payload", "another --format")):
        with pytest.raises(UsageError, match=fact):
            unpack(str(tmp_path / "set"), str(tmp_path / "new"), media_format=wanted)
    unpack(str(tmp_path / "set"), str(tmp_path / "integers"), media_format="npy")
    integers = np.load(tmp_path / "integers" / "china" / "02.npy")
    assert integers.shape == (12, 5, 7)
    packed(pictures, tmp_path / "cpd", profile="cpd")
    unpack(str(tmp_path / "cpd"), str(tmp_path / "files"), media_format="cpd")
    assert codec.decode((tmp_path / "files" / "china" / "01.cpd").read_bytes()).alpha is not None


def test_damaged_rows_are_reported(pictures, tmp_path):
    packed(pictures, tmp_path / "set", rows_per_shard=64)
    path = tmp_path / "set" / "part-00000-0.parquet"
    reader = PackedReader(path)
    key, payload = reader.row(4)["key"], bytes(reader.row(4)["payload"])
    data = path.read_bytes()
    place = data.index(payload) + 20
    path.write_bytes(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :])
    count, damaged = unpack(str(tmp_path / "set"), str(tmp_path / "out"), device="cpu")
    assert count == 29
    ((found, reason),) = damaged
    assert key in reason and "part-00000-0" in reason and found == "4"
    count, damaged = unpack(str(tmp_path / "set"), str(tmp_path / "tars"), webdataset=True)
    assert (count, len(damaged)) == (29, 1)


@pytest.mark.parametrize(
    "key", ["../../etc/passwd", "/etc/passwd", "a//b", "..", "", "c:\\x", "a\0b", "%2E", "."]
)
def test_keys_lead_nowhere_else(key, tmp_path):
    base = tmp_path / "base"
    assert base in (base / file_name(key)).resolve().parents
    assert "\0" not in file_name(key) and "\\" not in file_name(key)


def test_different_keys_have_different_files():
    keys = ["a//b", "a/b", "a/%00/b", "..", "%2E%2E", ".", "", "/", "%2F", "a/", "a"]
    assert len({file_name(key) for key in keys}) == len(keys)


def test_webdataset(codec, pictures, tmp_path):
    rows = ["path,key,label,note"]
    rows += [
        f"{path},x.{path.stem}/{path.parent.name}.b,{path.parent.name},é" for path in pictures.rglob("*.png")
    ]
    (tmp_path / "list.csv").write_text("\n".join(rows), encoding="utf-8")
    packed(tmp_path / "list.csv", tmp_path / "set")
    for media_format, suffix in ((None, "latents"), ("npy", "npy"), ("png", "png")):
        folder = tmp_path / suffix
        count, _ = unpack(
            str(tmp_path / "set"), str(folder), media_format=media_format, webdataset=True, device="cpu"
        )
        assert count == 30
        reader = PackedReader(tmp_path / "set")
        assert json.loads((folder / "set.json").read_text())["checkpoint"] == reader.info.checkpoint
        tars = sorted(folder.glob("*.tar"))
        assert [tar.stem for tar in tars] == [f"part-0000{i}-0" for i in range(4)]
        index = 0
        for path in tars:
            with tarfile.open(path) as tar:
                members = [(member.name, tar.extractfile(member).read()) for member in tar]
            for (first, data), (second, text) in zip(members[::2], members[1::2], strict=True):
                # What webdataset takes for the key: all up to the first dot of the name.
                stems = {
                    name.rpartition("/")[0] + "/" + name.rpartition("/")[2].partition(".")[0]
                    for name in (first, second)
                }
                assert len(stems) == 1 and first.endswith(f".{suffix}") and second.endswith(".json")
                row, facts = reader.row(index), json.loads(text)
                assert facts["key"] == row["key"] and facts["note"] == "é"
                assert facts["class"] == reader.info.classes[row["label"]]
                if suffix == "latents":
                    assert data == bytes(row["payload"])
                index += 1
        assert index == 30


@pytest.mark.parametrize("profile", ["train", "cpd"])
def test_a_codec_whose_checkpoint_tells_no_layout(pictures, tmp_path, profile):
    assert packed(pictures, tmp_path / "set", codec="hyperprior", profile=profile).rows == 30
    reader = PackedReader(tmp_path / "set")
    assert reader.info.latent_shape({"height": 48, "width": 64, "channels": 3}) == (256, 3, 4)
