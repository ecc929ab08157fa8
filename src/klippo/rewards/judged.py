"""Judges in a run of several processes: the first process asks, and the others get their scores."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from dataclasses import astuple

from torch.distributed.distributed_c10d import _get_default_store

from klippo.judge.judging import Judgement
from klippo.judge.messages import Answer, Request
from klippo.judge.reward import JudgeReward
from klippo.judge.rubric import Material
from klippo.ranks import Ranks
from klippo.rewards.combined import Started, SumReward, score_started
from klippo.types import Metrics, Prompt, RewardSource, Rollout, Scores

READ_EVERY_S = 0.05
"""How often the first process looks for responses that others have finished."""
_numbers = itertools.count()


class Nobody:
    """The backend of a process that asks nothing."""

    async def ask(self, request: Request) -> Answer:
        raise AssertionError(f"only the first process asks the judge, not for {request}")


class SharedJudge:
    """A judge that the first process asks about everyone's responses.

    The processes must build their judges in the same order and score at the same time. While they
    still sample, finished responses reach the first process through the group's store.
    """

    def __init__(self, judge: JudgeReward, ranks: Ranks, mailbox: Mailbox | None = None) -> None:
        self.judge = judge
        self._ranks = ranks
        self._mailbox = mailbox or Mailbox(f"klippo/judge/{next(_numbers)}")
        self._reading: asyncio.Task[None] | None = None

    def among(self, ranks: Ranks) -> RewardSource:
        """The same judge for other processes."""
        if ranks.world_size == 1:
            return self.judge
        return SharedJudge(self.judge, ranks, self._mailbox)

    async def begin(self, prompt: Prompt, response: str) -> None:
        """Have the judge asked about a finished response now."""
        material = self.judge.material(prompt, response)
        if not self._ranks.is_main:
            self._mailbox.post(material)
            return
        self.judge.begin_with(material)
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read())

    def score(self, rollout: Rollout) -> Scores | Awaitable[Scores]:
        """What `JudgeReward.score` gives for this process's responses."""
        return score_started(self.start(rollout))

    def start(self, rollout: Rollout) -> Started:
        """Exchange the texts; the scores are exchanged when the judge has answered."""
        materials = self._ranks.gather_or_fail(self.judge.materials(rollout))
        first = sum(len(one) for one in materials[: self._ranks.rank])
        device = rollout.tokens.response_ids.device

        async def ask() -> list[Judgement]:
            self._begin_posted()
            return await self.judge.judge_all([one for some in materials for one in some])

        def finish(results: Iterator[object]) -> Scores:
            judgements = next(results) if self._ranks.is_main else None
            everyones = self._ranks.gather_or_fail(judgements)[0]
            assert isinstance(everyones, list)
            return self.judge.scores(everyones[first : first + len(rollout)], device)

        return [ask()] if self._ranks.is_main else [], finish

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ConfigError when the reference's column is not among these."""
        self.judge.check_columns(columns)

    async def close(self) -> None:
        """End what is in flight."""
        if self._reading is not None:
            self._reading.cancel()
        await self.judge.close()

    def state_dict(self) -> Mapping[str, object]:
        return self.judge.state_dict()

    def load_state_dict(self, state: Mapping[str, Mapping[str, object]]) -> None:
        self.judge.load_state_dict(state)

    async def _read(self) -> None:
        while True:
            self._begin_posted()
            await asyncio.sleep(READ_EVERY_S)

    def _begin_posted(self) -> None:
        for material in self._mailbox.read():
            self.judge.begin_with(material)


class Mailbox:
    """Responses on their way from other processes to the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._num_read = 0

    def post(self, material: Material) -> None:
        """Send one."""
        store = _get_default_store()
        number = store.add(f"{self._name}/number", 1)
        store.set(f"{self._name}/{number}", json.dumps(astuple(material)))

    def read(self) -> list[Material]:
        """Take out what has come since."""
        store = _get_default_store()
        materials = []
        while store.check([key := f"{self._name}/{self._num_read + 1}"]):
            prompt, response, reference = json.loads(store.get(key))
            materials.append(Material(prompt=prompt, response=response, reference=reference))
            store.delete_key(key)
            self._num_read += 1
        return materials


def shared(source: RewardSource, ranks: Ranks) -> RewardSource:
    """The source, its judges asked by the first process alone."""
    if ranks.world_size == 1:
        return source
    if isinstance(source, JudgeReward):
        return SharedJudge(source, ranks)
    if isinstance(source, SumReward):
        return source.with_sources(lambda one: shared(one, ranks))
    return source


def yardstick(source: RewardSource, ranks: Ranks) -> RewardSource:
    """The source as the processes that evaluate use it: a text always gets the same score.

    Running moments would move the scale while the policy trains, so normalised terms are
    standardised by the moments of the first batch that the yardstick sees.
    """
    if isinstance(source, SharedJudge):
        return source.among(ranks)
    if isinstance(source, SumReward):
        fixed = source.with_sources(lambda one: yardstick(one, ranks))
        return SumReward(fixed.parts, ranks.all_sum_or_fail, measures_once=True)
    return source


def judge_metrics(source: RewardSource) -> Metrics:
    """The metrics of a judge, or of the judges in a sum, which have their term's name in theirs.

    Call it once per step: shares are those since the last call.
    """
    if isinstance(source, SharedJudge):
        source = source.judge
    if isinstance(source, JudgeReward):
        return source.metrics()
    if not isinstance(source, SumReward):
        return {}
    return {
        f"judge/{name}/{key.removeprefix('judge/')}": value
        for name, term in source.parts.items()
        for key, value in judge_metrics(term.source).items()
    }
