"""A whole PPO step against a double loop in float64, written from the papers.

The oracle knows tokens, scores and the model's logits; it shares no code with Klippo. Schulman et
al. 2017 (1707.06347) eq. 7, Schulman et al. 2016 (1506.02438) eq. 16, Ziegler et al. 2019
(1909.08593) eq. 2, and the clipped value loss of OpenAI baselines.
"""

import copy
import math

import pytest
import torch

from klippo.types import Scores
from tests.ppo.test_experience import learner
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import FAMILIES, RAGGED, assert_same_tensors, gradients, load, make_rollout

WHITENING_EPS = 1e-8
TEMPERATURE, BETA, GAMMA, LAMBDA, EPS, EPS_V, C_V, C_H = 0.8, 0.2, 0.97, 0.9, 0.2, 0.3, 0.5, 0.02
REWARD = [1.0, math.nan, -0.5, 2.0]
SCORED = [0, 2, 3]


class Oracle:
    """Plain loops over rows and tokens; every number is a float64 scalar."""

    def __init__(self, model, head):
        self.model, self.head = copy.deepcopy(model), copy.deepcopy(head)

    def rows(self):
        """For each scored row: log-probs, entropies and values, one scalar tensor per token."""
        for i in SCORED:
            prompt, response = RAGGED[i]
            out = self.model(torch.tensor([prompt + response]), output_hidden_states=True)
            logprobs, entropies, values = [], [], []
            for t, token in enumerate(response):
                at = len(prompt) - 1 + t
                scores = [out.logits[0, at, v] / TEMPERATURE for v in range(out.logits.shape[2])]
                normalizer = torch.logsumexp(torch.stack(scores), 0)
                logprobs.append(scores[token] - normalizer)
                entropies.append(-sum((s - normalizer).exp() * (s - normalizer) for s in scores))
                values.append(self.head(out.hidden_states[-1][0, at])[0])
            yield i, logprobs, entropies, values


def remember(policy, ref):
    """What is fixed during the passes: old log-probs, values, rewards, advantages, returns."""
    rows = {}
    with torch.no_grad():
        for (i, logprobs, _, values), (_, ref_logprobs, _, _) in zip(
            policy.rows(), ref.rows(), strict=True
        ):
            old, v = [float(x) for x in logprobs], [float(x) for x in values]
            kls = [a - float(b) for a, b in zip(old, ref_logprobs, strict=True)]
            last = len(old) - 1
            rewards = [-BETA * kl + (REWARD[i] if t == last else 0) for t, kl in enumerate(kls)]
            deltas = [
                rewards[t] + (GAMMA * v[t + 1] if t < last else 0) - v[t] for t in range(last + 1)
            ]
            advantages = [
                sum((GAMMA * LAMBDA) ** (u - t) * deltas[u] for u in range(t, last + 1))
                for t in range(last + 1)
            ]
            rows[i] = {
                "old_logprobs": old,
                "old_values": v,
                "token_rewards": rewards,
                "raw": advantages,
                "returns": [a + b for a, b in zip(advantages, v, strict=True)],
                "kl": sum(kls),
            }
    everything = [a for row in rows.values() for a in row["raw"]]
    mean = sum(everything) / len(everything)
    variance = sum((a - mean) ** 2 for a in everything) / len(everything)
    spread = math.sqrt(variance + WHITENING_EPS)
    for row in rows.values():
        row["advantages"] = [(a - mean) / spread for a in row["raw"]]
    return rows


def losses(policy, rows):
    """Mean policy loss, value loss, entropy and the share of clipped tokens."""
    sums, tokens = {"policy": 0, "value": 0, "entropy": 0, "clipped": 0, "ratio": 0}, 0
    for i, logprobs, entropies, values in policy.rows():
        row = rows[i]
        for t, logprob in enumerate(logprobs):
            advantage, target, old_value = (
                row[name][t] for name in ("advantages", "returns", "old_values")
            )
            ratio = (logprob - row["old_logprobs"][t]).exp()
            bounded = min(max(ratio.item(), 1 - EPS), 1 + EPS)
            if advantage * bounded < advantage * ratio.item():
                sums["policy"] += torch.tensor(-advantage * bounded, dtype=torch.float64)
                sums["clipped"] += 1
            else:
                sums["policy"] += -advantage * ratio
            error = (values[t] - target) ** 2
            step = values[t] - old_value
            if abs(float(step)) > EPS_V:
                held = old_value + math.copysign(EPS_V, float(step))
                if (held - target) ** 2 > float(error):
                    error = torch.tensor((held - target) ** 2, dtype=torch.float64)
            sums["value"] += error / 2
            sums["entropy"] += entropies[t]
            sums["ratio"] += float(ratio)
            tokens += 1
    return {name: total / tokens for name, total in sums.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_step_agrees_with_a_float64_double_loop(family):
    one = learner(
        load(FAMILIES[family]()),
        ppo={
            "num_epochs": 3, "gamma": GAMMA, "gae_lambda": LAMBDA, "clip_range": EPS,
            "value_clip_range": EPS_V, "value_coef": C_V, "entropy_coef": C_H,
            "micro_batch_size": 2,
        },
        kl={"coef": BETA},
        optimizer={"max_grad_norm": None, "learning_rate": 0.01},
    )  # fmt: skip
    model, head = one.policy.lm.model, one.policy.critic.head
    steps = []
    one.optimizer.adam.register_step_pre_hook(
        lambda *_: steps.append((Oracle(model, head), gradients(one.policy)))
    )
    expected = remember(Oracle(model, head), Oracle(one.reference.lm.model, head))
    experience = one.experience(
        make_rollout(RAGGED, temperature=TEMPERATURE), Scores(reward=torch.tensor(REWARD))
    )
    for i, row in expected.items():
        for name in ("old_logprobs", "old_values", "token_rewards", "returns", "advantages"):
            got = getattr(experience, name)[i, : len(RAGGED[i][1])].tolist()
            assert got == pytest.approx(row[name], **FLOAT64_APPROX), name
    assert experience.sequence_kl == pytest.approx(
        sum(row["kl"] for row in expected.values()) / len(SCORED), **FLOAT64_APPROX
    )

    metrics = one.learn(experience)
    assert len(steps) == 3
    means = []
    for policy, ours in steps:
        policy.model.zero_grad()
        policy.head.zero_grad()
        mean = losses(policy, expected)
        (mean["policy"] + C_V * mean["value"] - C_H * mean["entropy"]).backward()
        means.append({name: float(value) for name, value in mean.items()})
        theirs = {f"lm.model.{name}": g for name, g in gradients(policy.model).items()}
        theirs |= {f"critic.head.{name}": g for name, g in gradients(policy.head).items()}
        assert_same_tensors(ours, theirs, **FLOAT64)
    names = {
        "policy": "loss/policy", "value": "loss/value", "clipped": "policy/clipped_share",
        "ratio": "policy/ratio_mean",
    }  # fmt: skip
    for name, metric in names.items():
        average = sum(mean[name] for mean in means) / 3
        assert metrics[metric] == pytest.approx(average, **FLOAT64_APPROX), metric
    assert means[0]["clipped"] == 0
    assert means[2]["clipped"] > 0, "the case must reach the clipped branch"
