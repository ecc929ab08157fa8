"""Endless shuffled epochs over the prompts, or over responses that exist already."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

from klippo.errors import ConfigError
from klippo.types import Prompt

T = TypeVar("T")


class PromptSampler(Generic[T]):
    """Draws batches of prompts; each epoch sees every prompt exactly once, in its own order.

    Its state is the number of prompts drawn so far: prompt n is number `n mod N` of epoch
    `n div N`, and an epoch's order follows from the seed. A batch may span two epochs.
    """

    def __init__(
        self,
        prompts: Sequence[T],
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch_size` counts the prompts of all ranks together.

        Raises ConfigError when there are no prompts, or when the ranks cannot share a batch evenly.
        """
        assert 0 <= rank < world_size
        if not prompts:
            raise ConfigError("there are no prompts to sample from; at least one is needed")
        if batch_size < 1 or batch_size % world_size != 0:
            raise ConfigError(
                f"batch_size={batch_size} must be a positive multiple of the number of processes, "
                f"{world_size}; try {max(round(batch_size / world_size), 1) * world_size}"
            )
        self._prompts = prompts
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._share = batch_size // world_size
        self._num_drawn = 0
        self._order = lru_cache(maxsize=2)(self._shuffled)  # a batch may span two epochs

    def next(self) -> list[T]:
        """This rank's share of the next batch: `batch_size / world_size` prompts.

        The ranks' shares, put one after the other, are the batch that a single process would draw.
        """
        first = self._num_drawn + self._rank * self._share
        self._num_drawn += self._batch_size
        return [self._prompt(draw) for draw in range(first, first + self._share)]

    @property
    def epoch(self) -> float:
        """Epochs drawn so far, over all ranks."""
        return self._num_drawn / len(self._prompts)

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank."""
        num_prompts = len(self._prompts)
        return {"num_drawn": self._num_drawn, "num_prompts": num_prompts, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; another batch size or number of ranks is fine.

        Raises ConfigError when the prompts or the seed are others, whose order would be another.
        """
        for key, value in self.state_dict().items():
            if key != "num_drawn" and state[key] != value:
                raise ConfigError(
                    f"the checkpoint was written with {key}={state[key]}, this run has "
                    f"{key}={value}; resume with the same data and seed, or start a new run"
                )
        self._num_drawn = int(state["num_drawn"])

    def _prompt(self, draw: int) -> T:
        epoch, index = divmod(draw, len(self._prompts))
        return self._prompts[self._order(epoch)[index]]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}:{epoch}").shuffle(order)
        return order


def pick(prompts: list[Prompt], number: int, seed: int) -> list[Prompt]:
    """A fixed choice of at most `number` prompts, in the data's order."""
    if len(prompts) <= number:
        return prompts
    chosen = sorted(random.Random(seed).sample(range(len(prompts)), number))
    return [prompts[i] for i in chosen]
