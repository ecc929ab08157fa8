"""A weighted sum of named reward sources."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klippo.tensors.estimators import AllSum, RunningMoments, local
from klippo.types import RewardSource, Rollout, Scores, Stateful, stateful


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One summand."""

    source: RewardSource
    weight: float = 1.0
    normalize: bool = False
    """Subtract the running mean and divide by the running standard deviation before weighting."""


class SumReward:
    """reward = sum_i weight_i * part_i, where a part may be standardised by its running moments.

    A batch enters the running moments before it is standardised by them, so that the first batch
    has a scale too. A response that any part could not score (NaN) has a NaN sum. `Scores.parts`
    holds each part as its source gave it, under its name; parts of a part are `outer/inner`. The
    members of an ensemble among the parts are passed on, where there is exactly one.
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

    def score(self, rollout: Rollout) -> Scores | Awaitable[Scores]:
        """reward: (B,) float32; to be awaited exactly when a part is, and then all at once."""
        results: list[Scores | Awaitable[Scores]] = []
        try:
            for part in self.parts.values():
                results.append(part.source.score(rollout))  # noqa: PERF401, the ones before an error
        except BaseException:
            for result in results:
                if inspect.iscoroutine(result):
                    result.close()
            raise
        if any(inspect.isawaitable(result) for result in results):
            return self._score_when_ready(results)
        return self._sum([result for result in results if isinstance(result, Scores)])

    async def _score_when_ready(self, results: Sequence[Scores | Awaitable[Scores]]) -> Scores:
        tasks = {
            place: asyncio.ensure_future(result)
            for place, result in enumerate(results)
            if not isinstance(result, Scores)
        }
        try:
            await asyncio.gather(*tasks.values())
        except BaseException:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            raise
        return self._sum(
            [
                r if isinstance(r, Scores) else tasks[place].result()
                for place, r in enumerate(results)
            ]
        )

    def _sum(self, scores: Sequence[Scores]) -> Scores:
        total = torch.zeros_like(scores[0].reward, dtype=torch.float32)
        ensembles = [score.members for score in scores if score.members is not None]
        logged: dict[str, Tensor] = {}
        for (name, part), score in zip(self.parts.items(), scores, strict=True):
            reward = score.reward.float()
            logged[name] = reward
            logged |= {f"{name}/{inner}": values for inner, values in score.parts.items()}
            total = total + part.weight * self._standardized(name, reward)
        return Scores(
            reward=total,
            members=ensembles[0] if len(ensembles) == 1 else None,
            parts=logged,
            not_finite={row: text for score in scores for row, text in score.not_finite.items()},
        )

    def _standardized(self, name: str, reward: Tensor) -> Tensor:
        if name not in self._moments:
            return reward
        moments = self._moments[name]
        if not (self._measures_once and moments.count > 0):
            moments.update(reward[~reward.isnan()], self._all_sum)
        return moments.standardize(reward)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ConfigError when a part needs a column that is not among these."""
        columns = list(columns)
        for part in self.parts.values():
            check = getattr(part.source, "check_columns", None)
            if check is not None:
                check(columns)

    async def close(self) -> None:
        """Let the parts that hold connections end what is in flight."""
        for part in self.parts.values():
            close = getattr(part.source, "close", None)
            if close is not None:
                await close()

    def yardstick(self, all_sum: AllSum = local) -> SumReward:
        """The same sum for evaluation: one scale for all of its batches.

        `all_sum` adds up over the processes that share the evaluation.
        """
        return SumReward(
            {
                name: Part(
                    source=yardstick(p.source, all_sum), weight=p.weight, normalize=p.normalize
                )
                for name, p in self.parts.items()
            },
            all_sum,
            measures_once=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """The running moments of the parts, and the states of parts that have one."""
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
        found = ((name, stateful(part.source)) for name, part in self.parts.items())
        return {name: source for name, source in found if source is not None}


def yardstick(source: RewardSource, all_sum: AllSum = local) -> RewardSource:
    """The source as evaluation uses it: the same text gets the same score at every step.

    Running moments would move the scale while the policy trains, so parts that are normalised are
    standardised by the moments of the first batch that the yardstick sees.
    """
    return source.yardstick(all_sum) if isinstance(source, SumReward) else source
