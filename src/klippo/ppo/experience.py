"""From a rollout and its scores to advantages: what PPO learns from.

B sequences, T response tokens. Everything is (B, T) float32 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klippo.errors import DivergedError
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.ppo.score import shape_scores
from klippo.ppo.settings import KLSettings, PPOSettings, ScoreSettings
from klippo.ranks import Ranks
from klippo.tensors.advantages import gae
from klippo.tensors.ensembles import lowest_shares
from klippo.tensors.kl import k1
from klippo.tensors.masked import masked_mean, masked_sum, whiten
from klippo.tensors.moments import RunningMoments
from klippo.tensors.packing import micro_batches, split_up
from klippo.tensors.repetition import repeated_share
from klippo.types import Metrics, Rollout, Scores, TokenBatch

ONE_PROCESS = Ranks()
NGRAM = 3
"""Tokens of what counts as repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What the models say of a rollout batch; no score is needed for it."""

    tokens: TokenBatch  # the rollout's, with the states of frozen blocks where there are any
    logprobs: Tensor
    entropy: Tensor
    values: Tensor  # (B, T), or (B, T+1) with the value after the last token
    ref_logprobs: Tensor
    exact_kl: Tensor | None = None  # from the reference, where others wrote the responses
    hidden: Tensor | None = None  # (B, T, D) of the policy, where it was asked for


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
    hidden: Tensor | None = None  # (B, T, D) of the policy, where the critic alone learns from it
    metrics: Metrics

    def rows(self, index: Tensor) -> Experience:
        """These rows alone, without the columns that are padding in all of them."""
        tokens = self.tokens.rows(index)
        width = tokens.response_mask.shape[1]
        columns = {name: getattr(self, name) for name in PER_TOKEN}
        cut = {name: x[index, :width] for name, x in columns.items() if x is not None}
        return replace(self, tokens=tokens, **cut)


PER_TOKEN = (
    "mask",
    "old_logprobs",
    "ref_logprobs",
    "old_values",
    "token_rewards",
    "advantages",
    "returns",
    "weights",
    "hidden",
)
"""The fields of an `Experience` that are (B, T) or (B, T, D)."""


@torch.no_grad()
def run_forward(
    ppo: PPOSettings,
    policy: ActorCritic,
    reference: Reference,
    rollout: Rollout,
    *,
    keep_hidden: bool = False,
    ranks: Ranks = ONE_PROCESS,
) -> Forward:
    """Log-probs, entropy and values of a rollout batch, by the update's own forward pass.

    Every model runs once. `keep_hidden` keeps the policy's hidden states.
    """
    parts = parts_of(ppo, rollout.tokens, ranks=ranks)
    tokens = _with_frozen_states(policy, rollout.tokens, parts)
    found: dict[str, Tensor] = {}
    after_last = ppo.bootstrap_truncated
    for rows in parts:
        own = tokens.rows(rows)
        width = own.response_mask.shape[1]
        hidden = policy.lm.hidden(own, after_last=after_last)
        part = {"values": policy.critic(own, hidden, after_last=after_last)}
        part |= _log_probs(policy, reference, rollout, own, hidden)
        if keep_hidden:
            part["hidden"] = hidden[:, :width]
        for name, values in part.items():
            if name not in found:
                width = tokens.response_ids.shape[1] + int(name == "values" and after_last)
                found[name] = values.new_zeros(len(tokens), width, *values.shape[2:])
            found[name][rows, : values.shape[1]] = values
    return Forward(tokens=tokens, **found)


def _log_probs(
    policy: ActorCritic,
    reference: Reference,
    rollout: Rollout,
    tokens: TokenBatch,
    hidden: Tensor,
) -> dict[str, Tensor]:
    """What policy and reference say of the responses, each (B, T)."""
    temperature = rollout.temperature
    if rollout.behavior != "policy":
        both = reference.compare(policy.lm, tokens, temperature, hidden)
        return {
            "logprobs": both.logprobs,
            "entropy": both.entropy,
            "ref_logprobs": both.ref_logprobs,
            "exact_kl": both.kl,
        }
    logprobs, entropy = policy.lm.logprobs(tokens, hidden, temperature, with_entropy=True)
    ref_logprobs = reference.logprobs(tokens, temperature)
    return {"logprobs": logprobs, "entropy": entropy, "ref_logprobs": ref_logprobs}


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
    """Token rewards, advantages and returns of a rollout batch."""
    tokens = forward.tokens
    old_logprobs, ref_logprobs = behavior_logprobs(rollout, forward), forward.ref_logprobs
    reward = scores.reward.to(forward.values)
    mask = tokens.response_mask & ~reward.isnan()[:, None]
    old_values = forward.values[:, : mask.shape[1]]

    compared = reward if scores.baseline is None else reward - scores.baseline.to(reward)
    shaped = shape_scores(score, compared, rollout.finished, moments, ranks.all_sum)
    token_kl = k1(forward.logprobs, ref_logprobs)
    token_rewards = token_scores(shaped, mask)
    if kl.placement == "reward":
        token_rewards = token_rewards - kl_coef * token_kl
    token_rewards = torch.where(mask, token_rewards, torch.zeros_like(token_rewards))

    has_critic = scores.baseline is None
    advantages, returns = gae(
        token_rewards,
        old_values if has_critic else torch.zeros_like(old_values),
        mask,
        gamma=ppo.gamma,
        lam=ppo.gae_lambda if has_critic else 1.0,
        value_after=_value_after(forward.values, rollout) if ppo.bootstrap_truncated else None,
    )
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, all_sum=ranks.all_sum)

    scored = mask.any(1)
    told_kl = token_kl if forward.exact_kl is None else forward.exact_kl
    sequence_kl = float(masked_mean(masked_sum(told_kl, mask, 1), scored, ranks.all_sum))
    weights, mismatch = _engine_weights(ppo, rollout, old_logprobs, mask, ranks)
    metrics = _metrics(
        rollout, scores, shaped, mask, forward.entropy, old_values, returns, token_rewards, ranks
    )
    if has_critic:
        metrics |= _value_errors(ppo, rollout, mask, old_values, token_rewards, ranks)
    return Experience(
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
        hidden=forward.hidden,
        num_scored=int(ranks.all_sum(scored.sum())),
        metrics={"kl/sequence_nats": sequence_kl, "kl/coef": kl_coef} | metrics | mismatch,
    )


def token_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """The score (B,) on each row's last real token, zero elsewhere; (B, T)."""
    lengths = mask.sum(1)
    last = (lengths - 1).clamp(min=0)[:, None]
    landed = torch.where(lengths > 0, scores, torch.zeros_like(scores))
    return scores.new_zeros(mask.shape).scatter(1, last, landed[:, None])


