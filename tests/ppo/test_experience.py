"""From a scored rollout to what PPO learns from.

B sequences, T response tokens.
"""

import math

import pytest
import torch

from klippo.errors import DivergedError
from klippo.policy.settings import CriticSettings
from klippo.ppo.experience import shape_scores
from klippo.ppo.learner import Learner
from klippo.ppo.settings import KLSettings, OptimizerSettings, PPOSettings, ScoreSettings
from klippo.tensors.estimators import RunningMoments
from klippo.types import Scores
from tests.tolerance import FLOAT64, FLOAT64_APPROX, float32, float32_approx
from tests.toys import (
    EOS,
    LORA,
    RAGGED,
    disturb,
    gpt2,
    gradients,
    llama,
    load,
    make_rollout,
)

NAN = math.nan
REWARD = torch.tensor([1.0, -2.0, 0.5, 3.0])
SETUPS = {
    "full": ("full", CriticSettings()),
    "last_layers": ("last_layers", CriticSettings()),
    "lora": ("lora", CriticSettings(kind="lora", lora=LORA)),
}


def learner(loaded=None, *, ppo=None, kl=None, score=None, optimizer=None, moved=True):
    """A Learner whose policy has left its reference and whose values say something."""
    loaded = loaded or load(gpt2())
    if moved:
        disturb([p for group in loaded.policy.trainable() for p in group], scale=0.05)
    return Learner(
        loaded.policy,
        loaded.reference,
        ppo=PPOSettings(batch_size=4, **({"num_epochs": 1} | (ppo or {}))),
        kl=KLSettings(**(kl or {})),
        score=ScoreSettings(**(score or {})),
        optimizer=OptimizerSettings(**({"learning_rate": 1e-3} | (optimizer or {}))),
    )


def learnt_gradients(one, rollout, reward):
    """Gradients at the first optimizer step of learning from this rollout, with the metrics."""
    seen = []
    handle = one.optimizer.adam.register_step_pre_hook(
        lambda *_: seen.append(gradients(one.policy))
    )
    metrics = one.learn(one.experience(rollout, Scores(reward=reward)))
    handle.remove()
    return seen[0], metrics


@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize("setup", SETUPS)
def test_the_first_minibatch_sees_the_policy_that_sampled(setup, micro):
    tuning, critic = SETUPS[setup]
    options = {"num_unfrozen_layers": 1} if tuning == "last_layers" else {}
    one = learner(
        load(llama(attention_dropout=0.1), tuning=tuning, critic=critic, **options),
        ppo={"micro_batch_size": micro},
    )
    rollout = make_rollout(RAGGED, temperature=0.7)
    experience = one.experience(rollout, Scores(reward=REWARD))
    metrics = one.learn(experience)
    assert metrics["policy/first_ratio_mean"] == pytest.approx(1, **FLOAT64_APPROX)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, **FLOAT64_APPROX)
    assert metrics["policy/clipped_share"] == 0
    assert metrics["policy/update_kl_nats_per_token"] == pytest.approx(0, **FLOAT64_APPROX)
    assert metrics["kl/sequence_nats"] != 0


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("setup", SETUPS)
def test_half_precision_policies_learn_on_policy_with_float32_heads_and_adapters(setup, precision):
    tuning, critic = SETUPS[setup]
    model = llama().bfloat16() if precision == "bfloat16" else llama().float()
    loaded = load(
        model, tuning=tuning, critic=critic, autocast=precision == "autocast",
        **({"num_unfrozen_layers": 1} if tuning == "last_layers" else {}),
    )  # fmt: skip
    one = learner(loaded)
    assert {p.dtype for p in one.policy.trainable()[1]} == {torch.float32}
    if tuning == "lora":
        assert {p.dtype for p in one.policy.trainable()[0]} == {torch.float32}
    experience = one.experience(make_rollout(RAGGED), Scores(reward=REWARD))
    assert experience.old_logprobs.dtype == experience.old_values.dtype == torch.float32
    metrics = one.learn(experience)
    # The same forward twice: float32 log-probs, of some roundings each.
    largest = float(experience.old_logprobs.abs().max())
    assert metrics["policy/first_ratio_mean"] == pytest.approx(1, **float32_approx(8, largest))
    assert metrics["policy/clipped_share"] == 0


