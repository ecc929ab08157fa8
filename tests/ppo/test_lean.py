"""Work that is done once gives what doing it again would give.

B sequences, T response tokens.
"""

import dataclasses

import pytest
import torch

import klippo.tensors.head as head_module
from klippo.policy.settings import CriticSettings
from klippo.ppo.loss import policy_loss, probability_ratio, value_loss
from klippo.ppo.settings import PPOSettings
from klippo.ppo.update import loss_of
from klippo.tensors.estimators import masked_sum
from klippo.types import Scores
from tests.ppo.test_experience import learner
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import (
    LORA,
    RAGGED,
    assert_same_tensors,
    disturb,
    gpt2,
    gradients,
    llama,
    load,
    make_rollout,
)

ROLLOUT = make_rollout(RAGGED, temperature=0.8)
SCORES = Scores(reward=torch.tensor([1.0, -2.0, torch.nan, 3.0]))
ROWS = torch.tensor([3, 0, 2])

CASES = {
    "plain": {},
    "entropy": {"ppo": {"entropy_coef": 0.3}},
    "k2": {"kl_coef": 0.4},
    "exact": {"kl_coef": 0.4, "exact": True},
    "dual clip": {"ppo": {"dual_clip": 1.5}},
    "weights": {"weights": True},
    "everything": {
        "ppo": {"entropy_coef": 0.3, "dual_clip": 1.5, "value_clip_range": None},
        "kl_coef": 0.4,
        "weights": True,
    },
}
STARTS = {
    "tied head": lambda: load(gpt2()),
    "own head": lambda: load(llama()),
    "frozen head": lambda: load(gpt2(), tuning="last_layers", num_unfrozen_layers=1),
    "adapter": lambda: load(llama(), tuning="lora", lora=LORA),
    "checkpointing": lambda: load(llama(), gradient_checkpointing=True),
}


def plain(settings, policy, batch, *, kl_coef, exact_kl_to=None):
    """Eq. 9 written out, with plain autograd through full logits; (total, policy's, critic's)."""
    tokens, mask = batch.tokens, batch.mask
    hidden = policy.lm.hidden(tokens)
    logp = full_logprobs(policy.lm, hidden, batch.temperature)
    logprobs = logp.gather(2, tokens.response_ids[:, :, None]).squeeze(2)
    actor, _ = policy_loss(
        probability_ratio(logprobs, batch.old_logprobs),
        batch.advantages,
        clip_range=settings.clip_range,
        dual_clip=settings.dual_clip,
    )
    if batch.weights is not None:
        actor = actor * batch.weights
    critic = value_loss(
        policy.critic(tokens, hidden, after_last=False),
        batch.old_values,
        batch.returns,
        clip_range=settings.value_clip_range,
    )
    entropy = -(logp.exp() * logp).sum(2)
    total = actor + settings.value_coef * critic - settings.entropy_coef * entropy
    if exact_kl_to is not None:
        with torch.no_grad(), exact_kl_to._active():
            ref = full_logprobs(exact_kl_to.lm, exact_kl_to.lm.hidden(tokens), batch.temperature)
        total = total + kl_coef * (logp.exp() * (logp - ref)).sum(2)
    else:
        total = total + kl_coef * 0.5 * (logprobs - batch.ref_logprobs) ** 2
    return masked_sum(total, mask), masked_sum(actor, mask), masked_sum(critic, mask)


def full_logprobs(lm, hidden, temperature):
    """(B, T, V)."""
    return torch.log_softmax(lm.model.get_output_embeddings()(hidden) / temperature, -1)


