"""Early stopping on evaluations made by hand."""

import numpy as np
import pytest

from klippo.evaluation.early_stop import EarlyStop
from klippo.evaluation.settings import EarlyStopSettings


def rows(*, kl=1.0, gold=None, proxy=0.0, num=40, seed=0):
    noise = np.random.default_rng(seed).normal(size=num)
    return [
        {
            "prompt_id": i,
            "kl_exact_nats": kl,
            "proxy": proxy + 0.1 * noise[i],
            "gold": None if gold is None else gold + 0.1 * noise[-1 - i],
        }
        for i in range(num)
    ]


def test_a_kl_budget_ends_the_run_and_keeps_the_last_policy_within_it():
    early_stop = EarlyStop(EarlyStopSettings(max_kl=5.0))
    first, second, third = (
        early_stop.look(s, rows(kl=kl)) for s, kl in ((0, 0.0), (4, 4.9), (8, 5.1))
    )
    assert (first.is_best, second.is_best, third.is_best) == (True, True, False)
    assert first.stop is None
    assert second.stop is None
    assert third.stop == "KL 5.10 nats at step 8 exceeds early_stop.max_kl=5"
    assert early_stop.best_step == 4


def test_gold_that_falls_twice_while_the_proxy_rises_ends_the_run():
    early_stop = EarlyStop(EarlyStopSettings(gold_prompts=40))
    stops = []
    for step, (gold, proxy) in enumerate([(0, 0), (1, 1), (2, 2), (1, 3), (0.5, 4)]):
        decision = early_stop.look(step, rows(), rows(gold=gold, proxy=proxy, seed=step))
        stops.append(decision.stop)
    assert stops[:4] == [None] * 4
    assert "over-optimised by early stopping's 40 prompts" in stops[4]
    assert early_stop.best_step == 2


def test_one_alarm_that_passes_does_not_end_the_run():
    early_stop = EarlyStop(EarlyStopSettings(gold_prompts=40))
    for step, (gold, proxy) in enumerate([(0, 0), (2, 1), (1, 2), (3, 3), (2.5, 4)]):
        decision = early_stop.look(step, rows(), rows(gold=gold, proxy=proxy, seed=step))
        assert decision.stop is None
    assert early_stop.best_step == 3


def test_gold_beyond_the_budget_is_not_the_best():
    early_stop = EarlyStop(EarlyStopSettings(max_kl=5.0, gold_prompts=40))
    early_stop.look(0, rows(kl=0.0), rows(gold=0.0))
    decision = early_stop.look(4, rows(kl=9.0), rows(gold=9.0))
    assert not decision.is_best
    assert decision.stop is not None
    assert early_stop.best_step == 0


@pytest.mark.parametrize("number", range(3))
def test_false_alarms_on_runs_that_only_improve_are_rare(number):
    """100 runs of 12 looks each: gold and proxy rise together, every look has fresh noise."""
    alarms = 0
    for run in range(100):
        early_stop = EarlyStop(EarlyStopSettings(gold_prompts=32))
        rng = np.random.default_rng([number, run])
        prompt = rng.normal(size=32)
        for step in range(12):
            level = min(step, 6) / 6
            made = [
                {
                    "prompt_id": i,
                    "kl_exact_nats": 1.0,
                    "proxy": level + step / 12 + rng.normal(),
                    "gold": level + prompt[i] + rng.normal(),
                }
                for i in range(32)
            ]
            if early_stop.look(step, made, made).stop is not None:
                alarms += 1
                break
    assert alarms <= 5
