"""Rewards that only count tokens."""

from __future__ import annotations

import torch

from klippo.tensors.estimators import repeated_share
from klippo.types import Rollout, Scores


class LengthPenalty:
    """-(tokens above `max_tokens`) - (tokens below `min_tokens`), in tokens.

    Every sampled token counts, a stop token too.
    """

    def __init__(self, *, max_tokens: int | None = None, min_tokens: int | None = None) -> None:
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens

    def score(self, rollout: Rollout) -> Scores:
        """reward: (B,) float32, at most 0."""
        lengths = rollout.tokens.response_mask.sum(1)
        excess = torch.zeros_like(lengths)
        if self._max_tokens is not None:
            excess = excess + (lengths - self._max_tokens).clamp(min=0)
        if self._min_tokens is not None:
            excess = excess + (self._min_tokens - lengths).clamp(min=0)
        return Scores(reward=(-excess).float())


class RepetitionPenalty:
    """-(n-grams that occurred before in the same response) / (n-grams), between -1 and 0.

    N-grams are of token ids, stop tokens included; a response shorter than one n-gram gets 0.
    """

    def __init__(self, *, ngram: int = 3) -> None:
        self._ngram = ngram

    def score(self, rollout: Rollout) -> Scores:
        """reward: (B,) float32."""
        tokens = rollout.tokens
        return Scores(
            reward=-repeated_share(tokens.response_ids, tokens.response_mask, self._ngram)
        )
