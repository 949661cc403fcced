"""Which files of a folder are measured, and what becomes of the others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compand.errors import MediaError, UsageError
from compand.eval.items import Item, content_hash, find_items, load, reason
from compand.pictures import Picture
from compand.sounds import Sound


def picture(path: Path, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient = Image.linear_gradient("L").resize((20, 10))
    (Image.merge("LA", (gradient, gradient)) if mode == "LA" else gradient.convert(mode)).save(path)
    return path


def sound(path: Path, length: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Sound(np.linspace(-0.5, 0.5, length, dtype=np.float32)[None], 8000).save(path)
    return path


def test_items_are_found_in_all_folders_in_order(tmp_path: Path):
    for name in ("b/z.png", "a.jpg", "b/c/y.webp", "A.bmp"):
        picture(tmp_path / name)
    items, problems = find_items(tmp_path)
    assert [item.name for item in items] == ["A.bmp", "a.jpg", "b/c/y.webp", "b/z.png"]
    assert {item.medium for item in items} == {"image"}
    assert all(item.path == tmp_path / item.name for item in items)
    assert problems == []


def test_companions_and_hidden_files_are_passed_over_and_others_reported(tmp_path: Path):
    sound(tmp_path / "a.flac")
    for name in (
        "labels.csv",
        "notes.TXT",
        "README",
        "LICENSE",
        ".hidden.png",
        ".git/b.png",
        "c.xyz",
        "noname",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    items, problems = find_items(tmp_path)
    assert [item.name for item in items] == ["a.flac"]
    assert [problem.item for problem in problems] == ["c.xyz", "noname"]
    assert all(problem.codec == "" and problem.quality is None for problem in problems)


def test_a_folder_can_be_excluded(tmp_path: Path):
    for name in ("a.png", "out/plot.png", "b/out/c.png"):
        picture(tmp_path / name)
    sound(tmp_path / "out/examples/a.flac")
    (tmp_path / "out" / "odd.xyz").touch()
    items, problems = find_items(tmp_path, exclude=tmp_path / "b" / ".." / "out")
    assert [item.name for item in items] == ["a.png", "b/out/c.png"]
    assert problems == []


def test_a_problem_names_its_item_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "my photos"
    path = picture(folder / "b" / "a.png")
    path.write_bytes(b"nonsense")
    monkeypatch.chdir(tmp_path)
    for place in (path, path.relative_to(tmp_path)):
        item = Item("b/a.png", place, "image")
        with pytest.raises(MediaError) as caught:
            load(item)
        message = reason(caught.value, item)
        assert message.startswith("b/a.png") and "my photos" not in message
    item = Item("a.png", path, "image")
    gone = FileNotFoundError(2, "No such file or directory", "/var/tmp/x-1/coded")
    assert reason(gone, item).startswith("a.png: coded: no such file")
    text = "see https://a.org/b/c, 3 dB/octave or x/y/z"
    assert reason(MediaError(text), item) == f"a.png: {text}"


def test_mixed_folders_need_a_choice(tmp_path: Path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    sound(tmp_path / "c.wav")
    with pytest.raises(
        UsageError, match="2 images and 1 sounds: choose with --medium image or --medium audio"
    ):
        find_items(tmp_path)
    assert [item.name for item in find_items(tmp_path, "audio")[0]] == ["c.wav"]
    assert [item.name for item in find_items(tmp_path, "image")[0]] == ["a.png", "b.png"]


def test_a_file_is_a_folder_of_one(tmp_path: Path):
    path = picture(tmp_path / "only.png")
    assert find_items(path)[0] == [Item("only.png", path, "image")]


@pytest.mark.parametrize(
    ("name", "medium", "fact"),
    [
        ("nothing", None, "does not exist"),
        ("text.txt", None, "no image or sound"),
        ("folder", "image", "no image: name"),
        ("folder", "audio", "no sound: name"),
        ("folder", "video", "medium video does not exist"),
    ],
)
def test_nothing_to_measure_is_an_error(tmp_path: Path, name: str, medium: str | None, fact: str):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=fact):
        find_items(tmp_path / name, medium)


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", ".png"), ("L", ".png"), ("P", ".gif"), ("LA", ".png")])
def test_every_picture_is_loaded_as_rgb_without_transparency(tmp_path: Path, mode: str, suffix: str):
    item = Item(f"a{suffix}", picture(tmp_path / f"a{suffix}", mode), "image")
    loaded = load(item)
    assert isinstance(loaded, Picture)
    assert loaded.pixels.shape == (10, 20, 3) and loaded.alpha is None and loaded.icc is None
    assert ("transparency dropped" in loaded.notes) == (mode == "LA")
    with Image.open(item.path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(loaded.pixels, expected)


def test_a_sound_is_loaded_with_its_channels_and_rate(tmp_path: Path):
    loaded = load(Item("a.wav", sound(tmp_path / "a.wav"), "audio"))
    assert isinstance(loaded, Sound)
    assert (loaded.channels, loaded.length, loaded.rate) == (1, 100, 8000)


def test_unfit_files_say_why_in_one_line(tmp_path: Path):
    sound(tmp_path / "empty.wav", 0)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    (tmp_path / "broken.flac").write_bytes(b"fLaC" + bytes(20))
    for name, medium, fact in [
        ("empty.wav", "audio", "no samples"),
        ("broken.png", "image", "broken.png"),
        ("broken.flac", "audio", "broken.flac"),
        ("gone.png", "image", "does not exist"),
    ]:
        with pytest.raises(MediaError, match=fact) as caught:
            load(Item(name, tmp_path / name, medium))
        assert "\n" not in str(caught.value)


def test_the_hash_is_that_of_the_content(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(b"content")
    assert content_hash(Item("a.png", path, "image")) == hashlib.sha256(b"content").hexdigest()[:16]
    with pytest.raises(MediaError, match="cannot be read"):
        content_hash(Item("b.png", tmp_path / "b.png", "image"))
