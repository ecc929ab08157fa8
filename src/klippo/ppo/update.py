"""The PPO update: passes over one batch of experience in minibatches.

B sequences, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.ppo.experience import Experience, parts_of
from klippo.ppo.gather import gather_experience
from klippo.ppo.objective import NAMES, Loss, PPOLoss, WarmupLoss
from klippo.ppo.settings import PPOSettings
from klippo.ranks import Ranks, whole_tensor
from klippo.types import Metrics


@dataclass(slots=True)
class _Tally:
    """What the passes over one batch did."""

    num_minibatches: int = 0
    num_skipped: int = 0
    grad_norms: list[float] = field(default_factory=list)  # one per optimizer step
    means: list[dict[str, float]] = field(default_factory=list)  # one per optimizer step


def ppo_update(
    settings: PPOSettings,
    policy: ActorCritic,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    *,
    kl_in_loss_coef: float,
    exact_kl_to: Reference | None = None,
    max_grad_norm: float | None,
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
    optimizer.zero_grad(set_to_none=True)
    for _ in range(settings.num_epochs):
        order = torch.randperm(num_rows, generator=generator).to(experience.mask.device)
        for rows in torch.split(order, size):
            num_tokens = float(experience.mask[rows].sum())
            share = ranks.share(len(rows))
            own = parts_of(settings, experience.tokens, rows[share.start : share.stop], ranks=ranks)
            means = _gradients(loss, own, num_tokens, ranks)
            _step(optimizer, means, settings.ratio_threshold, max_grad_norm, tally, ranks)
            stopped_early = settings.target_kl is not None and (
                means["update_kl"] > settings.target_kl
            )
            if stopped_early:
                break
        if stopped_early:
            break
    policy.eval()
    planned = settings.num_epochs * math.ceil(num_rows / size)
    assert stopped_early or tally.num_minibatches == planned
    return _summary(tally, stopped_early)


def _gradients(
    loss: Loss, parts: list[Tensor], num_tokens: float, ranks: Ranks
) -> dict[str, float]:
    """Add this process's gradients up over the micro-batches; returns means over all tokens.

    Every token of the optimizer step weighs the same, whatever its micro-batch or process; without
    any token the means are NaN, and the step will be skipped.
    """
    sums = torch.zeros(len(NAMES), dtype=torch.float64, device=parts[0].device)
    for rows in parts:
        total, logged = loss(rows)
        (total / max(num_tokens, 1)).backward()  # type: ignore[no-untyped-call]
        sums += logged.stack()
    means = ranks.all_sum(sums) / (num_tokens or math.nan)
    return dict(zip(NAMES, means.tolist(), strict=True))


def _step(
    optimizer: torch.optim.Optimizer,
    means: dict[str, float],
    ratio_threshold: float | None,
    max_grad_norm: float | None,
    tally: _Tally,
    ranks: Ranks,
) -> None:
    """One optimizer step, or none where it would do harm.

    That is where the mean ratio is NaN or above the threshold, or a gradient is not finite.
    """
    tally.num_minibatches += 1
    ratio = means["ratio"]
    if math.isfinite(ratio) and (ratio_threshold is None or ratio <= ratio_threshold):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        ranks.sum_gradients(parameters)
        norm = float(whole_tensor(clip_grad_norm_(parameters, max_grad_norm or math.inf)))
        if math.isfinite(norm):
            optimizer.step()
            tally.grad_norms.append(norm)
            tally.means.append(means)
    tally.num_skipped = tally.num_minibatches - len(tally.means)
    optimizer.zero_grad(set_to_none=True)


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
        "update/grad_norm": sum(tally.grad_norms) / steps,
        "update/num_optimizer_steps": float(len(tally.means)),
        "update/num_skipped_minibatches": float(tally.num_skipped),
        "update/stopped_early": float(stopped_early),
    }
