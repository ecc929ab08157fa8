"""The passes over one batch, the ratio threshold, the schedule, the warm-up."""

import copy
import dataclasses
import math

import pytest
import torch

from klippo.policy.settings import CriticSettings
from klippo.ppo.experience import Experience
from klippo.ppo.optimizer import build_schedule
from klippo.ppo.settings import OptimizerSettings
from klippo.types import Scores
from tests.ppo.test_experience import REWARD, learner, learnt_gradients
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import (
    LORA,
    RAGGED,
    assert_same_tensors,
    gradients,
    llama,
    load,
    make_rollout,
    weights,
)

NAN = math.nan
ROLLOUT = make_rollout(RAGGED, temperature=0.8)
SCORES = Scores(reward=REWARD)
UNCLIPPED = {"max_grad_norm": None}


def run(one, experience=None, **changes):
    """One PPO step on the fixed batch, with some of its experience replaced."""
    experience = experience or one.experience(ROLLOUT, SCORES)
    return one.learn(dataclasses.replace(experience, **changes))


MICRO_BATCHES = [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_tokens": 18}]
"""18 tokens: the rows of 3 + 4 and 1 + 6 tokens, and those of 5 + 1 and 2 + 3."""


@pytest.mark.parametrize("micro", MICRO_BATCHES, ids=str)
def test_gradients_do_not_depend_on_the_micro_batch(micro):
    options = {"optimizer": UNCLIPPED, "kl": {"placement": "loss", "coef": 0.2}}
    whole, metrics = learnt_gradients(
        learner(ppo={"entropy_coef": 0.1}, **options), ROLLOUT, REWARD
    )
    one = learner(ppo={"entropy_coef": 0.1} | micro, **options)
    split, split_metrics = learnt_gradients(one, ROLLOUT, REWARD)
    assert_same_tensors(split, whole, **FLOAT64)
    for name in metrics:
        assert split_metrics[name] == pytest.approx(metrics[name], **FLOAT64_APPROX), name


def test_every_token_of_the_step_weighs_the_same():
    # Rows of 4, 6, 1 and 3 tokens: the gradient is that of the mean over 14 tokens.
    options = {"ppo": {"micro_batch_size": 1, "value_coef": 0.0}, "optimizer": UNCLIPPED}
    one = learner(**options)
    experience = one.experience(ROLLOUT, SCORES)
    gradient, _ = learnt_gradients(one, ROLLOUT, REWARD)
    fresh = learner(**options)
    logprobs = fresh.policy(ROLLOUT.tokens, 0.8).logprobs
    total = sum(
        -experience.advantages[i, t] * logprobs[i, t]
        for i, (_, response) in enumerate(RAGGED)
        for t in range(len(response))
    )
    (total / 14).backward()
    for name, expected in gradients(fresh.policy).items():
        torch.testing.assert_close(gradient[name], expected, **FLOAT64, msg=name)


def test_the_entropy_bonus_raises_the_entropy():
    one = learner(
        ppo={"entropy_coef": 10.0, "value_coef": 0.0, "num_epochs": 5}, optimizer=UNCLIPPED
    )
    before = one.policy(ROLLOUT.tokens, 0.8).entropy.sum().item()
    run(one)
    assert one.policy(ROLLOUT.tokens, 0.8).entropy.sum().item() > before + 0.01


def optimizer_state(one):
    return copy.deepcopy(one.optimizer.adam.state_dict()["state"])


def same_state(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[i][name], right[i][name]) for i in left for name in left[i]
    )


@pytest.mark.parametrize("shift", [-5.0, NAN])
@pytest.mark.parametrize("threshold", [10.0, None])
def test_a_minibatch_beyond_the_ratio_explosion_is_truly_skipped(shift, threshold):
    one = learner(ppo={"ratio_threshold": threshold})
    run(one)  # momentum from an honest step
    before, state = weights(one.policy), optimizer_state(one)
    experience = one.experience(ROLLOUT, SCORES)
    metrics = run(one, experience, old_logprobs=experience.old_logprobs + shift)
    skipped = math.isnan(shift) or threshold is not None
    after = weights(one.policy)
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert same is skipped
    assert same_state(state, optimizer_state(one)) is skipped
    assert metrics["update/num_skipped_minibatches"] == float(skipped)
    assert metrics["update/num_optimizer_steps"] == float(not skipped)
    assert metrics["update/num_losses_not_finite"] == float(math.isnan(shift))
    assert metrics["update/num_ratio_skips"] == float(skipped and not math.isnan(shift))
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_gradient_that_is_not_finite_moves_nothing():
    one = learner()
    run(one)
    before, state = weights(one.policy), optimizer_state(one)
    experience = one.experience(ROLLOUT, SCORES)
    one.policy.critic.head.weight.register_hook(lambda gradient: gradient * math.inf)
    metrics = run(one, experience)
    assert_same_tensors(weights(one.policy), before, atol=0)
    assert same_state(state, optimizer_state(one))
    assert metrics["update/num_skipped_minibatches"] == 1
    assert metrics["update/num_gradients_not_finite"] == 1


