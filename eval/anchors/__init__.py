"""Classical codecs and the identity, run through libraries that are installed."""

from __future__ import annotations

from collections.abc import Callable

from compand.eval.anchors import audio, images
from compand.eval.subjects import Subject

MISSING: dict[str, tuple[str, str]] = {**images.missing(), **audio.missing()}
"""Anchors that this machine lacks a library for: their medium and the remedy, by name."""


def builtin() -> dict[tuple[str, str], Callable[[], Subject]]:
    """The anchors that work here, by medium and name, in the order of tables."""
    return {
        (subject.medium, name): subject
        for module in (images, audio)
        for name, subject in module.ANCHORS.items()
        if name not in MISSING
    }
