"""The benchmarks that measure rate, time and memory, on next to nothing."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from PIL import Image

from compand.eval.benchmarks import kodak, memory, speed
from compand.eval.benchmarks.kodak import Trial


def test_kodak_measures_files(checkpoint_of, scenery, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(2):
        Image.fromarray(scenery[100 * i : 100 * i + 128, :192]).save(data / f"{i}.png")
    options = ["--data", str(data), "--codec", str(checkpoint_of("hyperprior")), "--levels", "1", "4", "8"]
    kodak.main([*options, "-o", str(tmp_path / "kodak.json")])
    results = json.loads((tmp_path / "kodak.json").read_text())["results"]
    assert len(results["trials"]) == 6
    assert results["violations"] == {
        "payload": 0,
        "file": sum(m > 0 for m in file_margins(results["trials"])),
    }
    for trial in results["trials"]:
        assert trial["bpp"] == 8 * trial["file_bytes"] / (128 * 192)
    assert results["curve"]["bpp"] == sorted(results["curve"]["bpp"])
    assert [row["anchor"] for row in results["bd_rate"]][:4] == ["VTM", "JPEG", "WebP", "BPG"]
    with Image.open(tmp_path / "kodak.png") as plot:
        assert plot.size == (1200, 825)
    assert "against it" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        kodak.main([*options, "-o", str(tmp_path / "kodak.json")])


def file_margins(trials):
    return [Trial(**trial).file_margin for trial in trials]


def test_margins_and_means():
    a, b = (Trial(name, 2.0, size, size - 20, 1000.0, rate, psnr) for name, size, rate, psnr in
            [("a", 1046, 0.5, 30.0), ("b", 1050, 0.7, 34.0)])  # fmt: skip
    assert a.payload_margin == pytest.approx(0)
    assert a.file_margin == pytest.approx(20)
    assert b.payload_margin == pytest.approx(4)
    assert kodak.mean_curve([a, b]) == (pytest.approx([0.6]), pytest.approx([32.0]))


def test_mosaic_is_reproducible_and_not_smooth(hopper):
    picture = memory.mosaic([hopper], 1100, 1050)
    assert picture.shape == (1100, 1050, 3)
    assert np.array_equal(picture, memory.mosaic([hopper], 1100, 1050))
    assert np.abs(np.diff(picture[:, :, 1].astype(int), axis=0)).mean() > 2


def test_stopwatch_splits_times():
    class Worker:
        def part(self):
            time.sleep(0.002)

    worker, stopwatch = Worker(), speed.Stopwatch()
    stopwatch.watch("part", worker, "part")

    def action():
        worker.part()
        worker.part()
        time.sleep(0.001)

    times = stopwatch.measure(action, warm_up=1, repetitions=3)
    assert len(times.total) == len(times.parts["part"]) == len(times.parts["rest"]) == 3
    for total, part, rest in zip(times.total, times.parts["part"], times.parts["rest"], strict=True):
        assert part >= 0.004
        assert rest >= 0.001
        assert total == pytest.approx(part + rest)
    assert speed.summary(times.merged(times))["repetitions"] == 6


def test_every_variant_names_a_coder_of_the_same_size(hopper):
    assert speed.load_picture(hopper).shape == (512, 768, 3)
    assert {variant.tuned for variant in speed.VARIANTS.values() if not variant.ours} == {True, False}
