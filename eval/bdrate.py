"""Bjontegaard deltas: the difference in rate of two codecs at equal quality, or in quality at equal rate, averaged.

Bjontegaard, VCEG-M33 (2001), with monotone piecewise cubic interpolation (pchip) between the points in place of a
polynomial, as JCT-VC uses it. Quality is PSNR, or any other figure that grows with rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from compand.errors import UsageError


class Curve(NamedTuple):
    """A rate-distortion curve; both grow from point to point."""

    rate: Sequence[float]  # bits per pixel or kilobits a second
    quality: Sequence[float]  # dB, where it is PSNR


class BdRate(NamedTuple):
    """A delta rate and the qualities that it was averaged over."""

    percent: float  # rate of the curve relative to the anchor's, 0 = equal, negative = the curve needs less
    low: float  # lowest and highest quality, in its unit
    high: float


class BdQuality(NamedTuple):
    """A delta in quality (BD-PSNR, where quality is PSNR) and the rates that it was averaged over."""

    difference: float  # in the unit of quality; positive = the curve is better
    low: float  # lowest and highest rate, in its unit
    high: float


def bd_rate(anchor: Curve, curve: Curve, rates: tuple[float, float] = (0.0, math.inf)) -> BdRate:
    """Mean difference of the logarithm of the rate, over the qualities that both curves have.

    Args:
        anchor: what the curve is compared with.
        curve: the curve judged.
        rates: lowest and highest rate; qualities that either curve, interpolated, reaches outside this range do not
            count.

    Raises:
        UsageError: a curve has fewer than two points or does not grow, or no quality is left.
    """
    curves = [_log_rate(each, rates) for each in (anchor, curve)]
    difference, low, high = _mean_difference(curves, "quality")
    return BdRate(100 * math.expm1(difference), low, high)


def bd_quality(anchor: Curve, curve: Curve) -> BdQuality:
    """Mean difference of the quality, over the logarithm of the rates that both curves have: BD-PSNR for PSNR.

    Raises:
        UsageError: a curve has fewer than two points or does not grow, or no rate is left.
    """
    curves = []
    for each in (anchor, curve):
        log_rate, quality = _checked(each)
        curves.append((PchipInterpolator(log_rate, quality), float(log_rate[0]), float(log_rate[-1])))
    difference, low, high = _mean_difference(curves, "rate")
    return BdQuality(difference, math.exp(low), math.exp(high))


def _mean_difference(
    curves: Sequence[tuple[PchipInterpolator, float, float]], axis: str
) -> tuple[float, float, float]:
    """The mean by which the second function exceeds the first where both are defined, and that range."""
    (first, *first_range), (second, *second_range) = curves
    low, high = max(first_range[0], second_range[0]), min(first_range[1], second_range[1])
    if low >= high:
        raise UsageError(f"the curves share no {axis}: add points")
    difference = (second.integrate(low, high) - first.integrate(low, high)) / (high - low)
    return float(difference), low, high


def _checked(curve: Curve) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logarithm of the rate, and quality. Raises UsageError for a curve that cannot be interpolated."""
    rate, quality = np.asarray(curve.rate, dtype=np.float64), np.asarray(curve.quality, dtype=np.float64)
    if rate.size < 2 or rate.shape != quality.shape or rate[0] <= 0:
        raise UsageError("a rate-distortion curve needs two points or more, with a rate each: add points")
    falls = np.flatnonzero(np.minimum(np.diff(rate), np.diff(quality)) <= 0)
    if falls.size:
        rates = f"{rate[falls[0]]:.4g} to {rate[falls[0] + 1]:.4g}"
        raise UsageError(f"the curve does not grow from rate {rates}: leave out a point")
    return np.log(rate), quality


def _log_rate(curve: Curve, rates: tuple[float, float]) -> tuple[PchipInterpolator, float, float]:
    """The logarithm of the rate as a function of quality, and its values where permitted rates begin and end."""
    log_rate, quality = _checked(curve)
    function = PchipInterpolator(log_rate, quality)
    low, high = max(rates[0], curve.rate[0]), min(rates[1], curve.rate[-1])
    if low >= high:
        raise UsageError(f"the curve has no rate in {rates[0]:g} to {rates[1]:g}: add points")
    return (
        PchipInterpolator(quality, log_rate),
        float(function(math.log(low))),
        float(function(math.log(high))),
    )
