"""Responses sampled from the current policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from klippo.rollouts.collate import collate
from klippo.rollouts.settings import RolloutSettings
from klippo.types import Engine, Prompt, Rollout


def draw_limits(
    response_length: int | list[int], num_responses: int, generator: torch.Generator
) -> list[int]:
    """The most tokens that each response may have: fixed, or uniform in [low, high]."""
    if isinstance(response_length, int):
        return [response_length] * num_responses
    low, high = response_length
    drawn = torch.randint(
        low, high + 1, (num_responses,), generator=generator, device=generator.device
    )
    limits: list[int] = drawn.tolist()
    return limits


class OnlineSource:
    """Draws prompts and lets the engine answer them."""

    def __init__(
        self,
        next_prompts: Callable[[], list[Prompt]],
        engine: Engine,
        tokenizer: Any,
        settings: RolloutSettings,
        generator: torch.Generator,
    ) -> None:
        self._next_prompts = next_prompts
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._generator = generator

    def next(self) -> Rollout:
        """The next batch of prompts with freshly sampled responses."""
        return self.answer(self._next_prompts())

    def answer(self, prompts: list[Prompt]) -> Rollout:
        """Responses to these prompts."""
        limits = draw_limits(self._settings.response_length, len(prompts), self._generator)
        self._engine.sync()
        completions = self._engine.generate(prompts, limits, self._generator)
        return collate(
            prompts,
            completions,
            self._tokenizer,
            temperature=self._settings.temperature,
            device=self._generator.device,
        )
