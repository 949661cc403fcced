"""`compand pack`, `unpack`, and `info` and `verify` of packed sets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from compand import cli
from compand.data.packed import PackedReader

OPTIONS = ("-c", "wavelet-rgb-16x", "-q", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def pictures(china: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 24 crops, 64x48."""
    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(china) as image:
        for number in range(24):
            path = folder / ("left" if number % 2 else "right") / f"{number:02d}.png"
            path.parent.mkdir(exist_ok=True)
            left, top = 24 * number, 16 * number
            image.crop((left, top, left + 64, top + 48)).save(path)
    return folder


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code


def content(folder: str) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_from_a_folder_to_a_set_and_back(pictures, capsys):
    assert run("pack", pictures, "set", *OPTIONS) == 0
    out, err = capsys.readouterr()
    assert out.startswith("set: 24 rows in 1 shard, ") and " bpp, " in out and "rows/s" in out and err == ""
    assert run("info", "set", "--grid", "grid.png", "--device", "cpu") == 0
    out = capsys.readouterr().out
    for fact in ("24 pictures, 64 x 48 pixels", "2: left 12, right 12", "12 x 6 x 8", "train, zstd", "-v"):
        assert fact in out
    with Image.open("grid.png") as grid:
        assert grid.size == (256, 192)
    assert run("info", "--json", "set", "set/part-00000-0.parquet") == 0
    whole, shard = json.loads(capsys.readouterr().out)
    assert whole["rows"] == shard["rows"] == 24 and whole["classes"] == {"left": 12, "right": 12}
    assert whole["bytes"] == Path("set/part-00000-0.parquet").stat().st_size
    assert whole["bpp"] == 8 * whole["bytes"] / (24 * 64 * 48)
    assert whole["source_bytes"] == sum(path.stat().st_size for path in pictures.rglob("*.png"))
    assert run("verify", "set") == 0
    assert capsys.readouterr().out == "set: intact, 24 rows\n"
    assert run("unpack", "set", "out", "--device", "cpu") == 0
    assert capsys.readouterr().out == "set -> out: 24 rows\n"
    assert set(content("out")) == set(content(str(pictures)))
    assert run("unpack", "set", "tars", "--to", "webdataset", "--quiet") == 0
    assert set(content("tars")) == {"set.json", "part-00000-0.tar"}
    assert capsys.readouterr().out == ""
    before = content("set")
    assert run("pack", pictures, "set", *OPTIONS) == 0
    assert "complete before" in capsys.readouterr().out and content("set") == before
    assert run("pack", pictures, "set", *OPTIONS, "--profile", "archive") == 2
    assert "profile train, not archive" in capsys.readouterr().err
    assert run("pack", pictures, "set", *OPTIONS, "--profile", "archive", "-f", "--quiet") == 0
    assert run("info", "set") == 0
    assert "archive" in capsys.readouterr().out


def test_bad_inputs_and_wrong_calls(pictures, capsys):
    Path("list.csv").write_text(f"path\n{pictures}/left/01.png\nmissing.png\n")
    assert run("pack", "list.csv", "set", *OPTIONS) == 1
    out, err = capsys.readouterr()
    assert (
        out.startswith("set: 1 row") and err == "compand: 1 input could not be packed: see set/failures.csv\n"
    )
    assert Path("set/failures.csv").read_text().startswith("key,reason\nmissing,")
    assert run("info", "set") == 0
    assert "1 inputs, see failures.csv" in capsys.readouterr().out
    assert run("pack", "list.csv", "fast", *OPTIONS, "--fail-fast") == 1
    assert "missing.png" in capsys.readouterr().err
    assert run("info", "fast") == 1
    assert "no finished packed set" in capsys.readouterr().err
    for arguments, fact in (
        (("pack", "list.csv", "new", *OPTIONS, "--engine", "spark"), "--engine spark does not exist"),
        (("pack", "nowhere", "new", *OPTIONS), "nowhere does not exist"),
        (("unpack", "set", "new", "--to", "zip"), "--to zip does not exist"),
        (("info", "set", "set", "--grid", "a.png"), "--grid shows one packed set"),
        (("info", "set", "--grid", "a.txt"), "name a .png file"),
    ):
        assert run(*arguments) == 2
        assert fact in capsys.readouterr().err
    for arguments in (("info", "s3://bucket/set"), ("unpack", "s3://bucket/set", "new")):
        assert run(*arguments) == 1
        assert "s3://bucket/set is not on this machine" in capsys.readouterr().err
    assert not Path("new").exists()


def test_damage_is_named(pictures, capsys):
    assert run("pack", pictures, "set", *OPTIONS, "--rows-per-shard", "12", "--quiet") == 0
    path = Path("set/part-00001-0.parquet")
    data = path.read_bytes()
    row = PackedReader(path).row(7)
    place = data.index(bytes(row["payload"])) + 20
    path.write_bytes(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :])
    assert run("verify", "set") == 1
    error = capsys.readouterr().err
    assert "part-00001-0.parquet" in error and row["key"] in error
    path.write_bytes(data[:-50])
    for command in ("verify", "info"):
        assert run(command, "set") == 1
        assert "part-00001-0.parquet" in capsys.readouterr().err
    assert run("unpack", "set", "out") == 1
    assert "part-00001-0.parquet" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_packing_goes_on_after_a_kill(pictures, capsys):
    options = (*OPTIONS, "--rows-per-shard", "3")
    assert run("pack", pictures, "whole", *options, "--quiet") == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "compand.cli", "pack", str(pictures), "set", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not Path("set/.packing/00001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed = content("set")
    assert "packing.json" in killed and "packed.json" not in killed
    assert run("pack", pictures, "set", *options) == 0
    assert "of 24 inputs were packed before" in capsys.readouterr().err
    assert content("set") == content("whole")
