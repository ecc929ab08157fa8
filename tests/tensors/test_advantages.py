"""Advantages, returns, whitening."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klippo.tensors.estimators import gae, masked_mean, masked_sum, whiten
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import over_two_ranks

WHITENING_EPS = 1e-8
NUMBER = st.floats(-10, 10, width=32)


@st.composite
def ragged(draw):
    """Rows of (reward, value) pairs of unlike lengths, a value after each, gamma and lambda."""
    rows = draw(st.lists(st.lists(st.tuples(NUMBER, NUMBER), max_size=7), min_size=1, max_size=4))
    after = draw(st.lists(NUMBER, min_size=len(rows), max_size=len(rows)))
    unit = st.floats(0, 1)
    return rows, after, draw(unit), draw(unit)


def as_tensors(rows, garbage=0.0):
    """Rewards, values and mask (B, T), with `garbage` in the padding."""
    width = max(map(len, rows)) + 2
    filled = torch.full((2, len(rows), width), garbage, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        for t, pair in enumerate(row):
            filled[:, i, t] = torch.tensor(pair)
            mask[i, t] = True
    return filled[0], filled[1], mask


def quadratic_gae(row, after, gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, each term on its own, in float64."""
    rewards = [float(r) for r, _ in row]
    values = [float(v) for _, v in row] + [float(after)]
    return [
        sum(
            (gamma * lam) ** (k - t) * (rewards[k] + gamma * values[k + 1] - values[k])
            for k in range(t, len(row))
        )
        for t in range(len(row))
    ]


@settings(max_examples=60, deadline=None)
@given(ragged())
def test_gae_is_the_discounted_sum_of_all_later_deltas(case):
    rows, after, gamma, lam = case
    rewards, values, mask = as_tensors(rows)
    advantages, returns = gae(
        rewards, values, mask, gamma=gamma, lam=lam, value_after=torch.tensor(after).double()
    )
    for i, row in enumerate(rows):
        expected = quadratic_gae(row, after[i], gamma, lam)
        for t, advantage in enumerate(expected):
            assert float(advantages[i, t]) == pytest.approx(advantage, **FLOAT64_APPROX)
            assert float(returns[i, t]) == pytest.approx(advantage + row[t][1], **FLOAT64_APPROX)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_garbage_in_the_padding_never_reaches_advantages_or_returns(garbage):
    rows = [[(1.0, 2.0), (-1.0, 0.5), (3.0, 1.0)], [(0.5, -1.0)], []]
    clean = gae(*as_tensors(rows), gamma=0.9, lam=0.8)
    dirty = gae(*as_tensors(rows, garbage), gamma=0.9, lam=0.8)
    for left, right in zip(clean, dirty, strict=True):
        assert torch.equal(left, right)


def test_gae_of_three_tokens_by_hand():
    # deltas with gamma 0.5: 1+0.5*4-2=1, 0+0.5*6-4=-1, 8-6=2; gamma*lambda = 0.25
    rewards, values, mask = as_tensors([[(1.0, 2.0), (0.0, 4.0), (8.0, 6.0)]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages[0, :3].tolist() == [0.875, -0.5, 2.0]
    assert returns[0, :3].tolist() == [2.875, 3.5, 8.0]


def test_without_discount_the_return_is_the_sum_of_later_rewards():
    rewards, values, mask = as_tensors([[(1.0, 9.0), (2.0, -4.0), (4.0, 7.0)]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert returns[0, :3].tolist() == [7.0, 6.0, 4.0]
    assert advantages[0, :3].tolist() == [-2.0, 10.0, -3.0]


def test_with_lambda_zero_the_advantage_is_the_one_step_error():
    rewards, values, mask = as_tensors([[(1.0, 9.0), (2.0, -4.0), (4.0, 7.0)]])
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.0)
    assert advantages[0, :3].tolist() == [1 - 4 - 9, 2 + 7 + 4, 4 - 7]


def test_the_value_after_the_last_token_counts_only_when_given():
    rewards, values, mask = as_tensors([[(0.0, 1.0), (2.0, 3.0)], [(2.0, 3.0)]])
    ended, _ = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    cut, _ = gae(
        rewards, values, mask, gamma=0.5, lam=0.0, value_after=torch.tensor([10.0, 10.0]).double()
    )
    assert ended[:, :2].tolist() == [[0.5, -1.0], [-1.0, 0.0]]
    assert cut[:, :2].tolist() == [[0.5, 4.0], [4.0, 0.0]]


MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()


def noise(seed=0):
    return torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed)).double() * 3 + 5


def test_whitened_advantages_have_zero_mean_and_unit_spread_over_real_tokens():
    x = noise().masked_fill(~MASK, math.nan)
    whitened = whiten(x, MASK)
    real, variance = whitened[MASK], float(x[MASK].var(correction=0))
    assert float(real.mean()) == pytest.approx(0, **FLOAT64_APPROX)
    spread = variance / (variance + WHITENING_EPS)
    assert float(real.square().mean()) == pytest.approx(spread, **FLOAT64_APPROX)
    assert not whitened[~MASK].any()


def test_whitening_of_four_numbers_by_hand():
    x, mask = torch.tensor([[1.0, 3.0, 5.0, 7.0]]).double(), torch.ones(1, 4, dtype=torch.bool)
    expected = torch.tensor([[-3.0, -1.0, 1.0, 3.0]]).double() / math.sqrt(5 + WHITENING_EPS)
    torch.testing.assert_close(whiten(x, mask), expected, **FLOAT64)
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), expected + 4, **FLOAT64)


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_nothing_or_a_single_token_gives_zero_and_not_nan(count):
    mask = torch.arange(4)[None] < count
    assert torch.equal(whiten(noise()[:1], mask), torch.zeros(1, 4).double())


def test_whitening_equal_numbers_stays_finite():
    assert not whiten(torch.full((2, 3), 7.0), torch.ones(2, 3, dtype=torch.bool)).any()


def test_whitening_over_two_processes_equals_whitening_the_whole_batch():
    x = noise()
    first, second = over_two_ranks(
        lambda rows, all_sum: whiten(x[rows], MASK[rows], all_sum=all_sum),
        [slice(0, 1), slice(1, 4)],
    )
    torch.testing.assert_close(torch.cat([first, second]), whiten(x, MASK), **FLOAT64)


def test_a_process_without_real_tokens_takes_part_in_whitening():
    x = noise()
    first, second = over_two_ranks(
        lambda rows, all_sum: whiten(x[rows], MASK[rows], all_sum=all_sum),
        [slice(0, 3), slice(3, 4)],
    )
    torch.testing.assert_close(first, whiten(x[:3], MASK[:3]), **FLOAT64)
    assert not second.any()


def test_masked_means_and_sums_ignore_whatever_stands_outside_the_mask():
    x = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, math.nan]]).double()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert float(masked_sum(x, mask)) == 7.0
    assert masked_sum(x, mask, 1).tolist() == [3.0, 4.0]
    assert float(masked_mean(x, mask)) == pytest.approx(7 / 3, **FLOAT64_APPROX)
    assert float(masked_mean(x, torch.zeros_like(mask))) == 0.0


def test_the_mean_over_processes_weighs_tokens_and_not_processes():
    x, mask = torch.tensor([[0.0, 0.0, 0.0], [8.0, 99.0, 99.0]]), torch.ones(2, 3).bool()
    mask[1, 1:] = False
    means = over_two_ranks(lambda row, all_sum: masked_mean(x[row], mask[row], all_sum), [0, 1])
    assert [float(mean) for mean in means] == [2.0, 2.0]