def _with_frozen_states(
    policy: ActorCritic, tokens: TokenBatch, parts: Sequence[Tensor]
) -> TokenBatch:
    """The output of the policy's frozen blocks for every token, worked out in these micro-batches.

    It holds B * (P + T) * D numbers until the update is done.
    """
    if policy.lm.frozen is None:
        return tokens
    states: Tensor | None = None
    num_prompt, num_response = tokens.prompt_ids.shape[1], tokens.response_ids.shape[1]
    for rows in parts:
        part = policy.lm.with_frozen_states(tokens.rows(rows))
        assert part.frozen_states is not None
        if states is None:
            width = part.frozen_states.shape[2]
            states = part.frozen_states.new_zeros(len(tokens), num_prompt + num_response, width)
        first = num_prompt - part.prompt_ids.shape[1]
        states[rows, first : num_prompt + part.response_ids.shape[1]] = part.frozen_states
    return replace(tokens, frozen_states=states)


def behavior_logprobs(rollout: Rollout, forward: Forward) -> Tensor:
    """Log-probs (B, T) of the policy that wrote the responses: where ratios start from."""
    match rollout.behavior:
        case "policy":
            return forward.logprobs
        case "start":
            return forward.ref_logprobs
    assert rollout.behavior_logprobs is not None
    return rollout.behavior_logprobs


def parts_of(
    ppo: PPOSettings,
    tokens: TokenBatch,
    rows: Tensor | None = None,
    *,
    ranks: Ranks = ONE_PROCESS,
) -> list[Tensor]:
    """Rows of a batch, all by default, in micro-batches as the settings want them.

    Processes with as many rows as each other have as many micro-batches: where weights are
    sharded, every pass is one of all processes.
    """
    if rows is None:
        rows = torch.arange(len(tokens), device=tokens.response_ids.device)
    parts = micro_batches(
        rows,
        tokens.prompt_mask,
        tokens.response_mask,
        size=ppo.micro_batch_size,
        budget=ppo.micro_batch_tokens,
    )
    if ppo.micro_batch_tokens is None:
        return parts
    return split_up(parts, max(ranks.gather(len(parts))))


