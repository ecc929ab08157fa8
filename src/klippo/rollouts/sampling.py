"""Drawing tokens from logits.

B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Training leaves top_k and top_p off (rule: sampled is scored)."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    top_p: float = 1.0


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Tempered logits (B, V) with everything outside top-k and top-p at minus infinity."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = torch.empty(0, device=logits.device)  # the warpers take it and do not read it
    if sampling.temperature != 1:
        logits = TemperatureLogitsWarper(sampling.temperature)(ids, logits)
    if sampling.top_k > 0:
        logits = TopKLogitsWarper(sampling.top_k)(ids, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(ids, logits)
    return logits


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B,) int64 and their log-probs (B,) in nats, from logits (B, V) float32.

    Inverse-CDF sampling: `uniform` (B,) float64 has one number in [0, 1) per row, where
    torch.multinomial would draw one per vocabulary entry.
    """
    if sampling.temperature == 0:
        logprobs = torch.log_softmax(logits, -1)
        token_ids = logprobs.argmax(-1)
    else:
        logprobs = torch.log_softmax(truncate(logits, sampling), -1)
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
        # right=True: an entry of probability zero is never the first to exceed the threshold.
        threshold = uniform[:, None] * cumulative[:, -1:]
        token_ids = torch.searchsorted(cumulative, threshold, right=True)
        token_ids = token_ids.squeeze(1).clamp(max=logits.shape[1] - 1)
    return token_ids, logprobs.gather(1, token_ids[:, None]).squeeze(1)
