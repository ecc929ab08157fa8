"""PPO's losses on numbers computed by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klippo.ppo.loss import policy_loss, probability_ratio, value_loss
from tests.tolerance import FLOAT64_APPROX


def loss_and_gradient(ratio, advantage, **options):
    """Policy loss and its derivative with respect to the log-prob."""
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    rho = probability_ratio(logprob, torch.zeros(1))
    loss, _ = policy_loss(rho, torch.tensor([advantage]), clip_range=0.2, **options)
    loss.sum().backward()
    return loss.item(), float(logprob.grad)


# Clipped and pessimistic: the policy already moved in the direction that the advantage wants.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2.0, -2.4, 0.0),  # up, wanted up: stop
        (0.5, -2.0, 1.6, 0.0),  # down, wanted down: stop
        (1.5, -2.0, 3.0, 3.0),  # up, wanted down: push back
        (0.5, 2.0, -1.0, -1.0),  # down, wanted up: push back
        (1.1, 2.0, -2.2, -2.2),  # inside the range
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_the_gradient_is_zero_exactly_when_clipped_and_pessimistic(
    ratio, advantage, loss, gradient
):
    assert loss_and_gradient(ratio, advantage) == pytest.approx((loss, gradient), **FLOAT64_APPROX)
    _, clipped = policy_loss(torch.tensor([ratio]), torch.tensor([advantage]), clip_range=0.2)
    assert bool(clipped) is (gradient == 0)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.05, 4), st.floats(-5, 5))
def test_a_token_counts_as_clipped_where_its_gradient_vanishes(ratio, advantage):
    if min(abs(ratio - 0.8), abs(ratio - 1.2), abs(advantage)) < 1e-3:
        return  # at the kink, or nothing to learn
    _, gradient = loss_and_gradient(ratio, advantage)
    _, clipped = policy_loss(torch.tensor([ratio]), torch.tensor([advantage]), clip_range=0.2)
    assert bool(clipped) is (gradient == 0)


def test_dual_clip_bounds_the_loss_of_bad_tokens_alone():
    # A < 0 and rho = 5: -A * rho = 10, bounded by dual_clip * |A| = 6 with no gradient.
    assert loss_and_gradient(5.0, -2.0) == pytest.approx((10.0, 10.0), **FLOAT64_APPROX)
    assert loss_and_gradient(5.0, -2.0, dual_clip=3.0) == pytest.approx(
        (6.0, 0.0), **FLOAT64_APPROX
    )
    assert loss_and_gradient(2.0, -2.0, dual_clip=3.0) == pytest.approx(
        (4.0, 4.0), **FLOAT64_APPROX
    )
    assert loss_and_gradient(5.0, 2.0, dual_clip=3.0) == loss_and_gradient(5.0, 2.0)
    assert loss_and_gradient(0.1, 2.0, dual_clip=3.0) == loss_and_gradient(0.1, 2.0)


def test_the_log_ratio_is_clamped_to_twenty_on_both_sides():
    logprobs = torch.tensor([-1.0, -1.0, -500.0, -25.0], dtype=torch.float64, requires_grad=True)
    ratio = probability_ratio(logprobs, torch.tensor([-3.0, -30.0, -1.0, -4.0]))
    expected = [math.exp(2), math.exp(20), math.exp(-20), math.exp(-20)]
    assert ratio.tolist() == pytest.approx(expected, **FLOAT64_APPROX)
    ratio.log().sum().backward()
    assert logprobs.grad.tolist()[1:] == [0, 0, 0]


@pytest.mark.parametrize(
    ("value", "old", "target", "clip_range", "loss", "gradient"),
    [
        (2.0, 0.0, 5.0, None, 4.5, -3.0),
        (2.0, 0.0, 5.0, 0.5, 10.125, 0.0),  # clipped to 0.5, further from 5: no pull
        (0.3, 0.0, 5.0, 0.5, 11.045, -4.7),  # inside the range
        (2.0, 0.0, 1.0, 0.5, 0.5, 1.0),  # clipped to 0.5, nearer to 1: the larger error rules
        (-2.0, 0.0, -5.0, 0.5, 10.125, 0.0),
    ],
)
def test_the_value_loss_takes_the_worse_of_clipped_and_unclipped(
    value, old, target, clip_range, loss, gradient
):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    got = value_loss(values, torch.tensor([old]), torch.tensor([target]), clip_range=clip_range)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, **FLOAT64_APPROX)
    assert float(values.grad) == pytest.approx(gradient, **FLOAT64_APPROX)
