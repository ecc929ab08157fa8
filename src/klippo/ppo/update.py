"""The PPO update: passes over one batch of experience in minibatches.

B sequences, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klippo.policy.actor_critic import ActorCritic
from klippo.ppo.experience import Experience, micro_batches
from klippo.ppo.settings import PPOSettings
from klippo.ranks import Ranks
from klippo.tensors.kl import k2, k3
from klippo.tensors.losses import is_clipped, policy_loss, probability_ratio, value_loss
from klippo.tensors.masked import masked_sum
from klippo.types import Metrics


@dataclass(slots=True)
class _Tally:
    """What the passes over one batch did."""

    sums: dict[str, float] = field(default_factory=dict)
    num_minibatches: int = 0
    num_optimizer_steps: int = 0
    num_skipped: int = 0
    grad_norm_sum: float = 0.0
    first: dict[str, float] = field(default_factory=dict)


def ppo_update(
    settings: PPOSettings,
    policy: ActorCritic,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    *,
    kl_in_loss_coef: float,
    max_grad_norm: float | None,
    critic_only: bool,
    generator: torch.Generator,
    ranks: Ranks,
) -> Metrics:
    """Run `num_epochs` passes; returns means over the minibatches.

    `critic_only` trains the critic's own weights and leaves the policy alone (warm-up).
    `generator` (CPU) shuffles the rows.
    """
    tally = _Tally()
    num_rows = len(experience.tokens)
    size = (settings.minibatch_size or settings.batch_size) // ranks.world_size
    stopped_early = False
    policy.train()
    for _ in range(settings.num_epochs):
        order = torch.randperm(num_rows, generator=generator).to(experience.mask.device)
        for rows in micro_batches(order, size):
            approximate_kl = _optimizer_step(
                settings,
                policy,
                optimizer,
                experience,
                rows,
                tally,
                kl_in_loss_coef=kl_in_loss_coef,
                max_grad_norm=max_grad_norm,
                critic_only=critic_only,
                ranks=ranks,
            )
            if settings.target_kl is not None and approximate_kl > settings.target_kl:
                stopped_early = True
                break
        if stopped_early:
            break
    policy.eval()
    assert tally.num_optimizer_steps + tally.num_skipped == tally.num_minibatches
    planned = settings.num_epochs * math.ceil(num_rows / size)
    assert stopped_early or tally.num_minibatches == planned
    return _summary(tally, stopped_early)


def _optimizer_step(
    settings: PPOSettings,
    policy: ActorCritic,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    rows: Tensor,
    tally: _Tally,
    *,
    kl_in_loss_coef: float,
    max_grad_norm: float | None,
    critic_only: bool,
    ranks: Ranks,
) -> float:
    """One minibatch: gradients of its micro-batches, then a step (or a skip). Returns its KL."""
    num_tokens = float(ranks.all_sum(experience.mask[rows].sum().double()))
    tally.num_minibatches += 1
    if num_tokens == 0:
        tally.num_skipped += 1
        return 0.0
    optimizer.zero_grad(set_to_none=True)
    sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=rows.device)
    for part in micro_batches(rows, settings.micro_batch_size):
        losses = _losses(settings, policy, experience, part, kl_in_loss_coef, critic_only)
        # Rule 23: every token of the optimizer step weighs the same, whatever its micro-batch.
        (losses.total / num_tokens).backward()  # type: ignore[no-untyped-call]
        sums += losses.sums
    means = dict(zip(_SUMS, (ranks.all_sum(sums) / num_tokens).tolist(), strict=True))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ranks.sum_gradients(parameters)
    if not _is_safe(means["ratio"], settings.ratio_threshold):
        tally.num_skipped += 1
        optimizer.zero_grad(set_to_none=True)
        return float(means["k3"])
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tally.num_optimizer_steps += 1
    tally.grad_norm_sum += float(norm)
    tally.first = tally.first or means
    for name, value in means.items():
        tally.sums[name] = tally.sums.get(name, 0.0) + value
    return float(means["k3"])


def _is_safe(ratio: float, threshold: float | None) -> bool:
    """The ratio guard: a mean ratio that is NaN, or above the threshold, is not safe."""
    return math.isfinite(ratio) and (threshold is None or ratio <= threshold)


_SUMS = ("policy_loss", "value_loss", "entropy", "ratio", "clipped", "k3", "kl_loss")


@dataclass(frozen=True, slots=True)
class _Losses:
    total: Tensor  # scalar, summed over tokens
    sums: Tensor  # one per name in _SUMS


def _losses(
    settings: PPOSettings,
    policy: ActorCritic,
    experience: Experience,
    rows: Tensor,
    kl_in_loss_coef: float,
    critic_only: bool,
) -> _Losses:
    """Sums over the real tokens of these rows."""
    tokens = experience.tokens.rows(rows)
    width = tokens.response_mask.shape[1]

    def of(x: Tensor) -> Tensor:
        return x[rows, :width]

    mask = of(experience.mask)
    if critic_only:
        values = policy.values(tokens)
        per_token = value_loss(
            values,
            of(experience.old_values),
            of(experience.returns),
            clip_range=settings.value_clip_range,
        )
        value_total = masked_sum(per_token, mask)
        still = {"value_loss": float(value_total), "ratio": float(mask.sum())}
        logged = [still.get(name, 0.0) for name in _SUMS]
        sums = torch.tensor(logged, dtype=torch.float64, device=rows.device)
        return _Losses(value_total, sums)

    output = policy(tokens, experience.temperature, with_entropy=settings.entropy_coef > 0)
    old_logprobs, advantages = of(experience.old_logprobs), of(experience.advantages)
    ratio = probability_ratio(output.logprobs, old_logprobs)
    actor = policy_loss(
        ratio, advantages, clip_range=settings.clip_range, dual_clip=settings.dual_clip
    )
    if experience.weights is not None:
        actor = actor * of(experience.weights)
    critic = value_loss(
        output.values,
        of(experience.old_values),
        of(experience.returns),
        clip_range=settings.value_clip_range,
    )
    leash = k2(output.logprobs, of(experience.ref_logprobs))
    per_token = actor + settings.value_coef * critic
    if settings.entropy_coef > 0:
        per_token = per_token - settings.entropy_coef * output.entropy
    if kl_in_loss_coef > 0:
        per_token = per_token + kl_in_loss_coef * leash
    with torch.no_grad():
        per_token_logs = (
            actor,
            critic,
            output.entropy,
            ratio,
            is_clipped(ratio, advantages, clip_range=settings.clip_range).float(),
            k3(old_logprobs, output.logprobs),
            leash,
        )
        sums = torch.stack([masked_sum(x.double(), mask) for x in per_token_logs])
    return _Losses(masked_sum(per_token, mask), sums)


def _summary(tally: _Tally, stopped_early: bool) -> Metrics:
    steps = max(tally.num_optimizer_steps, 1)
    mean = {name: total / steps for name, total in tally.sums.items()}
    return {
        "loss/policy": mean.get("policy_loss", 0.0),
        "loss/value": mean.get("value_loss", 0.0),
        "policy/ratio_mean": mean.get("ratio", 1.0),
        "policy/first_ratio_mean": tally.first.get("ratio", 1.0),
        "policy/clipped_share": mean.get("clipped", 0.0),
        "policy/update_kl_nats_per_token": mean.get("k3", 0.0),
        "update/grad_norm": tally.grad_norm_sum / steps,
        "update/num_optimizer_steps": float(tally.num_optimizer_steps),
        "update/num_skipped_minibatches": float(tally.num_skipped),
        "update/stopped_early": float(stopped_early),
    }
