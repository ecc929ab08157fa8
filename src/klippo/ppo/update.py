"""The PPO update: passes over one batch of experience in minibatches.

B sequences, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.ppo.experience import Experience, parts_of
from klippo.ppo.gather import gather_experience
from klippo.ppo.objective import NAMES, Loss, PPOLoss, WarmupLoss
from klippo.ppo.optimizer import Optimizer
from klippo.ppo.settings import PPOSettings
from klippo.ranks import Ranks
from klippo.types import Metrics

Skip = Literal["empty", "loss", "ratio", "gradient"]
"""Why a minibatch was skipped: nothing to learn from; a loss (or ratio) that is not finite; a mean
ratio above the threshold; a gradient that is not finite."""


@dataclass(slots=True)
class _Tally:
    """What the passes over one batch did."""

    skipped: list[Skip] = field(default_factory=list)  # one per minibatch without a step
    seen: list[dict[str, float]] = field(default_factory=list)  # means of all minibatches
    grad_norms: list[float] = field(default_factory=list)  # one per optimizer step
    means: list[dict[str, float]] = field(default_factory=list)  # one per optimizer step


def ppo_update(
    settings: PPOSettings,
    policy: ActorCritic,
    optimizer: Optimizer,
    experience: Experience,
    *,
    kl_in_loss_coef: float,
    exact_kl_to: Reference | None = None,
    critic_only: bool,
    generator: torch.Generator,
    ranks: Ranks,
) -> Metrics:
    """Run `num_epochs` passes; returns means over the optimizer steps.

    `experience` holds this process's rows; minibatches are made of the rows of all processes, and
    each process takes an equal part of every minibatch. `critic_only` trains the critic's own
    weights and leaves the policy alone (warm-up). `generator` (CPU) shuffles the rows, and must be
    in the same state on every process. With `exact_kl_to` the KL in the loss is the exact one.
    """
    experience = gather_experience(experience, ranks)
    loss: Loss = PPOLoss(
        settings=settings,
        policy=policy,
        experience=experience,
        kl_coef=kl_in_loss_coef,
        reference=exact_kl_to,
    )
    if critic_only:
        loss = WarmupLoss(settings=settings, policy=policy, experience=experience)
    tally = _Tally()
    num_rows = len(experience.tokens)  # of all processes
    size = settings.minibatch_size or settings.batch_size
    stopped_early = False
    policy.train()
    for _ in range(settings.num_epochs):
        order = torch.randperm(num_rows, generator=generator).to(experience.mask.device)
        for rows in torch.split(order, size):
            num_tokens = float(experience.mask[rows].sum())
            share = ranks.share(len(rows))
            own = parts_of(settings, experience.tokens, rows[share.start : share.stop], ranks=ranks)
            means = _gradients(loss, optimizer, own, num_tokens, ranks)
            _step(optimizer, means, settings.ratio_threshold, tally)
            stopped_early = settings.target_kl is not None and (
                means.get("update_kl", 0.0) > settings.target_kl
            )
            if stopped_early:
                break
        if stopped_early:
            break
    policy.eval()
    planned = settings.num_epochs * math.ceil(num_rows / size)
    assert stopped_early or len(tally.seen) == planned
    return _summary(tally, stopped_early)


def _gradients(
    loss: Loss, optimizer: Optimizer, parts: list[Tensor], num_tokens: float, ranks: Ranks
) -> dict[str, float]:
    """Add this process's gradients up over the micro-batches; returns means over all tokens.

    Every token of the optimizer step weighs the same, whatever its micro-batch or process; without
    any token there are no means, and the step will be skipped.
    """
    sums = torch.zeros(len(NAMES), dtype=torch.float64, device=parts[0].device)

    def mean_loss(rows: Tensor) -> Tensor:
        total, logged = loss(rows)
        sums.add_(logged.stack())
        return total / max(num_tokens, 1)

    for rows in parts:
        optimizer.backward(partial(mean_loss, rows))
    totals = ranks.all_sum(sums).tolist()
    if num_tokens == 0:
        return {}
    return {name: total / num_tokens for name, total in zip(NAMES, totals, strict=True)}


def _step(
    optimizer: Optimizer, means: dict[str, float], ratio_threshold: float | None, tally: _Tally
) -> None:
    """One optimizer step, or none where it would do harm."""
    tally.seen.append(means)
    skip = _why_skip(means, ratio_threshold)
    if skip is not None:
        optimizer.forget()
        tally.skipped.append(skip)
        return
    norm = optimizer.step()
    if math.isfinite(norm):
        tally.grad_norms.append(norm)
        tally.means.append(means)
    else:
        tally.skipped.append("gradient")


def _why_skip(means: dict[str, float], ratio_threshold: float | None) -> Skip | None:
    """What forbids a step before its gradient is looked at."""
    if not means:
        return "empty"
    if not all(math.isfinite(means[name]) for name in ("policy_loss", "value_loss", "ratio")):
        return "loss"
    if ratio_threshold is not None and means["ratio"] > ratio_threshold:
        return "ratio"
    return None


def _largest(tally: _Tally, name: str, otherwise: float) -> float:
    """Over all minibatches where it is finite."""
    values = [means[name] for means in tally.seen if means and math.isfinite(means[name])]
    return max(values, default=otherwise)


def _summary(tally: _Tally, stopped_early: bool) -> Metrics:
    steps = max(len(tally.means), 1)
    still = dict.fromkeys(NAMES, 0.0) | {"ratio": 1.0}
    mean = {name: sum(m[name] for m in tally.means or [still]) / steps for name in NAMES}
    return {
        "loss/policy": mean["policy_loss"],
        "loss/value": mean["value_loss"],
        "policy/ratio_mean": mean["ratio"],
        "policy/first_ratio_mean": (tally.means or [still])[0]["ratio"],
        "policy/clipped_share": mean["clipped"],
        "policy/update_kl_nats_per_token": mean["update_kl"],
        "policy/largest_ratio_mean": _largest(tally, "ratio", 1.0),
        "policy/largest_update_kl_nats_per_token": _largest(tally, "update_kl", 0.0),
        "update/grad_norm": sum(tally.grad_norms) / steps,
        "update/num_optimizer_steps": float(len(tally.means)),
        "update/num_skipped_minibatches": float(len(tally.skipped)),
        "update/num_losses_not_finite": float(tally.skipped.count("loss")),
        "update/num_gradients_not_finite": float(tally.skipped.count("gradient")),
        "update/num_ratio_skips": float(tally.skipped.count("ratio")),
        "update/stopped_early": float(stopped_early),
    }
