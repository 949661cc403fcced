"""The benchmarks that measure rate, time and memory, on next to nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from compand.eval.benchmarks import estimate, memory
from compand.eval.benchmarks.estimate import Trial


def test_estimate_holds_files_against_the_model(checkpoint_of, scenery, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(2):
        Image.fromarray(scenery[100 * i : 100 * i + 128, :192]).save(data / f"{i}.png")
    options = ["--data", str(data), "--codec", str(checkpoint_of("hyperprior")), "--levels", "1", "4", "8"]
    estimate.main([*options, "-o", str(tmp_path / "estimate.json")])
    results = json.loads((tmp_path / "estimate.json").read_text())["results"]
    trials = [Trial(**trial) for trial in results["trials"]]
    assert len(trials) == 6
    assert results["violations"] == {"payload": 0, "file": sum(trial.file_margin > 0 for trial in trials)}
    assert all(trial.payload_bytes < trial.file_bytes for trial in trials)
    assert "0 of 6 payloads" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        estimate.main([*options, "-o", str(tmp_path / "estimate.json")])


def test_margins():
    a, b = (Trial("a", 2.0, size, size - 20, 1000.0) for size in (1046, 1050))
    assert a.payload_margin == pytest.approx(0)
    assert a.file_margin == pytest.approx(20)
    assert b.payload_margin == pytest.approx(4)
    assert estimate.margins([a, b], "file") == pytest.approx([20, 24])


def test_mosaic_is_reproducible_and_not_smooth(hopper):
    picture = memory.mosaic([hopper], 1100, 1050)
    assert picture.shape == (1100, 1050, 3)
    assert np.array_equal(picture, memory.mosaic([hopper], 1100, 1050))
    assert np.abs(np.diff(picture[:, :, 1].astype(int), axis=0)).mean() > 2
