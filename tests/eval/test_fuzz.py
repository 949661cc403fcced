"""The fuzz benchmark in small, and that it notices what it is there to notice."""

from __future__ import annotations

import numpy as np
import pytest

from compand.errors import BitstreamError
from compand.eval.benchmarks import fuzz
from compand.eval.benchmarks.fuzz import Case, Original
from compand.image_codec import ImageCodec
from compand.pictures import Picture


@pytest.fixture(scope="module")
def codec(exact) -> ImageCodec:
    return exact("hyperprior")


@pytest.fixture(scope="module")
def originals(codec) -> list[Original]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compand.image_codec.TILE", fuzz.TILE)
        return [Original(codec.encode(picture, quality=3), codec) for picture in fuzz.make_pictures()]


def test_no_damaged_file_ends_in_a_failure(codec):
    findings = fuzz.run(codec, cases=320)
    assert findings.failures == []
    assert findings.cases == 320
    assert sum(sum(counts.values()) for counts in findings.outcomes.values()) == 640
    assert findings.outcomes["truncate"].keys() <= {
        "BitstreamError naming the offset",
        "BitstreamError naming the chunk and the offset",
    }
    for name in ("flip", "truncate", "splice", "repaired_payload"):
        assert findings.outcomes[f"{name}, partial"]["part of the picture"] > 0
    assert findings.memory_after - findings.memory_before < 500e6


def test_originals_cover_tiles_extras_and_both_headers(originals):
    assert [len(original.content.chunks) for original in originals] == [5, 6, 1, 1]
    assert [original.content.header.compact for original in originals] == [False, False, True, False]
    assert originals[0].picture.alpha is not None
    assert originals[0].picture.icc is not None


def test_judge_tells_ends_apart(originals):
    original = originals[0]
    case = Case(original.data, (original,))
    assert fuzz.judge(case, original.picture) == ("intact picture", True)
    assert fuzz.judge(case, original.without(frozenset({1})))[0] == "part of the picture"
    assert fuzz.judge(case, BitstreamError("x", offset=3)) == ("BitstreamError naming the offset", True)
    assert not fuzz.judge(case, BitstreamError("two\nlines"))[1]
    assert not fuzz.judge(case, MemoryError())[1]
    changed = Picture(original.picture.pixels ^ np.uint8(1), original.picture.alpha, original.picture.icc)
    assert not fuzz.judge(case, changed)[1]
    assert fuzz.judge(case._replace(repaired=True), changed)[1]
    lost_alpha = Picture(original.picture.pixels, None, original.picture.icc)
    assert not fuzz.judge(case, lost_alpha)[1]