def test_a_loss_that_is_not_finite_moves_nothing():
    one = learner()
    before = weights(one.policy)
    experience = one.experience(ROLLOUT, SCORES)
    metrics = run(one, experience, returns=experience.returns * math.inf)
    assert_same_tensors(weights(one.policy), before, atol=0)
    assert metrics["update/num_losses_not_finite"] == 1
    assert metrics["update/num_gradients_not_finite"] == 0


def test_the_ratio_threshold_looks_at_the_masked_mean_ratio_and_not_at_single_tokens():
    one = learner(ppo={"ratio_threshold": 10.0})
    experience = one.experience(ROLLOUT, SCORES)
    old = experience.old_logprobs.clone()
    old[~experience.mask] = -50.0  # padding has no say
    old[0, 0] -= math.log(100.0)  # mean ratio (100 + 13) / 14 = 8.07
    metrics = run(one, experience, old_logprobs=old)
    assert metrics["update/num_optimizer_steps"] == 1
    assert metrics["policy/ratio_mean"] == pytest.approx(113 / 14, **FLOAT64_APPROX)
    one = learner(ppo={"ratio_threshold": 8.0})
    metrics = run(one, one.experience(ROLLOUT, SCORES), old_logprobs=old)
    assert metrics["update/num_skipped_minibatches"] == 1


def test_the_update_kl_is_that_of_the_policy_that_sampled_from_the_new_one():
    one = learner()
    experience = one.experience(ROLLOUT, SCORES)
    metrics = run(one, experience, old_logprobs=experience.old_logprobs - 0.5)
    # k3 under samples of the old policy: rho - 1 - log rho with log rho = 0.5
    expected = math.exp(0.5) - 1 - 0.5
    assert metrics["policy/update_kl_nats_per_token"] == pytest.approx(expected, **FLOAT64_APPROX)
    assert metrics["policy/ratio_mean"] == pytest.approx(math.exp(0.5), **FLOAT64_APPROX)


def test_only_the_bad_minibatch_is_skipped():
    one = learner(ppo={"ratio_threshold": 10.0, "minibatch_size": 1, "num_epochs": 3})
    experience = one.experience(ROLLOUT, SCORES)
    old = experience.old_logprobs.clone()
    old[1] -= 6.0
    metrics = run(one, experience, old_logprobs=old)
    assert metrics["update/num_skipped_minibatches"] == 3
    assert metrics["update/num_optimizer_steps"] == 9


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"num_epochs": 1}, 1),
        ({"num_epochs": 3}, 3),
        ({"num_epochs": 2, "minibatch_size": 2}, 4),
        ({"num_epochs": 2, "minibatch_size": 2, "micro_batch_size": 1}, 4),
        ({"num_epochs": 2, "minibatch_size": 1}, 8),
    ],
)
def test_the_number_of_optimizer_steps_is_epochs_times_minibatches(settings, steps):
    one, counted = learner(ppo=settings), []
    one.optimizer.adam.register_step_post_hook(lambda *_: counted.append(1))
    metrics = run(one)
    assert metrics["update/num_optimizer_steps"] == len(counted) == steps
    assert one.num_steps_done == 1


def test_every_row_is_visited_once_in_each_epoch(monkeypatch):
    seen, rows = [], Experience.rows

    def watched(self, index):
        seen.append(index.tolist())
        return rows(self, index)

    monkeypatch.setattr(Experience, "rows", watched)
    run(learner(ppo={"num_epochs": 8, "minibatch_size": 2, "micro_batch_size": 1}))
    epochs = [seen[i : i + 4] for i in range(0, 32, 4)]
    assert all(sorted(epoch) == [[0], [1], [2], [3]] for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) > 1, "the order changes between epochs"


def test_the_passes_end_once_the_target_kl_is_passed():
    options = {"optimizer": {"learning_rate": 0.05}}
    passes = {"num_epochs": 6, "ratio_threshold": None}
    free = run(learner(ppo=passes, **options))
    stopped = run(learner(ppo=passes | {"target_kl": 1e-4}, **options))
    assert (free["update/num_optimizer_steps"], free["update/stopped_early"]) == (6, 0)
    # The first pass is on-policy (KL 0), the second sees what the first step did.
    assert (stopped["update/num_optimizer_steps"], stopped["update/stopped_early"]) == (2, 1)
    never = run(learner(ppo=passes | {"target_kl": 1e4}, **options))
    assert never["update/num_optimizer_steps"] == 6


def test_the_global_gradient_norm_is_clipped_and_reported_unclipped():
    free, free_metrics = learnt_gradients(learner(optimizer=UNCLIPPED), ROLLOUT, REWARD * 100)
    norm = math.sqrt(sum(float(g.square().sum()) for g in free.values()))
    limited = learner(optimizer={"max_grad_norm": 0.01})
    clipped, metrics = learnt_gradients(limited, ROLLOUT, REWARD * 100)
    assert norm > 0.1
    assert free_metrics["update/grad_norm"] == pytest.approx(norm, **FLOAT64_APPROX)
    assert metrics["update/grad_norm"] == pytest.approx(norm, **FLOAT64_APPROX)
    scale = 0.01 / norm
    for name in free:
        torch.testing.assert_close(clipped[name], free[name] * scale, **FLOAT64)


