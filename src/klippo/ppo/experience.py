"""From a rollout and its scores to advantages: what PPO learns from.

B sequences, T response tokens. Everything is (B, T) float32 unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from klippo.errors import DivergedError
from klippo.ppo.settings import KLSettings, PPOSettings, ScoreSettings
from klippo.ranks import Ranks
from klippo.tensors.ensembles import lowest_shares
from klippo.tensors.estimators import (
    AllSum,
    RunningMoments,
    gae,
    k1,
    local,
    masked_mean,
    masked_sum,
    repeated_share,
    whiten,
)
from klippo.types import Metrics, Rollout, Scores, TokenBatch

NGRAM = 3
"""Tokens of what counts as repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What the models say of a rollout batch; no score is needed for it."""

    tokens: TokenBatch  # the rollout's, with the output of frozen blocks if there are any
    logprobs: Tensor
    entropy: Tensor
    values: Tensor  # (B, T), or (B, T+1) with the value after the last token
    ref_logprobs: Tensor
    exact_kl: Tensor | None = None  # from the reference, if the policy did not write the responses
    hidden: Tensor | None = None  # (B, T, D) of the policy, if the critic alone learns from it


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One rollout batch with all that the update needs; `mask` leaves unscored rows out."""

    tokens: TokenBatch
    temperature: float
    mask: Tensor  # (B, T) bool: real response tokens of scored rows
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    token_rewards: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None  # truncated importance weights pi_old / pi_engine
    sequence_kl: float  # nats, mean over scored rows of all processes
    num_scored: int  # over all processes
    hidden: Tensor | None = None  # (B, T, D), as in `Forward`
    metrics: Metrics

    def rows(self, index: Tensor) -> Experience:
        """These rows alone, without the columns that are padding in all of them."""
        tokens = self.tokens.rows(index)
        width = tokens.response_mask.shape[1]
        columns = ((field.name, getattr(self, field.name)) for field in fields(self))
        cut: dict[str, Any] = {
            name: x[index, :width] for name, x in columns if isinstance(x, Tensor)
        }
        return replace(self, tokens=tokens, **cut)


def build_experience(
    ppo: PPOSettings,
    kl: KLSettings,
    score: ScoreSettings,
    rollout: Rollout,
    forward: Forward,
    scores: Scores,
    *,
    kl_coef: float,
    moments: RunningMoments,
    ranks: Ranks,
) -> Experience:
    """Token rewards, advantages and returns of a rollout batch.

        r_t = -beta * (log pi - log pi_ref) + 1[t = last] * score

    `moments` takes in the scores if they are normalised. Raises DivergedError past
    `ppo.max_logprob_mismatch`.
    """
    tokens, ref_logprobs = forward.tokens, forward.ref_logprobs
    reward = scores.reward.to(forward.values)
    mask = tokens.response_mask & ~reward.isnan()[:, None]
    scored = mask.any(1)
    old_values = forward.values[:, : mask.shape[1]]

    has_critic = scores.baseline is None
    compared = reward if scores.baseline is None else reward - scores.baseline.to(reward)
    shaped = shape_scores(score, compared, rollout.finished, moments, ranks.all_sum)
    token_kl = k1(forward.logprobs, ref_logprobs)
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    token_rewards = shaped.new_zeros(mask.shape).scatter(1, last, shaped[:, None])
    if kl.placement == "reward":
        token_rewards = token_rewards - kl_coef * token_kl
    token_rewards = torch.where(mask, token_rewards, torch.zeros_like(token_rewards))

    value_after = None
    if ppo.bootstrap_truncated:  # the critic's if the limit cut the response, 0 if it finished
        lengths = tokens.response_mask.sum(1, keepdim=True)
        value_after = forward.values.gather(1, lengths).squeeze(1)
        value_after = torch.where(rollout.finished, torch.zeros_like(value_after), value_after)
    advantages, returns = gae(
        token_rewards,
        old_values if has_critic else torch.zeros_like(old_values),
        mask,
        gamma=ppo.gamma,
        lam=ppo.gae_lambda if has_critic else 1.0,
        value_after=value_after,
    )
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, all_sum=ranks.all_sum)

    # of the policy that wrote the responses: ratios start from them
    old_logprobs = {
        "policy": forward.logprobs,
        "start": forward.ref_logprobs,
        "recorded": rollout.behavior_logprobs,
    }[rollout.behavior]
    assert old_logprobs is not None
    weights, mismatch = _engine_weights(ppo, rollout, old_logprobs, mask, ranks)
    measured_kl = token_kl if forward.exact_kl is None else forward.exact_kl
    sequence_kl = float(masked_mean(masked_sum(measured_kl, mask, 1), scored, ranks.all_sum))
    experience = Experience(
        tokens=tokens,
        temperature=rollout.temperature,
        mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        old_values=old_values,
        token_rewards=token_rewards,
        advantages=advantages,
        returns=returns,
        weights=weights,
        sequence_kl=sequence_kl,
        num_scored=int(ranks.all_sum(scored.sum())),
        hidden=forward.hidden,
        metrics={"kl/sequence_nats": sequence_kl, "kl/coef": kl_coef},
    )
    metrics = _metrics(experience, rollout, forward.entropy, scores, shaped, ranks)
    if has_critic:
        known = scored & rollout.finished if ppo.bootstrap_truncated else scored
        metrics |= _value_errors(experience, known, ppo.gamma, ranks)
    return replace(experience, metrics=experience.metrics | metrics | mismatch)


