"""Codecs and anchors behind one contract, found by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compand import checkpoint
from compand.errors import BitstreamError, CheckpointError, UsageError
from compand.eval import subjects
from compand.eval.anchors.images import ImageIdentity, Png
from compand.pictures import Picture

PLUGIN = """
from compand.eval.anchors.images import ImageIdentity
from compand.eval.subjects import register_anchor

class Other(ImageIdentity):
    name = "other"

register_anchor("other", Other, "image")
"""


@pytest.fixture(autouse=True)
def only_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test end with it."""
    monkeypatch.setattr(subjects, "_registered", {})


def test_names_are_the_newest_checkpoints_and_the_anchors():
    names = subjects.names("image")
    newest = {info.codec: info.name for info in checkpoint.available() if info.medium == "image"}
    assert set(newest.values()) <= set(names)
    assert {"jpeg", "webp", "png", "identity"} <= set(names)
    assert {"mp3", "vorbis", "opus", "flac", "identity"} <= set(subjects.names("audio"))
    assert len(set(subjects.names())) == len(subjects.names())
    assert set(subjects.names()) == set(names) | set(subjects.names("audio"))


@pytest.mark.parametrize("medium", ["image", "audio"])
def test_everything_that_is_named_keeps_the_contract(medium: str):
    for name in subjects.names(medium):
        subject = subjects.find(name, medium)
        assert subject.name == name and subject.medium == medium
        assert subject.kind in ("compand", "classical", "lossless", "identity")
        assert list(subject.qualities) == sorted(set(subject.qualities))
        assert len(subject.qualities) >= (8 if subject.kind in ("compand", "classical") else 1)
        assert subject.title and subject.identity and subject.settings_note.endswith(".")
        assert subject.suffix.startswith(".")
        again = subjects.find(subject.source, medium)
        assert (again.name, again.identity) == (name, subject.identity)


@pytest.mark.parametrize(
    ("name", "medium", "right", "wrong"),
    [
        ("jpeg", "image", 50.0, (0.0, 101.0, 50.5)),
        ("jpeg-9d", "image", 50.0, (0.0, 50.5)),
        ("avif", "image", 50.0, (-1.0, 50.5)),
        ("png", "image", 9.0, (10.0, 0.5)),
        ("webp", "image", 50.5, (-1.0, 101.0)),
        ("jpeg2000", "image", 0.125, (0.0, 25.0)),
        ("identity", "image", 1.0, (2.0,)),
        ("hyperprior", "image", 2.5, (0.5, 9.0)),
        ("flac", "audio", 24.0, (16.5, 20.0)),
        ("opus", "audio", 6.5, (5.0, 300.0)),
        ("identity", "audio", 1.0, (0.0,)),
    ],
)
def test_a_quality_that_a_codec_has_not_is_refused_before_coding(name, medium, right, wrong):
    try:
        subject = subjects.find(name, medium)
    except UsageError as error:
        pytest.skip(str(error))
    subject.check_quality(right)
    for quality in wrong:
        with pytest.raises(UsageError, match=f"has no quality {quality:g}: choose"):
            subject.check_quality(quality)


def test_a_codec_name_means_its_newest_checkpoint():
    info = checkpoint.find("hyperprior")
    subject = subjects.find("hyperprior")
    assert subject.name == info.name and subject.identity == info.weights.hex()
    assert subject.qualities == tuple(range(1, 9))


def test_a_checkpoint_folder_codes_and_is_found_again(
    checkpoint_of: Callable[[str], Path], scenery: np.ndarray
):
    folder = checkpoint_of("factorized")
    subject = subjects.find(str(folder), "image")
    assert subject.source == str(folder.resolve()) and subject.name == folder.name
    original = Picture(scenery[:70, :90].copy(), None, None)
    sizes = []
    for quality in (subject.qualities[0], subject.qualities[-1]):
        data = subject.encode(original, quality)
        decoded = subjects.find(subject.source).decode(data)
        assert isinstance(decoded, Picture) and decoded.pixels.shape == (70, 90, 3)
        sizes.append(len(data))
    assert sizes[0] < sizes[1]
    assert subject.overhead(data) == 0
    with pytest.raises(UsageError, match="quality 99"):
        subject.encode(original, 99)
    with pytest.raises(BitstreamError):
        subject.decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("name", "medium", "fact"),
    [
        ("nothing", None, "codec nothing is unknown: known are .*jpeg"),
        ("opus", "image", "codec opus is unknown"),
        ("hyperprior", "audio", "codes image, not audio"),
        ("identity", None, "say which medium"),
    ],
)
def test_what_cannot_be_found_says_why(name: str, medium: str | None, fact: str):
    with pytest.raises(UsageError, match=fact):
        subjects.find(name, medium)


def test_a_folder_without_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        subjects.find(str(tmp_path))


def test_an_anchor_without_its_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch):
    from compand.eval import anchors

    monkeypatch.setitem(anchors.MISSING, "jpegxl", ("image", "pip install pillow-jxl-plugin"))
    assert "jpegxl" not in subjects.names("image")
    with pytest.raises(UsageError, match="jpegxl is not available here: pip install"):
        subjects.find("jpegxl")


def test_anchors_register_once():
    subjects.register_anchor("mine", Png, "image")
    subjects.register_anchor("mine", Png, "image")
    assert "mine" in subjects.names("image") and "mine" not in subjects.names("audio")
    assert isinstance(subjects.find("mine"), Png)
    for name in ("mine", "jpeg"):
        with pytest.raises(UsageError, match="exists already"):
            subjects.register_anchor(name, ImageIdentity, "image")
    with pytest.raises(UsageError, match="medium"):
        subjects.register_anchor("yours", Png, "video")


def test_plugins_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "compand_plugin_a.py").write_text(PLUGIN)
    (tmp_path / "compand_plugin_b.py").write_text("raise RuntimeError('first\\nsecond')")
    monkeypatch.syspath_prepend(tmp_path)
    subjects.load_plugins(["compand_plugin_a"])
    assert subjects.find("other").name == "other"
    for module, fact in [("compand_plugin_b", "first second"), ("compand_plugin_c", "No module named")]:
        with pytest.raises(UsageError, match=f"plug-in {module} cannot be imported .{fact}"):
            subjects.load_plugins([module])
    del sys.modules["compand_plugin_a"]
