"""How far offline training can be trusted: ratios, effective sample size, distances.

B sequences, T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from klippo.ppo.experience import Experience, Forward
from klippo.ppo.loss import probability_ratio
from klippo.ppo.settings import PPOSettings
from klippo.tensors.estimators import masked_sum
from klippo.types import Behavior, Metrics

SUSPICIOUS_Z = 4.0
"""Standard errors beyond which chance is no explanation."""


def diagnose(ppo: PPOSettings, experience: Experience, forward: Forward) -> Metrics:
    """Ratios to the policy that wrote the responses, effective sample size, distances.

    Effective sample size is Kish's (sum w)^2 / (n sum w^2), as a share: of tokens with their
    ratios, and of responses with the products of theirs, which is far stricter.
    """
    mask = experience.mask
    ratio = probability_ratio(forward.logprobs, experience.old_logprobs)
    tokens, advantages = ratio[mask].double(), experience.advantages[mask]
    log_ratio = masked_sum(forward.logprobs - experience.old_logprobs, mask, 1).double()
    high, low = 1 + ppo.clip_range, 1 - ppo.clip_range
    lower, upper = torch.quantile(tokens, torch.tensor([0.01, 0.99], dtype=tokens.dtype)).tolist()
    metrics = {
        "offline/ratio_mean": float(tokens.mean()),
        "offline/ratio_p1": lower,
        "offline/ratio_p99": upper,
        "offline/ratio_max": float(tokens.max()),
        "offline/clipped_share_good": _share(tokens > high, advantages > 0),
        "offline/clipped_share_bad": _share(tokens < low, advantages < 0),
        "offline/ess_tokens": effective_share(tokens.log()),
        "offline/ess_responses": effective_share(log_ratio),
        "offline/forward_kl_nats": float(-log_ratio.mean()),
        "offline/nll_nats_per_token": float(-forward.logprobs[mask].mean()),
    }
    if forward.exact_kl is not None:
        metrics["offline/kl_start_nats"] = float(masked_sum(forward.exact_kl, mask, 1).mean())
    return metrics


def effective_share(log_weights: Tensor) -> float:
    """(sum w)^2 / (n sum w^2) of weights given by their logarithms (n,); 1 for equal weights."""
    first = 2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0)
    return float((first - math.log(len(log_weights))).exp())


def _share(inside: Tensor, among: Tensor) -> float:
    """NaN if there are none."""
    return float((inside & among).sum() / among.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class BehaviorCheck:
    """Whether the log-probs that ratios start from can be those of who wrote the responses."""

    mean: float  # per response; 0 is expected of a true claim
    standard_error: float

    @property
    def is_suspicious(self) -> bool:
        """Whether chance does not explain the mean."""
        return abs(self.mean) > SUSPICIOUS_Z * max(self.standard_error, 1e-6)


def check_behavior(behavior: Behavior, experience: Experience, forward: Forward) -> BehaviorCheck:
    """Test the claim at the start, before anything was learnt.

    Responses of the policy pi itself have E[log pi(token) + entropy of pi] = 0 at every position;
    recorded log-probs of b have E[pi(token) / b(token) - 1] = 0. Sums over a response are means of
    zero either way, whatever the rewards.
    """
    mask = experience.mask
    if behavior == "recorded":
        terms = probability_ratio(forward.logprobs, experience.old_logprobs) - 1
    else:
        terms = forward.logprobs + forward.entropy
    sums = masked_sum(terms, mask, 1)[mask.any(1)].double()
    spread = float(sums.std()) if len(sums) > 1 else math.inf
    return BehaviorCheck(mean=float(sums.mean()), standard_error=spread / math.sqrt(len(sums)))
