"""Rewards that stand in the data."""

from __future__ import annotations

import torch

from klippo.types import BASELINE, Rollout, Scores


class ColumnReward:
    """The reward that each response came with."""

    def __init__(self, column: str) -> None:
        self._column = column

    def score(self, rollout: Rollout) -> Scores:
        """reward (B,) float32; baseline (B,) float32 where the data has one."""
        device = rollout.tokens.response_ids.device

        def read(name: str) -> torch.Tensor:
            numbers = [float(prompt.meta[name]) for prompt in rollout.prompts]
            return torch.tensor(numbers, dtype=torch.float32, device=device)

        has_baseline = all(BASELINE in prompt.meta for prompt in rollout.prompts)
        return Scores(reward=read(self._column), baseline=read(BASELINE) if has_baseline else None)
