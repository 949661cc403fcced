"""Distortion of sounds.

SI-SDR and the log-mel distance are computed a channel and averaged over the channels whose original is not silent, PSNR
and SDR over all channels together; PESQ, STOI and ViSQOL, which know one ear, of the mean of the channels. A sound that
was decoded to silence gets the worst value of its metric rather than none, so that means cannot gain by it.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compand.errors import UsageError
from compand.sounds import Sound, resample

MEL_WINDOWS = (2048, 1024, 512, 256)
"""Samples of the windows of the log-mel distance."""

MEL_FLOOR = -80.0
"""Least level of a mel band, in dB of a full-scale sine; differences below it cannot be heard."""

SI_SDR_FLOOR = -30.0
"""Least SI-SDR in dB; a mean over sounds would otherwise depend on how wrong the worst one is."""

PESQ_WORST = 1.0
"""MOS-LQO of a part that was decoded to silence."""

PESQ_SECONDS = 20
"""Longest part that PESQ is computed of; its reference implementation holds no more than 50 utterances."""

VISQOL_SPEECH_RATE = 24000
"""Highest sample rate in Hz that is judged in ViSQOL's speech mode."""

_PACKAGES = {"pesq": ("pesq", "pesq"), "stoi": ("pystoi", "eval"), "visqol": ("visqol", "visqol")}
"""Module and extra of compand of each metric that needs one."""


def sdr(original: Sound, decoded: Sound) -> float:
    """Signal-to-distortion ratio 10 log10(|x|^2 / |x - y|^2) in dB over all channels together; infinite if equal.

    The definition of Mitsufuji et al., "Music Demixing Challenge 2021" (2022), equation 1, and equal to the SNR;
    unlike BSS Eval no filter is fitted first.
    """
    x, y = (sound.samples.astype(np.float64).ravel() for sound in (original, decoded))
    return _ratio(x, x - y)


def psnr(original: Sound, decoded: Sound) -> float:
    """10 log10(1 / mean squared error) in dB over all channels together, for a peak of 1; infinite if equal."""
    error = (original.samples.astype(np.float64) - decoded.samples).ravel()
    return _ratio(np.ones(1), error / math.sqrt(error.size))


