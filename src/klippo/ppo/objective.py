"""What a minibatch minimises: clipped policy loss, value loss, entropy bonus, KL.

B sequences, T response tokens. Losses are sums over real tokens; the update divides them by the
number of tokens of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.ppo.experience import Experience
from klippo.ppo.settings import PPOSettings
from klippo.tensors.kl import k2, k3
from klippo.tensors.losses import is_clipped, policy_loss, probability_ratio, value_loss
from klippo.tensors.masked import masked_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSums:
    """Sums over real tokens, each a float64 scalar; divided by their number they are means."""

    policy_loss: Tensor
    value_loss: Tensor
    ratio: Tensor
    clipped: Tensor
    update_kl: Tensor  # k3 of the old policy against the one being updated, nats

    def stack(self) -> Tensor:
        """All of them in the order of `NAMES`."""
        return torch.stack([getattr(self, name) for name in NAMES])


NAMES = tuple(field.name for field in fields(TokenSums))

Loss = Callable[[Tensor], tuple[Tensor, TokenSums]]
"""Rows of the batch -> (loss to differentiate, scalar; what to report)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOLoss:
    """The loss of PPO (Schulman et al. 2017, eq. 9, negated), with options."""

    settings: PPOSettings
    policy: ActorCritic
    experience: Experience
    kl_coef: float
    """Weight of the KL in the loss; 0 where the penalty sits in the reward."""
    reference: Reference | None = None
    """Makes the KL in the loss exact; without it it is k2 of the sampled tokens."""

    def __call__(self, rows: Tensor) -> tuple[Tensor, TokenSums]:
        settings, experience = self.settings, self.experience
        tokens = experience.tokens.rows(rows)
        of = _columns(rows, tokens.response_mask.shape[1])
        output = self.policy(tokens, experience.temperature, with_entropy=settings.entropy_coef > 0)
        old_logprobs, advantages = of(experience.old_logprobs), of(experience.advantages)
        ratio = probability_ratio(output.logprobs, old_logprobs)
        actor = policy_loss(
            ratio, advantages, clip_range=settings.clip_range, dual_clip=settings.dual_clip
        )
        if experience.weights is not None:
            actor = actor * of(experience.weights)
        critic = _critic_loss(settings, experience, output.values, of)
        loss = actor + settings.value_coef * critic - settings.entropy_coef * output.entropy
        if self.kl_coef > 0:
            if self.reference is None:
                kl = k2(output.logprobs, of(experience.ref_logprobs))
            else:
                kl = self.reference.kl_from(
                    self.policy.lm, tokens, experience.temperature, output.hidden
                )
            loss = loss + self.kl_coef * kl
        mask = of(experience.mask)
        with torch.no_grad():
            clipped = is_clipped(ratio, advantages, clip_range=settings.clip_range)
            sums = TokenSums(
                policy_loss=masked_sum(actor.double(), mask),
                value_loss=masked_sum(critic.double(), mask),
                ratio=masked_sum(ratio.double(), mask),
                clipped=masked_sum(clipped.double(), mask),
                update_kl=masked_sum(k3(old_logprobs, output.logprobs).double(), mask),
            )
        return masked_sum(loss, mask), sums


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupLoss:
    """The value loss alone, and only for the critic's own weights: the policy does not move."""

    settings: PPOSettings
    policy: ActorCritic
    experience: Experience

    def __call__(self, rows: Tensor) -> tuple[Tensor, TokenSums]:
        tokens = self.experience.tokens.rows(rows)
        of = _columns(rows, tokens.response_mask.shape[1])
        critic = _critic_loss(self.settings, self.experience, self.policy.values(tokens), of)
        mask = of(self.experience.mask)
        loss = masked_sum(critic, mask)
        zero = torch.zeros((), dtype=torch.float64, device=rows.device)
        sums = TokenSums(
            policy_loss=zero,
            value_loss=loss.detach().double(),
            ratio=mask.sum().double(),
            clipped=zero,
            update_kl=zero,
        )
        return loss, sums


def _columns(rows: Tensor, width: int) -> Callable[[Tensor], Tensor]:
    """Takes the same rows and columns of a (B, T) tensor as `TokenBatch.rows` did."""
    return lambda x: x[rows, :width]


def _critic_loss(
    settings: PPOSettings,
    experience: Experience,
    values: Tensor,
    of: Callable[[Tensor], Tensor],
) -> Tensor:
    return value_loss(
        values,
        of(experience.old_values),
        of(experience.returns),
        clip_range=settings.value_clip_range,
    )