@pytest.mark.parametrize(
    "micro",
    [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_tokens": 18}],
    ids=str,
)
def test_old_log_probs_do_not_depend_on_the_micro_batch(micro):
    loaded = load(llama())
    rollout, scores = make_rollout(RAGGED, temperature=0.7), Scores(reward=REWARD)
    options = {"bootstrap_truncated": True}
    whole = learner(loaded, ppo=options).experience(rollout, scores)
    split = learner(loaded, ppo=options | micro, moved=False)
    parts = split.experience(rollout, scores)
    for name in ("old_logprobs", "ref_logprobs", "old_values", "token_rewards", "advantages"):
        ours, expected = getattr(parts, name)[whole.mask], getattr(whole, name)[whole.mask]
        torch.testing.assert_close(ours, expected, **FLOAT64, msg=name)


@pytest.mark.parametrize("trailing", [0, 3])
def test_without_kl_the_one_reward_stands_on_the_last_real_token(trailing):
    rows = [*RAGGED, ([4], [3] * (6 + trailing))]
    reward = torch.cat([REWARD, torch.tensor([7.0])])
    one = learner(kl={"coef": 0.0})
    rewards = one.experience(make_rollout(rows), Scores(reward=reward)).token_rewards
    for i, (_, response) in enumerate(rows):
        expected = [0.0] * (len(response) - 1) + [float(reward[i])]
        assert rewards[i, : len(response)].tolist() == expected
        assert not rewards[i, len(response) :].any()


def test_a_score_of_zero_is_not_a_missing_score():
    one = learner(kl={"coef": 0.0})
    experience = one.experience(make_rollout(RAGGED), Scores(reward=torch.zeros(4)))
    assert experience.num_scored == 4
    assert not experience.token_rewards.any()


def test_each_tokens_reward_is_minus_beta_times_k1_and_the_score_comes_last():
    one = learner(kl={"coef": 0.3})
    experience = one.experience(make_rollout(RAGGED), Scores(reward=REWARD))
    assert not experience.token_rewards.requires_grad
    for i, (_, response) in enumerate(RAGGED):
        for t in range(len(response)):
            k1 = float(experience.old_logprobs[i, t] - experience.ref_logprobs[i, t])
            score = float(REWARD[i]) if t == len(response) - 1 else 0.0
            assert float(experience.token_rewards[i, t]) == pytest.approx(
                -0.3 * k1 + score, **FLOAT64_APPROX
            )
    totals = [
        sum(
            float(experience.old_logprobs[i, t] - experience.ref_logprobs[i, t])
            for t in range(len(response))
        )
        for i, (_, response) in enumerate(RAGGED)
    ]
    assert experience.sequence_kl == pytest.approx(sum(totals) / 4, **FLOAT64_APPROX)


def test_the_kl_in_the_loss_leaves_rewards_alone_and_pulls_with_k2():
    rollout = make_rollout(RAGGED)
    options = {"ppo": {"value_coef": 0.0}, "optimizer": {"max_grad_norm": None}}
    one = learner(kl={"coef": 0.3, "placement": "loss"}, **options)
    rewards = one.experience(rollout, Scores(reward=REWARD)).token_rewards
    assert int((rewards != 0).sum()) == 4
    with_leash, _ = learnt_gradients(one, rollout, REWARD)
    free, _ = learnt_gradients(learner(kl={"coef": 0.0}, **options), rollout, REWARD)

    fresh = learner(**options)
    output = fresh.policy(rollout.tokens, 1.0)
    ref = fresh.reference.logprobs(rollout.tokens, 1.0)
    # By hand: d/dtheta of mean k2 is mean (log pi - log ref) * d log pi
    pull = ((output.logprobs.detach() - ref) * output.logprobs)[rollout.tokens.response_mask]
    (0.3 * pull.mean()).backward()
    leash = gradients(fresh.policy)
    for name in free:
        if name in leash:
            torch.testing.assert_close(
                with_leash[name] - free[name], leash[name], **FLOAT64, msg=name
            )


SCORES = torch.tensor([2.0, -4.0, NAN, 10.0]).double()
FINISHED = torch.tensor([True, False, False, False])


def shaped(scores=SCORES, finished=FINISHED, moments=None, **settings):
    out = shape_scores(ScoreSettings(**settings), scores, finished, moments or RunningMoments())
    return [None if math.isnan(x) else x for x in out.tolist()]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2, -4, None, 10]),
        ({"missing_eos": "replace", "missing_eos_value": -1.0}, [2, -1, None, -1]),
        ({"missing_eos": "subtract", "missing_eos_value": 3.0}, [2, -7, None, 7]),
        ({"scale": 0.5}, [1, -2, None, 5]),
        ({"clip": 3.0}, [2, -3, None, 3]),
        ({"scale": 0.5, "clip": 3.0}, [1, -2, None, 3]),  # scale, then clip
        (  # missing end, then scale, then clip
            {"missing_eos": "subtract", "missing_eos_value": 2.0, "scale": 0.5, "clip": 3.0},
            [1, -3, None, 3],
        ),
    ],
)
def test_scores_are_shaped_in_one_documented_order(settings, expected):
    assert shaped(**settings) == expected