def test_adam_follows_its_settings():
    one = learner(optimizer={"critic_learning_rate": 5e-3})
    assert [group["lr"] for group in one.optimizer.adam.param_groups] == [1e-3, 5e-3]
    assert {group["eps"] for group in one.optimizer.adam.param_groups} == {1e-5}
    assert OptimizerSettings().max_grad_norm == 1.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"num_warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25, 0, 0]),
        ({"schedule": "linear", "num_warmup_steps": 1}, [0.5, 1, 2 / 3, 1 / 3, 0, 0]),
        ({"schedule": "linear", "num_decay_steps": 2}, [1, 0.5, 0, 0, 0, 0]),
        ({"schedule": "linear", "final_fraction": 0.2}, [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ({"schedule": "cosine"}, [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0, 0]),
    ],
)
def test_the_learning_rate_follows_its_schedule(settings, expected):  # 4 PPO steps
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = build_schedule(optimizer, OptimizerSettings(**settings), num_steps=4)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2 * factor for factor in expected], **FLOAT64_APPROX)


def test_the_schedule_counts_ppo_steps_and_not_minibatches():
    one = learner(
        ppo={"num_steps": 4, "num_epochs": 2, "minibatch_size": 2},
        optimizer={"schedule": "linear", "learning_rate": 1.0, "critic_learning_rate": 0.5},
    )
    rates = [run(one)["update/learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([1.0, 0.75, 0.5])


CRITICS = {
    "trunk": (CriticSettings(), "full"),
    "lora": (CriticSettings(kind="lora", lora=LORA), "lora"),
    "separate": (CriticSettings(kind="separate"), "full"),
}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", CRITICS)
def test_the_warm_up_moves_the_critic_and_not_one_bit_of_the_policy(kind, decay):
    critic, tuning = CRITICS[kind]
    one = learner(
        load(llama(), critic=critic, tuning=tuning),
        ppo={"num_critic_warmup_steps": 2, "num_epochs": 2},
        optimizer={"weight_decay": decay, "learning_rate": 0.01},
    )
    own = {id(p) for p in one.policy.trainable()[1]}
    names = {name: id(p) in own for name, p in one.policy.named_parameters()}
    start = weights(one.policy)
    losses = []
    for _ in range(2):
        metrics = run(one)
        assert metrics["update/num_optimizer_steps"] == 2
        losses.append(metrics["loss/value"])
    warm = weights(one.policy)
    assert losses[1] < losses[0]
    changed = {name for name in start if not torch.equal(start[name], warm[name])}
    assert all(names[name] for name in changed)
    assert {name for name, is_own in names.items() if is_own} == changed
    run(one)
    now = weights(one.policy)
    assert any(not names[n] and not torch.equal(warm[n], now[n]) for n in warm)


def test_the_kl_controller_takes_in_each_batchs_kl_and_number_of_sequences():
    one = learner(kl={"coef": 0.1, "controller": "adaptive", "target": 1e-3, "horizon": 100.0})
    reward = torch.tensor([1.0, NAN, 0.5, 3.0])
    experience = one.experience(ROLLOUT, Scores(reward=reward))
    error = min(max(experience.sequence_kl / 1e-3 - 1, -0.2), 0.2)
    assert abs(error) > 0.01
    one.learn(experience)
    assert one.kl_controller.coef == pytest.approx(0.1 * (1 + error * 3 / 100))
    assert one.experience(ROLLOUT, SCORES).metrics["kl/coef"] == one.kl_controller.coef
    fixed = learner(kl={"coef": 0.1})
    run(fixed)
    assert fixed.kl_controller.coef == 0.1


def test_learning_the_same_batch_twice_from_the_same_seed_gives_the_same_weights():
    settings = {"num_epochs": 2, "minibatch_size": 2}
    one, two = learner(ppo=settings), learner(ppo=settings)
    run(one)
    run(two)
    first, second = weights(one.policy), weights(two.policy)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rewarded_responses_become_likelier_and_punished_ones_rarer():
    one = learner(
        ppo={"num_epochs": 4, "value_coef": 0.0},
        kl={"coef": 0.0},
        optimizer={"learning_rate": 3e-3},
        moved=False,
    )
    reward = torch.tensor([2.0, -2.0, 2.0, -2.0])

    def sequence_logprobs():
        with torch.no_grad():
            return one.policy(ROLLOUT.tokens, 0.8).logprobs.sum(1)

    before = sequence_logprobs()
    one.learn(one.experience(ROLLOUT, Scores(reward=reward)))
    assert ((sequence_logprobs() - before) * reward > 0).all()
