"""The verdict on runs whose truth is known."""

import numpy as np
import pytest

from klippo.evaluation.history import History, history
from klippo.evaluation.verdict import judge

STEPS = [0, 5, 10, 15, 20, 25, 30, 40]


def run(rng, gold_curve, proxy_curve, *, num_prompts=128, same=False):
    """A run whose gold and proxy follow curves; prompts differ, every sample has its own noise."""
    shape = (len(STEPS), num_prompts)
    gold = np.array(gold_curve)[:, None] + rng.normal(size=num_prompts) + rng.normal(size=shape)
    proxy = np.array(proxy_curve)[:, None] + rng.normal(size=num_prompts) + rng.normal(size=shape)
    return History(
        steps=STEPS,
        prompt_ids=list(range(num_prompts)),
        proxy=gold.copy() if same else proxy,
        kl=np.arange(len(STEPS))[:, None] * np.ones(shape),
        gold=gold,
    )


RISING = np.linspace(0, 2, 8)
FLAT = np.zeros(8)
FALLING = np.array([0, 0.4, 0.7, 0.8, 0.6, 0.3, 0.0, -0.4])


def share(outcome, curves, number=200, **options):
    found = [
        judge(run(np.random.default_rng(i), *curves, **options)).outcome for i in range(number)
    ]
    return found.count(outcome) / number


@pytest.mark.parametrize("curve", [RISING, FLAT, FALLING])
def test_false_alarms_where_gold_equals_proxy_are_at_most_5_percent(curve):
    assert share("over-optimised", (curve, curve), same=True) <= 0.05


def test_false_alarms_where_gold_never_falls_are_at_most_5_percent():
    """Gold is flat or saturates, proxy rises: a peak by chance must not raise an alarm."""
    saturating = np.minimum(RISING, 0.6)
    assert share("over-optimised", (FLAT, RISING)) <= 0.05
    assert share("over-optimised", (saturating, RISING)) <= 0.05


def test_power_on_a_fall_of_one_standard_deviation():
    assert share("over-optimised", (FALLING, RISING)) >= 0.95


def test_a_better_policy_is_called_improved():
    assert share("improved", (RISING, RISING), number=50) >= 0.98


def test_gold_that_falls_without_the_proxy_is_worse_and_not_over_optimised():
    assert share("worse", (-RISING, FLAT), number=50) >= 0.9


def test_no_change_on_many_prompts_is_unchanged():
    assert share("unchanged", (FLAT, FLAT), number=50, num_prompts=2000) >= 0.9


def test_no_change_on_few_prompts_is_not_enough_data():
    assert share("not enough data", (FLAT, FLAT), number=50, num_prompts=20) >= 0.8


def test_less_than_two_evaluations_or_few_prompts_or_no_gold_are_not_enough_data():
    rng = np.random.default_rng(0)
    few = judge(run(rng, FLAT, FLAT, num_prompts=8))
    assert few.outcome == "not enough data"
    assert "8 prompts" in few.reason
    whole = run(rng, FLAT, FLAT)
    one = History(
        steps=[0], prompt_ids=whole.prompt_ids, proxy=whole.proxy[:1], kl=whole.kl[:1],
        gold=whole.gold[:1],
    )  # fmt: skip
    assert "one evaluation" in judge(one).reason
    blind = History(
        steps=STEPS, prompt_ids=whole.prompt_ids, proxy=whole.proxy, kl=whole.kl, gold=None
    )
    assert "klippo gold-eval" in judge(blind).reason


def test_prompts_with_a_missing_score_are_left_out():
    whole = run(np.random.default_rng(0), RISING, RISING, num_prompts=40)
    whole.gold[3, :10] = np.nan
    assert judge(whole).gold_change.num == 30


def test_a_history_holds_the_prompts_that_every_step_has():
    def row(prompt, value):
        return {"prompt_id": prompt, "proxy": value, "kl_exact_nats": 0.0, "gold": None}

    found = history({0: [row(1, 1.0), row(2, 2.0)], 5: [row(2, 3.0), row(3, 4.0)]})
    assert (found.steps, found.prompt_ids) == ([0, 5], [2])
    assert found.proxy.tolist() == [[2.0], [3.0]]
    assert found.gold is None
