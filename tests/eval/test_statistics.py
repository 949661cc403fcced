"""Intervals, tests and correlations against closed forms, SciPy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from compand.errors import UsageError
from compand.eval.perception.statistics import (
    Bootstrap,
    compare,
    drop_correlation,
    holm,
    interval,
    mcnemar,
    rank_correlation,
    scored,
)


def accuracy(total: np.ndarray) -> np.ndarray:
    return total[..., 0] / total[..., 1]


def right(flags) -> np.ndarray:
    """Outcomes [items, 2] of a classifier."""
    flags = np.asarray(flags, dtype=np.float64)
    return np.stack([flags, np.ones_like(flags)], axis=-1)


def compared(bootstrap, first, second, pairwise="bootstrap"):
    return compare(scored(bootstrap, accuracy, first), scored(bootstrap, accuracy, second), pairwise)


def correlated(bootstrap, outcomes, values, better):
    points = [scored(bootstrap, accuracy, outcomes[:, point]) for point in range(outcomes.shape[1])]
    return drop_correlation(bootstrap, points, values, better)


def test_samples_draw_every_item_equally_often_and_as_many_as_there_are():
    bootstrap = Bootstrap(50)
    drawn = bootstrap.sums(np.eye(50))
    assert np.array_equal(drawn.sum(1), np.full(bootstrap.samples, 50))
    assert drawn.mean(0) == pytest.approx(np.ones(50), abs=0.05)
    assert np.array_equal(drawn, np.round(drawn))
    # Draws with replacement are multinomial: each count has variance 1 - 1/n.
    assert drawn.var() == pytest.approx(1 - 1 / 50, rel=0.03)


def test_the_same_samples_every_time():
    values = np.random.default_rng(1).normal(size=(30, 4, 3))
    assert np.array_equal(Bootstrap(30).sums(values), Bootstrap(30).sums(values))
    assert not np.array_equal(Bootstrap(30).sums(values), Bootstrap(30, seed=1).sums(values))
    assert Bootstrap(30, 70).sums(values).shape == (70, 4, 3)


def test_many_points_at_once_equal_one_at_a_time():
    values = np.random.default_rng(2).normal(size=(40, 5, 2))
    bootstrap = Bootstrap(40)
    together = bootstrap.sums(values)
    for point in range(5):
        assert together[:, point] == pytest.approx(bootstrap.sums(values[:, point]))


@pytest.mark.parametrize(("rate", "items"), [(0.5, 400), (0.8, 1000), (0.93, 300)])
def test_the_interval_of_an_accuracy_is_the_binomial_one(rate, items):
    correct = round(rate * items)
    flags = np.arange(items) < correct
    value, low, high = scored(Bootstrap(items, 4000), accuracy, right(flags)).score
    half = 1.96 * math.sqrt(value * (1 - value) / items)
    assert value == correct / items
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.12)


def test_the_interval_of_a_ratio_of_sums_agrees_with_scipy():
    generator = np.random.default_rng(3)
    outcomes = np.stack([generator.gamma(2, size=120), 3 + generator.gamma(1, size=120)], axis=-1)
    found = scored(Bootstrap(120, 6000), accuracy, outcomes).score
    expected = stats.bootstrap(
        (outcomes[:, 0], outcomes[:, 1]),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True, vectorized=True, n_resamples=6000, method="percentile", random_state=0,
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.06 * width)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(4)
    covered = 0
    for trial in range(300):
        flags = generator.random(150) < 0.7
        _, low, high = scored(Bootstrap(150, 400, seed=trial), accuracy, right(flags)).score
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_without_items_there_is_no_interval():
    with pytest.raises(UsageError, match="no item"):
        Bootstrap(0)


# ------------------------------------------------------------------------------------------------ paired tests


@given(st.integers(0, 25), st.integers(0, 25), st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_is_the_binomial_test_on_items_that_differ(only_first, only_second, both, neither):
    first = np.repeat([True, False, True, False], [only_first, only_second, both, neither])
    second = np.repeat([False, True, True, False], [only_first, only_second, both, neither])
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail) if n else 1.0)


def test_a_paired_test_sees_what_unpaired_intervals_hide():
    """Two codecs that differ on few items of the same 1,000: far from zero in pairs, deep within +-2.7 points alone."""
    flags = np.random.default_rng(5).random(1000) < 0.8
    worse = flags.copy()
    worse[np.flatnonzero(flags)[:15]] = False
    bootstrap = Bootstrap(1000)
    result = compared(bootstrap, right(flags), right(worse), "mcnemar")
    assert result.test == "McNemar exact"
    assert result.p == pytest.approx(2 * 2.0**-15)
    assert result.difference.value == pytest.approx(0.015)
    assert 0 < result.difference.low < 0.015 < result.difference.high < 0.03
    own = [scored(bootstrap, accuracy, right(f)).score for f in (flags, worse)]
    assert own[0].low < own[1].high


def test_swapping_turns_the_difference_around():
    generator = np.random.default_rng(6)
    first, second = right(generator.random(80) < 0.6), right(generator.random(80) < 0.5)
    bootstrap = Bootstrap(80)
    for pairwise in ("mcnemar", "bootstrap"):
        one = compared(bootstrap, first, second, pairwise)
        other = compared(bootstrap, second, first, pairwise)
        assert other.difference == pytest.approx((-one.difference[0], -one.difference[2], -one.difference[1]))
        assert other.p == one.p


def test_equal_outcomes_have_no_difference():
    outcomes = right(np.arange(60) % 3 > 0)
    result = compared(Bootstrap(60), outcomes, outcomes.copy())
    assert result.difference == (0, 0, 0)
    assert result.p == 1


def test_no_item_that_differs_leaves_a_difference_open_by_the_rule_of_three():
    outcomes = right(np.arange(60) % 3 > 0)
    result = compared(Bootstrap(60), outcomes, outcomes.copy(), "mcnemar")
    assert result.difference.value == 0 and result.p == 1
    assert result.difference.high == -result.difference.low == pytest.approx(3 / 60, rel=0.05)
    # A share of differing items at the end of the interval shows in none of 60 with a probability of 5 %.
    assert (1 - result.difference.high) ** 60 == pytest.approx(0.05)


@pytest.mark.parametrize("correct", [0, 1, 30, 40])
def test_the_interval_of_right_or_wrong_is_wilsons(correct):
    value, low, high = scored(Bootstrap(40), accuracy, right(np.arange(40) < correct), "mcnemar").score
    z = stats.norm.ppf(0.975)
    middle = (correct + z**2 / 2) / (40 + z**2)
    half = z / (40 + z**2) * math.sqrt(correct * (40 - correct) / 40 + z**2 / 4)
    assert value == correct / 40
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-12)
    assert high - low > 0.08


def test_items_of_a_group_are_drawn_together():
    groups = [f"clip {place // 4}" for place in range(20)]
    bootstrap = Bootstrap(20, 2000, groups=groups)
    drawn = bootstrap.sums(np.eye(20)).reshape(-1, 5, 4)
    assert bootstrap.grouped and (drawn == drawn[..., :1]).all()
    assert np.array_equal(drawn[..., 0].sum(1), np.full(2000, 5)) and drawn.std() > 0.5
    # Items of a clip that agree are worth one: the interval is wider by the root of the number of items in a group.
    flags = right(np.repeat([1, 0, 1, 0, 1], 4))
    spread = [scored(chosen, accuracy, flags).samples.std() for chosen in (bootstrap, Bootstrap(20, 2000))]
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.1)
    alone = Bootstrap(20, 50, groups=[str(place) for place in range(20)])
    assert not alone.grouped and np.array_equal(alone.sums(np.eye(20)), Bootstrap(20, 50).sums(np.eye(20)))


def test_an_interval_of_another_level():
    samples = np.arange(1001.0)
    assert interval(500, samples, 0.99)[1:] == pytest.approx((5, 995))
    assert interval(500, samples)[1:] == pytest.approx((25, 975))


def test_the_paired_bootstrap_agrees_with_the_t_test():
    generator = np.random.default_rng(7)
    shared = generator.normal(8, 4, size=200)
    first, second = shared + generator.normal(0.18, 1, size=200), shared
    outcomes = [np.stack([x, np.ones(200)], axis=-1) for x in (first, second)]
    result = compared(Bootstrap(200, 10_000), *outcomes)
    expected = stats.ttest_rel(first, second).pvalue
    assert result.test == "paired bootstrap"
    assert 0.001 < expected < 0.2
    assert result.p == pytest.approx(expected, rel=0.35)


def test_p_of_the_bootstrap_is_never_zero():
    outcomes = [np.stack([np.full(30, x), np.ones(30)], axis=-1) for x in (2.0, 1.0)]
    assert 0 < compared(Bootstrap(30), *outcomes).p < 0.0003


@pytest.mark.parametrize(("first", "pairwise"), [(0.5, "mcnemar"), (1.0, "guess")])
def test_tests_that_do_not_fit_are_refused(first, pairwise):
    outcomes = right(np.full(10, first))
    with pytest.raises(UsageError) as caught:
        compared(Bootstrap(10), outcomes, outcomes, pairwise)
    assert "\n" not in str(caught.value)


def test_holm():
    # Worked by hand: 4 * 0.01, max(0.04, 3 * 0.02), max(0.06, 2 * 0.03), max(0.06, 0.04).
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_adjusted_p_values_lie_between_the_raw_ones_and_bonferroni(p):
    for raw, adjusted in zip(p, holm(p), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p)) + 1e-12
    assert np.all(np.diff(np.asarray(holm(p))[np.argsort(p, kind="stable")]) >= 0)


# ------------------------------------------------------------------------------------------- rank correlations


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=12))
def test_rho_is_scipys_with_ties(pairs):
    x, y = (np.array(values, dtype=np.float64) for values in zip(*pairs, strict=True))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(rank_correlation(x, y))
    else:
        assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_rho_works_on_all_samples_at_once():
    generator = np.random.default_rng(8)
    x, y = generator.normal(size=(2, 7, 9))
    rows = [stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert rank_correlation(x, y) == pytest.approx(rows)


@pytest.fixture(scope="module")
def sweep() -> tuple[np.ndarray, np.ndarray]:
    """Quality at 10 codec points on 200 items, and outcomes whose chance of being right rises with it."""
    generator = np.random.default_rng(9)
    quality = np.linspace(20, 40, 10) + generator.normal(0, 2, size=(200, 1))
    chance = 0.2 + 0.7 * (np.linspace(0, 1, 10))
    return quality, right(generator.random((200, 10)) < chance)


def test_sign_of_the_correlation_with_the_score_drop(sweep):
    quality, outcomes = sweep
    bootstrap = Bootstrap(200, 500)
    rising = correlated(bootstrap, outcomes, quality, "higher").rho
    falling = correlated(bootstrap, outcomes, -quality, "lower").rho
    backwards = correlated(bootstrap, outcomes, quality, "lower").rho
    assert rising.value > 0.95 and rising.low > 0.8
    assert falling == rising
    assert backwards == pytest.approx((-rising.value, -rising.high, -rising.low))


def test_the_correlation_is_of_means_over_items(sweep):
    quality, outcomes = sweep
    noisy = quality + np.random.default_rng(10).normal(0, 60, size=quality.shape)
    found = correlated(Bootstrap(200, 500), outcomes, noisy, "higher").rho
    expected = stats.spearmanr(-noisy.mean(0), -outcomes[..., 0].mean(0)).statistic
    assert found.value == pytest.approx(expected)
    assert found.low < found.value <= found.high


def test_an_infinite_metric_ranks_as_the_best(sweep):
    quality, outcomes = sweep
    with_infinite = quality.copy()
    with_infinite[3, 9] = math.inf
    bootstrap = Bootstrap(200, 500)
    found = correlated(bootstrap, outcomes, with_infinite, "higher")
    assert found.rho.value == correlated(bootstrap, outcomes, quality, "higher").rho.value
    assert np.isfinite(found.samples).all()
    means = bootstrap.means(with_infinite)
    drawn = bootstrap.sums(np.eye(200))[:, 3] > 0
    assert np.array_equal(np.isinf(means[:, 9]), drawn) and not np.isinf(means[:, :9]).any()
    assert means[~drawn] == pytest.approx(bootstrap.means(quality)[~drawn])


def test_items_without_the_metric_do_not_count(sweep):
    quality, outcomes = sweep
    bootstrap = Bootstrap(200, 500)
    partial = quality.copy()
    partial[:50, 4] = math.nan
    found = correlated(bootstrap, outcomes, partial, "higher")
    expected = correlated(
        bootstrap, outcomes, np.where(np.arange(200)[:, None] < 50, math.nan, quality), "higher"
    )
    assert found.rho == expected.rho
    assert found.rho.value == pytest.approx(
        stats.spearmanr(-quality[50:].mean(0), -outcomes[..., 0].mean(0)).statistic
    )
    nothing = correlated(bootstrap, outcomes, np.full_like(quality, math.nan), "higher").rho
    assert np.isnan(nothing).all()


def test_chance_alone_gives_an_interval_around_zero():
    generator = np.random.default_rng(11)
    outcomes = right(generator.random((300, 12)) < 0.5)
    found = correlated(Bootstrap(300, 1000), outcomes, generator.normal(size=(300, 12)), "higher")
    assert found.rho.low < 0 < found.rho.high
    assert found.rho.high - found.rho.low > 0.5
