"""Rewards that ask no model: a column of the data, and penalties that count tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from klippo.tensors.estimators import repeated_share
from klippo.types import BASELINE, Rollout, Scores


class ColumnReward:
    """The reward that each response came with."""

    def __init__(self, column: str) -> None:
        self._column = column

    def score(self, rollout: Rollout) -> Scores:
        """reward (B,) float32; baseline (B,) float32 if the data has one."""
        device = rollout.tokens.response_ids.device

        def read(name: str) -> Tensor:
            numbers = [float(prompt.meta[name]) for prompt in rollout.prompts]
            return torch.tensor(numbers, dtype=torch.float32, device=device)

        has_baseline = all(BASELINE in prompt.meta for prompt in rollout.prompts)
        return Scores(reward=read(self._column), baseline=read(BASELINE) if has_baseline else None)


class LengthPenalty:
    """-(tokens above `max_tokens`) - (tokens below `min_tokens`), in tokens.

    Every sampled token counts, a stop token too.
    """

    def __init__(self, *, max_tokens: int | None = None, min_tokens: int | None = None) -> None:
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens

    def score(self, rollout: Rollout) -> Scores:
        """reward: (B,) float32, at most 0."""
        lengths = rollout.tokens.response_mask.sum(1)  # (B,)
        low = 0 if self._min_tokens is None else self._min_tokens
        reward = (lengths - low).clamp(max=0)
        if self._max_tokens is not None:
            reward = reward - (lengths - self._max_tokens).clamp(min=0)
        return Scores(reward=reward.float())


class RepetitionPenalty:
    """-(n-grams that occurred before in the same response) / (n-grams), between -1 and 0.

    N-grams are of token ids, stop tokens included; a response shorter than one n-gram gets 0.
    """

    def __init__(self, *, ngram: int = 3) -> None:
        self._ngram = ngram

    def score(self, rollout: Rollout) -> Scores:
        """reward: (B,) float32."""
        tokens = rollout.tokens
        share = repeated_share(tokens.response_ids, tokens.response_mask, self._ngram)
        return Scores(reward=-share)
