"""PPO on responses that were logged before."""

import dataclasses
import math

import pytest
import torch

from klippo.ppo.diagnostics import check_behavior, diagnose, effective_share
from klippo.ppo.learner import Learner
from klippo.ppo.settings import KLSettings, OptimizerSettings, PPOSettings
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.sampling import Sampling, response_seeds
from klippo.types import Scores
from tests.tolerance import FLOAT64_APPROX, float32_approx
from tests.toys import EOS, RAGGED, disturb, gpt2, load, make_rollout, prompt

ARMS = 4
BETA = 0.5
COUNTS = [4, 3, 2, 1]
"""How often the behaviour policy took each arm: exactly its probabilities times ten."""
REWARDS = [0.2, -0.6, 0.9, 0.4]
PLAIN = {"whiten_advantages": False, "value_clip_range": None, "num_epochs": 1}


def learner(loaded, *, kl=0.0, rate=1e-2, placement="exact", **ppo):
    return Learner(
        loaded.policy,
        loaded.reference,
        ppo=PPOSettings(**(PLAIN | ppo)),
        kl=KLSettings(coef=kl, placement=placement),
        optimizer=OptimizerSettings(learning_rate=rate, schedule="cosine"),
    )


def bandit(behavior):
    """Ten logged pulls, with their log-probs; one state, one token each."""
    arms = [arm for arm, count in enumerate(COUNTS) for _ in range(count)]
    logprobs = [[float(torch.tensor(COUNTS[arm] / 10).log())] for arm in arms]
    rollout = make_rollout([([1], [arm]) for arm in arms], logprobs=logprobs)
    reward = torch.tensor([REWARDS[arm] for arm in arms])
    return dataclasses.replace(rollout, behavior=behavior), reward


def arm_probabilities(policy):
    tokens = make_rollout([([1], [arm]) for arm in range(ARMS)]).tokens
    with torch.no_grad():
        return policy(tokens, 1.0).logprobs[:, 0].double().exp()


@pytest.mark.parametrize("baseline", ["value", "leave_one_out"])
def test_a_logged_bandit_is_solved_whoever_pulled_the_arms(baseline):
    # KL-regularised optimum: pi* ~ pi_ref exp(R / beta), whatever the behaviour policy was.
    loaded = load(gpt2(seed=3, vocab_size=ARMS))
    rollout, reward = bandit("recorded")
    factor, scores = 1.0, Scores(reward=reward)
    if baseline == "leave_one_out":
        others = (reward.sum() - reward) / (len(reward) - 1)
        scores = Scores(reward=reward, baseline=others)
        factor = len(reward) / (len(reward) - 1)  # r_i - mean of others = n / (n-1) (r_i - mean)
    reference = arm_probabilities(loaded.policy)
    optimum = reference * (factor * torch.tensor(REWARDS).double() / BETA).exp()
    optimum /= optimum.sum()
    value_coef = 0.5 if baseline == "value" else 0.0
    steps = 200
    one = learner(
        loaded, kl=BETA, num_steps=steps, batch_size=10, clip_range=1e6, value_coef=value_coef
    )
    assert 0.5 * (arm_probabilities(loaded.policy) - optimum).abs().sum() > 0.1
    for _ in range(steps):
        one.learn(one.experience(rollout, scores))
    assert 0.5 * (arm_probabilities(loaded.policy) - optimum).abs().sum() < 0.01


def test_the_clip_holds_ratios_to_the_behaviour_policy():
    """Without a penalty a liked arm stops a fifth above its start: there the gradient ends."""
    loaded = load(gpt2(seed=3, vocab_size=ARMS))
    rollout, reward = bandit("start")
    start = arm_probabilities(loaded.policy)
    one = learner(loaded, num_steps=200, batch_size=10, clip_range=0.2, value_coef=0.0, rate=2e-3)
    scores = Scores(reward=reward, baseline=torch.full_like(reward, float(reward.mean())))
    for _ in range(200):
        one.learn(one.experience(rollout, scores))
    ratio = arm_probabilities(loaded.policy) / start
    liked = torch.tensor(REWARDS) > float(reward.mean())
    assert (ratio[liked] < 1.3).all()
    assert ratio[liked].max() > 1.15


def sampled(model, num=300, temperature=1.0, length=6):
    """Responses of the model's own, with the log-probs that they were drawn with."""
    engine = HFEngine(
        model,
        stop_ids=frozenset([EOS]),
        sampling=Sampling(temperature=temperature),
        record_logprobs=True,
    )
    prompts = [prompt(3, 1 + i % 5, id=i) for i in range(num)]
    done = engine.generate(prompts, [length] * num, response_seeds(0, range(num)))
    return [(p.token_ids, c.token_ids) for p, c in zip(prompts, done, strict=True)], [
        c.logprobs for c in done
    ]


def checked(behavior, rows, logprobs):
    loaded = load()
    one = learner(loaded, num_steps=1, batch_size=len(rows))
    rollout = make_rollout(rows, logprobs=logprobs)
    rollout = dataclasses.replace(rollout, behavior=behavior)
    forward = one.forward(rollout)
    experience = one.experience(rollout, Scores(reward=torch.randn(len(rows))), forward)
    return check_behavior(behavior, experience, forward)


