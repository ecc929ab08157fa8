"""Gradient checkpointing changes memory alone; what is saved reads back as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from klippo.policy.adapters import POLICY
from klippo.policy.settings import CriticSettings
from klippo.policy.weights import VALUE_HEAD_FILE, save_policy
from tests.policy.test_critics import CRITICS, TOKENS
from tests.policy.test_reference import logprobs_of
from tests.tolerance import FLOAT64
from tests.toys import (
    FAMILIES,
    LORA,
    NO_TOKENIZER,
    assert_same_tensors,
    disturb,
    gpt2,
    gradients,
    llama,
    load,
    oracle,
)

LORA_CRITIC = CriticSettings(kind="lora", lora=LORA)
SETUPS = {
    "full": ("full", CriticSettings()),
    "full, separate critic": ("full", CriticSettings(kind="separate")),
    "last_layers": ("last_layers", CriticSettings()),
    "lora": ("lora", CriticSettings()),
    "lora, lora critic": ("lora", LORA_CRITIC),
}


def trained_gradients(family, tuning, critic, checkpointing):
    torch.manual_seed(4)
    policy = load(
        FAMILIES[family](), critic=critic, tuning=tuning, gradient_checkpointing=checkpointing
    ).policy
    disturb([p for group in policy.trainable() for p in group])
    policy.train()
    calls = []
    block = policy.lm.model.base_model
    block = block.h[1] if family == "gpt2" else block.layers[1]
    # A hook inside the block: what is outside of it is not run again.
    norm = block.ln_1 if family == "gpt2" else block.input_layernorm
    norm.register_forward_hook(lambda *_: calls.append(1))
    output = policy(TOKENS, 0.8)
    forward_calls = len(calls)
    (output.logprobs.sum() + 0.3 * output.entropy.sum() + output.values.square().sum()).backward()
    if policy.peft_model is not None:
        assert policy.peft_model.active_adapter == POLICY
    return gradients(policy), len(calls) - forward_calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setup", SETUPS)
def test_checkpointed_gradients_equal_plain_ones(setup, family):
    tuning, critic = SETUPS[setup]
    plain, none_again = trained_gradients(family, tuning, critic, False)
    checkpointed, again = trained_gradients(family, tuning, critic, True)
    assert (none_again, again > 0) == (0, True), "checkpointing must recompute the blocks"
    assert plain
    assert_same_tensors(checkpointed, plain, **FLOAT64)


def saved(tmp_path, kind, model=None):
    critic, tuning = CRITICS[kind]
    policy = load(llama() if model is None else model, critic=critic, tuning=tuning).policy
    disturb([p for group in policy.trainable() for p in group], scale=0.2)
    save_policy(policy, NO_TOKENIZER, tmp_path / "model", tmp_path / "critic")
    with torch.no_grad():
        return policy, policy(TOKENS, 0.8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["trunk", "trunk_last_layers"])
def test_a_saved_policy_reloads_with_the_same_log_probs(tmp_path, kind, family):
    _, output = saved(tmp_path, kind, FAMILIES[family]())
    again = oracle(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval())
    torch.testing.assert_close(logprobs_of(again), output.logprobs, **FLOAT64)


def test_the_saved_config_keeps_its_dropout(tmp_path):  # off in the run, not in the model
    saved(tmp_path, "trunk", gpt2(resid_pdrop=0.25))
    assert json.loads((tmp_path / "model/config.json").read_text())["resid_pdrop"] == 0.25


@pytest.mark.parametrize("kind", ["trunk_lora", "lora", "separate_lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_reloads_on_its_base_and_stands_alone(tmp_path, kind, family):
    from peft import PeftModel

    _, output = saved(tmp_path, kind, FAMILIES[family]())
    again = PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "model").eval()
    merged = oracle(again.merge_and_unload())
    torch.testing.assert_close(logprobs_of(merged), output.logprobs, **FLOAT64)
    assert not [path for path in (tmp_path / "model").iterdir() if path.is_dir()]
    names = load_file(tmp_path / "model/adapter_model.safetensors")
    assert all("critic" not in name and "reference" not in name for name in names)


def test_a_policy_started_from_an_adapter_saves_its_own_adapter_alone(tmp_path):
    saved(tmp_path / "first", "trunk_lora")
    policy = load(
        llama(), critic=LORA_CRITIC, tuning="lora", adapter=str(tmp_path / "first/model")
    ).policy
    disturb(policy.trainable()[0], scale=0.2, seed=11)
    with torch.no_grad():
        expected = policy(TOKENS, 0.8).logprobs
    save_policy(policy, NO_TOKENIZER, tmp_path / "model", tmp_path / "critic")
    assert not [path for path in (tmp_path / "model").iterdir() if path.is_dir()]
    again = load(llama(), tuning="lora", adapter=str(tmp_path / "model"))
    with torch.no_grad():
        torch.testing.assert_close(again.policy(TOKENS, 0.8).logprobs, expected, **FLOAT64)


@pytest.mark.parametrize("kind", CRITICS)
def test_the_value_head_lies_beside_and_says_what_it_stands_on(tmp_path, kind):
    policy, output = saved(tmp_path, kind)
    head = load_file(tmp_path / "critic" / VALUE_HEAD_FILE)
    assert torch.equal(head["weight"], policy.critic.head.weight)
    assert torch.equal(head["bias"], policy.critic.head.bias)
    stands_on = json.loads((tmp_path / "critic/critic.json").read_text())["stands_on"]
    if kind.startswith("separate"):
        assert stands_on == "this folder's model"
        trunk = AutoModel.from_pretrained(tmp_path / "critic").eval()
        with torch.no_grad():
            policy.critic.trunk.load_state_dict(trunk.state_dict())
            torch.testing.assert_close(policy(TOKENS, 0.8).values, output.values, **FLOAT64)
    elif kind == "lora":
        assert stands_on == "the policy's base with this folder's adapter"
        assert list((tmp_path / "critic").glob("*/adapter_model.safetensors"))
    else:
        assert stands_on == "the policy's trunk"
