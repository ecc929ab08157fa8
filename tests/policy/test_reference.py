"""The reference is the policy at step 0, and stays it.

B sequences, T response tokens.
"""

import copy

import pytest
import torch

from klippo.evaluation.samples import evaluate
from klippo.policy.adapters import CRITIC, POLICY, REFERENCE, using_adapter
from klippo.policy.settings import CriticSettings
from klippo.types import Scores
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import (
    FAMILIES,
    LORA,
    RAGGED,
    dense_logprobs,
    disturb,
    gpt2,
    llama,
    load,
    make_rollout,
    oracle,
    weights,
)

LORA_CRITIC = CriticSettings(kind="lora", lora=LORA)


def saved_adapter(folder, model):
    """A trained adapter on disk for `model`; returns the base with it merged, as an oracle."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules="all-linear",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
    )  # fmt: skip
    trained = get_peft_model(copy.deepcopy(model), config)
    disturb([p for p in trained.parameters() if p.requires_grad], scale=0.3, seed=8)
    trained.save_pretrained(folder)
    return trained.merge_and_unload().eval()


def logprobs_of(model, rows=RAGGED, temperature=0.8):
    """Log-probs (B, T) of a plain model, row by row."""
    tokens = make_rollout(rows).tokens
    out = torch.zeros(tokens.response_mask.shape, dtype=model.dtype)
    with torch.no_grad():
        for i, (prompt_ids, ids) in enumerate(rows):
            logp = dense_logprobs(model, prompt_ids, ids, temperature)
            out[i, : len(ids)] = logp.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    return out


STARTS = ["full", "last_layers", "lora", "adapter"]


def start(kind, family, tmp_path, critic=None):
    """(loaded policy in float64, frozen copy of what it was at step 0)."""
    model = FAMILIES[family]()
    copied = oracle(model)
    if kind == "adapter":
        copied = oracle(saved_adapter(tmp_path, model))
        return load(model, critic=critic, tuning="lora", adapter=str(tmp_path)), copied
    options = {"num_unfrozen_layers": 1} if kind == "last_layers" else {}
    return load(model, critic=critic, tuning=kind, **options), copied


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", STARTS)
def test_the_reference_is_the_start_before_and_after_training(kind, family, tmp_path):
    loaded, copied = start(kind, family, tmp_path)
    tokens = make_rollout(RAGGED).tokens
    expected = logprobs_of(copied)
    with torch.no_grad():
        at_step_0 = loaded.policy(tokens, 0.8).logprobs
    torch.testing.assert_close(at_step_0, expected, **FLOAT64)
    torch.testing.assert_close(loaded.reference.logprobs(tokens, 0.8), expected, **FLOAT64)
    assert torch.equal(loaded.reference.logprobs(tokens, 0.8), at_step_0)
    assert loaded.reference.kl_from(loaded.policy.lm, tokens, 0.8).abs().max() < FLOAT64["atol"]

    disturb(loaded.policy.trainable()[0], scale=0.2)
    with torch.no_grad():
        moved = loaded.policy(tokens, 0.8).logprobs
    assert (moved - expected).abs().max() > 0.05
    torch.testing.assert_close(loaded.reference.logprobs(tokens, 0.8), expected, **FLOAT64)


@pytest.mark.parametrize("kind", STARTS)
def test_exact_kl_is_the_full_vocabulary_sum_against_a_frozen_copy(kind, tmp_path):
    loaded, copied = start(kind, "gpt2", tmp_path)
    disturb(loaded.policy.trainable()[0], scale=0.2)
    rollout = make_rollout(RAGGED, temperature=0.8)
    kl = loaded.reference.kl_from(loaded.policy.lm, rollout.tokens, 0.8)
    rows = evaluate(
        loaded.policy, loaded.reference, rollout, Scores(reward=torch.zeros(len(RAGGED))),
        step=0, episodes=0, parts=[torch.tensor([2, 0, 3]), torch.tensor([1])],
    )  # fmt: skip
    with torch.no_grad():
        for i, (prompt_ids, ids) in enumerate(RAGGED):
            # the model inside the policy has the active (policy) adapter: its logits are pi's
            logp = dense_logprobs(loaded.policy.lm.model, prompt_ids, ids, 0.8)
            ref = dense_logprobs(copied, prompt_ids, ids, 0.8)
            expected = (logp.exp() * (logp - ref)).sum(1)
            torch.testing.assert_close(kl[i, : len(ids)], expected, **FLOAT64)
            assert not kl[i, len(ids) :].any()
            chosen = torch.tensor(ids)[:, None]
            k1 = float((logp - ref).gather(1, chosen).sum())
            assert rows[i]["kl_exact_nats"] == pytest.approx(
                float(expected.sum()), **FLOAT64_APPROX
            )
            assert rows[i]["kl_k1_nats"] == pytest.approx(k1, **FLOAT64_APPROX)


def test_frozen_layers_are_held_once(tmp_path):  # last_layers costs no second model
    loaded, _ = start("last_layers", "gpt2", tmp_path)
    mine = dict(loaded.policy.lm.model.named_parameters())
    reference = dict(loaded.reference.lm.model.named_parameters())
    for name, parameter in mine.items():
        shared = parameter.data_ptr() == reference[name].data_ptr()
        assert shared is not parameter.requires_grad, name
        assert not reference[name].requires_grad
    assert {name.split(".")[2] for name, p in mine.items() if p.requires_grad} == {"1"}


def adapter_state(policy):
    layers = [m for m in policy.peft_model.modules() if hasattr(m, "lora_A")]
    return (
        policy.peft_model.active_adapter,
        {layer.disable_adapters for layer in layers},
        {tuple(layer.active_adapters) for layer in layers},
        {name: p.requires_grad for name, p in policy.named_parameters()},
    )


@pytest.mark.parametrize("name", [REFERENCE, CRITIC, None])
def test_an_exception_under_another_adapter_puts_everything_back(tmp_path, name):
    policy = start("adapter", "llama", tmp_path, LORA_CRITIC)[0].policy
    before = adapter_state(policy)
    assert before[:3] == (POLICY, {False}, {(POLICY,)})
    inside = []

    def fail():
        with using_adapter(policy.peft_model, name):
            inside.append(adapter_state(policy))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside[0][:3] != before[:3]
    assert adapter_state(policy) == before


def test_an_exception_inside_the_reference_puts_everything_back(tmp_path, monkeypatch):
    loaded, _ = start("adapter", "llama", tmp_path, LORA_CRITIC)
    before = adapter_state(loaded.policy)

    def broken(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(loaded.reference.lm.trunk, "forward", broken)
    with pytest.raises(MemoryError):
        loaded.reference.logprobs(make_rollout(RAGGED).tokens, 1.0)
    assert adapter_state(loaded.policy) == before


def test_policy_critic_and_reference_adapters_each_keep_their_own_weights(tmp_path):
    loaded, _ = start("adapter", "gpt2", tmp_path, LORA_CRITIC)
    of_policy, of_critic = loaded.policy.trainable()
    names = {id(p): name for name, p in loaded.policy.named_parameters()}
    assert all(f".{POLICY}." in names[id(p)] for p in of_policy)
    assert sum(f".{CRITIC}." in names[id(p)] for p in of_critic) == len(of_critic) - 2
    assert not any(
        p.requires_grad for n, p in loaded.policy.named_parameters() if f".{REFERENCE}." in n
    )
    # Every critic adapter sits on a layer of the base, never on another adapter.
    assert not [n for n in names.values() if n.count("lora_") > 1]
    assert len(of_policy) == len(of_critic) - 2


def test_the_critic_adapter_learns_from_values_and_the_policy_adapter_from_log_probs():
    policy = load(llama(), critic=LORA_CRITIC, tuning="lora").policy
    disturb([p for group in policy.trainable() for p in group])
    tokens = make_rollout(RAGGED).tokens
    of_policy, of_critic = policy.trainable()

    def moved(parameters):
        return [p.grad is not None and bool(p.grad.any()) for p in parameters]

    policy(tokens, 1.0).values.sum().backward()
    assert all(moved(of_critic))
    assert not any(moved(of_policy))
    policy.zero_grad()
    policy(tokens, 1.0).logprobs.sum().backward()
    assert all(moved(of_policy))
    assert not any(moved(of_critic))
    base = [p for n, p in policy.named_parameters() if "lora_" not in n and "critic" not in n]
    assert not any(p.requires_grad or p.grad is not None for p in base)


def test_reference_passes_leave_no_gradients_and_no_changed_weights():
    loaded = load(llama(), critic=LORA_CRITIC, tuning="lora")
    before = weights(loaded.policy)
    assert not loaded.reference.logprobs(make_rollout(RAGGED).tokens, 1.0).requires_grad
    after = weights(loaded.policy)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_wrapping_a_model_of_ones_own_trains_that_very_model():
    model = gpt2()
    assert load(model).policy.lm.model is model
