"""Random numbers of a response: they follow from the run's seed and the response's number alone.

So a response is the same whichever process, batch and order it is sampled in.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


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
