"""Inputs, output names, atomic writes."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compand import files
from compand.errors import MediaError, UsageError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def png(path: Path) -> bool:
    return path.suffix == ".png"


def inputs(*paths: str) -> list[files.Input]:
    return [files.Input(Path(path), PurePath(Path(path).name)) for path in paths]


def targets(jobs: list[files.Job]) -> list[str]:
    return [job.target.as_posix() for job in jobs]


# ------------------------------------------------------------------------------------------ expansion


def test_folder_gives_fitting_visible_files_in_order(tmp_path):
    touch(tmp_path, "b.png", "a.png", "c.txt", ".hidden.png", "sub/d.png", ".git/e.png")
    found, failures = files.expand([str(tmp_path)], png)
    assert [item.place.as_posix() for item in found] == ["a.png", "b.png"]
    assert not failures
    found, _ = files.expand([str(tmp_path)], png, recursive=True)
    assert [item.place.as_posix() for item in found] == ["a.png", "b.png", "sub/d.png"]


def test_folder_without_fitting_files_is_a_failure_with_the_remedy(tmp_path):
    touch(tmp_path, "sub/a.png")
    found, failures = files.expand([str(tmp_path)], png)
    assert not found
    assert "-r" in failures[0].message


def test_patterns_are_expanded_and_brackets_in_names_are_not_patterns(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c[1].png")
    found, _ = files.expand([str(tmp_path / "?.png"), str(tmp_path / "c[1].png")], png)
    assert [item.place.name for item in found] == ["a.png", "b.png", "c[1].png"]
    _, failures = files.expand([str(tmp_path / "x*.png")], png)
    assert "no file matches" in failures[0].message


def test_missing_file_does_not_hide_the_others_and_none_is_taken_twice(tmp_path):
    touch(tmp_path, "a.png")
    again = str(tmp_path / "sub" / ".." / "a.png")
    (tmp_path / "sub").mkdir()
    found, failures = files.expand([str(tmp_path / "no.png"), str(tmp_path / "a.png"), again], png)
    assert len(found) == len(failures) == 1
    assert "no such file" in failures[0].message


def test_standard_input_once(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    found, _ = files.expand(["-"], png)
    assert found[0].path is None
    with pytest.raises(UsageError, match="twice"):
        files.expand(["-", "-"], png)


@pytest.mark.parametrize("spooled", [False, True])
def test_the_opening_of_standard_input_is_whole_however_slowly_it_comes(monkeypatch, spooled):
    content = bytes(range(256)) * 300
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb", buffering=0) as pipe:
            for part in (content[:4], content[4:10], content[10:]):
                pipe.write(part)
                time.sleep(0.05)

    thread = threading.Thread(target=write, daemon=True)
    with open(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        thread.start()
        item = files.Input(None, PurePath("stdin"))
        assert [item.opening(size) for size in (12, 3, 20)] == [content[:12], content[:3], content[:20]]
        if spooled:
            with files.spooled_stdin() as spool:
                spool.seek(0)
                assert spool.read() == content
        else:
            assert item.read() == content
        assert item.read() == b""
    thread.join()


# ------------------------------------------------------------------------------------------ output names


def test_default_output_is_beside_the_input():
    jobs = files.plan(inputs("x/photo.v2.png", "x/noise"), None, ".cpd", several=True)
    assert targets(jobs) == ["x/photo.v2.cpd", "x/noise.cpd"]


def test_folder_output_mirrors_subfolders(tmp_path):
    items = [files.Input(tmp_path / "in" / "sub" / "a.png", PurePath("sub/a.png"))]
    jobs = files.plan(items, str(tmp_path / "out"), ".cpd", several=True)
    assert jobs[0].target == tmp_path / "out" / "sub" / "a.cpd"


def test_single_input_takes_a_file_name_or_an_existing_folder(tmp_path):
    named = files.plan(inputs("a.png"), str(tmp_path / "b.cpd"), ".cpd", several=False)
    assert named[0].target == tmp_path / "b.cpd"
    inside = files.plan(inputs("a.png"), str(tmp_path), ".cpd", several=False)
    assert inside[0].target == tmp_path / "a.cpd"
    slash = files.plan(inputs("a.png"), f"{tmp_path}/new/", ".cpd", several=False)
    assert slash[0].target == tmp_path / "new" / "a.cpd"


def test_names_that_differ_by_suffix_alone_are_both_kept():
    jobs = files.plan(inputs("photo.png", "photo.jpg", "other.png", "Photo.tif"), None, ".cpd", several=True)
    assert targets(jobs) == ["photo.png.cpd", "photo.jpg.cpd", "other.cpd", "Photo.tif.cpd"]


def test_decoded_names_do_not_repeat_their_suffix():
    jobs = files.plan(inputs("photo.png.cpd", "photo.jpg.cpd", "b.cpd"), "out", ".png", several=True)
    assert targets(jobs) == ["out/photo.png", "out/photo.jpg.png", "out/b.png"]


def test_every_input_may_have_a_suffix_of_its_own():
    several = inputs("a.cpd", "b.cpd", "b.flac.cpd")
    jobs = files.plan(several, None, lambda item: ".png" if item.name == "a.cpd" else ".flac", several=True)
    assert targets(jobs) == ["a.png", "b.cpd.flac", "b.flac.cpd.flac"]


def test_equal_names_from_two_folders_are_refused_before_anything_is_written():
    with pytest.raises(UsageError, match=r"x/a\.png.*y/a\.png"):
        files.plan(inputs("x/a.png", "y/a.png"), "out", ".cpd", several=True)


def test_an_input_is_never_an_output():
    with pytest.raises(UsageError, match="is an input"):
        files.plan(inputs("a.cpd"), None, ".cpd", several=False)
    with pytest.raises(UsageError, match="is an input"):
        files.plan(inputs("x/a.png", "y/a.cpd"), None, ".cpd", several=True)


def test_several_outputs_do_not_fit_a_file_or_standard_output(tmp_path):
    touch(tmp_path, "file")
    with pytest.raises(UsageError, match="name a folder"):
        files.plan(inputs("a.png", "b.png"), str(tmp_path / "file"), ".cpd", several=True)
    with pytest.raises(UsageError, match="takes one file"):
        files.plan(inputs("a.png", "b.png"), "-", ".cpd", several=True)


names = st.builds(
    "{}/{}{}".format,
    st.sampled_from(["x", "y"]),
    st.sampled_from(["a", "A", "a.png", "b"]),
    st.sampled_from(["", ".png", ".jpg", ".PNG", ".cpd"]),
)


@given(st.lists(names, min_size=1, max_size=6, unique=True), st.sampled_from([None, "out"]))
@pytest.mark.parametrize("suffix", [".cpd", ".png"])
def test_every_plan_is_one_to_one_or_refused(suffix, paths, output):
    try:
        jobs = files.plan(inputs(*paths), output, suffix, several=True)
    except UsageError:
        return
    written = targets(jobs)
    assert len(set(written)) == len(paths)
    assert not set(written) & set(paths)
    assert all(name.endswith(suffix) for name in map(str.lower, written))


# ------------------------------------------------------------------------------------------ atomic writes


def test_content_appears_whole_with_ordinary_permissions(tmp_path):
    target = tmp_path / "new" / "a.bin"
    with files.atomic_write(target) as stream:
        stream.write(b"one")
        assert not target.exists()
    assert target.read_bytes() == b"one"
    assert [path.name for path in target.parent.iterdir()] == ["a.bin"]
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, files.Interrupted])
@pytest.mark.parametrize("force", [False, True])
def test_a_failed_write_leaves_things_as_they_were(tmp_path, error, force):
    target = tmp_path / "a.bin"
    if force:
        target.write_bytes(b"before")

    def write() -> None:
        with files.atomic_write(target, force=force) as stream:
            stream.write(b"half")
            raise error(2)

    with pytest.raises(error):
        write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"before"] if force else [])


def test_existing_file_is_kept_unless_forced(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"before")
    with pytest.raises(MediaError, match=r"-f .*--skip-existing"), files.atomic_write(target):
        pytest.fail("the refusal must come before the content is made")
    with files.atomic_write(target, force=True) as stream:
        stream.write(b"after")
    assert target.read_bytes() == b"after"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    target = tmp_path / "a.bin"

    def write() -> None:
        with files.atomic_write(target) as stream:
            stream.write(b"late")
            target.write_bytes(b"early")

    with pytest.raises(MediaError, match="exists"):
        write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"early"]
    target.unlink()
    with files.atomic_write(target) as stream:
        stream.write(b"alone")
    assert target.read_bytes() == b"alone"


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege on Windows")
def test_a_link_keeps_pointing(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"before")
    link.symlink_to(real)
    with files.atomic_write(link, force=True) as stream:
        stream.write(b"after")
    assert link.is_symlink()
    assert real.read_bytes() == b"after"


def test_folder_or_file_in_the_way(tmp_path):
    touch(tmp_path, "file")
    for target in (tmp_path, tmp_path / "file" / "a.bin"):
        with pytest.raises(MediaError, match="folder"), files.atomic_write(target):
            pytest.fail("must be refused")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_devices_are_written_to_and_a_full_one_is_named():
    with files.atomic_write(Path("/dev/null")) as stream:
        stream.write(b"gone")
    assert Path("/dev/null").is_char_device()
    full = r"/dev/full: no space left.*; free some space"
    with pytest.raises(MediaError, match=full), files.atomic_write(Path("/dev/full")) as stream:
        stream.write(b"too much")


def test_a_stream_of_blocks_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    item = inputs("in")[0]
    jobs = files.Job(item, tmp_path / "out"), files.Job(item, None)

    def fail(job: files.Job) -> None:
        with files.open_output(job) as stream:
            stream.write(b"half")
            raise RuntimeError

    with open(tmp_path / "piped", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        for job in jobs:
            with pytest.raises(RuntimeError):
                fail(job)
        assert [path.name for path in tmp_path.iterdir()] == ["piped"]
        for job in jobs:
            with files.open_output(job) as stream:
                stream.write(b"????? world")
                stream.seek(0)
                stream.write(b"hello")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "piped").read_bytes() == b"hello world"
    with pytest.raises(MediaError, match="out exists"):
        fail(jobs[0])


# ------------------------------------------------------------------------------------------ the batch


@pytest.mark.parametrize("workers", [1, 3])
def test_batch_goes_past_failures_and_lists_them(capsys, workers):
    jobs = [files.Job(item, None) for item in inputs("a", "b", "c", "d")]

    def work(job, progress):
        progress(1, 2)
        if job.source.name in "bd":
            raise MediaError(f"{job.source.name} is bad; mend it")
        return files.Done(f"{job.source.name} done", notes=("a note",))

    assert not files.run_batch(jobs, work, workers=workers)
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["a done", "c done"]
    assert "note: a: a note" in err
    closing = err[err.index("compand: 2 failures") :].splitlines()
    assert sorted(closing[1:]) == ["  b is bad; mend it", "  d is bad; mend it"]


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_ends_the_batch(capsys, workers):
    jobs = [files.Job(item, None) for item in inputs(*(f"{number:03}" for number in range(200)))]
    tried = []

    def work(job, progress):
        tried.append(job)
        raise OSError(28, "No space left on device", "x.cpd")

    assert not files.run_batch(jobs, work, workers=workers)
    assert len(tried) < 100
    err = capsys.readouterr().err
    assert "compand: 200 failures" in err
    assert "not tried" in err


def test_wrong_usage_is_raised_once():
    jobs = [files.Job(item, None) for item in inputs("a", "b", "c")]

    def work(job, progress):
        raise UsageError("quality 99 is outside 1 to 8")

    for workers in (1, 2):
        with pytest.raises(UsageError):
            files.run_batch(jobs, work, workers=workers)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MediaError("a.png is empty; use another"), "a.png is empty; use another"),
        (MediaError("no picture"), "a.png: no picture"),
        (PermissionError(13, "Permission denied", "/x"), "/x: permission denied; check its permissions"),
        (MemoryError(), "a.png: not enough memory; use -j 1"),
        (RuntimeError("two\nlines"), "a.png: unexpected RuntimeError: two lines; COMPAND_DEBUG=1"),
    ],
)
def test_every_error_is_one_line_that_names_its_object(error, line):
    text = files.explain(error, "a.png")
    assert text.startswith(line)
    assert "\n" not in text
