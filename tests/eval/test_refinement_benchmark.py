"""The benchmark of encode-time refinement, on next to nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from compand import refinement as search
from compand.errors import UsageError
from compand.eval.benchmarks import refinement
from compand.eval.benchmarks.refinement import Draft, Trial


def trial(picture: str, quality: float, effort: int, size: int, db: float) -> Trial:
    return Trial(picture, quality, effort, size, 8000, db, 8.0 * size, 1.0 + effort)


def test_files_of_all_efforts_are_compared(checkpoint_of, scenery, tmp_path, capsys, monkeypatch):
    few = tuple(schedule._replace(steps=min(schedule.steps, 12)) for schedule in search.SCHEDULES)
    monkeypatch.setattr(search, "SCHEDULES", few)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(2):
        Image.fromarray(scenery[100 * i : 100 * i + 64, :96]).save(data / f"{i}.png")
    output = tmp_path / "refinement.json"
    options = [
        "--data",
        str(data),
        "-c",
        str(checkpoint_of("hyperprior")),
        "--device",
        "cpu",
        "-o",
        str(output),
    ]
    options += ["--qualities", "2", "6", "--efforts", "1"]
    made: list[tuple[float, int]] = []
    measure = refinement.measure

    def interrupted(codec, path, quality, effort):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append((quality, effort))
        return measure(codec, path, quality, effort)

    monkeypatch.setattr(refinement, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refinement.main(options)
    assert not output.exists()
    monkeypatch.setattr(refinement, "measure", lambda *job: (made.append(job[2:]), measure(*job))[1])
    refinement.main(options)
    assert sorted(made) == sorted((q, e) for q in (2.0, 6.0) for e in (0, 1) for _ in range(2))
    results = json.loads(output.read_text())["results"]
    assert len(results["trials"]) == 8 and list(results["efforts"]) == ["0", "1"]
    refined = results["efforts"]["1"]
    assert refined["bd_rate"] < 0 and refined["cost"]["mean"] < 0 and refined["cost"]["least"] <= 0
    assert refined["bd_rate_vtm"] is None and "against VTM" not in output.with_suffix(".md").read_text()
    assert not list(tmp_path.glob("*.draft")) and "R + lambda D" in capsys.readouterr().out
    with pytest.raises(UsageError, match="one quality"):
        refinement.main([*options, "--force", "--qualities", "3"])
    with pytest.raises(SystemExit):
        refinement.main([*options, "--force", "--efforts", "4"])


def test_figures_are_those_of_the_files():
    trials = [trial(p, q, 0, 100 * (q + 1), 30.0 + 5 * q) for p in "ab" for q in (1, 2, 3)]
    trials += [
        trial(p, q, 1, 90 * (q + 1) if p == "a" else 100 * (q + 1), 30.0 + 5 * q)
        for p in "ab"
        for q in (1, 2, 3)
    ]
    row = refinement.summary(trials, [0, 1])["1"]
    assert row["bd_rate"] == pytest.approx(-5)
    assert row["bd_rate_pictures"] == pytest.approx({"mean": -5, "least": 0, "most": -10})
    assert row["cost"] == pytest.approx({"mean": -5, "least": 0, "most": -10})
    assert (row["unchanged"], row["files"]) == (3, 6)
    assert np.allclose(row["bpp"], [8 * 95 * (q + 1) / 8000 for q in (1, 2, 3)])
    names = [f"kodim{i:02}" for i in range(1, 25)]
    kodak = [trial(p, q, 0, 300 * 2**q, 30.0 + 4 * q) for p in names for q in (0, 1)]
    assert isinstance(refinement.summary(kodak, [0])["0"]["bd_rate_vtm"], float)


def test_drafts_of_other_weights_are_forgotten(tmp_path):
    path = tmp_path / "a.draft"
    draft = Draft(path, {"weights": "1"})
    draft.add(trial("a", 1, 0, 100, 30))
    again = Draft(path, {"weights": "1"})
    assert again.find("a", 1, 0) == draft.trials[0] and again.find("a", 1, 1) is None
    path.write_text(path.read_text() + '{"picture": "b", "qua')  # cut off while it was written
    assert Draft(path, {"weights": "1"}).trials == draft.trials
    assert not Draft(path, {"weights": "2"}).trials