def test_running_normalisation_comes_after_the_missing_end_and_before_the_scale():
    moments = RunningMoments()
    got = shaped(
        moments=moments, missing_eos="replace", missing_eos_value=0.0, normalize=True, scale=10.0
    )
    # 2, 0, 0: mean 2/3, sd sqrt(4/3)
    spread = math.sqrt(4 / 3)
    expected = [10 * (4 / 3) / spread, 10 * (-2 / 3) / spread, 10 * (-2 / 3) / spread]
    assert [x for x in got if x is not None] == pytest.approx(expected, **FLOAT64_APPROX)
    assert got[2] is None
    assert moments.count == 3


def test_score_whitening_keeps_the_mean_and_sets_the_spread():
    got = shaped(scores=torch.tensor([1.0, 3.0, NAN, 5.0]).double(), whiten=True)
    spread = math.sqrt(8 / 3 + 1e-8)
    expected = [3 - 2 / spread, 3, 3 + 2 / spread]
    assert [x for x in got if x is not None] == pytest.approx(expected, **FLOAT64_APPROX)
    assert got[2] is None


def test_a_missing_end_is_judged_by_the_response_alone():
    rows = [([3, EOS], [4, 5]), ([3], [4, EOS])]
    one = learner(kl={"coef": 0.0}, score={"missing_eos": "replace", "missing_eos_value": -9.0})
    rewards = one.experience(make_rollout(rows), Scores(reward=REWARD[:2])).token_rewards
    assert rewards.tolist() == [[0.0, -9.0], [0.0, -2.0]]


UNSCORED = torch.tensor([1.0, NAN, 0.5, 3.0])
OTHER_ROW = [RAGGED[0], ([2, 2, 2, 2, 2, 2], [11, 10, 9]), RAGGED[2], RAGGED[3]]
EVERYTHING_ON = {
    "ppo": {"entropy_coef": 0.1, "bootstrap_truncated": True, "importance_cap": 2.0},
    "score": {"normalize": True, "whiten": True, "missing_eos": "subtract"},
    "optimizer": {"max_grad_norm": None},
}
BEHAVIOR = [[-1.0] * len(response) for _, response in RAGGED]


def of_unscored_row(rows, logprobs):
    one = learner(**EVERYTHING_ON)
    return one, *learnt_gradients(one, make_rollout(rows, logprobs=logprobs), UNSCORED)


def test_nothing_in_an_unscored_row_moves_a_gradient_or_a_statistic():
    one, gradient, metrics = of_unscored_row(RAGGED, BEHAVIOR)
    changed = [BEHAVIOR[0], [-7.0, -0.1, -3.0], BEHAVIOR[2], BEHAVIOR[3]]
    two, other_gradient, other_metrics = of_unscored_row(OTHER_ROW, changed)
    assert all(g.isfinite().all() for g in gradient.values())
    for name in gradient:
        torch.testing.assert_close(gradient[name], other_gradient[name], **FLOAT64, msg=name)
    assert one.score_moments.state_dict() == two.score_moments.state_dict()
    assert one.score_moments.count == 3
    assert metrics["reward/scored_share"] == 0.75
    about_sampling = {"response/length_tokens", "response/finished_share"}
    for name in metrics.keys() - about_sampling:
        assert metrics[name] == pytest.approx(other_metrics[name], **FLOAT64_APPROX), name


def test_an_unscored_row_is_as_if_it_were_not_there():
    _, gradient, metrics = of_unscored_row(RAGGED, BEHAVIOR)
    kept = [0, 2, 3]
    one = learner(**EVERYTHING_ON)
    rollout = make_rollout([RAGGED[i] for i in kept], logprobs=[BEHAVIOR[i] for i in kept])
    alone, without = learnt_gradients(one, rollout, UNSCORED[kept])
    for name in gradient:
        torch.testing.assert_close(gradient[name], alone[name], **FLOAT64, msg=name)
    for name in ("loss/policy", "loss/value", "kl/sequence_nats", "reward/score_mean"):
        assert metrics[name] == pytest.approx(without[name], **FLOAT64_APPROX), name


def test_garbage_log_probs_of_an_engine_in_an_unscored_row_do_not_reach_the_gradient():
    broken = [BEHAVIOR[0], [NAN] * 6, BEHAVIOR[2], BEHAVIOR[3]]
    gradient = of_unscored_row(RAGGED, broken)[1]
    assert all(g.isfinite().all() for g in gradient.values())


