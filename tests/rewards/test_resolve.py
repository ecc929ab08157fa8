"""Any source can be scored from plain code, and what does not fit the rollout is refused."""

import asyncio

import pytest
import torch

from klippo.errors import RewardError
from klippo.rewards.function import FunctionReward
from klippo.rewards.resolve import resolve_scores
from klippo.types import Scores

from .conftest import make_rollout

ROLLOUT = make_rollout(["a", "b"])


class Fixed:
    def __init__(self, result):
        self._result = result

    def score(self, rollout):
        return self._result


async def judge(responses):
    await asyncio.sleep(0)
    return [1.0, 2.0]


def test_an_async_source_is_scored_inside_a_running_event_loop():
    async def notebook_cell():
        return resolve_scores(FunctionReward(judge), ROLLOUT)

    assert asyncio.run(notebook_cell()).reward.tolist() == [1.0, 2.0]


def test_an_async_source_keeps_its_event_loop_and_builds_no_graph():
    seen = []

    async def looks(responses):
        seen.append((asyncio.get_running_loop(), torch.is_grad_enabled()))
        return [1.0, 2.0]

    for _ in range(2):
        resolve_scores(FunctionReward(looks), ROLLOUT)
    assert seen[0] == seen[1]
    assert seen[0][1] is False


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Scores(reward=torch.zeros(3)), r"shape \(3,\); float32 of shape \(2,\) is needed"),
        (Scores(reward=torch.zeros(2, 1)), r"shape \(2, 1\)"),
        (Scores(reward=torch.zeros(2, dtype=torch.long)), "torch.int64 rewards"),
        ([1.0, 2.0], "Fixed.score returned list, not Scores"),
    ],
)
def test_scores_that_do_not_fit_are_refused(result, message):
    with pytest.raises(RewardError, match=message):
        resolve_scores(Fixed(result), ROLLOUT)
