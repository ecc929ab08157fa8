"""Accuracy, calibration and agreement of reward models on held-out pairs."""

import math

import numpy as np
import pytest

from klippo.evaluation.pairs import (
    accuracy,
    ensemble_differences,
    error_correlation,
    gain,
    reliability,
    report_pairs,
)
from klippo.evaluation.statistics import wilson


def apart(num):
    """Units of pairs that share nothing."""
    return [(f"a{i}", f"b{i}") for i in range(num)]


def test_figures_of_a_small_example_by_hand():
    report = report_pairs([2.0, -1.0, 0.0, 3.0], apart(4), num_bins=2)
    assert report.accuracy.mean == 0.625  # 1, 0, a half, 1
    losses = [math.log1p(math.exp(-d)) for d in (2.0, -1.0, 0.0, 3.0)]
    assert report.log_loss_nats == pytest.approx(sum(losses) / 4)
    low, high = report.reliability
    assert (low.num, high.num) == (2, 2)
    assert low.accuracy == 0.25
    assert low.confidence == pytest.approx((0.5 + 1 / (1 + math.exp(-1))) / 2)
    expected = (abs(0.25 - low.confidence) + abs(1 - high.confidence)) / 2
    assert report.calibration_error == pytest.approx(expected)


def test_wilsons_interval_is_the_published_one():
    """Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_all_right_still_leaves_doubt():
    result = accuracy(np.ones(20), apart(20))
    assert result.mean == result.high == 1
    assert 0.8 < result.low < 0.9


def test_pairs_that_share_a_prompt_widen_the_interval():
    rng = np.random.default_rng(0)
    per_prompt = np.repeat(rng.normal(size=40), 10)  # right or wrong by prompt as a whole
    together = accuracy(per_prompt, [(f"p{i // 10}",) for i in range(400)])
    alone = accuracy(per_prompt, [(f"p{i}",) for i in range(400)])
    assert (together.high - together.low) > 2.5 * (alone.high - alone.low)


def test_the_interval_covers_the_truth_where_pairs_share_responses():
    """Quality minus noise of 30 responses, all 435 pairs; the truth is the average over draws."""
    rng = np.random.default_rng(1)
    pairs = [(i, j) for i in range(30) for j in range(i)]
    units = [(str(i), str(j)) for i, j in pairs]

    def draw():
        quality = rng.normal(size=30)
        score = quality + rng.normal(size=30)
        sign = [np.sign(quality[i] - quality[j]) * (score[i] - score[j]) for i, j in pairs]
        return np.asarray(sign)

    truth = float(np.mean([(draw() > 0).mean() for _ in range(300)]))
    intervals = [accuracy(draw(), units) for _ in range(200)]
    covered = np.mean([one.low <= truth <= one.high for one in intervals])
    naive = [wilson(one.mean, 435) for one in intervals]
    covered_naively = np.mean([low <= truth <= high for low, high in naive])
    assert covered > 0.87
    assert covered_naively < 0.75


def test_calibrated_scores_have_little_calibration_error_and_sure_ones_much():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=4000)
    d = np.abs(logits) * np.where(rng.random(4000) < 1 / (1 + np.exp(-np.abs(logits))), 1, -1)
    assert report_pairs(d.tolist(), apart(4000)).calibration_error < 0.03
    assert report_pairs((5 * d).tolist(), apart(4000)).calibration_error > 0.15


def test_bins_have_equal_numbers_of_pairs():
    points = reliability(np.linspace(-1, 3, 103), 10)
    assert {point.num for point in points} == {10, 11}
    assert [p.confidence for p in points] == sorted(p.confidence for p in points)


def test_an_ensemble_standardises_members_where_their_sd_is_known():
    differences = [[1.0, -1.0], [-10.0, 30.0]]
    assert ensemble_differences(differences, [None, None]) == [-4.5, 14.5]
    assert ensemble_differences(differences, [None, 10.0]) == [-4.5, 14.5]
    # (1/1 - 10/10) / 2 * 5.5 and (-1/1 + 30/10) / 2 * 5.5
    assert ensemble_differences(differences, [1.0, 10.0]) == pytest.approx([0.0, 5.5])


def test_error_correlation_of_the_same_and_of_unrelated_members():
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(2, 5000)) + 0.5
    assert error_correlation([one, one]) == pytest.approx(1)
    assert error_correlation([one, other]) == pytest.approx(0, abs=0.05)
    assert error_correlation([one]) is None
    assert error_correlation([[1.0, 2.0], [1.0, -1.0]]) is None


def test_the_gain_of_an_ensemble_is_paired():
    """Right on pairs 0-3 together; members are right on three of four: +0.25 on each side."""
    members = [[1.0, 1.0, 1.0, -1.0] * 50, [1.0, 1.0, -1.0, 1.0] * 50]
    result = gain([1.0] * 200, members, apart(200))
    assert result.mean == pytest.approx(0.25)
    assert (result.high - result.low) / 2 == pytest.approx(1.96 * 0.25 / math.sqrt(200), rel=1e-3)
    shared = gain([1.0] * 200, members, [(f"p{i // 4}",) for i in range(200)])
    assert shared.low >= result.low - 1e-9
