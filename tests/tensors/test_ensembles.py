"""The ensembles' objectives against numbers computed by hand, and their properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klippo.tensors.ensembles import combine, lowest_shares, variance
from tests.tolerance import FLOAT64, gamma

# Three members (rows), two responses (columns).
MEMBERS = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]], dtype=torch.float64)


def test_the_mean_is_computed_by_hand():
    torch.testing.assert_close(
        combine(MEMBERS, "mean"), torch.tensor([3.0, 1.0], dtype=torch.float64)
    )


def test_wco_is_the_lowest_member():
    torch.testing.assert_close(
        combine(MEMBERS, "WCO"), torch.tensor([1.0, 0.0], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("ddof", "expected"),
    [
        # squared deviations from 3: 4 + 1 + 9 = 14; from 1: 1 + 1 + 4 = 6
        (0, [3 - 0.5 * 14 / 3, 1 - 0.5 * 6 / 3]),
        (1, [3 - 0.5 * 14 / 2, 1 - 0.5 * 6 / 2]),
    ],
)
def test_uwo_subtracts_lambda_times_the_variance_with_either_divisor(ddof, expected):
    scores = combine(MEMBERS, "UWO", uwo_weight=0.5, ddof=ddof)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


def test_lambda_zero_is_the_mean_exactly():
    assert torch.equal(combine(MEMBERS, "UWO", uwo_weight=0.0), combine(MEMBERS, "mean"))


def test_mean_minus_k_standard_deviations():
    scores = combine(MEMBERS, "mean_minus_sd", sd_weight=2.0, ddof=1)
    expected = torch.tensor([3 - 2 * math.sqrt(7), 1 - 2 * math.sqrt(3)], dtype=torch.float64)
    torch.testing.assert_close(scores, expected)


def test_the_median_of_an_odd_and_an_even_number_of_members():
    torch.testing.assert_close(
        combine(MEMBERS, "median"), torch.tensor([2.0, 0.0], dtype=torch.float64)
    )
    four = torch.tensor([[1.0], [2.0], [4.0], [100.0]], dtype=torch.float64)
    torch.testing.assert_close(combine(four, "median"), torch.tensor([3.0], dtype=torch.float64))


def test_soft_min_of_two_members_by_hand():
    two = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64)
    # -log((exp(0) + exp(-log 3)) / 2) = -log((1 + 1/3) / 2) = log(3/2)
    torch.testing.assert_close(
        combine(two, "soft_min"), torch.tensor([math.log(1.5)], dtype=torch.float64)
    )


def test_variance_agrees_with_torch():
    members = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).double()
    for ddof in (0, 1):
        torch.testing.assert_close(variance(members, ddof), members.var(0, correction=ddof))


@pytest.mark.parametrize("objective", ["mean", "WCO", "UWO", "soft_min", "median", "mean_minus_sd"])
def test_a_missing_score_makes_the_row_missing_and_no_other(objective):
    members = MEMBERS.clone()
    members[1, 0] = math.nan
    scores = combine(members, objective, uwo_weight=0.5, sd_weight=0.5)
    assert scores.isnan().tolist() == [True, False]


numbers = st.floats(-10, 10, width=32)
tables = st.integers(1, 6).flatmap(
    lambda k: st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=k, max_size=k)
)


@settings(max_examples=60, deadline=None)
@given(tables, st.floats(0.05, 20))
def test_every_objective_lies_between_the_lowest_member_and_the_mean(table, temperature):
    members = torch.tensor(table, dtype=torch.float64)
    low, mean = combine(members, "WCO"), combine(members, "mean")
    soft = combine(members, "soft_min", temperature=temperature)
    slack = FLOAT64["atol"]
    assert bool((low - slack <= soft).all())
    assert bool((soft <= mean + slack).all())
    assert bool((combine(members, "UWO", uwo_weight=0.3) <= mean + slack).all())


@settings(max_examples=60, deadline=None)
@given(tables, numbers)
def test_moving_all_members_moves_every_objective_by_as_much(table, shift):
    members = torch.tensor(table, dtype=torch.float64)
    # Numbers up to 20; a standard deviation is the root of a variance that may be all rounding.
    slack = 20 * math.sqrt(gamma(20, torch.float64))
    for objective in ("mean", "WCO", "UWO", "soft_min", "median", "mean_minus_sd"):
        options = {"uwo_weight": 0.7, "sd_weight": 0.7}
        before, after = (combine(m, objective, **options) for m in (members, members + shift))
        torch.testing.assert_close(after, before + shift, atol=slack, rtol=0)


def test_soft_min_becomes_the_minimum_when_cold_and_the_mean_when_hot():
    cold = combine(MEMBERS, "soft_min", temperature=1e-3)
    hot = combine(MEMBERS, "soft_min", temperature=1e4)
    # cold: minimum + t log(K / ties)
    torch.testing.assert_close(cold, combine(MEMBERS, "WCO"), atol=2e-3, rtol=0)
    torch.testing.assert_close(hot, combine(MEMBERS, "mean"), atol=1e-2, rtol=0)


def test_the_lowest_members_share_a_tie():
    expected = torch.tensor([[1.0, 0.5], [0.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(lowest_shares(MEMBERS), expected)