def test_parts_of_an_unscored_row_stay_out_of_the_means():
    one = learner()
    parts = {"style": torch.tensor([1.0, 100.0, 2.0, 3.0])}
    metrics = one.experience(make_rollout(RAGGED), Scores(reward=UNSCORED, parts=parts)).metrics
    assert metrics["reward/part/style"] == pytest.approx(2.0)


def test_a_batch_without_any_score_changes_no_weight():
    one = learner()
    before = [p.detach().clone() for p in one.policy.parameters()]
    metrics = one.learn(one.experience(make_rollout(RAGGED), Scores(reward=REWARD * NAN)))
    assert metrics["update/num_optimizer_steps"] == 0
    assert metrics["reward/scored_share"] == 0
    assert all(torch.equal(b, p) for b, p in zip(before, one.policy.parameters(), strict=True))
    assert not [name for name, value in metrics.items() if math.isnan(value)]


def test_a_cut_response_is_terminal_unless_bootstrapped():
    # lambda 0 and gamma 1: the last token's return is its reward plus V of the state after it.
    rows = [([3], [4, 5, 6]), ([3], [4, 5, EOS]), ([2, 2], [7])]  # cut, finished, cut
    scores = Scores(reward=REWARD[:3])
    common = {"kl": {"coef": 0.0}}
    plain = {"gae_lambda": 0.0, "whiten_advantages": False}
    loaded = load(gpt2())
    terminal = learner(loaded, ppo=plain, **common).experience(make_rollout(rows), scores)
    cut = learner(loaded, ppo=plain | {"bootstrap_truncated": True}, moved=False, **common)
    bootstrapped = cut.experience(make_rollout(rows), scores)
    lasts = [2, 2, 0]
    model, head = loaded.policy.lm.model, loaded.policy.critic.head
    for i, ((prompt_ids, ids), last) in enumerate(zip(rows, lasts, strict=True)):
        with torch.no_grad():
            state = model.transformer(input_ids=torch.tensor([prompt_ids + ids]))[0][0, -1]
            after = float(head(state))
        assert abs(after) > 1e-3
        assert float(terminal.returns[i, last]) == pytest.approx(float(REWARD[i]), **FLOAT64_APPROX)
        expected = float(REWARD[i]) + (after if ids[-1] != EOS else 0.0)
        assert float(bootstrapped.returns[i, last]) == pytest.approx(expected, **FLOAT64_APPROX)


def test_the_engines_mismatch_is_logged_in_nats_per_token():
    one, rollout = learner(), make_rollout(RAGGED)
    old = one.experience(rollout, Scores(reward=REWARD)).old_logprobs
    shift = [0.1, -0.3, 0.2, 0.0]
    own = [(old[i, : len(r)] - shift[i]).tolist() for i, (_, r) in enumerate(RAGGED)]
    metrics = one.experience(make_rollout(RAGGED, logprobs=own), Scores(reward=REWARD)).metrics
    lengths = [len(r) for _, r in RAGGED]
    expected = sum(abs(s) * n for s, n in zip(shift, lengths, strict=True)) / sum(lengths)
    rounding = float32_approx(1, float(old.abs().max()))  # the engine's log-probs are float32
    assert metrics["engine/logprob_mismatch_nats"] == pytest.approx(expected, **rounding)
    unscored = one.experience(make_rollout(RAGGED, logprobs=own), Scores(reward=UNSCORED)).metrics
    expected = (0.1 * 4 + 0.2 * 1 + 0.0 * 3) / 8
    assert unscored["engine/logprob_mismatch_nats"] == pytest.approx(expected, **rounding)


def test_truncated_importance_weights_multiply_the_policy_loss():
    old = learner().experience(make_rollout(RAGGED), Scores(reward=REWARD)).old_logprobs
    ratios = [0.5, 1.5, 4.0, 1.0]  # pi_old / pi_engine, row by row; capped at 2
    own = [(old[i, : len(r)] - math.log(ratios[i])).tolist() for i, (_, r) in enumerate(RAGGED)]
    options = {"ppo": {"value_coef": 0.0, "importance_cap": 2.0}, "kl": {"coef": 0.0}}
    one = learner(optimizer={"max_grad_norm": None}, **options)
    rollout = make_rollout(RAGGED, logprobs=own)
    experience = one.experience(rollout, Scores(reward=REWARD))
    weights, mask = experience.weights, experience.mask
    expected = torch.tensor([0.5, 1.5, 2.0, 1.0]).double()[:, None].expand(4, 6)
    rounding = float32(1, 2 * float(old.abs().max()))  # the engine's log-probs are float32
    torch.testing.assert_close(weights[mask], expected[mask], **rounding)
    gradient, metrics = learnt_gradients(one, rollout, REWARD)

    fresh = learner(**options)
    output = fresh.policy(rollout.tokens, 1.0)
    # At ratio 1 the policy gradient is -A * d log pi.
    surrogate = -weights * experience.advantages
    (surrogate * output.logprobs)[mask].mean().backward()
    assert metrics["loss/policy"] == pytest.approx(float(surrogate[mask].mean()), **FLOAT64_APPROX)
    for name, expected in gradients(fresh.policy).items():
        torch.testing.assert_close(gradient[name], expected, **FLOAT64, msg=name)


