"""Synthetic drums and notes: more kinds of sound to learn separation from than a folder of samples has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RATE = 44100
SECONDS = 2.0

Wave = NDArray[np.float32]


def note(generator: np.random.Generator) -> Wave:
    """A pitched sound [N] with a peak of 1: harmonic partials (strings, basses, pads) or inharmonic ones (bells)."""
    time = np.arange(round(SECONDS * RATE)) / RATE
    pitch = np.exp(generator.uniform(np.log(45), np.log(1100)))
    if generator.random() < 0.25:
        ratios = np.sort(np.concatenate([[1.0], generator.uniform(1, 12, generator.integers(3, 9))]))
    else:
        ratios = np.arange(1.0, min(40.0, 14000 / pitch))
        ratios *= np.sqrt(1 + generator.choice([0, 1e-4, 5e-4]) * ratios**2)  # stiffness of a string
        if generator.random() < 0.25:
            ratios = ratios[::2]
    ratios = ratios[ratios * pitch < 16000][:40]
    levels = ratios ** -generator.uniform(0.4, 3) * generator.uniform(0.2, 1, len(ratios))
    levels[0] *= generator.choice([0.3, 1.0])
    decay = np.exp(generator.uniform(np.log(0.08), np.log(4)))
    damping = generator.uniform(0, 1)
    vibrato = generator.choice([0, 0, 0.002, 0.006]) * np.sin(2 * np.pi * generator.uniform(3, 7) * time)
    glide = generator.choice([0, 0, 0, 0.2]) * generator.uniform(-1, 1) * np.exp(-time / 0.1)
    cycles = np.cumsum(pitch * (1 + vibrato + glide)) / RATE
    detuning = generator.choice([0, 0.002, 0.006])
    wave = np.zeros(len(time))
    for ratio, level in zip(ratios, levels, strict=True):
        partial = np.sin(2 * np.pi * (ratio * cycles + generator.random()))
        if detuning:
            partial += np.sin(2 * np.pi * (ratio * (1 + detuning) * cycles + generator.random()))
        wave += level * partial * np.exp(-time / (decay / ratio**damping))
    if generator.random() < 0.3:
        wave = np.tanh(generator.uniform(1, 6) * wave / np.abs(wave).max())
    attack = np.exp(generator.uniform(np.log(0.001), np.log(0.15)))
    return _scaled(wave * np.minimum(time / attack, 1))


def drum(generator: np.random.Generator) -> Wave:
    """A struck sound [N] with a peak of 1: a falling tone, noise or metal, or several of them."""
    time = np.arange(round(SECONDS * RATE)) / RATE
    parts = generator.random(3) < np.array([0.5, 0.6, 0.3])
    if not parts.any():
        parts[1] = True
    wave = np.zeros(len(time))
    if parts[0]:  # skin: kick drums and toms
        low = np.exp(generator.uniform(np.log(38), np.log(250)))
        fall = 1 + generator.uniform(0, 4) * np.exp(-time / generator.uniform(0.005, 0.06))
        decay = np.exp(generator.uniform(np.log(0.04), np.log(0.5)))
        wave += np.sin(2 * np.pi * np.cumsum(low * fall) / RATE) * np.exp(-time / decay)
    if parts[1]:  # noise: snares, hats, claps
        noise = generator.standard_normal(len(time))
        decay = np.exp(generator.uniform(np.log(0.01), np.log(0.6)))
        wave += generator.uniform(0.2, 1) * _band(noise, generator) * np.exp(-time / decay)
    if parts[2]:  # metal: cymbals, cowbells
        pitches = generator.uniform(300, 9000, 8)
        tones = np.sign(np.sin(2 * np.pi * pitches[:, None] * time)).sum(0)
        decay = np.exp(generator.uniform(np.log(0.02), np.log(1.2)))
        wave += generator.uniform(0.2, 1) * _band(tones, generator) * np.exp(-time / decay)
    attack = generator.uniform(0.0003, 0.004)
    return _scaled(wave * np.minimum(time / attack, 1))


def _band(wave: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """A wave behind a random band-pass filter, with a standard deviation of 1."""
    spectrum = np.fft.rfft(wave)
    octaves = np.log2(np.arange(len(spectrum)) * RATE / len(wave) + 20)
    middle, width = np.log2(np.exp(generator.uniform(np.log(300), np.log(14000)))), generator.uniform(0.4, 3)
    filtered = np.fft.irfft(spectrum * np.exp(-(((octaves - middle) / width) ** 2)), n=len(wave))
    return filtered / filtered.std()


def _scaled(wave: NDArray[np.float64]) -> Wave:
    return (wave / max(np.abs(wave).max(), 1e-9)).astype(np.float32)