@pytest.mark.parametrize("chunk", [1, 30, 10**6])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("start", STARTS)
def test_the_fused_head_has_the_gradients_of_plain_autograd(monkeypatch, start, case, chunk):
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", chunk)
    options, loaded = CASES[case], STARTS[start]()
    settings = PPOSettings(batch_size=4, **options.get("ppo", {}))
    one = learner(loaded)
    experience = one.experience(ROLLOUT, SCORES)
    disturb([p for group in loaded.policy.trainable() for p in group], scale=0.05)
    if options.get("weights"):
        weights = torch.linspace(0.2, 2.0, experience.mask.numel()).view_as(experience.mask * 1.0)
        experience = dataclasses.replace(experience, weights=weights)
    arguments = {
        "kl_coef": options.get("kl_coef", 0.0),
        "exact_kl_to": loaded.reference if options.get("exact") else None,
    }
    batch = experience.rows(ROWS)
    expected, actor, critic = plain(settings, loaded.policy, batch, **arguments)
    (expected / 7).backward()
    expected_gradients = gradients(loaded.policy)
    loaded.policy.zero_grad()
    total, logged = loss_of(settings, loaded.policy, batch, **arguments)
    (total / 7).backward()
    torch.testing.assert_close(total, expected, **FLOAT64)
    torch.testing.assert_close(logged[0], actor, **FLOAT64)
    torch.testing.assert_close(logged[1], critic, **FLOAT64)
    assert any(bool(gradient.any()) for gradient in expected_gradients.values())
    assert_same_tensors(gradients(loaded.policy), expected_gradients, **FLOAT64)


def trunk_runs(lm):
    """A list that grows by one whenever a trunk runs."""
    runs = []
    lm.trunk.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("behavior", ["policy", "start"])
def test_every_model_runs_once_on_a_rollout_batch(behavior):
    one = learner(load(llama()))
    runs = trunk_runs(one.policy.lm), trunk_runs(one.reference.lm)
    forward = one.forward(dataclasses.replace(ROLLOUT, behavior=behavior))
    assert [len(each) for each in runs] == [1, 1]
    assert (forward.exact_kl is None) is (behavior == "policy")


def test_what_both_models_say_together_is_what_they_say_apart():
    one = learner(load(llama()))
    disturb(one.policy.parameters(), scale=0.1)
    together = one.forward(dataclasses.replace(ROLLOUT, behavior="start"))
    apart = one.forward(ROLLOUT)
    for name in ("logprobs", "ref_logprobs", "entropy", "values"):
        found, expected = getattr(together, name), getattr(apart, name)
        torch.testing.assert_close(found, expected, **FLOAT64)
    with torch.no_grad():
        kl = one.reference.kl_from(one.policy.lm, ROLLOUT.tokens, 0.8)
    assert kl.max() > 0.01
    torch.testing.assert_close(together.exact_kl, kl, **FLOAT64)


@pytest.mark.parametrize("kind", ["trunk", "separate"])
def test_a_warm_up_runs_the_policy_in_the_forward_phase_alone(kind):
    def learn(known):
        one = learner(
            load(llama(), critic=CriticSettings(kind=kind)),
            ppo={"num_critic_warmup_steps": 1, "num_epochs": 3, "micro_batch_size": 2},
        )
        experience = one.experience(ROLLOUT, SCORES)
        assert (experience.hidden is not None) is (kind == "trunk")
        if not known:
            experience = dataclasses.replace(experience, hidden=None)
        runs, seen = trunk_runs(one.policy.lm), []
        one.optimizer.adam.register_step_pre_hook(lambda *_: seen.append(gradients(one.policy)))
        metrics = one.learn(experience)
        return metrics, seen, len(runs)

    metrics, seen, num_runs = learn(known=True)
    expected_metrics, expected, num_expected = learn(known=False)
    assert (num_runs, num_expected) == (0, 6 if kind == "trunk" else 0)
    assert metrics == pytest.approx(expected_metrics, **FLOAT64_APPROX)
    assert len(seen) == 3
    for mine, theirs in zip(seen, expected, strict=True):
        assert_same_tensors(mine, theirs, **FLOAT64)


def test_no_states_are_kept_once_the_critic_is_warm():
    one = learner(load(llama()), ppo={"num_critic_warmup_steps": 1})
    assert one.learn(one.experience(ROLLOUT, SCORES))["update/num_optimizer_steps"] == 1
    assert one.forward(ROLLOUT).hidden is None