def si_sdr(original: Sound, decoded: Sound) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, mean over the channels; infinite if equal.

    Le Roux et al., "SDR - half-baked or well done?" (2019), equation 3; the mean is not subtracted. No channel counts
    for less than `SI_SDR_FLOOR`, which is also the value of a channel decoded to silence.
    """
    ratios = []
    for x, y in _channels(original, decoded):
        scale = float(x @ y) / float(x @ x)
        ratio = _ratio(scale * x, scale * x - y) if scale != 0 else SI_SDR_FLOOR
        ratios.append(max(ratio, SI_SDR_FLOOR))
    return float(np.mean(ratios))


def log_mel(original: Sound, decoded: Sound) -> float:
    """Multi-resolution log-mel distance in dB, mean over the channels; 0 if equal.

    The mean over windows of w = 2048, 1024, 512 and 256 samples of the mean over frames t and mel bands m of
    |L_x(t, m) - L_y(t, m)|, where L = max(10 log10 E, -80) and E is the energy in one of w / 32 triangular bands
    (HTK mel scale, 0 to half the sample rate) of a Hann-windowed spectrum with hops of w / 4. The spectrum is scaled so
    that the energies of a sine of amplitude 1 add up to 1. Sounds are continued by zeros.
    """
    import torch

    distances = []
    with torch.inference_mode():
        for x, y in _channels(original, decoded):
            for window in MEL_WINDOWS:
                levels_x, levels_y = (_mel_levels(each, original.rate, window) for each in (x, y))
                distances.append(float((levels_x - levels_y).abs().mean()))
    return float(np.mean(distances))


def pesq(original: Sound, decoded: Sound) -> float:
    """PESQ as MOS-LQO: ITU-T P.862.1 (narrow-band) at 8 kHz, else P.862.2 (wide-band), at 16 kHz.

    Sounds beyond 20 s are cut into equal parts of at most that; parts without utterances do not count in the mean.

    Raises:
        UsageError: shorter than a quarter of a second, or without an utterance.
    """
    import pesq as library

    rate, mode = (8000, "nb") if original.rate == 8000 else (16000, "wb")
    x, y = _mono(original, decoded, rate)
    if original.seconds < 0.25:
        raise UsageError(f"pesq needs 0.25 s of sound, there are {original.seconds:.3f} s: leave it out")
    parts = math.ceil(original.seconds / PESQ_SECONDS)
    scores = []
    for part_x, part_y in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        if not part_x.any():
            continue
        if not part_y.any():
            scores.append(PESQ_WORST)
            continue
        try:
            scores.append(library.pesq(rate, part_x, part_y, mode))
        except library.NoUtterancesError:
            continue
    if not scores:
        raise UsageError("pesq finds no utterance: leave the sound out")
    return float(np.mean(scores))


def stoi(original: Sound, decoded: Sound) -> float:
    """Short-time objective intelligibility, at most 1 (Taal et al., 2011), at 10 kHz by pystoi.

    Raises:
        UsageError: less than 0.4 s are within 40 dB of the loudest frame.
    """
    from pystoi import stoi as stoi_of

    x, y = _mono(original, decoded, original.rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi_of(x, y, original.rate))
        except (RuntimeWarning, ValueError):  # ValueError: not one whole frame
            fact = "stoi needs 0.4 s that are not silent"
            raise UsageError(f"{fact}, of {original.seconds:.3f} s in all: leave it out") from None


def visqol(original: Sound, decoded: Sound) -> float:
    """ViSQOL v3 as MOS-LQO (Chinen et al., 2020) by visqol-python: speech mode at 16 kHz (with the polynomial mapping,
    scaled to 5) up to 24 kHz, else audio mode at 48 kHz.

    Raises:
        UsageError: the sound is too short, or has no activity in speech mode.
    """
    mode, rate = ("speech", 16000) if original.rate <= VISQOL_SPEECH_RATE else ("audio", 48000)
    x, y = (samples.astype(np.float64) for samples in _mono(original, decoded, rate))
    try:
        return float(_visqol_api(mode).measure_from_arrays(x, y, rate).moslqo)
    except (ValueError, IndexError) as error:
        fact = " ".join(str(error).split())
        raise UsageError(f"visqol cannot judge {original.seconds:.3f} s ({fact}): leave it out") from None


_FUNCTIONS: Mapping[str, Callable[[Sound, Sound], float]] = MappingProxyType(
    {
        "psnr": psnr,
        "sdr": sdr,
        "si_sdr": si_sdr,
        "log_mel": log_mel,
        "pesq": pesq,
        "stoi": stoi,
        "visqol": visqol,
    }
)


def measure(metric: str, original: Sound, decoded: Sound) -> float:
    """See `compand.eval.metrics.measure`."""
    if original.rate != decoded.rate or original.samples.shape != decoded.samples.shape:
        shapes = " instead of ".join(
            f"{sound.channels} x {sound.length} at {sound.rate} Hz" for sound in (decoded, original)
        )
        raise UsageError(f"the decoded sound is {shapes}: the codec must restore size and rate")
    if original.length == 0:
        raise UsageError("the sound has no samples: leave it out")
    if not np.isfinite(decoded.samples).all():
        raise UsageError("the decoded sound has samples that are not numbers: the codec is at fault")
    if not original.samples.any():
        raise UsageError(f"{metric} is not defined, the original is silent: leave it out")
    return _FUNCTIONS[metric](original, decoded)


def lacking(metric: str, named: bool) -> str:
    """Why a metric cannot be computed here, with the remedy; "" where it can.

    Args:
        metric: its name.
        named: whether it was asked for by name.
    """
    if metric not in _PACKAGES:
        return ""
    module, extra = _PACKAGES[metric]
    if importlib.util.find_spec(module) is None:
        return f'{module} is not installed: pip install "compand[{extra}]"'
    if metric == "visqol" and not named and importlib.util.find_spec("numba") is None:
        return "it takes seconds for a second of sound without numba: pip install numba, or name it with --metrics"
    return ""


def _channels(original: Sound, decoded: Sound) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Pairs of channels whose original is not silent."""
    return [
        (x.astype(np.float64), y.astype(np.float64))
        for x, y in zip(original.samples, decoded.samples, strict=True)
        if x.any()
    ]


def _ratio(signal: NDArray[np.float64], error: NDArray[np.float64]) -> float:
    """Ratio of energies in dB."""
    noise = float(error @ error)
    if noise == 0:
        return math.inf
    energy = float(signal @ signal)
    return 10 * math.log10(energy / noise) if energy else -math.inf


def _mel_levels(samples: NDArray[np.float64], rate: int, window: int) -> Any:
    """Levels of mel bands in dB, float32 tensor [bands, frames]."""
    import torch

    hann, bands = _mel_bank(rate, window)
    signal = torch.from_numpy(samples.astype(np.float32))
    spectrum = torch.stft(
        signal, window, window // 4, window=hann, center=True, pad_mode="constant", return_complex=True
    )
    energy = bands @ spectrum.abs().square() * (4 / (window * hann.square().sum()))
    return 10 * energy.clamp(min=10 ** (MEL_FLOOR / 10)).log10()


@lru_cache(maxsize=16)
def _mel_bank(rate: int, window: int) -> Any:
    """Hann window [w] and triangular bands [w / 32, w / 2 + 1]."""
    import torch
    from torchaudio.functional import melscale_fbanks

    bands = melscale_fbanks(window // 2 + 1, 0.0, rate / 2, window // 32, rate, norm=None, mel_scale="htk")
    return torch.hann_window(window), bands.T.contiguous()


def _mono(original: Sound, decoded: Sound, rate: int) -> list[NDArray[np.float32]]:
    """The means of the channels at a rate, float32 [N]. Raises UsageError if the original's channels cancel."""
    mixed = []
    for sound in (original, decoded):
        mean = sound.samples.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
        mixed.append(resample(Sound(mean, sound.rate), rate).samples[0])
    if not mixed[0].any():
        raise UsageError("the channels of the original cancel each other in mono: leave the sound out")
    return mixed


@lru_cache(maxsize=2)
def _visqol_api(mode: str) -> Any:
    from visqol import VisqolApi

    api = VisqolApi()
    api.create(mode=mode, use_lattice_model=False)
    return api
