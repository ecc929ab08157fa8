"""Running statistics of scores."""

import statistics

import pytest
import torch

from klippo.tensors.estimators import RunningMoments
from tests.tolerance import FLOAT64_APPROX
from tests.toys import over_two_ranks

STREAM = [[3.0, -1.0, 4.0], [], [1.5], [-5.0, 9.0, 2.0, 6.0]]


def fed(batches):
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch))
    return moments


def test_running_moments_equal_those_of_the_whole_stream():
    moments, everything = fed(STREAM), [x for batch in STREAM for x in batch]
    assert moments.mean == pytest.approx(statistics.mean(everything))
    assert moments.sd == pytest.approx(statistics.stdev(everything))
    standard = moments.standardize(torch.tensor(everything, dtype=torch.float64))
    assert float(standard.mean()) == pytest.approx(0, **FLOAT64_APPROX)
    assert float(standard.std()) == pytest.approx(1)


@pytest.mark.parametrize("batches", [[], [[2.0]], [[2.0, 2.0], [2.0]]])
def test_the_spread_is_one_until_there_is_any(batches):
    assert fed(batches).sd == 1.0


def test_moments_over_two_processes_equal_those_of_one():
    def of(rank_batches, all_sum):
        moments = RunningMoments()
        for batch in rank_batches:
            moments.update(torch.tensor(batch), all_sum)
        return moments.mean, moments.sd

    whole = fed(STREAM)
    ranks = over_two_ranks(of, [[[3.0], [], [1.5], [-5.0, 9.0]], [[-1.0, 4.0], [], [], [2.0, 6.0]]])
    for mean, sd in ranks:
        assert (mean, sd) == pytest.approx((whole.mean, whole.sd))


def test_moments_continue_where_they_were_saved():
    resumed = RunningMoments()
    resumed.load_state_dict(fed(STREAM[:2]).state_dict())
    for batch in STREAM[2:]:
        resumed.update(torch.tensor(batch))
    assert (resumed.mean, resumed.sd) == (fed(STREAM).mean, fed(STREAM).sd)
