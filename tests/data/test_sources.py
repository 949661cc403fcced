"""What can be packed: folders, manifests, Parquet and saved data sets become records."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compand.data.sources import Source, list_source
from compand.errors import MediaError, UsageError
from compand.pictures import is_image_path


def listed(source: str | Path, **options) -> Source:
    return list_source(str(source), is_image_path, **options)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def table(found: Source) -> dict[str, dict]:
    return {record.key: dict(record.columns) for record in found.records}


def parquet(path: Path, rows: list[dict], **options) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


# ------------------------------------------------------------------------------------------------ folders


def test_class_folders_give_labels_and_keys(tmp_path):
    touch(
        tmp_path, "dog/b.png", "dog/deep/a.jpg", "cat/a.png", "dog/.hidden.png", "dog/notes.txt", ".git/x.png"
    )
    found = listed(tmp_path)
    assert found.classes == ("cat", "dog")
    assert table(found) == {"cat/a": {"label": 0}, "dog/b": {"label": 1}, "dog/deep/a": {"label": 1}}
    assert found.columns == pa.schema([("label", pa.int64())])
    assert {record.read() for record in found.records} == {b"cat/a.png", b"dog/b.png", b"dog/deep/a.jpg"}


def test_a_flat_folder_has_no_labels_and_keeps_suffixes_where_needed(tmp_path):
    touch(tmp_path, "a.png", "b.png", "b.jpg")
    found = listed(tmp_path)
    assert found.classes is None
    assert table(found) == {"a": {}, "b.jpg": {}, "b.png": {}}


def test_a_stray_file_does_not_take_the_labels_away(tmp_path):
    touch(tmp_path, "cat/a.png", "dog/a.png", "stray.png", "notes.txt")
    with pytest.raises(UsageError, match=r"holds stray\.png beside folders with files: move it"):
        listed(tmp_path)


def test_an_empty_class_is_an_error_unless_allowed(tmp_path):
    touch(tmp_path, "cat/a.png", "dog/notes.txt", "elk/a.png")
    with pytest.raises(UsageError, match=r"class folder .*dog holds no fitting file.*--allow-empty-class"):
        listed(tmp_path)
    found = listed(tmp_path, allow_empty_class=True)
    assert found.classes == ("cat", "elk")
    assert table(found) == {"cat/a": {"label": 0}, "elk/a": {"label": 1}}


def test_orders(tmp_path):
    names = [f"{kind}/{number:03d}.png" for kind in ("cat", "dog") for number in range(50)]
    touch(tmp_path, *names)
    keys = [record.key for record in listed(tmp_path).records]
    assert keys == [record.key for record in listed(tmp_path).records]
    labels = [key[:3] for key in keys]
    assert 15 < labels[:50].count("cat") < 35
    assert [record.key for record in listed(tmp_path, order="sorted").records] == sorted(keys)


def test_names_that_are_not_utf8(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (record,) = listed(tmp_path).records
    assert record.key == "caf\\xe9" and record.read() == b"x"


def test_what_cannot_be_packed(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        listed(tmp_path / "missing")
    with pytest.raises(UsageError, match="nothing to pack"):
        listed(touch(tmp_path / "empty", "notes.txt"))
    with pytest.raises(UsageError, match=r"no list of inputs"):
        listed(touch(tmp_path, "a.png") / "a.png")
    with pytest.raises(UsageError, match="is a packed set"):
        listed(touch(tmp_path / "set", "packed.json", "part-00000-0.parquet"))
    with pytest.raises(UsageError, match="leave --label out"):
        listed(touch(tmp_path / "flat", "a.png"), label="species")


# ---------------------------------------------------------------------------------------------- manifests


def test_a_csv_manifest_keeps_its_columns(tmp_path):
    touch(tmp_path, "in/a.png", "in/b.png", "other.png")
    path = tmp_path / "list.csv"
    path.write_text(
        "\ufeffpath,label,age,score,zip,rate\n"
        'in/a.png,dog,3,1.5,00417,"a ""b"", c"\n'
        "./in/b.png,cat,,2,10115,\n"
        "other.png,dog,5,,x,y\n",
        encoding="utf-8",
    )
    found = listed(path)
    assert found.classes == ("cat", "dog")
    assert table(found) == {
        "in/a": {"label": 1, "age": 3, "score": 1.5, "zip": "00417", "source_rate": 'a "b", c'},
        "in/b": {"label": 0, "age": None, "score": 2.0, "zip": "10115", "source_rate": ""},
        "other": {"label": 1, "age": 5, "score": None, "zip": "x", "source_rate": "y"},
    }
    assert found.columns.field("age").type == pa.int64() and found.columns.field("score").type == pa.float64()
    assert {record.read() for record in found.records} == {b"in/a.png", b"in/b.png", b"other.png"}


def test_numbers_that_begin_with_zero_are_names(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("path,id,part,take\na.png,007,0.5,84_12\nb.png,008,0,84_13\n")
    assert table(listed(path)) == {
        "a": {"id": "007", "part": 0.5, "take": "84_12"},
        "b": {"id": "008", "part": 0.0, "take": "84_13"},
    }


def test_a_jsonl_manifest_with_named_columns(tmp_path):
    path = tmp_path / "list.jsonl"
    rows = [
        {"file": "a.png", "id": 7, "kind": 2, "tags": ["x"], "mixed": 1},
        {"file": "b.png", "id": 8, "kind": 0, "mixed": "one"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = listed(path, media="file", key="id", label="kind")
    assert found.classes is None
    assert table(found) == {
        "7": {"label": 2, "tags": ["x"], "mixed": "1"},
        "8": {"label": 0, "tags": None, "mixed": '"one"'},
    }


@pytest.mark.parametrize(
    ("name", "text", "fact"),
    [
        ("a.csv", "path,label\na.png,x\nb.png\n", r"line 3: fewer fields"),
        ("a.csv", "path,label\na.png,x,y\n", r"line 2: more fields"),
        ("a.csv", "file,label\na.png,x\n", r"no column path \(file, label\).*--media"),
        ("a.csv", "path,label\n,x\n", r"line 2: no path"),
        ("a.csv", "path,label\na.png,1.5\n", r"column label is double: labels are integers or names"),
        ("a.csv", "path,label\na.png,1\nb.png,\n", r"row 1 has no label"),
        ("a.csv", "path,height,source_height\na.png,1,2\n", r"height would be named source_height"),
        ("a.jsonl", '{"path": "a.png"}\n[1]\n', r"line 2: no object"),
        ("a.jsonl", '{"path": "a.png"}\n{"path"', r"line 2: not JSON"),
        ("a.jsonl", '{"path": 3}\n', r"line 1: no path"),
    ],
)
def test_manifests_with_faults(tmp_path, name, text, fact):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=fact):
        listed(tmp_path / name)


def test_keys_that_two_records_have(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("path,key\na.png,x\nb.png,y\nc.png,x\n")
    with pytest.raises(UsageError, match=r"key x is that of .*a\.png and .*c\.png"):
        listed(path)
    path.write_text("path\na.png\na.png\n")
    with pytest.raises(UsageError, match=r"key a\.png is that of .*a\.png, twice"):
        listed(path)


# ------------------------------------------------------------------------------------------ Parquet, Arrow


def test_parquet_rows_stay_with_their_row_groups(tmp_path):
    rows = [
        {"image": {"bytes": str(i).encode(), "path": None}, "label": i % 3, "text": str(i)} for i in range(40)
    ]
    found = listed(parquet(tmp_path / "train.parquet", rows, row_group_size=8))
    assert found.classes is None
    assert table(found) == {f"train/{i:07d}": {"label": i % 3, "text": str(i)} for i in range(40)}
    assert {record.key: record.read() for record in found.records} == {
        f"train/{i:07d}": str(i).encode() for i in range(40)
    }
    groups = [record.group for record in found.records]
    assert [groups[i] for i in range(0, 40, 8)] == list(dict.fromkeys(groups))
    assert groups != sorted(groups)
    assert [record.row for record in found.records[:8]] != list(range(8))
    assert pickle.loads(pickle.dumps(found.records[5])).read() == found.records[5].read()


def test_a_folder_of_parquet_files_with_a_choice_of_columns(tmp_path):
    for name in ("a", "b"):
        row = {"left": b"L" + name.encode(), "right": b"R" + name.encode(), "id": name, "kind": "k" + name}
        parquet(tmp_path / f"{name}.parquet", [row])
    with pytest.raises(UsageError, match=r"several columns of bytes \(left, right\).*--media"):
        listed(tmp_path)
    found = listed(tmp_path, media="right", key="id", label="kind")
    assert found.classes == ("ka", "kb")
    assert table(found) == {"a": {"label": 0, "left": b"La"}, "b": {"label": 1, "left": b"Lb"}}
    assert {record.read() for record in found.records} == {b"Ra", b"Rb"}


def test_parquet_with_paths_and_holes(tmp_path):
    touch(tmp_path, "pictures/a.png")
    rows = [{"image": {"bytes": None, "path": "pictures/a.png"}}, {"image": None}]
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "list.parquet")
    records = {record.key: record for record in listed(tmp_path / "list.parquet").records}
    assert records["list/0000000"].read() == b"pictures/a.png"
    with pytest.raises(MediaError, match="column image holds nothing"):
        records["list/0000001"].read()


def test_damaged_and_foreign_parquet(tmp_path):
    (tmp_path / "cut.parquet").write_bytes(parquet(tmp_path / "a.parquet", [{"x": b"1"}]).read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"cut\.parquet cannot be read"):
        listed(tmp_path / "cut.parquet")
    with pytest.raises(UsageError, match="no column of bytes"):
        listed(parquet(tmp_path / "numbers.parquet", [{"x": 1}]))
    folder = tmp_path / "two"
    folder.mkdir()
    parquet(folder / "a.parquet", [{"x": b"1", "y": 1}])
    parquet(folder / "b.parquet", [{"x": b"1", "y": "1"}])
    with pytest.raises(UsageError, match=r"b\.parquet has other columns than .*a\.parquet"):
        listed(folder)


def saved_dataset(folder: Path, rows: list[dict]) -> Path:
    """What `datasets.save_to_disk` writes."""
    folder.mkdir()
    content = pa.Table.from_pylist(rows)
    with (
        pa.OSFile(str(folder / "data-0.arrow"), "wb") as file,
        pa.ipc.new_stream(file, content.schema) as out,
    ):
        for batch in content.to_batches(max_chunksize=3):
            out.write_batch(batch)
    features = {"image": {"_type": "Image"}, "label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def test_saved_datasets_and_the_hub(tmp_path, monkeypatch):
    rows = [{"image": {"bytes": str(i).encode(), "path": "x.png"}, "label": i % 2} for i in range(10)]
    folder = saved_dataset(tmp_path / "saved", rows)
    found = listed(folder)
    assert found.classes == ("no", "yes")
    assert {record.read(): record.columns["label"] for record in found.records} == {
        str(i).encode(): i % 2 for i in range(10)
    }

    def load_dataset(name, split):
        assert (name, split) == ("owner/set", "test")
        label = SimpleNamespace(names=["no", "yes"])
        files = [{"filename": str(folder / "data-0.arrow")}]
        return SimpleNamespace(features={"image": object(), "label": label}, cache_files=files)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert table(listed("hf:owner/set:test")) == table(found)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        listed("hf:owner/set")
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(UsageError, match=r"several splits \(saved\)"):
        listed(tmp_path)


def test_places_by_url(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("dog/a.png", "cat/b.png"):
        memory.pipe_file(f"/sources/{name}", name.encode())
    memory.pipe_file("/sources-list/list.csv", b"path,age\n../sources/dog/a.png,3\n")
    found = listed("memory://sources")
    assert found.classes == ("cat", "dog")
    assert {record.key: record.read() for record in found.records} == {
        "cat/b": b"cat/b.png",
        "dog/a": b"dog/a.png",
    }
    assert table(listed(f"file://{touch(tmp_path, 'x.png')}")) == {"x": {}}
