"""The fits recover what they were made from, and say when there is nothing to recover."""

import math

import numpy as np
import pytest

from klippo.evaluation.scaling import Curve, fit, peak_of, predict


def simulate(law, alpha, beta, rng, *, largest_d, num_steps=14, num_prompts=128, noise=1.0):
    """A run whose gold gain follows a law; prompts differ, and every score has its own noise."""
    d = np.linspace(0, largest_d, num_steps)
    gain = predict(law, alpha, beta, d)
    prompt_effect = rng.normal(size=num_prompts)
    gold = gain[:, None] + prompt_effect + noise * rng.normal(size=(num_steps, num_prompts))
    kl = d[:, None] ** 2 * rng.gamma(4.0, 0.25, size=(num_steps, num_prompts))
    return Curve(gold=gold, kl=kl)


@pytest.mark.parametrize(
    ("law", "alpha", "beta", "largest_d"), [("bon", 1.0, 0.15, 6.0), ("rl", 1.2, 0.6, 8.0)]
)
def test_the_peak_lies_in_its_interval_in_at_least_90_of_100_simulations(
    law, alpha, beta, largest_d
):
    true_peak = peak_of(law, alpha, beta)
    assert true_peak < largest_d
    hits = 0
    for number in range(100):
        rng = np.random.default_rng(number)
        curves = [simulate(law, alpha, beta, rng, largest_d=largest_d)]
        found = fit(law, curves, seed=number, num_draws=300)
        hits += found.peak.low <= true_peak <= found.peak.high
    assert hits >= 90


@pytest.mark.parametrize("law", ["bon", "rl"])
def test_without_noise_the_fit_is_exact(law):
    rng = np.random.default_rng(0)
    d = np.linspace(0, 5, 9)
    gold = np.repeat(predict(law, 0.8, 0.2, d)[:, None], 20, axis=1)
    kl = np.repeat(d[:, None] ** 2, 20, axis=1)
    found = fit(law, [Curve(gold=gold, kl=kl)], num_draws=20)
    assert found.alpha.value == pytest.approx(0.8)
    assert found.beta.value == pytest.approx(0.2)
    assert found.peak.value == pytest.approx(peak_of(law, 0.8, 0.2))
    assert found.peak.low == pytest.approx(found.peak.high)
    np.testing.assert_allclose(found(d), gold[:, 0], atol=1e-9)
    assert rng is not None


def test_peaks_by_hand():
    assert peak_of("bon", 1.0, 0.25) == pytest.approx(2.0)
    assert peak_of("rl", 2.0, 1.0) == pytest.approx(math.e)
    assert peak_of("bon", 1.0, 0.0) == math.inf
    assert peak_of("rl", 1.0, -0.1) == math.inf


@pytest.mark.parametrize(("law", "peak"), [("bon", 2.0), ("rl", math.e)])
def test_the_peak_is_where_the_curve_is_highest(law, peak):
    alpha, beta = (1.0, 0.25) if law == "bon" else (2.0, 1.0)
    d = np.linspace(0.01, 8, 4000)
    assert d[predict(law, alpha, beta, d).argmax()] == pytest.approx(peak, abs=0.01)


def test_seeds_widen_the_interval_when_they_disagree():
    rng = np.random.default_rng(1)
    alike = [simulate("rl", 1.2, 0.6, rng, largest_d=8.0, noise=0.2) for _ in range(3)]
    apart = [simulate("rl", alpha, 0.6, rng, largest_d=8.0, noise=0.2) for alpha in (0.8, 1.2, 1.6)]
    narrow, wide = fit("rl", alike).alpha, fit("rl", apart).alpha
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_too_few_points_give_no_fit():
    gold = np.zeros((3, 20))
    kl = np.array([[0.0] * 20, [1.0] * 20, [4.0] * 20])
    assert fit("rl", [Curve(gold=gold, kl=kl)]) is None


def test_the_start_is_recentred_to_zero():
    rng = np.random.default_rng(2)
    curve = simulate("bon", 1.0, 0.15, rng, largest_d=6.0, noise=0.1)
    moved = Curve(gold=curve.gold + 7.0, kl=curve.kl)
    assert fit("bon", [moved]).alpha.value == pytest.approx(fit("bon", [curve]).alpha.value)


def test_the_band_holds_the_curve():
    rng = np.random.default_rng(3)
    found = fit("rl", [simulate("rl", 1.2, 0.6, rng, largest_d=8.0)])
    d = np.linspace(0.5, 8, 20)
    low, high = found.band(d)
    assert (low <= found(d) + 1e-9).all()
    assert (found(d) <= high + 1e-9).all()
