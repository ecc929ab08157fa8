"""Where rollouts come from: sampled by the current policy, or logged before.

Online and offline PPO differ here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from klippo.ranks import Ranks
from klippo.rollouts.collate import collate, decode
from klippo.rollouts.sampling import draw_limits, response_seeds
from klippo.rollouts.settings import RolloutSettings
from klippo.types import Behavior, Completion, Engine, LoggedResponse, Prompt, Rollout, Tokenizer

OnResponse = Callable[[Prompt, str], None]
"""Called with a prompt and its response as soon as the response is finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Samples responses of the current policy; a seed and a number decide each response."""

    engine: Engine
    tokenizer: Tokenizer
    settings: RolloutSettings
    device: torch.device

    def sample(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        numbers: Iterable[int],
        on_response: OnResponse | None = None,
    ) -> Rollout:
        """One response per prompt, with the random numbers of the responses `numbers` of `seed`."""

        def on_done(i: int, completion: Completion) -> None:
            if on_response is not None:
                on_response(prompts[i], decode([completion.token_ids], self.tokenizer)[0])

        seeds = response_seeds(seed, numbers)
        limits = draw_limits(self.settings.response_length, seeds)
        self.engine.sync()
        return collate(
            prompts,
            self.engine.generate(prompts, limits, seeds, on_done),
            self.tokenizer,
            temperature=self.settings.temperature,
            device=self.device,
        )


class OnlineSource:
    """Draws prompts and samples a response to each.

    Responses are numbered over the whole run and all of its processes, and a response's number and
    the seed decide its random numbers. The whole state is the number of responses drawn so far.
    """

    def __init__(
        self,
        sampler: Sampler,
        next_prompts: Callable[[], list[Prompt]],
        *,
        seed: int,
        ranks: Ranks | None = None,
        on_response: OnResponse | None = None,
    ) -> None:
        """`on_response` is called for each response that `next` samples."""
        self.sampler = sampler
        self._next_prompts = next_prompts
        self._seed = seed
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
        numbers = range(first, first + len(prompts))
        return self.sampler.sample(prompts, self._seed, numbers, on_response)

    def state_dict(self) -> dict[str, int]:
        """The same on every process."""
        return {"num_drawn": self._num_drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from `state`, with any number of processes."""
        self._num_drawn = state["num_drawn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedSource:
    """Batches of logged responses, in the order in which `next_responses` gives them."""

    next_responses: Callable[[], list[LoggedResponse]]
    tokenizer: Tokenizer
    temperature: float
    """Of the policy that wrote the responses."""
    behavior: Behavior
    device: torch.device

    def next(self) -> Rollout:
        """The next batch."""
        return self.rollout(self.next_responses())

    def rollout(self, responses: Sequence[LoggedResponse]) -> Rollout:
        """These responses as one batch."""
        batch = collate(
            [response.prompt for response in responses],
            [response.completion for response in responses],
            self.tokenizer,
            temperature=self.temperature,
            device=self.device,
        )
        return replace(batch, behavior=self.behavior)
