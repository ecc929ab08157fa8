"""The parts of the benchmarks page about token budgets and ensembles say what their files say."""

import json
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def result_of(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


def test_token_budget():
    from sections import token_budget

    result = result_of("token_budget")
    text = token_budget.section(result)
    for arm in result["arms"].values():
        assert f"| {arm['num_micro_batches']} | {arm['padded_tokens']:,} |" in text
        assert arm["padded_tokens"] >= result["real_tokens"]
    assert f"update **{statistics.median(result['ratios']['update_cpu_s']):.2f}**" in text


def test_five_reward_models_cost_at_most_three_tenths_of_a_step():
    from sections import ensemble_step

    result = result_of("ensemble_step")
    text = ensemble_step.section(result)
    for case in result["cases"]:
        middle = statistics.median(case["ratios"])
        assert f"| {case['name']} |" in text
        assert f"**{middle:.2f}**" in text
        assert middle <= 1.3
