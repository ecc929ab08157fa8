"""A weighted sum of named reward sources."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from klippo.judge.judging import together
from klippo.tensors.estimators import AllSum, RunningMoments, local
from klippo.types import RewardSource, Rollout, Scores, Stateful, stateful


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One term of a sum."""

    source: RewardSource
    weight: float = 1.0
    normalize: bool = False
    """Subtract the running mean and divide by the running standard deviation before weighting."""


Started = tuple[list[Awaitable[Any]], Callable[[Iterator[Any]], Scores]]
"""What to wait for, and the scores as they follow from the results, which are in that order.

Processes of one run may finish waiting in any order; what they exchange afterwards has the same
order everywhere.
"""


def start(source: RewardSource, rollout: Rollout) -> Started:
    """Begin to score."""
    if hasattr(source, "start"):
        started: Started = source.start(rollout)
        return started
    result = source.score(rollout)
    return ([result], next) if inspect.isawaitable(result) else ([], lambda _: result)


def score_started(started: Started) -> Scores | Awaitable[Scores]:
    """The scores; to be awaited exactly if there is something to wait for, and then all at once."""
    waiting, finish = started

    async def when_ready() -> Scores:
        return finish(iter(await together(waiting)))

    return when_ready() if waiting else finish(iter(()))


class SumReward:
    """reward = sum_i weight_i * r_i, whose terms may be standardised by their running moments.

    A batch enters the running moments before it is standardised by them, so that the first batch
    has a scale too. A response that any term could not score (NaN) has a NaN sum. `Scores.parts`
    holds each term as its source gave it, under its name; terms of a term are `outer/inner`. The
    members of an ensemble among the terms are passed on, if there is exactly one.
    """

    def __init__(
        self, parts: Mapping[str, Part], all_sum: AllSum = local, *, measures_once: bool = False
    ) -> None:
        """`all_sum` adds a tensor up over all processes, for the running moments.

        With `measures_once` the moments are those of the first batch and stay so.
        """
        self.parts = dict(parts)
        self._all_sum = all_sum
        self._moments = {name: RunningMoments() for name, p in parts.items() if p.normalize}
        self._measures_once = measures_once

    def with_sources(self, change: Callable[[RewardSource], RewardSource]) -> SumReward:
        """The same sum of changed sources, without what it has measured."""
        parts = {name: replace(p, source=change(p.source)) for name, p in self.parts.items()}
        return SumReward(parts, self._all_sum, measures_once=self._measures_once)

    def score(self, rollout: Rollout) -> Scores | Awaitable[Scores]:
        """reward: (B,) float32; to be awaited exactly if a term is."""
        return score_started(self.start(rollout))

    def start(self, rollout: Rollout) -> Started:
        """Begin to score all terms."""
        waiting: list[Awaitable[Any]] = []
        finishes: list[Callable[[Iterator[Any]], Scores]] = []
        try:
            for part in self.parts.values():
                more, finish = start(part.source, rollout)
                waiting += more
                finishes.append(finish)
        except BaseException:
            for one in waiting:
                if inspect.iscoroutine(one):
                    one.close()
            raise
        return waiting, lambda results: self._sum([finish(results) for finish in finishes])

    def _sum(self, scores: list[Scores]) -> Scores:
        total = torch.zeros_like(scores[0].reward, dtype=torch.float32)
        ensembles = [score.members for score in scores if score.members is not None]
        logged: dict[str, Tensor] = {}
        for (name, part), score in zip(self.parts.items(), scores, strict=True):
            reward = score.reward.float()
            logged[name] = reward
            logged |= {f"{name}/{inner}": values for inner, values in score.parts.items()}
            if (moments := self._moments.get(name)) is not None:
                if not (self._measures_once and moments.count > 0):
                    moments.update(reward[~reward.isnan()], self._all_sum)
                reward = moments.standardize(reward)
            total = total + part.weight * reward
        return Scores(
            reward=total,
            members=ensembles[0] if len(ensembles) == 1 else None,
            parts=logged,
            not_finite={row: text for score in scores for row, text in score.not_finite.items()},
        )

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ConfigError when a term needs a column that is not among these."""
        columns = list(columns)
        for part in self.parts.values():
            if hasattr(part.source, "check_columns"):
                part.source.check_columns(columns)

    async def close(self) -> None:
        """Let the terms that hold connections end what is in flight."""
        for part in self.parts.values():
            if hasattr(part.source, "close"):
                await part.source.close()

    def state_dict(self) -> dict[str, Any]:
        """The running moments of the terms, and the states of terms that have one."""
        return {
            "moments": {name: moments.state_dict() for name, moments in self._moments.items()},
            "sources": {name: source.state_dict() for name, source in self._stateful().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, moments in self._moments.items():
            moments.load_state_dict(state["moments"][name])
        for name, source in self._stateful().items():
            source.load_state_dict(state["sources"][name])

    def _stateful(self) -> dict[str, Stateful]:
        states = ((name, stateful(part.source)) for name, part in self.parts.items())
        return {name: state for name, state in states if state is not None}
