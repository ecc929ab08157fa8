"""PPO's losses, one number per token; the caller sums them over its mask.

All tensors (B, T) unless said otherwise.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """rho = pi / pi_old at the sampled token, its logarithm clamped to ±20."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_loss(
    ratio: Tensor, advantages: Tensor, *, clip_range: float, dual_clip: float | None = None
) -> Tensor:
    """max(-A * rho, -A * clip(rho, 1 - eps, 1 + eps)).

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, negated. `dual_clip` c > 1 bounds the loss of
    tokens with A < 0 by -c * A (Ye et al. 2020, arXiv 1912.09729, eq. 5).
    """
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def is_clipped(ratio: Tensor, advantages: Tensor, *, clip_range: float) -> Tensor:
    """True where the clipped branch of the policy loss is strictly larger: the gradient is zero."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -advantages * clipped > -advantages * ratio


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float | None
) -> Tensor:
    """0.5 * max((V - R)^2, (clip(V, V_old ± eps_v) - R)^2); without the clip where it is None.

    The clipped form is that of OpenAI baselines' ppo2.
    """
    squared = (values - returns) ** 2
    if clip_range is not None:
        clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
        squared = torch.maximum(squared, (clipped - returns) ** 2)
    return 0.5 * squared
