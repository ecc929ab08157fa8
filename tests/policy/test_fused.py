"""The tanh approximation of GELU as one operation: the same numbers, and less to hold."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import klippo.policy.loading as loading
from klippo.ppo.settings import PPOSettings
from klippo.ppo.update import loss_of
from klippo.types import Scores
from tests.ppo.test_experience import learner
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import RAGGED, assert_same_tensors, disturb, gpt2, gradients, load, make_rollout

NUM_LAYERS, WIDTH = 2, 16


def one_pass(activation):
    """Loss, gradients and bytes kept for the backward pass of one update, just after a change."""
    loaded = load(gpt2(num_layers=NUM_LAYERS, activation_function=activation))
    one = learner(loaded)
    rollout = make_rollout(RAGGED, temperature=0.8)
    experience = one.experience(rollout, Scores(reward=torch.tensor([1.0, -2.0, 0.5, 3.0])))
    disturb([p for group in loaded.policy.trainable() for p in group], scale=0.05)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor  # alive, so that no number is used twice
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = loss_of(PPOSettings(batch_size=4), loaded.policy, experience, kl_coef=0)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    total.backward()
    return float(total.detach()), gradients(loaded.policy), num_bytes


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast"])
def test_losses_and_gradients_are_those_of_the_formula_and_less_is_kept(monkeypatch, activation):
    loss, found, num_bytes = one_pass(activation)
    monkeypatch.setattr(loading, "with_fused_activations", lambda model: model)
    expected_loss, expected, num_expected = one_pass(activation)
    assert loss == pytest.approx(expected_loss, **FLOAT64_APPROX)
    assert_same_tensors(found, expected, **FLOAT64)
    # tanh, what it is added to and half of what goes in: 3 tensors, 4 times the width
    tokens = 4 * (5 + 6 - 1)
    assert num_expected - num_bytes >= NUM_LAYERS * 3 * tokens * 4 * WIDTH * 8


def test_other_activations_and_the_config_stay_as_they_are():
    model = gpt2(activation_function="relu")
    kind = type(model.transformer.h[0].mlp.act)
    assert type(load(model).policy.lm.model.transformer.h[0].mlp.act) is kind
    fused = load(gpt2(activation_function="gelu_new"))
    for lm in (fused.policy.lm, fused.reference.lm):
        assert isinstance(lm.model.transformer.h[0].mlp.act, torch.nn.GELU)
        assert lm.model.config.activation_function == "gelu_new"
