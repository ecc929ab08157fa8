"""Responses are judged while others are still being sampled."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from klippo import PPOTrainer
from klippo.errors import BudgetError
from klippo.judge.messages import Answer, Request
from klippo.judge.reward import JudgeReward
from klippo.ranks import Ranks
from klippo.rewards import judged
from klippo.rewards.combined import Part, SumReward
from klippo.rewards.judged import judge_metrics
from klippo.rewards.resolve import begin_with, close_source, resolve_scores
from klippo.rewards.simple import LengthPenalty
from klippo.types import Rollout
from tests.judge.fakes import FakeJudge, settings
from tests.judge.servers import api, serving
from tests.toys import make_rollout

RESPONSES = ["first", "second", "third", "second"]


def rollout() -> Rollout:
    made = make_rollout([([5, 6], [7])] * len(RESPONSES))
    made.responses[:] = RESPONSES
    return made


class SlowJudge(FakeJudge):
    """Takes its time; knows how many questions were open at once."""

    def __init__(self, delay_s: float, error: Exception | None = None) -> None:
        super().__init__(lambda response: min(len(response), 10))
        self.delay_s = delay_s
        self.error = error
        self.num_open = self.most_open = self.num_ended = 0

    async def ask(self, request: Request) -> Answer:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await asyncio.sleep(self.delay_s)
            if self.error is not None:
                raise self.error
            return await super().ask(request)
        finally:
            self.num_open -= 1
            self.num_ended += 1


def begun(source: JudgeReward | SumReward, batch: Rollout) -> None:
    begin = begin_with(source)
    assert begin is not None
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        begin(prompt, response)


def test_what_was_begun_is_not_asked_again_and_scores_are_the_same() -> None:
    judge, batch = SlowJudge(0.0), rollout()
    source = JudgeReward(settings(score_source="json"), judge)
    begun(source, batch)
    scores = resolve_scores(source, batch)
    alone = resolve_scores(JudgeReward(settings(score_source="json"), SlowJudge(0.0)), batch)
    assert scores.reward.tolist() == alone.reward.tolist()
    assert [judge.count(one) for one in ("first", "third")] == [1, 1]
    resolve_scores(source, batch)  # a later rollout is scored anew (from the cache, in a run)
    assert judge.count("first") == 2


@pytest.mark.timed
def test_answers_come_in_while_the_caller_is_busy() -> None:
    judge, batch = SlowJudge(0.3), rollout()
    source = JudgeReward(settings(score_source="json"), judge)
    begun(source, batch)
    time.sleep(0.9)  # sampling goes on
    start = time.perf_counter()
    resolve_scores(source, batch)
    assert time.perf_counter() - start < 0.2
    assert judge.most_open == 3  # the response that is there twice is asked about once


def test_the_judge_in_a_sum_is_told_and_a_sum_without_a_judge_is_not() -> None:
    judge, batch = SlowJudge(0.0), rollout()
    own = JudgeReward(settings(score_source="json"), judge)
    length = Part(source=LengthPenalty(max_tokens=4))
    source = SumReward({"judge": Part(source=own), "length": length})
    begun(source, batch)
    resolve_scores(source, batch)
    assert judge.count("third") == 1
    assert begin_with(SumReward({"length": length})) is None


def test_an_error_of_what_was_begun_is_raised_when_scores_are_wanted() -> None:
    judge, batch = SlowJudge(0.0), rollout()
    source = JudgeReward(settings(score_source="json"), judge)
    resolve_scores(source, batch)
    judge.error = BudgetError("no money left")
    begun(source, batch)
    with pytest.raises(BudgetError, match="no money left"):
        resolve_scores(source, batch)


def test_closing_ends_what_was_begun_and_never_wanted() -> None:
    judge, batch = SlowJudge(30.0), rollout()
    source = JudgeReward(settings(score_source="json"), judge)
    source._is_open, source.judge.source = True, "json"
    begun(source, batch)
    while judge.num_open < 3:
        time.sleep(0.01)
    start = time.perf_counter()
    close_source(source)
    assert time.perf_counter() - start < 5
    assert judge.num_ended == judge.most_open == 3


def config(server: Any, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "policy": {"model": "demo:policy"},
        "data": {"train": "demo:prompts"},
        "rollout": {"response_length": [4, 24]},
        "reward": {"kind": "judge", "api": api(server), "probes": False},
        "ppo": {"num_steps": 3, "batch_size": 16, "num_epochs": 1},
        "evaluation": {"num_prompts": 8, "num_shown": 2},
    } | more


def test_a_run_asks_while_it_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(delay_s=0.01) as server:
        trainer = PPOTrainer(config(server, tmp_path / "run"), quiet=True)
        session = trainer.session
        hits = server.hits
        batch = session.source.next()
        time.sleep(1.0)  # sampled, and not yet scored
        assert server.hits - hits >= len(set(batch.responses))
        hits = server.hits
        session.score(batch)
        assert server.hits == hits
        rollout = trainer.generate(["The film"] * 4)  # scored by whoever asked for it
        time.sleep(0.3)
        assert len(rollout) == 4
        assert server.hits == hits


@pytest.mark.timed
def test_a_process_that_waits_holds_up_the_other_by_no_more_than_its_slowest_answer(
    tmp_path: Path,
) -> None:
    """The first asks about both processes' responses at once, so a step takes 1 s and not 2."""
    with serving(delay_s=1.0) as server:
        given = config(server, tmp_path / "run", device="cpu")
        given["evaluation"] = {"num_prompts": 0}
        (tmp_path / "run.yaml").write_text(json.dumps(given))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        ended = subprocess.run(
            [sys.executable, *launcher, "-m", "klippo", "train", "run.yaml"],
            cwd=tmp_path,
            env={"OMP_NUM_THREADS": "1"} | os.environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == 3
    assert all(step["time/step_s"] > 1.0 for step in steps[:1])
    assert min(step["time/step_s"] for step in steps) < 1.9
    # A sample to begin with, and 16 responses a step, of which each process sampled 8.
    assert steps[-1]["judge/num_calls"] == server.hits


class Pair(Ranks):
    """Two processes of a run as two threads of this one."""

    meeting = threading.Barrier(2)
    items: ClassVar[dict[int, Any]] = {}

    def gather_or_fail(self, item: Any, error: Any = None) -> list[Any]:
        self.items[self.rank] = item
        self.meeting.wait(10)
        found = [self.items[0], self.items[1]]
        self.meeting.wait(10)
        return found

    def all_sum_or_fail(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.gather_or_fail(x), torch.zeros_like(x))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import HashStore

    group_store = HashStore()
    monkeypatch.setattr(judged, "_get_default_store", lambda: group_store)


def in_both(work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


@pytest.mark.usefixtures("store")
def test_the_first_process_asks_about_the_responses_of_all() -> None:
    """Two judges in a sum, the first the slower: what processes exchange keeps its order."""
    quick, slow = SlowJudge(0.0), SlowJudge(0.2)

    def source(rank: int, ranks: Ranks) -> Any:
        own = settings(score_source="json")
        backends = (slow, quick) if rank == 0 else (judged.Nobody(), judged.Nobody())
        parts = {
            name: Part(source=JudgeReward(own, backend), normalize=name == "slow")
            for name, backend in zip(("slow", "quick"), backends, strict=True)
        }
        inner = SumReward({"quick": parts["quick"]}, ranks.all_sum_or_fail)
        return SumReward(
            {"slow": parts["slow"], "inner": Part(source=inner, normalize=True)},
            ranks.all_sum_or_fail,
        )

    sources = [judged.shared(source(rank, Pair(rank, 2)), Pair(rank, 2)) for rank in range(2)]
    batches = [rollout(), rollout()]
    batches[1].responses[:] = ["a", "bb", "ccc", "first"]
    scores = in_both(lambda rank: resolve_scores(sources[rank], batches[rank]))
    for batch, score in zip(batches, scores, strict=True):
        expected = [min(len(response), 10) / 5 - 1 for response in batch.responses]
        assert score.parts["slow"].tolist() == pytest.approx(expected)
        assert score.parts["inner/quick"].tolist() == pytest.approx(expected)
    everything = torch.cat([score.parts["slow"] for score in scores])
    standardized = (everything - everything.mean()) / everything.std()
    total = torch.cat([score.reward for score in scores])
    torch.testing.assert_close(total, 2 * standardized)
    assert [judge_metrics(one)["judge/slow/num_calls"] > 0 for one in sources] == [True, False]


@pytest.mark.usefixtures("store")
def test_the_first_process_begins_with_what_the_other_has_finished() -> None:
    judge = SlowJudge(0.0)
    backends = (judge, judged.Nobody())
    number = judged._numbers
    sources = []
    for rank in range(2):
        judged._numbers = itertools.count(1000)  # as in two processes
        given = JudgeReward(settings(score_source="json"), backends[rank])
        sources.append(judged.shared(given, Pair(rank, 2)))
    judged._numbers = number
    batches = [rollout(), rollout()]
    batches[1].responses[:] = ["a", "bb", "ccc", "dddd"]
    for source, batch in zip(sources, batches, strict=True):
        begun(source, batch)
    while judge.count("dddd") == 0:
        time.sleep(0.01)
    scores = in_both(lambda rank: resolve_scores(sources[rank], batches[rank]))
    assert scores[1].reward.tolist() == pytest.approx([-0.8, -0.6, -0.4, -0.2])
    assert [judge.count(one) for one in ("first", "a", "dddd")] == [1, 1, 1]
    close_source(sources[0])
