"""Files of every release decode for ever: symbols exactly, pictures and sounds up to floating-point rounding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from golden.make import symbol_digest

import compand
import compand.checkpoint
import compand.coding.container
from compand.pictures import psnr, read_picture
from compand.sounds import Sound, read_sound

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("*/*.cpd"))


@pytest.fixture(scope="module")
def codecs() -> dict[str, compand.Codec]:
    return {release: compand.load(release, device="cpu") for release in {path.parent.name for path in FILES}}


def test_every_release_has_golden_files() -> None:
    assert {info.name for info in compand.available()} == {path.parent.name for path in FILES}


def test_compact_files_are_unambiguous() -> None:
    """A compact file has two bytes of the symbols fingerprint: releases must differ there, or share all four."""
    first: dict[tuple[str, bytes], bytes] = {}
    for info in compand.available():
        assert first.setdefault((info.codec, info.symbols[:2]), info.symbols) == info.symbols


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden_file_decodes(path: Path, codecs: dict[str, compand.Codec]) -> None:
    data = path.read_bytes()
    header = compand.coding.container.read_header(data)
    assert compand.checkpoint.for_header(header).name == path.parent.name
    with symbol_digest() as digest:
        decoded = codecs[path.parent.name].decode(data)
    assert digest.hexdigest() == json.loads((path.parent / "symbols.json").read_text())[path.stem]
    if isinstance(decoded, Sound):
        recorded = read_sound(path.with_suffix(".flac"))
        assert (decoded.rate, decoded.samples.shape) == (recorded.rate, recorded.samples.shape)
        error = np.square(decoded.samples - recorded.samples).mean()
        assert error < 1e-4 * np.square(recorded.samples).mean() + 1e-12
        return
    expected = read_picture(path.with_suffix(".png"))
    assert decoded.pixels.shape == expected.pixels.shape
    # Synthesis may run in bfloat16 or in float32, by the machine.
    assert psnr(decoded.pixels, expected.pixels) > 45
    assert (decoded.alpha is None) == (expected.alpha is None)
    if expected.alpha is not None:
        assert np.array_equal(decoded.alpha, expected.alpha)