def _value_after(values: Tensor, rollout: Rollout) -> Tensor:
    """V of the state after the last token (B,): the critic's for cut responses, 0 for finished."""
    after = values.gather(1, rollout.tokens.response_mask.sum(1, keepdim=True)).squeeze(1)
    return torch.where(rollout.finished, torch.zeros_like(after), after)


def _engine_weights(
    ppo: PPOSettings, rollout: Rollout, old_logprobs: Tensor, mask: Tensor, ranks: Ranks
) -> tuple[Tensor | None, Metrics]:
    """How far the engine's log-probs are from the training forward's, and what to do about it.

    Raises DivergedError past `max_logprob_mismatch`.
    """
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
    rollout: Rollout,
    scores: Scores,
    shaped: Tensor,
    mask: Tensor,
    entropy: Tensor,
    old_values: Tensor,
    returns: Tensor,
    token_rewards: Tensor,
    ranks: Ranks,
) -> Metrics:
    """Masked means over all processes; each key names its unit where it has one."""
    scored = mask.any(1)
    reward = scores.reward.to(mask.device)
    response = rollout.tokens

    def mean(x: Tensor, keep: Tensor) -> float:
        return float(masked_mean(x, keep, ranks.all_sum))

    score_mean = mean(reward, scored)
    return_mean = masked_mean(returns, mask, ranks.all_sum)
    return_variance = mean((returns - return_mean) ** 2, mask)
    residual = returns - old_values
    residual_variance = mean((residual - masked_mean(residual, mask, ranks.all_sum)) ** 2, mask)
    everything = torch.ones_like(scored)
    num_not_finite = torch.tensor(float(len(scores.not_finite)), device=mask.device)
    # Rewards of responses that exist already say nothing about the policy.
    of = "reward" if rollout.behavior == "policy" else "data"
    metrics = {
        f"{of}/score_mean": score_mean,
        f"{of}/score_sd": mean((reward - score_mean) ** 2, scored) ** 0.5,
        f"{of}/shaped_mean": mean(shaped, scored),
        f"{of}/sequence_total": mean(masked_sum(token_rewards, mask, 1), scored),
        f"{of}/scored_share": mean(scored.float(), everything),
        f"{of}/num_not_finite": float(ranks.all_sum(num_not_finite)),
        "policy/entropy_nats": mean(entropy, mask),
        "response/length_tokens": mean(response.response_mask.sum(1).float(), everything),
        "response/repeated_share": mean(
            repeated_share(response.response_ids, response.response_mask, NGRAM), everything
        ),
        "response/finished_share": mean(rollout.finished.float(), everything),
        "value/mean": mean(old_values, mask),
        "value/explained_variance": 1 - residual_variance / max(return_variance, 1e-8),
    }
    for name, part in scores.parts.items():
        part = part.to(mask.device)
        metrics[f"{of}/part/{name}"] = mean(part, scored & ~part.isnan())
    if scores.members is not None:
        members = scores.members.to(mask.device)
        for k, (own, lowest) in enumerate(zip(members, lowest_shares(members), strict=True), 1):
            whole = scored & ~lowest.isnan()
            metrics[f"ensemble/member{k}_mean"] = mean(own, whole)
            metrics[f"ensemble/member{k}_lowest_share"] = mean(lowest, whole)
    return metrics


def _value_errors(
    ppo: PPOSettings,
    rollout: Rollout,
    mask: Tensor,
    old_values: Tensor,
    token_rewards: Tensor,
    ranks: Ranks,
) -> Metrics:
    """How far the first values are from the rewards that followed, and how far 0 would have been.

        mean (V_0 - sum_t gamma^t r_t)^2,    mean (sum_t gamma^t r_t)^2

    over responses, in squared reward units. GAE's returns hold the values themselves, so that a
    critic which is wrong by a constant shows in no explained variance; sums of rewards do not.
    Where responses that the limit cut are bootstrapped, only finished ones have such a sum.
    """
    discounts = ppo.gamma ** torch.arange(mask.shape[1], device=mask.device)
    followed = (token_rewards * discounts).sum(1)
    known = mask.any(1) & rollout.finished if ppo.bootstrap_truncated else mask.any(1)

    def mean_square(x: Tensor) -> float:
        return float(masked_mean(x.double() ** 2, known, ranks.all_sum))

    return {
        "value/mean_squared_error": mean_square(followed - old_values[:, 0]),
        "value/mean_squared_return": mean_square(followed),
    }
