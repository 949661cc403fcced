"""The command line around a codec without weights, in this process and in its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest
from PIL import Image

from compand import cli, demo


@pytest.fixture(autouse=True)
def fake_codec(monkeypatch):
    fakes.install(
        lambda owner, name, value: monkeypatch.setattr(owner, name, value, raising=False), monkeypatch.setitem
    )


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def picture(path: str, *, size: tuple[int, int] = (6, 5), red: int = 10) -> np.ndarray:
    pixels = np.random.default_rng(len(path)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    pixels[0, 0, 0] = red
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def pixels_of(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


def start(*arguments: str, **options) -> subprocess.Popen:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, fakes.__file__, *arguments], **streams)


def names() -> list[str]:
    return sorted(path.as_posix() for path in Path().rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------- encode and decode


def test_encode_writes_no_picture_format(capsys):
    picture("a.png")
    assert run("encode", "a.png", "-o", "out.jpg") == 2
    assert "-o out.jpg: encode writes .cpd files" in capsys.readouterr().err
    assert names() == ["a.png"]


def test_a_file_that_grows_is_remarked_on(capsys):
    picture("noise.jpg", size=(64, 64))
    before = Path("noise.jpg").stat().st_size
    assert run("encode", "noise.jpg") == 0
    assert Path("noise.cpd").stat().st_size > before
    assert f"more than the {before} of the original" in capsys.readouterr().err


def test_encode_and_decode_beside_the_input(capsys):
    pixels = picture("photo.png")
    assert run("encode", "photo.png", "-q", "2.5") == 0
    size = Path("photo.cpd").stat().st_size
    out, err = capsys.readouterr()
    assert out == f"photo.png -> photo.cpd: 6 x 5, {size} bytes, {8 * size / 30:.3f} bpp\n"
    assert err == ""
    assert run("decode", "photo.cpd", "-o", "back.png") == 0
    assert np.array_equal(pixels_of("back.png"), pixels)


def test_folders_are_mirrored_and_workers_change_nothing(capsys):
    for name in ("in/a.png", "in/sub/b.png", "in/sub/c.jpg", "in/sub/c.png"):
        picture(name)
    Path("in/notes.txt").touch()
    assert run("encode", "in", "-r", "-o", "one") == 0
    assert run("encode", "in", "-r", "-o", "two", "-j", "3", "--quiet") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    made = [path.relative_to("one") for path in Path("one").rglob("*.cpd")]
    assert sorted(map(Path.as_posix, made)) == ["a.cpd", "sub/b.cpd", "sub/c.jpg.cpd", "sub/c.png.cpd"]
    assert all(Path("one", path).read_bytes() == Path("two", path).read_bytes() for path in made)


def test_existing_outputs(capsys):
    picture("a.png")
    Path("a.cpd").write_bytes(b"mine")
    assert run("encode", "a.png") == 1
    assert (
        capsys.readouterr().err
        == "compand: a.png: a.cpd exists: -f overwrites it, --skip-existing leaves it\n"
    )
    assert run("encode", "a.png", "--skip-existing") == 0
    assert Path("a.cpd").read_bytes() == b"mine"
    assert run("encode", "a.png", "-f") == 0
    assert Path("a.cpd").read_bytes() != b"mine"
    assert run("encode", "a.png", "-f", "--skip-existing") == 2


def test_bad_files_do_not_stop_the_others(capsys):
    picture("a.png")
    picture("bug.png", red=99)
    Path("text.png").write_text("no picture")
    before = {name: Path(name).read_bytes() for name in names()}
    assert run("encode", "text.png", "bug.png", "missing.png", "a.png") == 1
    out, err = capsys.readouterr()
    assert out.startswith("a.png -> a.cpd")
    lines = err.splitlines()
    assert lines[0] == "compand: 3 failures:"
    assert sorted(line.split(":")[0].split()[0] for line in lines[1:]) == [
        "bug.png",
        "missing.png",
        "text.png",
    ]
    assert {name: Path(name).read_bytes() for name in before} == before
    assert set(names()) == {*before, "a.cpd"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("encode",),
        ("encode", "a.png", "-q", "2", "--bpp", "1"),
        ("encode", "a.png", "--bpp", "1", "--psnr", "30"),
        ("encode", "a.png", "-q", "99"),
        ("encode", "a.png", "-j", "0"),
        ("encode", "a.png", "b.png", "-o", "-"),
        ("encode", "x/a.png", "a.png", "-o", "out"),
        ("decode", "a.cpd", "--format", "nonsense"),
        ("unknown",),
    ],
)
def test_wrong_usage_is_2_and_writes_nothing(arguments, capsys):
    for name in ("a.png", "b.png", "x/a.png"):
        picture(name)
    Path("a.cpd").write_bytes(
        fakes.FakeCodec().encode(fakes.Picture(np.zeros((2, 2, 3), np.uint8), None, None))
    )
    before = names()
    options = ("-f",) if arguments[0] == "encode" and len(arguments) > 1 and "-o" not in arguments else ()
    assert run(*arguments, *options) == 2
    assert names() == before
    assert "Traceback" not in capsys.readouterr().err


def test_unknown_checkpoint_is_one_line(capsys):
    picture("a.png")
    assert run("encode", "a.png", "-c", "nothing-v9") == 1
    assert capsys.readouterr().err == "compand: checkpoint nothing-v9 is unknown: see compand codecs\n"


def test_suffix_of_the_output_decides_the_format(capsys):
    picture("a.png", size=(32, 32))
    assert run("encode", "a.png") == 0
    assert run("decode", "a.cpd", "-o", "b.webp") == 0
    assert run("decode", "a.cpd", "-o", "out/", "--format", "jpg") == 0
    assert Path("b.webp").read_bytes()[8:12] == b"WEBP"
    assert Path("out/a.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_pictures_of_many_bands_are_arrays(capsys):
    bands = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
    np.save("a.npy", bands)
    assert run("encode", "a.npy") == 0
    assert run("info", "a.cpd") == 0
    assert "5 x 6 pixels, 4 bands, 8 bit" in capsys.readouterr().out
    assert run("decode", "a.cpd", "-o", "back/") == 0
    assert np.array_equal(np.load("back/a.npy"), bands)
    assert run("decode", "a.cpd", "-o", "b.png") == 1
    assert "4 bands: save as .npy" in capsys.readouterr().err


def test_partial_decoding_writes_and_reports(capsys):
    picture("a.png", size=(40, 40))
    assert run("encode", "a.png", "--no-compact") == 0
    data = bytearray(Path("a.cpd").read_bytes())
    data[-9] ^= 255
    Path("a.cpd").write_bytes(data)
    assert run("decode", "a.cpd", "-o", "b.png") == 1
    assert not Path("b.png").exists()
    assert run("decode", "a.cpd", "-o", "b.png", "--partial") == 1
    assert pixels_of("b.png").shape == (40, 40, 3)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("compand: decoded in part: a.cpd: ")
    assert "chunk 0" in line


def test_debug_shows_where(monkeypatch, capsys):
    picture("bug.png", red=99)
    assert run("encode", "bug.png") == 1
    plain = capsys.readouterr().err
    monkeypatch.setenv("COMPAND_DEBUG", "1")
    assert run("encode", "bug.png") == 1
    assert plain.count("\n") == 1
    assert "Traceback" not in plain
    assert "fakes.py" in capsys.readouterr().err


# -------------------------------------------------------------------------------- info, verify, codecs


def test_info_as_text_and_as_json(capsys):
    picture("a.png", size=(40, 30))
    run("encode", "a.png", "-q", "3.5", "--no-compact", "--quiet")
    size = Path("a.cpd").stat().st_size
    assert run("info", "a.cpd") == 0
    text = capsys.readouterr().out
    assert "fake, fake-v1" in text
    assert "40 x 30 pixels, RGB, 8 bit" in text
    assert run("info", "a.cpd", "--json") == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["bpp"] == 8 * size / 1200
    facts = {
        "bytes": size,
        "quality": 3.5,
        "width": 40,
        "height": 30,
        "chunks": 1,
        "compact": False,
        "damage": [],
    }
    assert facts.items() <= record.items()
    assert 0 < record["header_bytes"] <= 32


def test_info_of_what_is_no_cpd_goes_on(capsys):
    picture("a.png")
    run("encode", "a.png", "--quiet")
    assert run("info", "a.png", "a.cpd") == 1
    out, err = capsys.readouterr()
    assert out.startswith("a.cpd\n")
    assert err.startswith("compand: a.png: ")


def test_verify_finds_damage(capsys):
    for name in ("a.png", "b.png"):
        picture(name, size=(40, 30))
    run("encode", "a.png", "b.png", "--quiet")
    assert run("verify", ".", "--deep") == 0
    assert capsys.readouterr().out.count("intact, 1 chunk,") == 2
    data = bytearray(Path("b.cpd").read_bytes())
    data[-3] ^= 1
    Path("b.cpd").write_bytes(data)
    assert run("verify", "a.cpd", "b.cpd") == 1
    out, err = capsys.readouterr()
    assert out.startswith("a.cpd: intact")
    assert err.startswith("compand: b.cpd: ")
    assert err.count("\n") == 1


def test_codecs_as_table_and_as_json(capsys):
    assert run("codecs") == 0
    assert "fake-v1  image" in capsys.readouterr().out
    assert run("codecs", "--json") == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["symbols"] == fakes.SYMBOLS.hex()


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("compand 0.")
    assert run("--help") == 0
    assert "encode" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- demo


def test_demo_writes_both_files_and_finds_rivals(capsys):
    assert run("demo") == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["BYTES", "compand", "WebP", "JPEG", "JPEG", "written:"]
    assert int(rows[1].split()[1]) == Path("compand-demo.cpd").stat().st_size
    assert pixels_of("compand-demo.png").shape[1] > 3 * 500
    assert run("demo") == 1
    assert "exists" in capsys.readouterr().err


def test_demo_search_finds_the_lowest_setting_that_is_enough():
    tried = []

    def encode(setting: int) -> demo.Coded:
        tried.append(setting)
        return demo.Coded(setting, 10 * setting, np.zeros((1, 1, 3), np.uint8))

    for wanted in (1, 2, 50, 51, 99, 100):
        assert demo.search(encode, lambda coded, least=wanted: coded.setting >= least).setting == wanted
    assert demo.search(encode, lambda coded: False).setting == 100
    assert len(tried) < 7 * 9


# ----------------------------------------------------------------------------------- other packages


@pytest.mark.parametrize("command", ["train", "eval"])
def test_arguments_are_passed_on_untouched(command, monkeypatch):
    seen = []
    entry = type(sys)(f"compand.{command}.cli")
    entry.main = seen.append
    monkeypatch.setitem(sys.modules, f"compand.{command}.cli", entry)
    assert run(command, "fit", "--config", "a.yaml", "--data.root=x", "--help", "-v", "file") == 0
    assert seen == [["fit", "--config", "a.yaml", "--data.root=x", "--help", "-v", "file"]]


@pytest.mark.parametrize(
    ("command", "extra"),
    [("train", "train"), ("export", "train"), ("import-compressai", "train"), ("eval", "eval")],
    ids=str,
)
def test_a_missing_extra_is_named(command, extra, monkeypatch, capsys):
    import_module = cli.importlib.import_module

    def absent(module, package=None):
        if module.startswith("compand."):
            raise ModuleNotFoundError("No module named 'lightning'", name="lightning")
        return import_module(module, package)

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    assert run(command, "fit") == 2
    assert capsys.readouterr().err == f'compand: lightning is not installed: pip install "compand[{extra}]"\n'


# ------------------------------------------------------------------------------- pipes, signals, limits


def test_standard_streams_carry_data_alone():
    pixels = picture("a.png")
    data, err = start("encode", "-", stdin=subprocess.PIPE).communicate(Path("a.png").read_bytes())
    assert b"standard input -> standard output: 6 x 5" in err
    png, _ = start("decode", "-", stdin=subprocess.PIPE).communicate(data)
    Path("b.png").write_bytes(png)
    assert np.array_equal(pixels_of("b.png"), pixels)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_is_one_line_and_leaves_nothing(number, workers):
    picture("slow.png", red=66)
    picture("slower.png", red=66)
    before = names()
    process = start("encode", "slow.png", "slower.png", "-j", workers)
    for _ in range(int(workers)):
        assert process.stdout.readline() == b"slow\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 128 + number
    assert err.decode().startswith("compand: interrupted")
    assert err.count(b"\n") == 1
    assert names() == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_in_mid_write_leaves_no_partial_output():
    script = (
        "from pathlib import Path; import time; from compand.files import atomic_write\n"
        "with atomic_write(Path('a.cpd')) as stream:\n"
        "    stream.write(b'half'); stream.flush(); print('ready', flush=True); time.sleep(30)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert not Path("a.cpd").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX resource limits")
def test_a_write_that_runs_out_of_room_leaves_nothing():
    import resource

    picture("a.png", size=(200, 200))

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    _, err = (process := start("encode", "a.png", preexec_fn=little_room)).communicate()
    assert process.returncode == 1
    assert err.decode().startswith("compand: a.png: cannot write a.cpd: file too large")
    assert names() == ["a.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line():
    picture("a.png")
    _, err = (process := start("encode", "a.png", "-o", "/dev/full")).communicate()
    assert process.returncode == 1
    assert err.decode().startswith("compand: a.png: cannot write /dev/full: no space left on device; free")
    with open("/dev/full", "wb") as full:
        _, err = (process := start("encode", "a.png", "-o", "-", stdout=full)).communicate()
    assert process.returncode == 1
    assert b"standard output: no space left" in err
    assert err.count(b"\n") == 1


def test_unwritable_folder_is_refused_before_encoding(monkeypatch, capsys):
    picture("a.png")
    Path("locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    monkeypatch.setattr(fakes.FakeCodec, "encode", lambda *_, **__: pytest.fail("too late"))
    assert run("encode", "a.png", "-o", "locked/") == 1
    assert "locked is not writable; choose another place with -o" in capsys.readouterr().err
    assert names() == ["a.png"]


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_progress_is_shown_on_a_terminal_and_data_is_not_written_to_one():
    import pty

    picture("a.png")
    picture("b.png")
    terminal, side = pty.openpty()
    process = start("encode", "a.png", "b.png", stderr=side)
    out, _ = process.communicate()
    shown = os.read(terminal, 65536)
    assert process.returncode == 0
    assert b"/2" in shown
    assert len(out.splitlines()) == 2
    process = start("decode", "a.cpd", "-o", "-", stdout=side)
    assert b"standard output is a terminal" in process.communicate()[1]
    assert process.returncode == 2
    os.close(side)
    os.close(terminal)


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_reader_that_goes_away_is_no_traceback():
    picture("a.png", size=(300, 300))
    assert run("encode", "a.png") == 0
    read_end, write_end = os.pipe()
    os.close(read_end)
    _, err = (process := start("decode", "a.cpd", "-o", "-", stdout=write_end)).communicate()
    os.close(write_end)
    assert process.returncode == 1
    assert err.count(b"\n") == 1
    assert b"broken pipe" in err
