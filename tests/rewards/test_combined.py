"""A sum weights, standardises and logs its parts, and waits for slow ones together."""

import asyncio
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klippo.errors import ConfigError, RewardError
from klippo.ranks import Ranks
from klippo.rewards.combined import Part, SumReward
from klippo.rewards.function import FunctionReward
from klippo.rewards.judged import yardstick
from klippo.rewards.resolve import resolve_scores
from klippo.types import Scores
from tests.tolerance import float32

from .conftest import make_rollout

NAN = float("nan")


class Given:
    """Scores handed in beforehand, batch after batch."""

    def __init__(self, *batches):
        self._batches = list(batches)

    def score(self, rollout):
        return Scores(reward=torch.tensor(self._batches.pop(0)))


def rollout_of(size):
    return make_rollout(["x"] * size)


def score(source, size=2):
    return resolve_scores(source, rollout_of(size))


def test_a_sum_weights_its_parts_and_logs_them_raw():
    source = SumReward(
        {
            "a": Part(source=Given([1.0, 2.0]), weight=2.0),
            "b": Part(source=Given([3.0, 5.0]), weight=-1),
        }
    )
    scores = score(source)
    assert scores.reward.tolist() == [-1.0, -1.0]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "a": [1.0, 2.0],
        "b": [3.0, 5.0],
    }


def test_parts_of_parts_are_logged_under_both_names():
    inner = SumReward({"x": Part(source=Given([1.0, 2.0])), "y": Part(source=Given([1.0, 1.0]))})
    scores = score(SumReward({"outer": Part(source=inner, weight=10)}))
    assert scores.reward.tolist() == [20.0, 30.0]
    assert list(scores.parts) == ["outer", "outer/x", "outer/y"]


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_response_that_a_part_could_not_score_has_no_sum(weight):
    source = SumReward(
        {"a": Part(source=Given([1.0, NAN]), weight=weight), "b": Part(source=Given([1.0, 1.0]))}
    )
    scores = score(source)
    assert scores.reward.isnan().tolist() == [False, True]
    assert not scores.parts["b"].isnan().any()


finite_or_nan = st.just(NAN) | st.floats(-100, 100, width=32)


@given(st.lists(st.lists(finite_or_nan, min_size=3, max_size=3), min_size=1, max_size=5))
def test_normalised_parts_follow_the_moments_of_everything_seen_so_far(batches):
    source = SumReward({"a": Part(source=Given(*batches), weight=2.0, normalize=True)})
    seen = []
    for batch in batches:
        scores = score(source, 3)
        seen += [x for x in batch if not np.isnan(x)]
        mean = np.mean(seen) if seen else 0.0
        sd = np.std(seen, ddof=1) if len(seen) > 1 and np.ptp(seen) > 0 else 1.0
        expected = 2 * (np.array(batch) - mean) / sd
        np.testing.assert_allclose(scores.reward.numpy(), expected, **float32(4))
        np.testing.assert_array_equal(scores.parts["a"].numpy(), np.array(batch, np.float32))


def test_running_moments_survive_a_resume():
    first, second, third = [1.0, 5.0], [2.0, 9.0], [4.0, 4.5]

    def build(*batches):
        inner = SumReward({"x": Part(source=Given(*batches), normalize=True)})
        return SumReward({"outer": Part(source=inner, normalize=True)})

    whole = build(first, second, third)
    score(whole)
    score(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = build(third)
    resumed.load_state_dict(state)
    assert score(resumed).reward.equal(score(whole).reward)


def test_a_yardstick_keeps_the_scale_of_its_first_batch_and_leaves_training_alone():
    inner = SumReward(
        {"x": Part(source=Given([1.0, 5.0], [1.0, 5.0], [50.0, 60.0]), normalize=True)}
    )
    source = SumReward({"outer": Part(source=inner)})
    score(source)
    before = source.state_dict()
    fixed = yardstick(source, Ranks())
    score(fixed)
    reward = score(fixed).reward
    assert source.state_dict() == before
    torch.testing.assert_close(reward, (torch.tensor([50.0, 60.0]) - 3) / 8**0.5, **float32(4))
    plain = Given()
    assert yardstick(plain, Ranks()) is plain


def test_columns_that_a_part_needs_are_checked_before_the_run():
    inner = SumReward({"x": Part(source=FunctionReward(lambda answer: answer))})
    source = SumReward({"a": Part(source=Given()), "outer": Part(source=inner)})
    source.check_columns(["answer"])
    with pytest.raises(ConfigError, match="needs the argument 'answer'"):
        source.check_columns(["prompt"])


def test_moments_are_taken_over_all_processes():
    source = SumReward(
        {"a": Part(source=Given([1.0, 2.0]), normalize=True)}, all_sum=lambda x: 3 * x
    )
    score(source)
    assert source.state_dict()["moments"]["a"]["count"] == 6


class Meeting:
    """Async functions that finish only once all of them have begun."""

    def __init__(self, size):
        self._missing = size
        self._complete = None

    def reward(self, values):
        async def attend(responses):
            self._complete = self._complete or asyncio.Event()
            self._missing -= 1
            if self._missing == 0:
                self._complete.set()
            await asyncio.wait_for(self._complete.wait(), timeout=5)
            return values

        return FunctionReward(attend)


def test_async_parts_run_at_the_same_time_beside_sync_ones():
    meeting = Meeting(2)
    source = SumReward(
        {
            "slow": Part(source=meeting.reward([1.0, 2.0])),
            "quick": Part(source=Given([10.0, 10.0])),
            "inner": Part(source=SumReward({"slow": Part(source=meeting.reward([100.0, None]))})),
        }
    )
    scores = score(source)
    assert scores.reward.tolist()[0] == 111.0
    assert scores.reward.isnan().tolist() == [False, True]
    assert list(scores.parts) == ["slow", "quick", "inner", "inner/slow"]


def test_an_async_part_that_fails_ends_the_others():
    ended = []

    async def fails(responses):
        await asyncio.sleep(0)
        raise ValueError("no")

    async def waits(responses):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(True)
            raise

    source = SumReward(
        {"a": Part(source=FunctionReward(waits)), "b": Part(source=FunctionReward(fails))}
    )
    with pytest.raises(RewardError, match="fails raised ValueError: no"):
        score(source)
    assert ended == [True]


def test_a_sync_part_that_fails_leaves_no_coroutine_behind():
    async def never(responses):
        return [1.0, 1.0]

    def fails(responses):
        raise ValueError("no")

    source = SumReward(
        {"a": Part(source=FunctionReward(never)), "b": Part(source=FunctionReward(fails))}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RewardError, match="fails raised"):
            score(source)
