"""What is coded when no data are given: a photograph, or a synthetic sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from compand.demo import photograph

PICTURE_SIZE = (768, 512)  # width and height in pixels
SOUND_RATE = 48_000  # Hz
SOUND_SECONDS = 10

_NOTES = (220.0, 277.18, 329.63, 440.0, 392.0, 329.63, 293.66, 246.94)  # Hz, one every half second
_PARTIALS = 8
_PEAK = 0.5


def write_picture(folder: Path) -> tuple[Path, str]:
    """Writes the photograph of `compand demo` as a PNG file of PICTURE_SIZE. Returns the file and what it is."""
    source = photograph()
    with Image.open(source) as image:
        fitted = ImageOps.fit(image.convert("RGB"), PICTURE_SIZE, Image.Resampling.LANCZOS)
    path = folder / f"{source.stem}.png"
    fitted.save(path)
    return path, f"{source.name} fitted to {PICTURE_SIZE[0]} x {PICTURE_SIZE[1]}"


def write_sound(folder: Path) -> tuple[Path, str]:
    """Writes `mixture()` as a 16-bit FLAC file. Returns the file and what it is."""
    path = folder / "mixture.flac"
    soundfile.write(path, mixture().T, SOUND_RATE, subtype="PCM_16")
    return (
        path,
        f"synthetic mixture of tones and noise, {SOUND_SECONDS} s, stereo, {SOUND_RATE} Hz (no recording)",
    )


def mixture() -> NDArray[np.float32]:
    """Decaying harmonic tones over bursts of noise and a steady hiss, always the same: float32 [2, N]."""
    generator = np.random.default_rng(0)
    length = SOUND_RATE * SOUND_SECONDS
    left, right = 0.002 * generator.standard_normal((2, length))
    step = SOUND_RATE // 2
    time = np.arange(2 * step) / SOUND_RATE
    for number, start in enumerate(range(0, length, step)):
        pitch = _NOTES[number % len(_NOTES)]
        partials = [np.sin(2 * np.pi * pitch * k * time) / k**1.5 for k in range(1, _PARTIALS + 1)]
        tone = np.sum(partials, axis=0) * np.exp(-3 * time) * np.minimum(time * 200, 1)
        burst = generator.standard_normal(time.size) * np.exp(-40 * time)
        place = slice(start, min(start + time.size, length))
        size = place.stop - start
        balance = 0.3 + 0.4 * (number % 2)
        left[place] += balance * tone[:size] + 0.4 * burst[:size]
        right[place] += (1 - balance) * tone[:size] + 0.4 * burst[:size]
    samples = np.stack([left, right])
    return (samples * (_PEAK / np.abs(samples).max())).astype(np.float32)
