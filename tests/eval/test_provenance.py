"""The recorded command: typeable, and without this machine's folders."""

from __future__ import annotations

import shlex
import sys

import pytest

from compand.eval import provenance


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        (["rd", "/data/my photos", "-o", "/tmp/out"], ["rd", "my photos", "-o", "out"]),
        (["--output=/tmp/out", "-o/tmp/b"], ["--output=out", "-ob"]),
        (["-c", "jpeg,/runs/mine,/runs/other"], ["-c", "jpeg,mine,other"]),
        (["-q", "jpeg=10,50;webp=10;/runs/mine=1,2"], ["-q", "jpeg=10,50;webp=10;mine=1,2"]),
        (["a/b.png", "timm:x?random"], ["a/b.png", "timm:x?random"]),
        ([str(provenance.RESULTS / "a.json")], ["eval/results/a.json"]),
    ],
)
def test_the_command_can_be_typed_and_names_no_folder(arguments, recorded, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/compand", "eval", *arguments])
    command = provenance.provenance("data")["command"]
    assert shlex.split(command) == ["compand", "eval", *recorded]


def test_lists_with_semicolons_are_quoted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compand", "-q", "jpeg=10,50;webp=10"])
    assert provenance.provenance("data")["command"] == "compand -q 'jpeg=10,50;webp=10'"
