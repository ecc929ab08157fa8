"""Responses are judged while others are still being sampled."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from klippo import PPOTrainer
from klippo.errors import BudgetError
from klippo.judge.messages import Answer, Request
from klippo.judge.reward import JudgeReward
from klippo.ranks import Ranks
from klippo.rewards.combined import Part, SumReward
from klippo.rewards.judged import over_processes
from klippo.rewards.penalties import LengthPenalty
from klippo.rewards.resolve import begin_with, close_source, resolve_scores
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


class Two(Ranks):
    """The first of two processes; what the other says is given."""

    def gather(self, item: Any) -> list[Any]:
        return [item, OTHER]


OTHER = {
    "judge/num_calls": 3.0,
    "judge/unscored_share": 0.5,
    "judge/vote_sd": 0.0,
    "judge/unscored_parse": 2.0,
}


def test_metrics_are_those_of_all_processes() -> None:
    own = {
        "judge/num_calls": 4.0,
        "judge/unscored_share": 0.0,
        "judge/vote_sd": 1.0,
        "judge/cost_usd": 0.25,
        "judge/unscored_refusal": 1.0,
    }
    assert over_processes(own, Two(0, 2)) == {
        "judge/num_calls": 7.0,
        "judge/unscored_share": 0.25,
        "judge/vote_sd": 0.5,
        "judge/unscored_parse": 2.0,
        "judge/unscored_refusal": 1.0,
    }  # the cost of the other is not known, so that of both is not


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
    """Each process waits 1 s for its own answers: at once, so a step takes 1 s and not 2."""
    with serving(delay_s=1.0) as server:
        given = config(server, tmp_path / "run", device="cpu")
        given["evaluation"] = {"num_prompts": 0}
        (tmp_path / "run.yaml").write_text(json.dumps(given))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        ended = subprocess.run(
            [sys.executable, *launcher, "-m", "klippo", "train", "run.yaml"],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
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
    # Both processes' questions: a sample to begin with, and 16 responses a step.
    assert steps[-1]["judge/num_calls"] == server.hits
