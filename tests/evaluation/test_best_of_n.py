"""Best-of-n against brute force, and at the size of the published experiments."""

import math
import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klippo.evaluation.best_of_n import best_of_n, best_of_n_curve, default_ns, kl_of_best_of


def brute_force(proxy, gold, n):
    """Mean over all subsets of the gold score of the subset's best; ties share their gold."""
    totals = []
    for subset in combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        winners = [gold[i] for i in subset if proxy[i] == best]
        totals.append(sum(winners) / len(winners))
    return sum(totals) / len(totals)


@pytest.mark.parametrize("n", range(1, 9))
def test_it_equals_brute_force_over_all_subsets(n):
    rng = np.random.default_rng(n)
    proxy, gold = rng.normal(size=8), rng.normal(size=8)
    assert best_of_n(proxy, gold, n) == pytest.approx(brute_force(proxy, gold, n), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=7),
    st.integers(1, 7),
    st.integers(0, 2**32 - 1),
)
def test_ties_share_their_gold_as_brute_force_over_their_orders_does(proxy, n, seed):
    n = min(n, len(proxy))
    gold = np.random.default_rng(seed).normal(size=len(proxy))
    # The estimator levels gold within each tie first, so brute force does too.
    levelled = [np.mean([g for g, q in zip(gold, proxy, strict=True) if q == p]) for p in proxy]
    expected = brute_force(proxy, levelled, n)
    assert best_of_n(np.array(proxy, float), gold, n) == pytest.approx(expected, abs=1e-10)


def test_the_order_of_the_samples_does_not_matter():
    rng = np.random.default_rng(0)
    proxy, gold = rng.integers(0, 4, 30).astype(float), rng.normal(size=30)
    shuffled = rng.permutation(30)
    for n in (1, 5, 30):
        assert best_of_n(proxy, gold, n) == pytest.approx(
            best_of_n(proxy[shuffled], gold[shuffled], n), abs=1e-12
        )


def test_best_of_one_is_the_mean_and_best_of_all_is_the_best():
    proxy, gold = np.array([0.3, 0.1, 0.9]), np.array([1.0, 2.0, 6.0])
    assert best_of_n(proxy, gold, 1) == pytest.approx(3.0)
    assert best_of_n(proxy, gold, 3) == pytest.approx(6.0)
    # best of two by hand: pairs (0,1) -> 1, (0,2) -> 6, (1,2) -> 6
    assert best_of_n(proxy, gold, 2) == pytest.approx(13 / 3)


def test_at_the_published_size_it_is_finite_monotone_and_quick():
    num = 12_600
    proxy = np.random.default_rng(0).normal(size=num)
    ns = [1, 2, 10, 100, 1000, 5000, 12_500, 12_600]
    start = time.perf_counter()
    values = best_of_n_curve(proxy, proxy, ns)  # gold = proxy: more choice is never worse
    assert time.perf_counter() - start < 2
    assert np.isfinite(values).all()
    assert (np.diff(values) > 0).all()
    assert values[-1] == pytest.approx(proxy.max())


def test_more_choice_than_samples_is_refused():
    with pytest.raises(ValueError, match="n=4: best of n needs 1 <= n <= 3"):
        best_of_n(np.zeros(3), np.zeros(3), 4)


def test_kl_of_best_of_n_by_hand():
    assert kl_of_best_of(1) == 0
    assert kl_of_best_of(4) == pytest.approx(math.log(4) - 0.75)


def test_default_ns_end_with_all_samples():
    assert default_ns(12) == [1, 2, 4, 8, 12]
    assert default_ns(8) == [1, 2, 4, 8]
