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
        temperature = experience.temperature
        tokens = experience.tokens.rows(rows)
        num_tokens = tokens.response_mask.shape[1]
        of = _columns(rows, num_tokens)
        mask = of(experience.mask)
        known = experience.first_pass and experience.first_pass.take(rows, num_tokens)
        hidden = known[0] if known else self.policy.lm.hidden(tokens)
        actor = _actor_terms(self, of, tokens.response_mask)
        loss, logprobs = self.policy.lm.loss(
            tokens, hidden, temperature, actor, with_entropy=settings.entropy_coef > 0
        )
        values = known[1] if known else self.policy.critic(tokens, hidden, after_last=False)
        critic = masked_sum(_critic_loss(settings, experience, values, of), mask)
        loss = loss + settings.value_coef * critic
        if self.kl_coef > 0 and self.reference is not None:
            kl = self.reference.kl_from(self.policy.lm, tokens, temperature, hidden)
            loss = loss + self.kl_coef * masked_sum(kl, mask)
        return loss, actor.sums(logprobs, critic.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorTerms:
    """The part of the loss that each token's own log-prob and entropy decide; all (N,)."""

    settings: PPOSettings
    mask: Tensor  # bool: tokens that count
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor | None  # where an engine sampled from another policy
    ref_logprobs: Tensor | None  # where the loss has the k2 penalty
    kl_coef: float

    def __call__(self, logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        """The losses (n,) of a slice of the tokens."""
        loss = self.policy_loss(logprobs, part) - self.settings.entropy_coef * entropy
        if self.ref_logprobs is not None:
            loss = loss + self.kl_coef * k2(logprobs, self.ref_logprobs[part])
        return torch.where(self.mask[part], loss, torch.zeros_like(loss))

    def policy_loss(self, logprobs: Tensor, part: slice) -> Tensor:
        """The clipped loss (n,) of a slice of the tokens."""
        loss = policy_loss(
            probability_ratio(logprobs, self.old_logprobs[part]),
            self.advantages[part],
            clip_range=self.settings.clip_range,
            dual_clip=self.settings.dual_clip,
        )
        return loss if self.weights is None else loss * self.weights[part]

    def sums(self, logprobs: Tensor, critic: Tensor) -> TokenSums:
        """What to report of log-probs (N,) and the summed value loss."""
        ratio = probability_ratio(logprobs, self.old_logprobs)
        clipped = is_clipped(ratio, self.advantages, clip_range=self.settings.clip_range)
        return TokenSums(
            policy_loss=masked_sum(self.policy_loss(logprobs, slice(None)).double(), self.mask),
            value_loss=critic.double(),
            ratio=masked_sum(ratio.double(), self.mask),
            clipped=masked_sum(clipped.double(), self.mask),
            update_kl=masked_sum(k3(self.old_logprobs, logprobs).double(), self.mask),
        )


def _actor_terms(loss: PPOLoss, of: Callable[[Tensor], Tensor], real: Tensor) -> ActorTerms:
    """What the rows' real response tokens (`real`, (B, T)) are compared with."""
    experience = loss.experience
    uses_k2 = loss.kl_coef > 0 and loss.reference is None
    return ActorTerms(
        settings=loss.settings,
        mask=of(experience.mask)[real],
        old_logprobs=of(experience.old_logprobs)[real],
        advantages=of(experience.advantages)[real],
        weights=None if experience.weights is None else of(experience.weights)[real],
        ref_logprobs=of(experience.ref_logprobs)[real] if uses_k2 else None,
        kl_coef=loss.kl_coef,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupLoss:
    """The value loss alone, and only for the critic's own weights: the policy does not move.

    So the hidden states that a critic on the policy's trunk reads are those of the forward phase.
    """

    settings: PPOSettings
    policy: ActorCritic
    experience: Experience

    def __call__(self, rows: Tensor) -> tuple[Tensor, TokenSums]:
        tokens = self.experience.tokens.rows(rows)
        of = _columns(rows, tokens.response_mask.shape[1])
        hidden = None if self.experience.hidden is None else of(self.experience.hidden)
        values = self.policy.values(tokens, hidden)
        critic = _critic_loss(self.settings, self.experience, values, of)
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
    """Takes the same rows and columns of a (B, T, ...) tensor as `TokenBatch.rows` did."""
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
