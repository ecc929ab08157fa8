"""Three critics, where they start and what they train."""

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from klippo.errors import PreflightError
from klippo.policy.settings import CriticSettings
from tests.tolerance import FLOAT64
from tests.toys import (
    EOS,
    LORA,
    RAGGED,
    VOCABULARY,
    dense_logprobs,
    disturb,
    gpt2,
    llama,
    load,
    make_rollout,
    oracle,
)

TOKENS = make_rollout(RAGGED).tokens
CRITICS = {
    "trunk": (CriticSettings(), "full"),
    "trunk_last_layers": (CriticSettings(), "last_layers"),
    "trunk_lora": (CriticSettings(), "lora"),
    "lora": (CriticSettings(kind="lora", lora=LORA), "lora"),
    "separate": (CriticSettings(kind="separate"), "full"),
    "separate_lora": (CriticSettings(kind="separate"), "lora"),
    "separate_last_layers": (CriticSettings(kind="separate"), "last_layers"),
}


@pytest.mark.parametrize("kind", CRITICS)
def test_every_new_value_head_starts_at_exactly_zero(kind):
    critic, tuning = CRITICS[kind]
    policy = load(llama(), critic=critic, tuning=tuning).policy
    with torch.no_grad():
        assert not policy(TOKENS, 1.0, after_last=True).values.any()
        assert not policy.values(TOKENS).any()


@pytest.mark.parametrize("kind", CRITICS)
def test_policy_and_critic_weights_are_told_apart_and_each_counted_once(kind):
    critic, tuning = CRITICS[kind]
    policy = load(gpt2(), critic=critic, tuning=tuning).policy
    of_policy, of_critic = policy.trainable()
    ids = [id(p) for p in of_policy + of_critic]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in policy.parameters() if p.requires_grad}
    used_by_policy = {id(p) for p in policy.lm.model.parameters()}
    assert all(id(p) in used_by_policy for p in of_policy)
    heads = {id(p) for p in policy.critic.head.parameters()}
    assert heads <= {id(p) for p in of_critic}
    assert len(of_critic) > len(heads) or kind.startswith("trunk")


def reward_model(folder, vocab_size=VOCABULARY):
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=40, n_embd=24, n_layer=1, n_head=2, num_labels=1,
        pad_token_id=EOS, bos_token_id=EOS, eos_token_id=EOS, initializer_range=0.4,
        attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_critic_from_a_reward_model_keeps_its_head_and_reads_its_scores(tmp_path):
    model = reward_model(tmp_path).double()
    critic = CriticSettings(kind="separate", model=str(tmp_path))
    policy = load(llama(), critic=critic).policy.double()
    with torch.no_grad():
        values = policy.train()(TOKENS, 1.0, after_last=True).values
        for i, (prompt_ids, ids) in enumerate(RAGGED):
            whole = torch.tensor([prompt_ids + ids])
            scores = model.score(model.transformer(input_ids=whole)[0])[0, :, 0]
            expected = scores[len(prompt_ids) - 1 :]
            torch.testing.assert_close(values[i, : len(expected)], expected, **FLOAT64)
    assert all(p.requires_grad for p in policy.critic.parameters())


def test_a_critic_of_another_vocabulary_is_refused(tmp_path):
    reward_model(tmp_path, vocab_size=17)
    with pytest.raises(PreflightError, match="vocabulary of 17, the policy one of 13"):
        load(llama(), critic=CriticSettings(kind="separate", model=str(tmp_path)))


@pytest.mark.parametrize("kind", CRITICS)
def test_values_alone_equal_those_of_the_whole_pass_and_spare_the_policy(kind):
    critic, tuning = CRITICS[kind]
    policy = load(llama(), critic=critic, tuning=tuning).policy
    of_policy, of_critic = policy.trainable()
    disturb(of_critic, scale=0.3)
    values = policy.values(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(values, policy(TOKENS, 1.0).values, **FLOAT64)
    values.square().sum().backward()
    assert all(p.grad is None for p in of_policy)
    assert all(p.grad is not None and p.grad.any() for p in of_critic)


@pytest.mark.parametrize("kind", ["lora", "separate", "separate_lora"])
def test_a_critic_of_its_own_leaves_the_policys_distribution_alone(kind):
    critic, tuning = CRITICS[kind]
    model = llama()
    expected = {
        i: dense_logprobs(oracle(model), *row)
        .gather(1, torch.tensor(row[1])[:, None])
        .squeeze(1)
        .detach()
        for i, row in enumerate(RAGGED)
    }
    policy = load(model, critic=critic, tuning=tuning).policy
    disturb(policy.trainable()[1], scale=1.0)
    with torch.no_grad():
        logprobs = policy(TOKENS, 1.0).logprobs
    for i, own in expected.items():
        torch.testing.assert_close(logprobs[i, : len(own)], own, **FLOAT64)


def test_the_trunk_critics_loss_also_trains_the_trunk():
    policy = load(gpt2()).policy
    disturb(policy.critic.parameters(), scale=0.5)
    policy(TOKENS, 1.0).values.square().sum().backward()
    trunk = [p for n, p in policy.lm.trunk.named_parameters() if "ln_f" in n or ".h." in n]
    assert all(p.grad is not None and p.grad.any() for p in trunk)
