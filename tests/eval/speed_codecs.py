"""Codecs of another package, as --plugin takes them, that show how a run times codecs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from compand.eval.subjects import Subject, register_anchor

PLACE = "COMPAND_TEST_PLACE"
"""Environment variable that names a file for what a codec finds."""


class Probe(Subject):
    """Keeps the signal in memory, and notes its process and what it may use."""

    name = title = "probe"
    medium = "image"
    kind = "classical"
    identity = "probe 1"
    settings_note = "notes its process."
    qualities = (1.0, 2.0, 3.0, 4.0)
    suffix = ".probe"
    _signal = None

    def encode(self, signal, quality):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        facts = {"pid": os.getpid(), "quality": quality, "cores": cores, "omp": os.environ["OMP_NUM_THREADS"]}
        with open(os.environ[PLACE], "a", encoding="utf-8") as stream:
            stream.write(json.dumps(facts) + "\n")
        self._signal = signal
        return b"probe"

    def decode(self, data):
        return self._signal


class Endless(Probe):
    """Never ends."""

    name = title = "endless"

    def encode(self, signal, quality):
        super().encode(signal, quality)
        time.sleep(600)


class Dying(Probe):
    """Ends its process."""

    name = title = "dying"

    def encode(self, signal, quality):
        os._exit(7)


def facts(place: Path) -> list[dict]:
    """What was noted in a file."""
    return [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]


for subject in (Probe, Endless, Dying):
    register_anchor(subject.name, subject, "image")
