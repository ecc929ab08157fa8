"""PPO's objective (Schulman et al. 2017, arXiv 1707.06347, eq. 9), negated: what a token costs.

    L = L_clip + c_1 * L_value - c_2 * H + beta * KL

N response tokens; every tensor is (N,) float32. This is the specification: plain tensors, plain
autograd. The fused LM head calls it chunk by chunk; the update sums it and divides by the number of
tokens of the optimizer step.
"""

import torch
from torch import Tensor

from klippo.ppo.settings import PPOSettings
from klippo.tensors.estimators import k2, k3

MAX_LOG_RATIO = 20.0
LOGGED = ("policy_loss", "value_loss", "ratio", "clipped", "update_kl")
"""What `ppo_loss` reports of each token; `update_kl` is KL(pi_old || pi) by k3, in nats."""


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """rho = pi / pi_old at the sampled token, its logarithm clamped to ±20."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_loss(
    ratio: Tensor, advantages: Tensor, *, clip_range: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """max(-A * rho, -A * clip(rho, 1 - eps, 1 + eps)), and whether the clip won: no gradient.

    Schulman et al. 2017, eq. 7, negated. `dual_clip` c > 1 bounds the loss of tokens with A < 0 by
    -c * A (Ye et al. 2020, arXiv 1912.09729, eq. 5).
    """
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(free, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss, clipped > free


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float | None
) -> Tensor:
    """0.5 * max((V - R)^2, (clip(V, V_old ± eps_v) - R)^2), as in OpenAI baselines' ppo2."""
    squared = (values - returns) ** 2
    if clip_range is not None:
        clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
        squared = torch.maximum(squared, (clipped - returns) ** 2)
    return 0.5 * squared


def ppo_loss(
    settings: PPOSettings,
    kl_coef: float,
    *,
    logprobs: Tensor,  # log pi(token)
    entropy: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    ref_logprobs: Tensor,
    weights: Tensor | None = None,  # if an engine sampled from another policy
    exact_kl: Tensor | None = None,  # KL(pi || ref) over the vocabulary, in place of k2
) -> tuple[Tensor, Tensor]:
    """The loss of each token (N,), and what to log of it (N, 5), in the order of `LOGGED`."""
    ratio = probability_ratio(logprobs, old_logprobs)
    policy, clipped = policy_loss(
        ratio, advantages, clip_range=settings.clip_range, dual_clip=settings.dual_clip
    )
    policy = policy if weights is None else policy * weights
    value = value_loss(values, old_values, returns, clip_range=settings.value_clip_range)
    loss = policy + settings.value_coef * value - settings.entropy_coef * entropy
    if kl_coef > 0:
        loss = loss + kl_coef * (k2(logprobs, ref_logprobs) if exact_kl is None else exact_kl)
    logged = [policy, value, ratio, clipped.to(ratio.dtype), k3(old_logprobs, logprobs)]
    return loss, torch.stack(logged, -1).detach()
