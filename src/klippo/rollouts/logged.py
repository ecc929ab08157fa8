"""Responses that exist already, as rollouts: offline PPO differs from online PPO here alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from klippo.rollouts.collate import collate
from klippo.types import Behavior, LoggedResponse, Rollout


class LoggedSource:
    """Batches of logged responses, in the order in which `next_responses` gives them."""

    def __init__(
        self,
        next_responses: Callable[[], list[LoggedResponse]],
        tokenizer: Any,
        *,
        temperature: float,
        behavior: Behavior,
        device: torch.device,
    ) -> None:
        """`temperature` is that of the policy which wrote the responses."""
        self._next_responses = next_responses
        self._tokenizer = tokenizer
        self._temperature = temperature
        self._behavior = behavior
        self._device = device

    def next(self) -> Rollout:
        """The next batch."""
        return self.rollout(self._next_responses())

    def rollout(self, responses: Sequence[LoggedResponse]) -> Rollout:
        """These responses as one batch."""
        batch = collate(
            [one.prompt for one in responses],
            [one.completion for one in responses],
            self._tokenizer,
            temperature=self._temperature,
            device=self._device,
        )
        return replace(batch, behavior=self._behavior)
