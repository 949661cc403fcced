"""BD-rates against closed forms, against the bjontegaard package, and against figures that others published."""

from __future__ import annotations

import math

import bjontegaard
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compand.errors import UsageError
from compand.eval.bdrate import Curve, bd_rate
from compand.eval.published import kodak


def line(offset: float, slope: float, psnr: np.ndarray) -> Curve:
    """ln rate = offset + slope * PSNR."""
    return Curve(np.exp(offset + slope * psnr).tolist(), psnr.tolist())


@given(st.floats(0.2, 5.0), st.floats(0.05, 0.4))
def test_a_constant_factor_in_rate_is_the_bd_rate(factor, slope):
    psnr = np.linspace(26, 42, 7)
    anchor = line(-9, slope, psnr)
    result = bd_rate(anchor, Curve([factor * rate for rate in anchor.bpp], psnr.tolist()))
    assert result.percent == pytest.approx(100 * (factor - 1), abs=1e-6)
    assert (result.low, result.high) == pytest.approx((26, 42))


@given(st.floats(0.1, 0.3), st.floats(0.1, 0.3), st.floats(-0.5, 0.5), st.floats(24, 30), st.floats(32, 40))
def test_straight_lines_in_the_logarithm(slope, other_slope, shift, low, high):
    anchor = line(-6, slope, np.linspace(22, 36, 6))
    curve = line(-6 + shift, other_slope, np.linspace(low, high, 8))
    result = bd_rate(anchor, curve)
    start, end = max(22, low), min(36, high)
    mean = shift + (other_slope - slope) * (start + end) / 2
    assert result.percent == pytest.approx(100 * math.expm1(mean), abs=1e-6)
    assert (result.low, result.high) == pytest.approx((start, end))


def test_only_the_permitted_rates_count():
    psnr = np.linspace(20, 44, 25)
    anchor, curve = line(-8, 0.2, psnr), line(-7.5, 0.2, psnr)
    result = bd_rate(anchor, curve, (0.1, 1.5))
    # Both curves have a rate of at least 0.1 from where the cheaper one reaches it, and similarly above.
    assert result.low == pytest.approx((math.log(0.1) + 8) / 0.2)
    assert result.high == pytest.approx((math.log(1.5) + 7.5) / 0.2)
    assert result.percent == pytest.approx(100 * math.expm1(0.5), abs=1e-6)


def test_rates_outside_do_not_matter():
    psnr = np.linspace(20, 44, 25)
    anchor, curve = line(-8, 0.2, psnr), line(-7.5, 0.2, psnr)
    bent = Curve([rate * 3 if rate > 2.5 else rate for rate in curve.bpp], curve.psnr)
    assert bd_rate(anchor, bent) != bd_rate(anchor, curve)
    assert bd_rate(anchor, bent, (0.1, 1.5)) == bd_rate(anchor, curve, (0.1, 1.5))


@pytest.mark.parametrize(
    "name", ["jpeg", "webp", "bpg", "av1", "mbt2018-mean", "bmshj2018-hyperprior", "elic2022"]
)
def test_equals_the_bjontegaard_package(name):
    anchor, curve = kodak()["vtm"].curve, kodak()[name].curve
    expected = bjontegaard.bd_rate(
        anchor.bpp, anchor.psnr, curve.bpp, curve.psnr,
        method="pchip", require_matching_points=False, min_overlap=0,
    )  # fmt: skip
    assert bd_rate(anchor, curve).percent == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("jpeg", 208),
        ("webp", 79),
        ("bmshj2018-factorized", 68),
        ("bmshj2018-hyperprior", 30.5),
        ("elic2022", -7),
    ],
)
def test_the_published_curves_give_the_known_figures(name, percent):
    assert bd_rate(kodak()["vtm"].curve, kodak()[name].curve).percent == pytest.approx(percent, abs=0.6)


def test_every_published_curve_has_a_source_and_grows():
    for name, (curve, source) in kodak().items():
        assert source, name
        assert list(curve.bpp) == sorted(curve.bpp)
        assert len(curve.bpp) == len(curve.psnr) >= 2, name


@pytest.mark.parametrize(
    "curve",
    [
        Curve([0.5], [30]),
        Curve([0.5, 0.4], [30, 32]),
        Curve([0.4, 0.5], [32, 32]),
        Curve([0.0, 0.5], [30, 32]),
        Curve([0.1, 0.5], [30, 32, 34]),
        Curve([0.1, 0.5], [50, 55]),
        Curve([2.0, 3.0], [30, 32]),
    ],
    ids=[
        "one point",
        "falling rate",
        "flat PSNR",
        "no rate",
        "unequal lengths",
        "no overlap",
        "outside the rates",
    ],
)
def test_unusable_curves_are_refused(curve):
    with pytest.raises(UsageError) as caught:
        bd_rate(line(-6, 0.2, np.linspace(22, 36, 6)), curve, (0.1, 1.5))
    assert "\n" not in str(caught.value)
