"""KL estimators by enumeration, and the controller in numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klippo.ppo.learner import KLController
from klippo.tensors.estimators import k1, k2, k3
from tests.tolerance import FLOAT64_APPROX

REF = torch.tensor([0.7, 0.3], dtype=torch.float64).log()


def two_token_policy(logit):
    """Log-probs (2,) of a policy over two tokens, differentiable in its one logit."""
    return torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0)


def exact(logp):
    return (logp.exp() * (logp - REF)).sum()


def expected(estimator, logp):
    """The estimator's expectation under the policy, with the sampling held fixed."""
    return (logp.detach().exp() * estimator(logp, REF)).sum()


@settings(max_examples=50, deadline=None)
@given(st.floats(-6, 6))
def test_k1_and_k3_have_the_exact_kl_as_expectation(logit):
    logp = two_token_policy(torch.tensor(logit, dtype=torch.float64))
    for estimator in (k1, k3):
        assert float(expected(estimator, logp)) == pytest.approx(
            float(exact(logp)), **FLOAT64_APPROX
        )


@settings(max_examples=50, deadline=None)
@given(st.floats(-6, 6))
def test_the_expected_gradient_of_k2_alone_is_the_gradient_of_the_kl(logit):
    def slope(function):
        x = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
        function(two_token_policy(x)).backward()
        return float(x.grad)

    truth = slope(exact)
    assert slope(lambda logp: expected(k2, logp)) == pytest.approx(truth, **FLOAT64_APPROX)
    assert slope(lambda logp: expected(k1, logp)) == pytest.approx(0, **FLOAT64_APPROX)


def test_k3_in_the_loss_would_pull_towards_the_wrong_place():  # why k3 is for logs only
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    expected(k3, two_token_policy(x)).backward()
    y = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    exact(two_token_policy(y)).backward()
    assert abs(float(x.grad) - float(y.grad)) > 0.05


def test_estimators_of_one_token_by_hand():
    logp, ref = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    assert float(k1(logp, ref)) == pytest.approx(math.log(2))
    assert float(k2(logp, ref)) == pytest.approx(math.log(2) ** 2 / 2)
    assert float(k3(logp, ref)) == pytest.approx(0.5 - 1 + math.log(2))
    assert float(k1(ref, logp)) == pytest.approx(-math.log(2))
    assert float(k3(ref, logp)) == pytest.approx(2 - 1 - math.log(2))


@pytest.mark.parametrize(
    ("sequence_kl", "coef"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),  # ten per cent too far: proportional
        (60.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # far too far: the error is capped at 0.2
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),
        (-3.0, 0.1 * (1 - 0.2 * 64 / 1000)),  # an estimate may be negative
    ],
)
def test_the_adaptive_controller_follows_ziegler(sequence_kl, coef):
    controller = KLController(coef=0.1, target=6.0, horizon=1000.0)
    controller.update(sequence_kl, 64)
    assert controller.coef == pytest.approx(coef, **FLOAT64_APPROX)


def test_the_fixed_controller_never_moves():
    controller = KLController(coef=0.1)
    controller.update(1000.0, 64)
    assert controller.coef == 0.1
