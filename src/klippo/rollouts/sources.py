"""Where rollouts come from: sampled by the current policy, or logged before.

Online and offline PPO differ here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from klippo.ranks import Ranks
from klippo.rollouts.collate import collate, decode
from klippo.rollouts.sampling import draw_limits, response_seeds
from klippo.rollouts.settings import RolloutSettings
from klippo.types import Behavior, Completion, Engine, LoggedResponse, Prompt, Rollout, Tokenizer

OnResponse = Callable[[Prompt, str], None]
"""Told a prompt and a finished response to it."""


class OnlineSource:
    """Draws prompts and lets the engine answer them.

    Responses are numbered over the whole run and all of its processes, and a response's number and
    the seed decide its random numbers. The whole state is the number of responses drawn so far.
    """

    def __init__(
        self,
        next_prompts: Callable[[], list[Prompt]],
        engine: Engine,
        tokenizer: Tokenizer,
        settings: RolloutSettings,
        *,
        seed: int,
        device: torch.device,
        ranks: Ranks | None = None,
        on_response: OnResponse | None = None,
    ) -> None:
        """`on_response` is told of each response that `next` samples, as soon as it is finished."""
        self._next_prompts = next_prompts
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._seed = seed
        self._device = device
        self._ranks = ranks or Ranks()
        self._on_response = on_response
        self._num_drawn = 0

    def next(self) -> Rollout:
        """The next batch of prompts with freshly sampled responses."""
        return self.answer(self._next_prompts(), self._on_response)

    def answer(self, prompts: list[Prompt], on_response: OnResponse | None = None) -> Rollout:
        """Responses to these prompts, with new numbers; each process answers equally many."""
        first = self._num_drawn + self._ranks.rank * len(prompts)
        self._num_drawn += self._ranks.world_size * len(prompts)
        return self.answer_as(prompts, range(first, first + len(prompts)), on_response)

    def answer_as(
        self, prompts: list[Prompt], numbers: Iterable[int], on_response: OnResponse | None = None
    ) -> Rollout:
        """Responses to these prompts with the random numbers of the responses numbered so."""

        def tell(i: int, completion: Completion) -> None:
            if on_response is not None:
                on_response(prompts[i], decode([completion.token_ids], self._tokenizer)[0])

        seeds = response_seeds(self._seed, numbers)
        limits = draw_limits(self._settings.response_length, seeds)
        self._engine.sync()
        return collate(
            prompts,
            self._engine.generate(prompts, limits, seeds, tell),
            self._tokenizer,
            temperature=self._settings.temperature,
            device=self._device,
        )

    def state_dict(self) -> dict[str, int]:
        """The same on every process."""
        return {"num_drawn": self._num_drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken; another number of processes is fine."""
        self._num_drawn = state["num_drawn"]


class LoggedSource:
    """Batches of logged responses, in the order in which `next_responses` gives them."""

    def __init__(
        self,
        next_responses: Callable[[], list[LoggedResponse]],
        tokenizer: Tokenizer,
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