def shape_scores(
    settings: ScoreSettings,
    scores: Tensor,
    finished: Tensor,
    moments: RunningMoments,
    all_sum: AllSum = local,
) -> Tensor:
    """Shaped scores (B,) float32, in the order of `ScoreSettings`.

    scores (B,) are NaN if unscored, stay so and enter no statistic; finished (B,) is False if the
    length limit cut the response. `moments` takes in the batch if `normalize` is on.
    """
    if settings.missing_eos == "replace":
        value = torch.full_like(scores, settings.missing_eos_value)
        scores = torch.where(finished | scores.isnan(), scores, value)
    elif settings.missing_eos == "subtract":
        scores = torch.where(finished, scores, scores - settings.missing_eos_value)
    if settings.normalize:
        moments.update(scores[~scores.isnan()], all_sum)
        scores = moments.standardize(scores)
    scores = scores * settings.scale
    if settings.whiten:
        scored = ~scores.isnan()
        whitened = whiten(scores.nan_to_num(0.0), scored, shift_mean=False, all_sum=all_sum)
        scores = torch.where(scored, whitened, scores)
    if settings.clip is not None:
        scores = scores.clamp(-settings.clip, settings.clip)
    return scores


def _engine_weights(
    ppo: PPOSettings, rollout: Rollout, old_logprobs: Tensor, mask: Tensor, ranks: Ranks
) -> tuple[Tensor | None, Metrics]:
    """Importance weights, and how far the engine's log-probs are from the training forward's."""
    if rollout.behavior_logprobs is None or rollout.behavior != "policy":
        return None, {}
    log_ratio = old_logprobs - rollout.behavior_logprobs
    mismatch = float(masked_mean(log_ratio.abs(), mask, ranks.all_sum))
    limit = ppo.max_logprob_mismatch
    if limit is not None and not mismatch <= limit:
        raise DivergedError(
            f"the engine's log-probs are {mismatch:.3g} nats per token away from the policy's, "
            f"more than ppo.max_logprob_mismatch={limit}: the engine samples from other weights "
            "or in another precision; check its weight sync and dtype"
        )
    weights = None
    if ppo.importance_cap is not None:
        weights = log_ratio.exp().clamp(max=ppo.importance_cap)
        weights = torch.where(mask, weights, torch.zeros_like(weights))
    return weights, {"engine/logprob_mismatch_nats": mismatch}


def _metrics(
    experience: Experience,
    rollout: Rollout,
    entropy: Tensor,
    scores: Scores,
    shaped: Tensor,
    ranks: Ranks,
) -> Metrics:
    """Masked means over all processes; each key names its unit if it has one."""
    mask, returns, old_values = experience.mask, experience.returns, experience.old_values
    tokens = rollout.tokens
    scored = mask.any(1)
    every_row = torch.ones_like(scored)

    def mean(x: Tensor, keep: Tensor) -> float:
        return float(masked_mean(x, keep, ranks.all_sum))

    def variance(x: Tensor, keep: Tensor) -> float:
        return mean((x - masked_mean(x, keep, ranks.all_sum)) ** 2, keep)

    reward = scores.reward.to(mask.device)
    num_not_finite = torch.tensor(float(len(scores.not_finite)), device=mask.device)
    repeated = repeated_share(tokens.response_ids, tokens.response_mask, NGRAM)
    unexplained = variance(returns - old_values, mask) / max(variance(returns, mask), 1e-8)
    # Rewards of responses that exist already say nothing about the policy.
    of = "reward" if rollout.behavior == "policy" else "data"
    metrics = {
        f"{of}/score_mean": mean(reward, scored),
        f"{of}/score_sd": variance(reward, scored) ** 0.5,
        f"{of}/shaped_mean": mean(shaped, scored),
        f"{of}/sequence_total": mean(masked_sum(experience.token_rewards, mask, 1), scored),
        f"{of}/scored_share": mean(scored.float(), every_row),
        f"{of}/num_not_finite": float(ranks.all_sum(num_not_finite)),
        "policy/entropy_nats": mean(entropy, mask),
        "response/length_tokens": mean(tokens.response_mask.sum(1).float(), every_row),
        "response/repeated_share": mean(repeated, every_row),
        "response/finished_share": mean(rollout.finished.float(), every_row),
        "value/mean": mean(old_values, mask),
        "value/explained_variance": 1 - unexplained,
    }
    for name, part in scores.parts.items():
        part = part.to(mask.device)
        metrics[f"{of}/part/{name}"] = mean(part, scored & ~part.isnan())
    if scores.members is not None:
        members = scores.members.to(mask.device)
        for k, (member, lowest) in enumerate(zip(members, lowest_shares(members), strict=True), 1):
            complete = scored & ~lowest.isnan()
            metrics[f"ensemble/member{k}_mean"] = mean(member, complete)
            metrics[f"ensemble/member{k}_lowest_share"] = mean(lowest, complete)
    return metrics


def _value_errors(experience: Experience, known: Tensor, gamma: float, ranks: Ranks) -> Metrics:
    """How far the first values are from the rewards that followed, and how far 0 would have been.

        mean (V_0 - sum_t gamma^t r_t)^2,    mean (sum_t gamma^t r_t)^2

    over `known` responses (B,), in squared reward units. GAE's returns hold the values themselves,
    so explained variance cannot show that a critic is wrong by a constant; sums of rewards do.
    """
    rewards = experience.token_rewards
    discounts = gamma ** torch.arange(rewards.shape[1], device=rewards.device)
    followed = (rewards * discounts).sum(1)
    errors = {
        "value/mean_squared_error": followed - experience.old_values[:, 0],
        "value/mean_squared_return": followed,
    }
    return {
        name: float(masked_mean(x.double() ** 2, known, ranks.all_sum))
        for name, x in errors.items()
    }
