"""What a run would do and cost, against numbers worked out by hand."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klippo.config.load import load_config
from klippo.config.schema import RunConfig
from klippo.data.rows import Data, load_rows
from klippo.errors import ConfigError
from klippo.judge.store import Spend, Store, spent_in
from klippo.train.dry_run_plan import (
    Texts,
    agree_to_cost,
    passed_caps,
    plan_run,
    texts_of,
)
from tests.judge.server import FaultServer, ok

Cli = Callable[..., tuple[int, str, str]]
TEXTS = Texts(num_train=100, mean_prompt=40, longest_prompt=80, mean_reference=40)


def judge(url: str = "http://127.0.0.1:9/v1", *, api: Any = None, **more: Any) -> dict[str, Any]:
    reach = {"provider": "local", "model": "toy", "base_url": url} | (api or {})
    return {"kind": "judge", "api": reach, "probes": False, "score_source": "line"} | more


def run_config(reward: dict[str, Any], **more: Any) -> RunConfig:
    sections = {
        "policy": {"model": "demo:policy"},
        "data": {"train": "demo:prompts"},
        "rollout": {"response_length": 10},
        "ppo": {"num_steps": 10, "batch_size": 8, "num_epochs": 3, "minibatch_size": 4},
        "evaluation": {"num_prompts": 5, "every": 4},
        "reward": reward,
    }
    return RunConfig.model_validate(sections | more)


def data_of(config: RunConfig) -> Data:
    return load_rows(config.data, config.seed)


def test_steps_and_responses_are_those_of_the_loop():
    plan = plan_run(run_config({"kind": "length", "max_tokens": 9}), TEXTS)
    assert (plan.num_steps, plan.num_training, plan.num_optimizer_steps) == (10, 80, 60)
    assert plan.num_evaluation == 4 * 5  # before, at 4 and 8, after
    assert plan.judges == []


@pytest.mark.parametrize(
    ("settings", "expected", "worst"),
    [
        ({}, 100 + 1, 6 * 101),  # 80 + 20 responses, and the first call
        ({"api": {"max_attempts": 1}}, 101, 101),
        ({"probes": True}, 106, 6 * 106),
        ({"votes": 3}, 303, 6 * 303),
        ({"criteria": {"a": {"text": "A?"}, "b": {"text": "B?"}}}, 202, 6 * 202),
        ({"mode": "pairwise", "reference_column": "best"}, 202, 6 * 202),
        # 85 rows and the sample's have a reference; at worst one is asked for with each response
        ({"mode": "difference", "reference_column": "best"}, 101 + 86, 6 * (101 + 101)),
        ({"score_source": "auto"}, 101, 6 * 103),  # three forms are tried
    ],
)
def test_calls_are_responses_times_questions(settings: Any, expected: int, worst: int):
    if "criteria" in settings or settings.get("mode") == "difference":
        settings = settings | {"rubric": "general"}
    (found,) = plan_run(run_config(judge(**settings)), TEXTS).judges
    assert (found.expected.calls, found.worst.calls) == (expected, worst)


def test_judges_in_sums_and_gold_are_counted_apart():
    parts = {"good": {"reward": judge()}, "short": {"reward": {"kind": "length", "max_tokens": 9}}}
    config = run_config({"kind": "sum", "parts": parts}, gold=judge())
    found = {one.name: one.expected.calls for one in plan_run(config, TEXTS).judges}
    assert found == {"reward.good": 101, "gold": 21}


def test_usd_at_worst_pays_every_attempt_as_the_ledger_reserves_it():
    prices = {"usd_per_million_prompt_tokens": 0, "usd_per_million_completion_tokens": 1000}
    (found,) = plan_run(run_config(judge(api=prices, max_tokens=10)), TEXTS).judges
    # Written: 10 tokens as expected; at worst 10, and five times 40 after the answer was cut.
    assert found.expected.nano_usd == 101 * 10 * 1_000_000
    assert found.worst.nano_usd == 101 * (10 + 5 * 40) * 1_000_000


def test_caps_that_would_or_could_be_passed_are_named():
    def told(cap: int) -> str:
        return " ".join(passed_caps(plan_run(run_config(judge(api={"max_calls": cap})), TEXTS)))

    assert "reward: max_calls=100 would be passed" in told(100)
    assert "reward: max_calls=101 could be passed" in told(101)
    assert told(606) == ""


def test_responses_that_measure_an_ensemble_are_counted():
    ensemble = {"kind": "ensemble", "members": ["a", "b"], "reference_size": 32}
    counts = [
        plan_run(run_config(ensemble | {"standardize": how}), TEXTS).num_measured
        for how in ("start", "stored")
    ]
    assert counts == [32, 0]


def test_what_an_earlier_run_spent_counts_against_the_caps(tmp_path: Path):
    cache = tmp_path / "judge.sqlite"
    config = run_config(
        judge(api={"cache": str(cache), "max_calls": 606}), output_dir=str(tmp_path / "run")
    )
    plan = plan_run(config, TEXTS)
    assert plan.judges[0].spent.calls == 0
    assert not cache.exists()
    store = Store(cache, config.output_dir)
    asyncio.run(store.settle(Spend(calls=-4, tokens=-50, nano_usd=-6), "key", None))
    store.close()
    found = plan_run(config, TEXTS)
    assert found.judges[0].spent == Spend(calls=4, tokens=50, nano_usd=6)
    # 606 calls at worst are within the cap, and with 4 before they are not.
    assert passed_caps(plan) == []
    assert "max_calls=606 could be passed" in passed_caps(found)[0]


def test_a_dry_run_asks_no_judge_and_leaves_nothing(
    write_config: Callable[..., Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with FaultServer() as server:
        config = write_config(reward=judge(server.url), gold=judge(server.url, api={"model": "g"}))
        before = sorted(tmp_path.rglob("*"))
        code, out, _ = cli("train", config, "--dry-run")
        assert code == 0
        assert server.hits == []
    assert sorted(tmp_path.rglob("*")) == before
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    assert "48" in lines["responses to learn from"]
    assert "16" in lines["responses for evaluation"]
    assert "65" in lines["reward (toy): calls"]
    assert "17" in lines["gold (g): calls"]
    assert "unknown" in lines["gold (g): USD"]
    assert "time, an estimate" in lines
    assert "scaled from 8 responses" in out


def test_a_real_run_stays_within_the_worst_case(
    write_config: Callable[..., Path], cli: Cli, tmp_path: Path
):
    cache = tmp_path / "judge.sqlite"
    api = {"cache": str(cache), "max_attempts": 1}
    # Without usage in its answers, each call is charged at what was reserved for it.
    with FaultServer(otherwise=ok("Score: 7", usage=None)) as server:
        file = write_config(reward=judge(server.url, api=api, probes=True))
        config = load_config(file).config
        (plan,) = plan_run(config, texts_of(config, data_of(config))).judges
        assert cli("train", file, "--quiet")[0] == 0
    spent = spent_in(cache, config.output_dir)
    assert plan.expected.calls / 2 < spent.calls <= plan.expected.calls
    assert spent.tokens <= plan.worst.tokens


DEAR = {"usd_per_million_prompt_tokens": 0, "usd_per_million_completion_tokens": 1000}


def test_a_dear_judge_needs_a_yes_where_there_is_no_terminal(
    write_config: Callable[..., Path], cli: Cli, tmp_path: Path
):
    code, _, err = cli("train", write_config(reward=judge(api=DEAR)))
    assert code == 2
    assert "--yes" in err
    assert not (tmp_path / "run").exists()


def test_a_terminal_is_asked(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    config = load_config(write_config(reward=judge(api=DEAR))).config
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    answers = iter(["y", ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(answers))
    agree_to_cost(config, data_of(config))
    with pytest.raises(ConfigError, match="not started"):
        agree_to_cost(config, data_of(config))


@pytest.mark.parametrize("api", [DEAR | {"max_usd": 5}, {}])
def test_nobody_is_asked_about_little(write_config: Callable[..., Path], api: dict[str, Any]):
    config = load_config(write_config(reward=judge(api=api))).config
    agree_to_cost(config, data_of(config))


def test_nobody_is_asked_after_a_yes(write_config: Callable[..., Path], cli: Cli, tmp_path: Path):
    api = DEAR | {"cache": str(tmp_path / "judge.sqlite"), "max_attempts": 1}
    code, _, err = cli("train", write_config(reward=judge(api=api)), "--yes")
    assert code == 4, "the judge itself was asked, and cannot be reached"
    assert "may cost" not in err


def test_a_smaller_batch_alone_runs_a_recipe_and_the_dry_run_says_so(cli: Cli):
    code, out, err = cli("train", "quickstart", "ppo.batch_size=8", "--dry-run")
    assert code == 0
    assert "minibatch_size=64 does not divide ppo.batch_size=8" in " ".join(err.split())
    steps = next(line for line in out.splitlines() if "optimizer steps" in line)
    assert "100" in steps  # 50 PPO steps of 2 epochs
