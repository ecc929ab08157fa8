"""Generalised advantage estimation.

B sequences, T response tokens. Time t: the policy emits token t in state t, gets reward t.
"""

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    value_after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lambda * A_{t+1}
        R_t     = A_t + V_t

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16; V after the last real token is `value_after`
    (B,), 0 by default. rewards, values, mask: (B, T), real tokens first; results (B, T), 0 in the
    padding.
    """
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    values = torch.where(mask, values, torch.zeros_like(values))
    next_value = rewards.new_zeros(len(rewards)) if value_after is None else value_after
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(real, advantage, advantages[:, t])
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
    return advantages, advantages + values