def test_true_claims_about_who_wrote_the_responses_are_believed():
    rows, logprobs = sampled(gpt2())
    assert not checked("start", rows, None).is_suspicious
    assert not checked("recorded", rows, logprobs).is_suspicious
    other = gpt2()
    disturb(other.parameters(), scale=0.05)
    rows, logprobs = sampled(other)  # another policy, whose own log-probs were kept
    assert not checked("recorded", rows, logprobs).is_suspicious


def test_wrong_claims_are_flagged():
    rows, logprobs = sampled(gpt2())
    shifted = [[x - 0.3 for x in row] for row in logprobs]
    assert checked("recorded", rows, shifted).is_suspicious
    base_two = [[x / 0.6931 for x in row] for row in logprobs]
    assert checked("recorded", rows, base_two).is_suspicious
    reversed_ = [row[::-1] for row in logprobs]
    assert checked("recorded", rows, reversed_).is_suspicious
    cold, _ = sampled(gpt2(), temperature=0.6)
    assert checked("start", cold, None).is_suspicious
    stranger, _ = sampled(gpt2(seed=1))
    assert checked("start", stranger, None).is_suspicious


def test_diagnostics_are_those_of_a_double_loop():
    loaded = load()
    one = learner(loaded, num_steps=1, batch_size=4)
    rollout = dataclasses.replace(make_rollout(RAGGED), behavior="start")
    disturb(loaded.policy.lm.parameters(), scale=0.05)
    forward = one.forward(rollout)
    experience = one.experience(rollout, Scores(reward=torch.tensor([1.0, -1, 2, 0])), forward)
    found = diagnose(one.ppo, experience, forward)

    ratios, sequences, clipped = [], [], {"good": [], "bad": []}
    for i, (_, response) in enumerate(RAGGED):
        product = 1.0
        for t in range(len(response)):
            new, old = (float(x[i, t]) for x in (forward.logprobs, forward.ref_logprobs))
            ratio = torch.tensor(new - old, dtype=torch.float64).exp().item()
            ratios.append(ratio)
            product *= ratio
            good = float(experience.advantages[i, t]) > 0
            clipped["good" if good else "bad"].append(ratio > 1.2 if good else ratio < 0.8)
        sequences.append(product)

    def ess(weights):
        return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))

    expected = {
        "offline/ratio_mean": sum(ratios) / len(ratios),
        "offline/ratio_max": max(ratios),
        "offline/ess_tokens": ess(ratios),
        "offline/ess_responses": ess(sequences),
        "offline/forward_kl_nats": -sum(math.log(s) for s in sequences) / 4,
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, **FLOAT64_APPROX), key
    for key, values in clipped.items():
        share = sum(values) / len(values)  # there a quotient of two numbers, in float32
        assert found[f"offline/clipped_share_{key}"] == pytest.approx(share, **float32_approx(1))
    exact = loaded.reference.kl_from(loaded.policy.lm, rollout.tokens, 1.0)
    assert found["offline/kl_start_nats"] == pytest.approx(float(exact.sum() / 4), **FLOAT64_APPROX)


def test_effective_share_by_hand():
    assert effective_share(torch.tensor([0.0, 0.0, 0.0])) == pytest.approx(1.0)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert effective_share(weights.log()) == pytest.approx(36 / (3 * 14))


def test_leave_one_out_advantages_by_hand():
    loaded = load()
    one = learner(loaded, num_steps=1, batch_size=4)
    rollout = dataclasses.replace(make_rollout(RAGGED), behavior="start")
    reward = torch.tensor([1.0, 2.0, 6.0, 0.0])
    baseline = torch.tensor([4.0, 1.5, 1.0, 3.0])
    experience = one.experience(rollout, Scores(reward=reward, baseline=baseline))
    for i, (_, response) in enumerate(RAGGED):
        expected = [float(reward[i] - baseline[i])] * len(response)
        assert experience.advantages[i, : len(response)].tolist() == pytest.approx(expected)
    assert "reward/score_mean" not in experience.metrics
    assert experience.metrics["data/score_mean"] == pytest.approx(9 / 4)


def test_ratios_start_from_whoever_wrote_the_responses():
    loaded = load()
    disturb(loaded.policy.lm.parameters(), scale=0.05)
    one = learner(loaded, num_steps=1, batch_size=4)
    own = [[-1.0 - t for t in range(len(response))] for _, response in RAGGED]
    rollout = make_rollout(RAGGED, logprobs=own)
    forward = one.forward(dataclasses.replace(rollout, behavior="start"))
    for behavior, expected in {
        "policy": forward.logprobs,
        "start": forward.ref_logprobs,
        "recorded": rollout.behavior_logprobs,
    }.items():
        batch = dataclasses.replace(rollout, behavior=behavior)
        experience = one.experience(batch, Scores(reward=torch.ones(4)))
        assert torch.equal(experience.old_logprobs, expected)
    assert (forward.logprobs - forward.ref_logprobs).abs().max() > 1e-3
