"""One score from several: the objectives of reward-model ensembles.

K members, any further shape behind it. This is the only place where the formulas stand: PPO,
best-of-n and evaluation all come here.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["mean", "WCO", "UWO", "soft_min", "median", "mean_minus_sd"]


def combine(
    members: Tensor,
    objective: Objective,
    *,
    uwo_weight: float = 0.0,
    sd_weight: float = 0.0,
    ddof: int = 0,
    temperature: float = 1.0,
) -> Tensor:
    """members (K, ...) -> (...); NaN wherever a member is NaN.

    mean = mean_k R_k, WCO = min_k R_k, UWO = mean_k R_k - uwo_weight * var_k R_k
    (Coste et al. 2023, arXiv 2310.02743, section 3; their variance divides by K, ddof=0, their code
    by K - 1). Beyond the paper: soft_min = -t log mean_k exp(-R_k / t), which lies between minimum
    and mean; the median (the mean of the middle two for even K); mean_minus_sd = mean_k R_k -
    sd_weight * sd_k R_k.
    """
    mean = members.mean(0)
    match objective:
        case "mean":
            return mean
        case "WCO":
            return members.amin(0)
        case "UWO":
            return mean - uwo_weight * variance(members, ddof)
        case "soft_min":
            total = torch.logsumexp(-members / temperature, 0)
            return -temperature * (total - math.log(len(members)))
        case "median":
            middle = members.sort(0).values
            low, high = (len(members) - 1) // 2, len(members) // 2
            return torch.where(mean.isnan(), mean, (middle[low] + middle[high]) / 2)
        case "mean_minus_sd":
            return mean - sd_weight * variance(members, ddof).sqrt()


def variance(members: Tensor, ddof: int = 0) -> Tensor:
    """Variance over the members (K, ...) -> (...): sum of squared deviations / (K - ddof)."""
    return ((members - members.mean(0)) ** 2).sum(0) / (len(members) - ddof)


def lowest_shares(members: Tensor) -> Tensor:
    """The part of "being the minimum" that each member has: (K, B) -> (K, B), columns sum to 1.

    Members that tie share it. Columns with a NaN are NaN.
    """
    lowest = (members == members.amin(0)).to(members.dtype)
    shares = lowest / lowest.sum(0).clamp(min=1)
    return torch.where(members.isnan().any(0), math.nan, shares)
