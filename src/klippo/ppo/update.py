"""The PPO update: passes over one batch of experience in minibatches.

B sequences, T response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.ppo.experience import Experience
from klippo.ppo.loss import LOGGED, ppo_loss, value_loss
from klippo.ppo.optimizer import Optimizer
from klippo.ppo.settings import PPOSettings
from klippo.ranks import Ranks
from klippo.types import Metrics, TokenBatch

Loss = Callable[[Experience], tuple[Tensor, Tensor]]
"""Sum of the losses of a micro-batch's tokens; sums (5,) of what is logged, as in `LOGGED`."""
ONE_PROCESS = Ranks()
Lengths = tuple[int, int]
"""Tokens of a row's prompt, and of its response."""
ORDERS: tuple[Callable[[Lengths], int], ...] = (sum, max, lambda of: of[1], lambda _: 0)
"""Longest first: by total, by the longer of the two, by response; and as given, so that sorting
never adds padding."""
Skip = Literal["empty", "loss", "ratio", "gradient"]
"""Why a minibatch was skipped: no scored token; a loss, ratio or gradient that is not finite; a
mean ratio above the threshold."""
ON_POLICY = dict.fromkeys(LOGGED, 0.0) | {"ratio": 1.0}
"""Means of an update without any optimizer step."""


class Minibatch(NamedTuple):
    """What became of one minibatch."""

    means: dict[str, float]  # of `LOGGED`, over its tokens; empty without tokens
    skipped: Skip | None  # why there was no optimizer step
    grad_norm: float = 0.0  # before clipping


def ppo_update(
    settings: PPOSettings,
    loss: Loss,
    policy: ActorCritic,
    optimizer: Optimizer,
    experience: Experience,
    *,
    generator: torch.Generator,
    ranks: Ranks,
) -> Metrics:
    """Run `num_epochs` passes; returns means over the optimizer steps.

    `experience` holds this process's rows, an equal share of the batch. `generator` (CPU) shuffles
    the rows, from the same state on every process.
    """
    limit = math.inf if settings.target_kl is None else settings.target_kl
    results: list[Minibatch] = []
    policy.train()
    for rows in minibatches(settings, experience, generator, ranks):
        results.append(learn_minibatch(settings, loss, optimizer, experience, rows, ranks))
        if results[-1].means.get("update_kl", 0.0) > limit:
            break
    policy.eval()
    return summary(results, limit)


def minibatches(
    settings: PPOSettings, experience: Experience, generator: torch.Generator, ranks: Ranks
) -> Iterator[Tensor]:
    """This process's rows of each minibatch: every row once per epoch, in an order that changes.

    The rows of all processes, one after the other, are cut into groups of as many rows as an epoch
    has minibatches, and each minibatch takes one row of every group: processes hold equally many
    rows of each, and which rows these are does not depend on their number.
    """
    num_own = len(experience.tokens)
    first, size = ranks.rank * num_own, settings.minibatch
    num = math.ceil(num_own * ranks.world_size / size)
    starts = num * torch.arange(size)[:, None]
    for _ in range(settings.num_epochs):
        rows = starts + torch.rand(size, num, generator=generator).argsort(1) - first
        for minibatch in rows.T:
            own = minibatch[(minibatch >= 0) & (minibatch < num_own)]
            yield own.to(experience.mask.device)


