"""Bjontegaard deltas against closed forms, the bjontegaard package, and figures that others published."""

from __future__ import annotations

import math

import bjontegaard
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compand.errors import UsageError
from compand.eval.bdrate import Curve, bd_quality, bd_rate
from compand.eval.published import TITLES, is_kodak, kodak


def line(offset: float, slope: float, psnr: np.ndarray) -> Curve:
    """ln rate = offset + slope * PSNR."""
    return Curve(np.exp(offset + slope * psnr).tolist(), psnr.tolist())


@given(st.floats(0.2, 5.0), st.floats(0.05, 0.4))
def test_a_constant_factor_in_rate_is_the_bd_rate(factor, slope):
    psnr = np.linspace(26, 42, 7)
    anchor = line(-9, slope, psnr)
    result = bd_rate(anchor, Curve([factor * rate for rate in anchor.rate], psnr.tolist()))
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
    bent = Curve([rate * 3 if rate > 2.5 else rate for rate in curve.rate], curve.quality)
    assert bd_rate(anchor, bent) != bd_rate(anchor, curve)
    assert bd_rate(anchor, bent, (0.1, 1.5)) == bd_rate(anchor, curve, (0.1, 1.5))


@pytest.mark.parametrize(
    "name", ["jpeg", "webp", "bpg", "av1", "mbt2018-mean", "bmshj2018-hyperprior", "elic2022"]
)
def test_equals_the_bjontegaard_package(name):
    anchor, curve = kodak()["vtm"].curve, kodak()[name].curve
    expected = bjontegaard.bd_rate(
        anchor.rate, anchor.quality, curve.rate, curve.quality,
        method="pchip", require_matching_points=False, min_overlap=0,
    )  # fmt: skip
    assert bd_rate(anchor, curve).percent == pytest.approx(expected, abs=1e-6)


@given(st.floats(-3, 3), st.floats(2, 6), st.floats(0.05, 0.3), st.floats(0.5, 1.5))
def test_a_constant_gain_is_the_bd_psnr(gain, slope, low, high):
    def curve(start: float, end: float, offset: float) -> Curve:
        rate = np.geomspace(start, end, 6)
        return Curve(rate.tolist(), (30 + offset + slope * np.log2(rate)).tolist())

    result = bd_quality(curve(0.1, 1.0, 0), curve(low, high, gain))
    assert result.difference == pytest.approx(gain, abs=1e-9)
    assert (result.low, result.high) == pytest.approx((max(0.1, low), min(1.0, high)))


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("psnr", "jpeg"),
        ("psnr", "webp"),
        ("psnr", "bpg"),
        ("psnr", "mbt2018-mean"),
        ("psnr", "elic2022"),
        ("ms_ssim", "jpeg"),
        ("ms_ssim", "mbt2018-mean"),
    ],
)
def test_bd_psnr_equals_the_bjontegaard_package(metric, name):
    anchor, curve = kodak(metric)["vtm"].curve, kodak(metric)[name].curve
    expected = bjontegaard.bd_psnr(
        anchor.rate, anchor.quality, curve.rate, curve.quality,
        method="pchip", require_matching_points=False, min_overlap=0,
    )  # fmt: skip
    assert bd_quality(anchor, curve).difference == pytest.approx(expected, abs=1e-9)


def test_deltas_change_sign_with_the_roles():
    first, second = kodak()["webp"].curve, kodak()["vtm"].curve
    assert bd_quality(first, second).difference == pytest.approx(-bd_quality(second, first).difference)
    ratio = (1 + bd_rate(first, second).percent / 100) * (1 + bd_rate(second, first).percent / 100)
    assert ratio == pytest.approx(1)


def test_curves_without_a_common_rate_are_refused():
    with pytest.raises(UsageError, match="share no rate"):
        bd_quality(Curve([0.1, 0.2], [30, 32]), Curve([0.3, 0.4], [30, 32]))


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


@pytest.mark.parametrize("metric", ["psnr", "ms_ssim"])
def test_every_published_curve_has_a_source_and_grows(metric):
    assert kodak(metric).keys() >= {"vtm", "jpeg", "webp", "bpg", "mbt2018-mean"}
    for name, (curve, source) in kodak(metric).items():
        assert metric == "psnr" or 0.7 < min(curve.quality) <= max(curve.quality) < 1
        assert source, name
        assert list(curve.rate) == sorted(curve.rate)
        assert len(curve.rate) == len(curve.quality) >= 2, name


def test_curves_that_are_shown_are_in_the_table():
    assert TITLES.keys() <= kodak().keys()


def test_kodak_is_told_by_its_24_names():
    names = [f"kodim{number:02}.png" for number in range(1, 25)]
    assert is_kodak(names)
    assert is_kodak([f"lossless/{name}" for name in names])
    assert not is_kodak(names[:-1])
    assert not is_kodak([*names, "kodim25.png"])
    assert not is_kodak([*names[:-1], "photo.png"])


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
