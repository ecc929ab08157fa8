"""Drawing tokens from logits, and the random numbers for it.

B rows, V vocabulary. A response's random numbers follow from the run's seed and the response's
number alone, so it is the same in whichever process, batch and order it is sampled.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Training leaves top_k and top_p off."""

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


def response_seeds(seed: int, numbers: Iterable[int]) -> list[int]:
    """One seed (63 bits) for each response, from the run's seed and the response's number."""
    return [random.Random(f"{seed}:response:{number}").getrandbits(63) for number in numbers]


def draw_limits(response_length: int | list[int], seeds: Sequence[int]) -> list[int]:
    """The most tokens that each response may have: fixed, or uniform in [low, high]."""
    if isinstance(response_length, int):
        return [response_length] * len(seeds)
    low, high = response_length
    return [random.Random(f"{seed}:length").randint(low, high) for seed in seeds]


def uniforms(seeds: Sequence[int], num: int) -> Tensor:
    """Uniform numbers in [0, 1), (B, num) float64, row i from seeds[i]: number t for token t."""
    rows = [random.Random(seed) for seed in seeds]
    return torch.tensor([[row.random() for _ in range(num)] for row in rows], dtype=torch.float64)
