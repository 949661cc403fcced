"""Distortion metrics: which there are, which work here, and what they say of a decoded item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from compand.errors import UsageError
from compand.eval.items import Signal
from compand.pictures import Picture
from compand.sounds import Sound


class Metric(NamedTuple):
    """A column of a table of measurements."""

    name: str
    title: str
    unit: str  # "" where it has none
    better: str  # "higher" or "lower"
    medium: str  # "image" or "audio"


METRICS = (
    Metric("psnr", "PSNR", "dB", "higher", "image"),
    Metric("ms_ssim", "MS-SSIM", "", "higher", "image"),
    Metric("lpips", "LPIPS", "", "lower", "image"),
    Metric("dists", "DISTS", "", "lower", "image"),
    Metric("psnr", "PSNR", "dB", "higher", "audio"),
    Metric("si_sdr", "SI-SDR", "dB", "higher", "audio"),
    Metric("sdr", "SDR", "dB", "higher", "audio"),
    Metric("log_mel", "log-mel distance", "dB", "lower", "audio"),
    Metric("pesq", "PESQ", "MOS-LQO", "higher", "audio"),
    Metric("stoi", "STOI", "", "higher", "audio"),
    Metric("visqol", "ViSQOL", "MOS-LQO", "higher", "audio"),
)
"""All metrics, in the order of their columns; both media have a PSNR."""


def for_medium(medium: str, wanted: Sequence[str] | None = None) -> tuple[list[Metric], list[str]]:
    """The metrics that can be computed here.

    Args:
        medium: "image" or "audio".
        wanted: names; None for all.

    Returns:
        The metrics in the order of their columns, and a notice for each wanted one that lacks a package or weights.

    Raises:
        UsageError: a wanted name is no metric of the medium.
    """
    known = [metric for metric in METRICS if metric.medium == medium]
    for name in wanted or ():
        if name not in (metric.name for metric in known):
            choice = ", ".join(metric.name for metric in known)
            raise UsageError(f"metric {name} does not exist for {medium}: choose from {choice}")
    chosen = [metric for metric in known if wanted is None or metric.name in wanted]
    lacking = {metric.name: _lacking(metric, wanted is not None) for metric in chosen}
    notices = [
        f"{metric.title} is left out: {lacking[metric.name]}" for metric in chosen if lacking[metric.name]
    ]
    return [metric for metric in chosen if not lacking[metric.name]], notices


def measure(metric: str, original: Signal, decoded: Signal) -> float:
    """One metric of a decoded item.

    Args:
        metric: name of a metric.
        original, decoded: signals of one size; of one rate where they are sounds.

    Returns:
        The figure; infinite for metrics in dB of signals that are equal.

    Raises:
        UsageError: the item is unfit for the metric (too small, silent, an unsupported rate), or the two signals do
            not have the same size.
    """
    media = {entry.medium for entry in METRICS if entry.name == metric}
    if not media:
        known = dict.fromkeys(entry.name for entry in METRICS)
        raise UsageError(f"metric {metric} does not exist: choose from {', '.join(known)}")
    if "image" in media and isinstance(original, Picture) and isinstance(decoded, Picture):
        from compand.eval.metrics import images

        return images.measure(metric, original, decoded)
    if "audio" in media and isinstance(original, Sound) and isinstance(decoded, Sound):
        from compand.eval.metrics import audio

        return audio.measure(metric, original, decoded)
    kinds = f"{type(original).__name__} and {type(decoded).__name__}"
    raise UsageError(f"{metric} cannot compare {kinds}: check the codec and its medium")


def _lacking(metric: Metric, named: bool) -> str:
    """Why a metric cannot be computed here, with the remedy; "" where it can."""
    if metric.medium == "image":
        from compand.eval.metrics import images

        return images.lacking(metric.name)
    from compand.eval.metrics import audio

    return audio.lacking(metric.name, named)