def loss_of(
    settings: PPOSettings,
    policy: ActorCritic,
    batch: Experience,
    *,
    kl_coef: float,
    exact_kl_to: Reference | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's objective on a micro-batch, by one pass over trunk, critic and LM head."""
    tokens, temperature = batch.tokens, batch.temperature
    hidden = policy.lm.hidden(tokens)
    names = ("old_logprobs", "old_values", "advantages", "returns", "ref_logprobs", "weights")
    inputs = {name: x for name in names if (x := getattr(batch, name)) is not None}
    inputs["values"] = policy.critic(tokens, hidden, after_last=False)
    if kl_coef > 0 and exact_kl_to is not None:
        inputs["exact_kl"] = exact_kl_to.kl_from(policy.lm, tokens, temperature, hidden)
    return policy.lm.loss(
        tokens,
        batch.mask,
        hidden,
        temperature,
        partial(ppo_loss, settings, kl_coef),
        inputs,
        with_entropy=settings.entropy_coef > 0,
    )


def warm_up_loss(
    settings: PPOSettings, policy: ActorCritic, batch: Experience
) -> tuple[Tensor, Tensor]:
    """The value loss alone, only for the critic's own weights: the policy does not move.

    So a critic on the policy's trunk can read the hidden states of the forward phase.
    """
    values = policy.values(batch.tokens, batch.hidden)
    losses = value_loss(
        values, batch.old_values, batch.returns, clip_range=settings.value_clip_range
    )[batch.mask]
    ones, zeros = torch.ones_like(losses), torch.zeros_like(losses)
    logged = torch.stack([zeros, losses.detach(), ones, zeros, zeros], -1)
    return losses.sum(), logged.double().sum(0)


def learn_minibatch(
    settings: PPOSettings,
    loss: Loss,
    optimizer: Optimizer,
    experience: Experience,
    rows: Tensor,
    ranks: Ranks,
) -> Minibatch:
    """Add up the gradients of micro-batches; one optimizer step, or none if it would do harm.

    Every token of the step weighs the same, whatever its micro-batch or process.
    """
    num_tokens = float(ranks.all_sum(experience.mask[rows].sum()))
    sums: list[Tensor] = []

    def mean_loss(part: Tensor) -> Tensor:
        total, logged = loss(experience.rows(part))
        sums.append(logged)
        return total / max(num_tokens, 1)

    parts = parts_of(settings, experience.tokens, rows, ranks=ranks)
    optimizer.backward([partial(mean_loss, part) for part in parts])
    totals = ranks.all_sum(torch.stack(sums).sum(0)).tolist()
    means = {name: total / max(num_tokens, 1) for name, total in zip(LOGGED, totals, strict=True)}
    threshold = math.inf if settings.ratio_threshold is None else settings.ratio_threshold
    skipped: Skip | None = None
    if num_tokens == 0:
        skipped, means = "empty", {}
    elif not all(math.isfinite(means[name]) for name in ("policy_loss", "value_loss", "ratio")):
        skipped = "loss"
    elif means["ratio"] > threshold:
        skipped = "ratio"
    if skipped is not None:
        optimizer.forget()
        return Minibatch(means, skipped)
    norm = optimizer.step()
    return Minibatch(means, None if math.isfinite(norm) else "gradient", norm)


def summary(results: Sequence[Minibatch], target_kl: float) -> Metrics:
    """Means over the optimizer steps, largest values over all minibatches, and counts."""
    steps = [result for result in results if result.skipped is None]
    means = [result.means for result in steps] or [ON_POLICY]
    mean = {name: sum(m[name] for m in means) / len(means) for name in LOGGED}
    skips = [result.skipped for result in results if result.skipped is not None]

    def largest(name: str) -> float:
        values = (result.means.get(name, math.nan) for result in results)
        return max(filter(math.isfinite, values), default=ON_POLICY[name])

    return {
        "loss/policy": mean["policy_loss"],
        "loss/value": mean["value_loss"],
        "policy/ratio_mean": mean["ratio"],
        "policy/first_ratio_mean": means[0]["ratio"],
        "policy/clipped_share": mean["clipped"],
        "policy/update_kl_nats_per_token": mean["update_kl"],
        "policy/largest_ratio_mean": largest("ratio"),
        "policy/largest_update_kl_nats_per_token": largest("update_kl"),
        "update/grad_norm": sum(result.grad_norm for result in steps) / max(len(steps), 1),
        "update/num_optimizer_steps": float(len(steps)),
        "update/num_skipped_minibatches": float(len(skips)),
        "update/num_losses_not_finite": float(skips.count("loss")),
        "update/num_gradients_not_finite": float(skips.count("gradient")),
        "update/num_ratio_skips": float(skips.count("ratio")),
        "update/stopped_early": float(results[-1].means.get("update_kl", 0.0) > target_kl),
    }


def parts_of(
    ppo: PPOSettings, tokens: TokenBatch, rows: Tensor | None = None, *, ranks: Ranks = ONE_PROCESS
) -> list[Tensor]:
    """Rows of a batch, all by default, in micro-batches as the settings want them.

    Processes with equally many rows have equally many micro-batches, because all of them take part
    in every pass over sharded weights: the largest groups are halved until the numbers agree.
    """
    if rows is None:
        rows = torch.arange(len(tokens), device=tokens.response_ids.device)
    size, budget = ppo.micro_batch_size, ppo.micro_batch_tokens
    parts = micro_batches(rows, tokens.prompt_mask, tokens.response_mask, size=size, budget=budget)
    num = len(parts) if budget is None else ranks.largest(len(parts))
    while len(parts) < num:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        parts[largest : largest + 1] = parts[largest].tensor_split(2)
    return parts


def micro_batches(
    rows: Tensor,
    prompt_mask: Tensor,
    response_mask: Tensor,
    *,
    size: int | None = None,
    budget: int | None = None,
) -> list[Tensor]:
    """Row numbers (n,) in groups: every row once, at least one row in each group.

    Masks are (B, P) and (B, T) bool. Groups are of `size` rows in the order given; or, with
    `budget`, of rows of like length with at most `budget` tokens, padding included, a longer row
    being a group by itself; or, with neither, all rows are one group.
    """
    if budget is None:
        return [rows] if size is None else list(torch.split(rows, size))
    prompts, responses = prompt_mask[rows].sum(1).tolist(), response_mask[rows].sum(1).tolist()
    lengths = list(zip(prompts, responses, strict=True))
    plans = [_packed(lengths, key, budget) for key in ORDERS]
    best = min(plans, key=lambda plan: padded_tokens(plan, lengths))
    return [rows[torch.tensor(group, device=rows.device)] for group in best]


def padded_tokens(groups: Sequence[Sequence[int]], lengths: Sequence[Lengths]) -> int:
    """Tokens that go through the models, padding included."""
    rows = [[lengths[i] for i in group] for group in groups]
    return sum(len(of) * sum(map(max, zip(*of, strict=True))) for of in rows)


def _packed(
    lengths: Sequence[Lengths], key: Callable[[Lengths], int], budget: int
) -> list[list[int]]:
    """Groups of neighbours, each as large as the budget lets it be."""
    groups: list[list[int]] = []
    prompt = response = 0  # the longest of the last group
    for i in sorted(range(len(lengths)), key=lambda i: -key(lengths[i])):
        longer = max(prompt, lengths[i][0]), max(response, lengths[i][1])
        if groups and (len(groups[-1]) + 1) * sum(longer) <= budget:
            groups[-1].append(i)
            prompt, response = longer
        else:
            groups.append([i])
            prompt, response = lengths[i]
    return groups
