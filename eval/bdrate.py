"""Bjontegaard delta rate: the difference in rate of two codecs at equal quality, averaged over quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from compand.errors import UsageError


class Curve(NamedTuple):
    """A rate-distortion curve; both grow from point to point."""

    bpp: Sequence[float]  # bits per pixel
    psnr: Sequence[float]  # dB


class BdRate(NamedTuple):
    """A delta rate and the qualities that it was averaged over."""

    percent: float  # rate of the curve relative to the anchor's, 0 = equal, negative = the curve needs less
    low: float  # dB
    high: float  # dB


def bd_rate(anchor: Curve, curve: Curve, rates: tuple[float, float] = (0.0, math.inf)) -> BdRate:
    """Mean difference of the logarithm of the rate, over the qualities that both curves have.

    Bjontegaard, VCEG-M33 (2001), with monotone piecewise cubic interpolation (pchip) of the logarithm of the rate
    over PSNR in place of a polynomial, as JCT-VC uses it.

    Args:
        anchor: what the curve is compared with.
        curve: the curve judged.
        rates: bits per pixel; qualities that either curve, interpolated, reaches outside this range do not count.

    Raises:
        UsageError: a curve has fewer than two points or does not grow, or no quality is left.
    """
    functions, lows, highs = zip(*(_log_rate(each, rates) for each in (anchor, curve)), strict=True)
    low, high = max(lows), min(highs)
    if low >= high:
        raise UsageError(f"the curves share no quality (from {low:.2f} dB, to {high:.2f} dB): add points")
    difference = (functions[1].integrate(low, high) - functions[0].integrate(low, high)) / (high - low)
    return BdRate(100 * math.expm1(difference), low, high)


def _log_rate(curve: Curve, rates: tuple[float, float]) -> tuple[PchipInterpolator, float, float]:
    """The logarithm of the rate as a function of PSNR, and the PSNR with which the permitted rates begin and end."""
    bpp, psnr = np.asarray(curve.bpp, dtype=np.float64), np.asarray(curve.psnr, dtype=np.float64)
    grows = bpp.size > 1 and bpp.shape == psnr.shape and bpp[0] > 0
    if not grows or min(np.diff(bpp).min(), np.diff(psnr).min()) <= 0:
        raise UsageError(
            "a rate-distortion curve needs two points or more, and must grow in rate and in PSNR"
        )
    log_rate = np.log(bpp)
    quality = PchipInterpolator(log_rate, psnr)
    low = max(rates[0], bpp[0])
    high = min(rates[1], bpp[-1])
    if low >= high:
        raise UsageError(f"a curve has no rate in {rates[0]:g} to {rates[1]:g} bits per pixel: add points")
    return PchipInterpolator(psnr, log_rate), float(quality(math.log(low))), float(quality(math.log(high)))
