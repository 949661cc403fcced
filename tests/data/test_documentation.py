"""The worked example of the documentation, run as it is written."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest

from compand import cli

ROOT = Path(__file__).parents[2]


def test_the_example_from_a_folder_to_a_classifier(tmp_path, monkeypatch):
    chapter = (ROOT / "codecs" / "data" / "README.md").read_text(encoding="utf-8")
    section = chapter.split("## From a folder to a trained classifier")[1].split("\n## ")[0]
    (script,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (tmp_path / "train").symlink_to(ROOT / "train")
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {"__name__": "__main__"})
    lines = commands.strip().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["compand", name] for name in ("pack", "pack", "info", "train")
    ]
    for line in lines:
        with pytest.raises(SystemExit) as end:
            cli.main(shlex.split(line.replace("--trainer.max_steps 100", "--trainer.max_steps 50"))[1:])
        assert end.value.code == 0
    assert (tmp_path / "grid.png").stat().st_size > 10000
    (metrics,) = tmp_path.glob("runs/*/*/metrics.csv")
    with metrics.open(newline="") as file:
        scores = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
    assert scores and scores[-1] > 0.7  # of two classes
