"""What is claimed from measurements, on rows made so that the right claim is known."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from compand.errors import UsageError
from compand.eval.metrics import Metric
from compand.eval.perception.summary import TrainedOn, column, summarise
from compand.eval.perception.task import ClassificationTask, Task

PSNR = Metric("psnr", "PSNR", "dB", "higher", "image")
DISTS = Metric("dists", "DISTS", "", "lower", "image")
LPIPS = Metric("lpips", "LPIPS", "", "lower", "image")
MS_SSIM = Metric("ms_ssim", "MS-SSIM", "", "higher", "image")


class Accuracy(ClassificationTask):
    name = "made-up"
    medium = "image"
    kinds = ("image-classifier",)
    default_model = "none"
    labels = ("no", "yes")

    def items(self):
        return []


class MeanError(Task):
    """A score that is no share: the mean of the first number over the second."""

    name = "made-up-means"
    medium = "audio"
    kinds = ("separator",)
    score_name = "SDR"
    outcome_names = ("sdr", "items")
    pairwise = "bootstrap"
    default_model = "none"

    def items(self):
        return []

    def outcome(self, model, decoded, item):
        return [0.0, 1.0]

    def score(self, total):
        return total[..., 0] / total[..., 1]


ITEMS = [f"{place:04}.png" for place in range(400)]
DIFFICULTY = np.random.default_rng(0).permutation(len(ITEMS)) / len(ITEMS)
"""An item is recognised at every point whose accuracy is above its difficulty: as easy items are, in reality."""

CLEAN = 0.9


def outcomes(accuracy: float) -> list[list[float]]:
    return [[float(difficulty < accuracy), 1.0] for difficulty in DIFFICULTY]


def rows_of(codec: str, points: dict[float, tuple[float, float]], **metrics) -> list[dict]:
    """Rows of a codec: {quality: (bits per pixel, accuracy)}; metrics: functions of (quality, place of the item)."""
    clean = outcomes(CLEAN)
    return [
        {
            "item": item,
            "medium": "image",
            "codec": codec,
            "quality": quality,
            "bytes": round(bpp * 1000),
            "bpp": bpp * (1.1 if place % 2 else 0.9),
            "outcome": outcome,
            "outcome_undamaged": clean[place],
            **{name: value(quality, place) for name, value in metrics.items()},
        }
        for quality, (bpp, accuracy) in points.items()
        for place, (item, outcome) in enumerate(zip(ITEMS, outcomes(accuracy), strict=True))
    ]


def facts(**kinds) -> dict[str, dict]:
    return {name: {"title": name.upper(), "kind": kind, "note": ""} for name, kind in kinds.items()}


def summary(rows, codecs, metrics=(), lossy_models=(), task=Accuracy, items=ITEMS):
    return summarise(task(Path()), items, rows, codecs, metrics, "model-v1", lossy_models)


JPEG = rows_of("jpeg", {5: (0.2, 0.3), 10: (0.4, 0.5), 20: (0.6, 0.7), 50: (1.0, 0.85)})
CODECS = facts(jpeg="classical", hyperprior="compand")


# --------------------------------------------------------------------------------------------- scores and items


def test_points_are_means_over_the_items_with_their_score():
    codecs, perception, notices = summary(JPEG, facts(jpeg="classical"))
    assert notices == []
    assert [point["quality"] for point in codecs["jpeg"]["points"]] == [5, 10, 20, 50]
    point = codecs["jpeg"]["points"][1]
    assert point["score"] == 0.5 and point["items"] == 400
    assert point["bpp"] == pytest.approx(0.4) and point["bytes"] == 400
    assert point["score_drop"] == pytest.approx(perception["baseline"] - 0.5)
    assert point["score_drop_low"] < point["score_drop"] < point["score_drop_high"]
    half = 1.96 * math.sqrt(0.25 / 400)
    assert (point["score_low"], point["score_high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=0.008)
    assert perception["baseline"] == CLEAN
    assert perception["baseline_low"] < CLEAN < perception["baseline_high"]


def test_a_codec_that_changes_nothing_drops_nothing():
    rows = rows_of("identity", {1: (24.0, CLEAN)})
    point = summary(rows, facts(identity="identity"))[0]["identity"]["points"][0]
    assert point["score"] == CLEAN
    assert (point["score_drop"], point["score_drop_low"], point["score_drop_high"]) == (0, 0, 0)


def test_all_codecs_are_scored_on_the_items_that_all_have():
    webp = [row for row in rows_of("webp", {50: (0.5, 0.8)}) if row["item"] not in ITEMS[:30]]
    codecs, _, notices = summary(JPEG + webp, facts(jpeg="classical", webp="classical"))
    assert {point["items"] for codec in codecs.values() for point in codec["points"]} == {370}
    assert any("370 of 400" in notice for notice in notices)
    expected = np.mean([outcome[0] for outcome in outcomes(0.3)[30:]])
    assert codecs["jpeg"]["points"][0]["score"] == pytest.approx(expected)


def test_a_point_that_failed_often_does_not_cost_the_others_their_items():
    webp = [
        row
        for row in rows_of("webp", {5: (0.2, 0.6), 50: (0.5, 0.8)})
        if row["quality"] == 50 or row["item"] < "02"
    ]
    codecs, _, notices = summary(JPEG + webp, facts(jpeg="classical", webp="classical"))
    assert [point["quality"] for point in codecs["webp"]["points"]] == [50]
    assert codecs["jpeg"]["points"][0]["items"] == 400
    assert any("webp q5" in notice and "200 of 400" in notice for notice in notices)


def test_scores_at_the_ends_have_intervals():
    codecs, *_ = summary(rows_of("jpeg", {5: (0.2, 0.0), 50: (1.0, 1.0)}), facts(jpeg="classical"))
    none, every = codecs["jpeg"]["points"]
    assert (none["score"], none["score_low"], every["score"], every["score_high"]) == pytest.approx(
        (0, 0, 1, 1)
    )
    assert none["score_high"] == pytest.approx(3.84 / 403.84, rel=0.01) == 1 - every["score_low"]
    # A lossy codec that changed no answer in 400 items may still change one in a hundred.
    same = summary(rows_of("jpeg", {5: (0.2, CLEAN)}), facts(jpeg="classical"))[0]["jpeg"]["points"][0]
    assert same["score_drop"] == 0
    assert same["score_drop_high"] == -same["score_drop_low"] == pytest.approx(3 / 400, rel=0.01)


def test_items_that_depend_on_each_other_are_resampled_together():
    """Forty clips of ten frames that are all recognised or none: worth forty items, not four hundred."""
    recognised = {item: float((place // 10) % 2) for place, item in enumerate(ITEMS)}
    rows = [row | {"outcome": [recognised[row["item"]], 1.0]} for row in JPEG]
    groups = {item: str(place // 10) for place, item in enumerate(ITEMS)}
    ours = [row | {"codec": "hyperprior", "outcome": [1.0 - recognised[row["item"]], 1.0]} for row in rows]
    codecs, perception, _ = summarise(Accuracy(Path()), ITEMS, rows + ours, CODECS, (), "m", (), groups)
    point = codecs["jpeg"]["points"][0]
    assert point["score_high"] - point["score_low"] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(40), rel=0.1)
    # McNemar's test takes items as independent.
    assert {pair["test"] for pair in perception["pairs"]} == {"paired bootstrap"}


def test_without_any_common_item_there_is_no_summary():
    with pytest.raises(UsageError, match="problems"):
        summary([], facts(jpeg="classical"))
    with pytest.raises(UsageError, match="problems"):
        summary(JPEG[:3], facts(jpeg="classical"))


# ---------------------------------------------------------------------------------------------- rank correlation


def accuracy_of(quality: float) -> float:
    return {5: 0.3, 10: 0.5, 20: 0.7, 50: 0.85}[quality]


def test_correlation_of_each_metric_with_the_drop():
    noise = np.random.default_rng(1).normal(0, 6, len(ITEMS))
    rows = rows_of(
        "jpeg",
        {5: (0.2, 0.3), 10: (0.4, 0.5), 20: (0.6, 0.7), 50: (1.0, 0.85)},
        lpips=lambda quality, place: 1 - accuracy_of(quality) + 0.01 * noise[place],
        psnr=lambda quality, place: {5: 30, 10: 25, 20: 35, 50: 36}[quality] + noise[place],
    )
    _, perception, _ = summary(rows, facts(jpeg="classical"), [PSNR, LPIPS])
    found = {row["metric"]: row for row in perception["spearman"]}
    assert found["lpips"]["rho"] == 1
    assert found["psnr"]["rho"] == pytest.approx(
        stats.spearmanr([30, 25, 35, 36], [0.3, 0.5, 0.7, 0.85]).statistic
    )
    assert found["psnr"]["points"] == 4
    assert found["lpips"]["against"] == "psnr"
    assert found["lpips"]["against_value"] == pytest.approx(1 - found["psnr"]["rho"])
    assert "+1" in perception["spearman_sign"]


def test_lossless_codecs_do_not_count_in_correlations():
    """They would add points of no drop and infinite PSNR, where the two agree by definition."""
    metrics = {"psnr": lambda quality, place: 40 - quality / 10}
    rows = rows_of("jpeg", {5: (0.2, 0.3), 10: (0.4, 0.5), 20: (0.6, 0.7), 50: (1.0, 0.85)}, **metrics)
    perfect = {"psnr": lambda quality, place: math.inf}
    rows += rows_of("png", {1: (12.0, CLEAN)}, **perfect) + rows_of("identity", {1: (24.0, CLEAN)}, **perfect)
    _, perception, _ = summary(rows, facts(jpeg="classical", png="lossless", identity="identity"), [PSNR])
    (row,) = perception["spearman"]
    assert row["points"] == 4 and row["rho"] == -1


def test_a_metric_that_some_items_are_unfit_for():
    metrics = {"ms_ssim": lambda quality, place: None if place < 40 and quality == 10 else quality / 100}
    rows = rows_of("jpeg", {5: (0.2, 0.3), 10: (0.4, 0.5), 20: (0.6, 0.7)}, **metrics)
    codecs, perception, _ = summary(rows, facts(jpeg="classical"), [MS_SSIM])
    assert perception["spearman"][0]["rho"] == 1
    assert codecs["jpeg"]["points"][1]["ms_ssim"] == pytest.approx(0.1)
    rows = rows_of(
        "jpeg", {5: (0.2, 0.3), 10: (0.4, 0.5), 20: (0.6, 0.7)}, ms_ssim=lambda quality, place: None
    )
    codecs, perception, _ = summary(rows, facts(jpeg="classical"), [MS_SSIM])
    assert perception["spearman"] == [] and "ms_ssim" not in codecs["jpeg"]["points"][0]


# ---------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_of_nearly_equal_rates_and_tested_on_the_same_items():
    ours = rows_of("hyperprior", {1: (0.21, 0.45), 2: (0.5, 0.7), 3: (0.97, 0.85)})
    _, perception, _ = summary(JPEG + ours, CODECS)
    pairs = perception["pairs"]
    # 0.5 bpp is 20 % from 0.4 and 0.6: no partner.
    assert [(pair["a"], pair["b"]) for pair in pairs] == [
        ("jpeg q5", "hyperprior q1"),
        ("jpeg q50", "hyperprior q3"),
    ]
    first, last = pairs
    assert first["difference"] == pytest.approx(0.15) and first["low"] < 0.15 < first["high"]
    assert first["rate_ratio"] == pytest.approx(1.05)
    assert (first["score_a"], first["score_b"]) == (0.3, 0.45)
    # 60 items are right with ours alone, none with JPEG alone.
    assert first["test"] == "McNemar exact" and first["p"] == pytest.approx(2 * 0.5**60)
    # Nothing differs in 400 items, which leaves room for 3 in 400.
    assert last["difference"] == 0 and last["p"] == 1
    assert last["high"] == -last["low"] == pytest.approx(3 / 400, rel=0.01)
    assert first["p_adjusted"] == pytest.approx(2 * first["p"])


def test_a_point_has_one_partner_at_most():
    ours = rows_of("hyperprior", {quality: (0.2 + 0.004 * quality, 0.5) for quality in (1, 2, 3)})
    _, perception, _ = summary(JPEG + ours, CODECS)
    assert [(pair["a"], pair["b"]) for pair in perception["pairs"]] == [("jpeg q5", "hyperprior q1")]


def test_the_classical_codec_stands_first_whatever_the_order():
    ours = rows_of("hyperprior", {1: (0.2, 0.4)})
    _, perception, _ = summary(JPEG + ours, facts(hyperprior="compand", jpeg="classical"))
    assert [(pair["a"], pair["b"]) for pair in perception["pairs"]] == [("jpeg q5", "hyperprior q1")]


# --------------------------------------------------------------------------------------------------- finding 1


def first_finding(points: dict[float, tuple[float, float]]) -> str:
    return summary(JPEG + rows_of("hyperprior", points), CODECS)[1]["findings"][0]


def test_the_first_finding_holds_where_the_learned_codec_wins():
    found = first_finding({1: (0.19, 0.6), 2: (0.38, 0.7), 3: (0.58, 0.8), 4: (1.1, 0.87)})
    assert " holds: " in found
    assert "HYPERPRIOR is above JPEG at 3 of 4 points (0 of 4 in reverse)," in found


def test_it_holds_in_part_where_the_learned_codec_wins_at_half_of_its_points_at_most():
    found = first_finding({1: (0.19, 0.6), 2: (0.38, 0.7), 3: (0.58, 0.7), 4: (1.1, 0.87)})
    assert " holds in part: " in found and "at 2 of 4 points (0 of 4 in reverse)," in found


def test_it_does_not_where_the_learned_codec_loses():
    found = first_finding({1: (0.21, 0.1), 2: (0.42, 0.2), 3: (0.62, 0.3), 4: (1.1, 0.4)})
    assert "does not hold: " in found
    assert "JPEG at 0 of 4 points (4 of 4 in reverse)," in found


def test_it_does_not_hold_where_curves_cross():
    found = first_finding({1: (0.19, 0.6), 4: (1.1, 0.4)})
    assert "does not hold: " in found and "at 1 of 2 points (3 of 4 in reverse)," in found


def test_it_is_undecided_where_nothing_differs():
    found = first_finding({1: (0.2, 0.3), 2: (0.4, 0.5), 3: (0.6, 0.705)})
    assert "is undecided: " in found


def test_a_higher_score_at_a_higher_rate_proves_nothing():
    found = first_finding({4: (2.0, 0.89)})
    assert "is undecided: " in found and "JPEG at 0 of 1 points" in found


def test_one_classical_codec_that_is_not_beaten_spoils_it():
    ours = rows_of("hyperprior", {1: (0.19, 0.6), 2: (0.38, 0.7)})
    avif = rows_of("avif", {1: (0.19, 0.75), 2: (0.38, 0.8)})
    codecs = facts(jpeg="classical", avif="classical", hyperprior="compand")
    found = summary(JPEG + avif + ours, codecs)[1]["findings"][0]
    assert "does not hold: " in found
    assert "JPEG at 2 of 2 points (0 of 4 in reverse), AVIF at 0 of 2 points (2 of 2 in reverse)," in found


@pytest.mark.parametrize(
    ("codecs", "wanting"), [(facts(jpeg="classical"), "learned"), (facts(jpeg="compand"), "classical")]
)
def test_it_needs_both_kinds_of_codec(codecs, wanting):
    found = summary(JPEG, codecs)[1]["findings"][0]
    assert f"not tested: no {wanting} codec" in found


# --------------------------------------------------------------------------------------------------- finding 2


def second_finding(metrics, **values) -> str:
    """Eight points of two codecs; a metric is a function of the accuracy of the point and of the codec."""
    rows = []
    for codec, shift in (("jpeg", 0.0), ("hyperprior", 0.04)):
        accuracies = {quality: 0.2 * quality + shift for quality in (1, 2, 3, 4)}
        own = {
            name: lambda quality, place, value=value, codec=codec, accuracies=accuracies: value(
                accuracies[quality], codec
            )
            for name, value in values.items()
        }
        rows += rows_of(
            codec, {quality: (quality / 5, accuracy) for quality, accuracy in accuracies.items()}, **own
        )
    return summary(rows, CODECS, metrics)[1]["findings"][1]


def tracking(accuracy: float, codec: str) -> float:
    return accuracy


def misled(accuracy: float, codec: str) -> float:
    """PSNR that prefers one codec whatever it does to recognition."""
    return 30 + 10 * accuracy + (20 if codec == "jpeg" else 0)


def test_the_second_finding_holds_where_the_deep_metric_tracks_the_drop():
    found = second_finding([PSNR, LPIPS], psnr=misled, lpips=lambda a, codec: 1 - tracking(a, codec))
    assert (
        " holds: over 8 points of 2 codecs, rho is 1.00 [1.00, 1.00] for LPIPS (the best deep metric)"
        in found
    )


def test_it_does_not_where_psnr_tracks_it_better():
    found = second_finding([PSNR, LPIPS], psnr=tracking, lpips=lambda a, codec: -misled(a, codec))
    assert "does not hold: " in found


def test_it_is_undecided_where_both_are_perfect():
    assert "is undecided: " in second_finding([PSNR, LPIPS], psnr=tracking, lpips=lambda a, codec: 1 - a)


def test_a_perceptual_metric_stands_in_for_a_deep_one_and_is_called_so():
    found = second_finding([PSNR, MS_SSIM], psnr=misled, ms_ssim=tracking)
    assert "holds" in found and "no deep one being measured" in found
    assert "LPIPS" in second_finding(
        [PSNR, MS_SSIM, LPIPS], psnr=misled, ms_ssim=tracking, lpips=lambda a, c: 1 - a
    )


def test_a_score_that_never_drops_correlates_with_nothing():
    rows = rows_of(
        "jpeg",
        {5: (0.2, CLEAN), 10: (0.4, CLEAN), 20: (0.6, CLEAN)},
        psnr=lambda q, i: q,
        ms_ssim=lambda q, i: q / 50,
    )
    perception = summary(rows, facts(jpeg="classical"), [PSNR, MS_SSIM])[1]
    assert "not tested, for the score is the same at every point" in perception["findings"][1]


def test_the_number_of_candidates_is_stated():
    alone = second_finding([PSNR, LPIPS], psnr=misled, lpips=lambda a, codec: 1 - a)
    assert "(the only candidate)." in alone
    both = second_finding(
        [PSNR, LPIPS, DISTS], psnr=misled, lpips=lambda a, codec: 1 - a, dists=lambda a, codec: a
    )
    assert "(the best of 2 candidates: the interval of the difference is Bonferroni-adjusted" in both


def test_the_best_of_several_metrics_needs_the_wider_interval():
    noise = np.random.default_rng(3)
    points = {quality: (quality / 10, 0.1 * quality) for quality in range(1, 9)}
    rows = rows_of(
        "jpeg",
        points,
        psnr=lambda quality, place: 30 + noise.normal(),
        lpips=lambda quality, place: noise.normal(1 - 0.1 * quality, 3),
        dists=lambda quality, place: quality,
    )
    widths = []
    for metrics in ([PSNR, LPIPS], [PSNR, LPIPS, DISTS]):
        found = summary(rows, facts(jpeg="classical"), metrics)[1]["findings"][1]
        ends = re.search(r"for LPIPS .* difference of \S+ \[(\S+), (\S+)\]", found)
        assert ends is not None
        widths.append(float(ends[2]) - float(ends[1]))
    assert widths[1] > widths[0] > 0


def test_few_points_are_called_few():
    rows = rows_of(
        "jpeg",
        {5: (0.2, 0.3), 10: (0.4, 0.5), 20: (0.6, 0.7)},
        psnr=lambda quality, place: quality,
        lpips=lambda quality, place: -quality,
    )
    assert (
        "few for a rank correlation"
        in summary(rows, facts(jpeg="classical"), [PSNR, LPIPS])[1]["findings"][1]
    )


def test_it_needs_two_metrics_and_three_points():
    assert "not tested" in second_finding([PSNR], psnr=tracking)
    assert "not tested" in second_finding([LPIPS], lpips=tracking)
    assert "not tested" in summary(JPEG, facts(jpeg="classical"))[1]["findings"][1]
    two = rows_of("jpeg", {5: (0.2, 0.3), 10: (0.4, 0.5)}, psnr=lambda q, p: q, lpips=lambda q, p: -q)
    assert "three lossy points" in summary(two, facts(jpeg="classical"), [PSNR, LPIPS])[1]["findings"][1]


# --------------------------------------------------------------------------------------------------- finding 3


def with_second_model(rows, accuracies: dict[float, float], clean: float, name: str = "robust-v1"):
    answers = {quality: outcomes(accuracy) for quality, accuracy in accuracies.items()}
    undamaged = outcomes(clean)
    place = {item: index for index, item in enumerate(ITEMS)}
    return [
        row
        | {
            column(name): answers[row["quality"]][place[row["item"]]],
            column(name, undamaged=True): undamaged[place[row["item"]]],
        }
        for row in rows
    ]


def test_the_third_finding_states_gain_and_price():
    rows = with_second_model(JPEG, {5: 0.5, 10: 0.6, 20: 0.7, 50: 0.8}, 0.84)
    trained_on = TrainedOn("robust-v1", "jpeg", 10.0)
    _, perception, _ = summary(rows, facts(jpeg="classical"), lossy_models=[trained_on])
    found = perception["findings"][2]
    assert " holds: robust-v1, trained on jpeg q10, has a top-1 accuracy of 0.600 on jpeg q10" in found
    assert "the task model has 0.500 (+0.100 [" in found
    assert "0.840 on undamaged items where that has 0.900 (-0.060 [" in found
    table = perception["lossy_training"]
    assert [row["quality"] for row in table] == [None, 5, 10, 20, 50]
    assert [row["codec"] for row in table] == ["undamaged", *4 * ["jpeg"]]
    assert [row["difference"] for row in table] == pytest.approx([-0.06, 0.2, 0.1, 0, -0.05])
    assert table[2]["p"] == pytest.approx(2 * 0.5**40) and table[3]["p"] == 1
    assert table[1]["trained_on"] == "jpeg q10"
    assert table[1]["score_low"] < table[1]["score"] == 0.5 < table[1]["score_high"]


def test_p_of_the_third_finding_is_adjusted_for_the_number_of_models():
    # 6 items more are right with the second model: p is 2 / 2^6 = 0.031 alone, and 0.094 as one of three.
    accuracies = dict.fromkeys((5, 10, 20, 50), 0.515)
    names = ("a-v1", "b-v1", "c-v1")
    rows = JPEG
    for name in names:
        rows = with_second_model(rows, accuracies, 0.9, name)
    one = [TrainedOn("a-v1", "jpeg", 10.0)]
    three = [TrainedOn(name, "jpeg", 10.0) for name in names]
    alone, together = (
        summary(rows, facts(jpeg="classical"), lossy_models=models)[1]["findings"][2]
        for models in (one, three)
    )
    assert " holds: " in alone and "p = 0.031, 0.031 by Holm's method over 1 models" in alone
    assert "is undecided: " in together and "p = 0.031, 0.094 by Holm's method over 3 models" in together


@pytest.mark.parametrize(
    ("accuracy", "verdict"), [(0.3, "does not hold: "), (0.5, "is undecided: "), (0.6, " holds: ")]
)
def test_verdicts_of_the_third_finding(accuracy, verdict):
    rows = with_second_model(JPEG, dict.fromkeys((5, 10, 20, 50), accuracy), 0.9)
    found = summary(rows, facts(jpeg="classical"), lossy_models=[TrainedOn("robust-v1", "jpeg", 10.0)])
    assert verdict in found[1]["findings"][2]


@pytest.mark.parametrize("quality", [1.0, 2.0])
def test_only_the_quality_that_a_model_was_trained_on_counts(quality):
    points = {1: (0.2, 0.4), 4: (0.6, 0.7)}
    rows = with_second_model(rows_of("hyperprior-v1", points), {1: 0.5, 4: 0.75}, 0.9)
    codecs = {"hyperprior-v1": {"title": "hyperprior-v1", "kind": "compand", "note": ""}}
    found = summary(rows, codecs, lossy_models=[TrainedOn("robust-v1", "hyperprior", quality)])
    finding = found[1]["findings"][2]
    if quality == 1:
        assert "trained on hyperprior q1, has a top-1 accuracy of 0.500 on hyperprior-v1 q1 " in finding
    else:
        assert "trained on hyperprior q2, was not tested at the trained quality" in finding
        assert "holds" not in finding


def test_a_codec_without_its_version_is_none_of_several():
    names = ("hyperprior-v1", "hyperprior-v2")
    rows = [row for name in names for row in rows_of(name, {1: (0.2, 0.4)})]
    rows = with_second_model(rows, {1: 0.6}, 0.9)
    codecs = {name: {"title": name, "kind": "compand", "note": ""} for name in names}

    def finding(codec: str) -> str:
        return summary(rows, codecs, lossy_models=[TrainedOn("robust-v1", codec, 1.0)])[1]["findings"][2]

    assert "was not tested" in finding("hyperprior") and "on hyperprior-v2 q1 " in finding("hyperprior-v2")


def test_a_model_whose_codec_is_not_measured_is_said_to_be_untested():
    rows = with_second_model(JPEG, dict.fromkeys((5, 10, 20, 50), 0.5), 0.9)
    found = summary(rows, facts(jpeg="classical"), lossy_models=[TrainedOn("robust-v1", "webp", 5.0)])
    assert "was not tested at the trained quality, which is not in the run" in found[1]["findings"][2]


def test_a_second_model_trained_on_clean_items_is_tabled_but_no_finding():
    rows = with_second_model(JPEG, dict.fromkeys((5, 10, 20, 50), 0.5), 0.9)
    _, perception, _ = summary(
        rows, facts(jpeg="classical"), lossy_models=[TrainedOn("robust-v1", None, None)]
    )
    assert "not tested" in perception["findings"][2]
    assert (
        len(perception["lossy_training"]) == 5
        and perception["lossy_training"][0]["trained_on"] == "clean items"
    )


# --------------------------------------------------------------------------------------------- other scores


def test_scores_that_are_not_accuracies_are_compared_by_bootstrap():
    generator = np.random.default_rng(2)
    own = generator.normal(8, 3, 60)
    items = [f"{place}.wav" for place in range(60)]

    def rows(codec: str, quality: float, kbps: float, loss: float) -> list[dict]:
        return [
            {
                "item": item,
                "medium": "audio",
                "codec": codec,
                "quality": quality,
                "bytes": 1000,
                "kbps": kbps,
                "kbps_payload": kbps - 1,
                "outcome": [sdr - loss + generator.normal(0, 0.3), 1.0],
                "outcome_undamaged": [sdr, 1.0],
            }
            for item, sdr in zip(items, own, strict=True)
        ]

    measured = rows("opus", 6, 6.0, 4.0) + rows("mine", 1, 5.9, 2.0)
    codecs, perception, _ = summary(
        measured, facts(opus="classical", mine="compand"), task=MeanError, items=items
    )
    (pair,) = perception["pairs"]
    assert pair["test"] == "paired bootstrap" and pair["p"] < 0.001
    assert pair["difference"] == pytest.approx(2, abs=0.2)
    assert 1.6 < pair["low"] < pair["difference"] < pair["high"] < 2.4
    point = codecs["opus"]["points"][0]
    assert point["kbps"] == pytest.approx(6) and point["kbps_payload"] == pytest.approx(5)
    assert point["score_drop"] == pytest.approx(4, abs=0.2)
    assert " holds: " in perception["findings"][0]
    assert (
        "rates include the container, without which they are, in kbps: OPUS 5 to 5, MINE 4.9 to 4.9."
        in (perception["findings"][0])
    )
    assert (pair["rate_payload_a"], pair["rate_payload_b"]) == pytest.approx((5, 4.9))
    assert "rates include the container" in perception["pairs_difference"]