def test_without_a_cap_the_engines_log_probs_change_nothing_in_the_loss():
    one = learner()
    rollout = make_rollout(RAGGED, logprobs=BEHAVIOR)
    assert one.experience(rollout, Scores(reward=REWARD)).weights is None


@pytest.mark.parametrize("own", [-9.0, NAN])
def test_a_mismatch_past_its_limit_stops_the_run(own):
    logprobs = [[own] * len(response) for _, response in RAGGED]
    one = learner(ppo={"max_logprob_mismatch": 0.5})
    with pytest.raises(DivergedError, match=r"more than ppo\.max_logprob_mismatch=0\.5"):
        one.experience(make_rollout(RAGGED, logprobs=logprobs), Scores(reward=REWARD))


def test_metrics_of_a_batch_are_masked_means_in_their_units():
    one = learner(kl={"coef": 0.0})
    rollout = make_rollout(RAGGED)
    experience = one.experience(rollout, Scores(reward=UNSCORED))
    metrics, scored = experience.metrics, [0, 2, 3]
    with torch.no_grad():
        entropy = one.policy(rollout.tokens, 1.0).entropy
    tokens = [(i, t) for i in scored for t in range(len(RAGGED[i][1]))]

    def mean(x):
        return sum(float(x[i, t]) for i, t in tokens) / len(tokens)

    assert metrics["reward/score_mean"] == pytest.approx(1.5)
    assert metrics["reward/score_sd"] == pytest.approx(math.sqrt((0.25 + 1 + 2.25) / 3))
    assert metrics["reward/sequence_total"] == pytest.approx(1.5)
    assert metrics["policy/entropy_nats"] == pytest.approx(mean(entropy), **FLOAT64_APPROX)
    assert metrics["value/mean"] == pytest.approx(mean(experience.old_values), **FLOAT64_APPROX)
    assert metrics["response/length_tokens"] == pytest.approx((4 + 6 + 1 + 3) / 4)
    assert metrics["response/finished_share"] == 0.75
    residual = experience.returns - experience.old_values
    variance = mean((experience.returns - mean(experience.returns)) ** 2)
    explained = 1 - mean((residual - mean(residual)) ** 2) / variance
    assert metrics["value/explained_variance"] == pytest.approx(explained, **FLOAT64_APPROX)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_values_are_compared_with_the_rewards_that_followed(bootstrap):
    """A critic that is wrong by a constant explains as much variance as before, and errs."""
    one = learner(moved=False, kl={"coef": 0.0}, ppo={"bootstrap_truncated": bootstrap})
    rollout = make_rollout(RAGGED)  # the second row was cut
    with torch.no_grad():
        one.policy.critic.head.bias.fill_(10.0)
    metrics = one.experience(rollout, Scores(reward=REWARD)).metrics
    # With gamma 1 and no KL a row's rewards sum up to its score: 1, -2, 0.5, 3.
    error, square = (220.25 / 3, 10.25 / 3) if bootstrap else (364.25 / 4, 14.25 / 4)
    assert metrics["value/mean_squared_error"] == pytest.approx(error, **FLOAT64_APPROX)
    assert metrics["value/mean_squared_return"] == pytest.approx(square, **FLOAT64_APPROX)
    assert metrics["value/mean"] == pytest.approx(10)


def test_the_rewards_that_followed_are_discounted():
    one = learner(moved=False, kl={"coef": 0.0}, ppo={"gamma": 0.5})
    metrics = one.experience(make_rollout(RAGGED), Scores(reward=REWARD)).metrics
    # Scores on tokens 4, 6, 1 and 3: 1 / 8, -2 / 32, 0.5 and 3 / 4; the critic says 0.
    square = (1 / 64 + 1 / 256 + 1 / 4 + 9 / 16) / 4
    assert metrics["value/mean_squared_return"] == pytest.approx(square, **FLOAT64_APPROX)
    assert metrics["value/mean_squared_error"] == pytest.approx(square, **FLOAT64_APPROX)
