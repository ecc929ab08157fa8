"""`klippo train` from end to end on small local models."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from klippo.runs.folder import read_rows
from tests.tolerance import FLOAT64_APPROX


@pytest.mark.usefixtures("in_float64")
def test_a_run_leaves_a_complete_folder(cli, write_config, tmp_path: Path) -> None:
    code, out, err = cli("train", write_config())
    assert code == 0, err
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "MODEL_CARD.md",
        "before_after.md",
        "config.yaml",
        "critic",
        "eval",
        "metrics.jsonl",
        "model",
        "report",
        "report.html",
        "run_status.json",
        "started.json",
    ]
    metrics = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert all(row["update/num_optimizer_steps"] == 4 for row in metrics)
    assert metrics[0]["kl/sequence_nats"] == pytest.approx(0, **FLOAT64_APPROX)
    assert metrics[0]["policy/first_ratio_mean"] == pytest.approx(1, **FLOAT64_APPROX)
    assert json.loads((run / "run_status.json").read_text())["state"] == "done"
    assert "step 3/3" in out
    assert "Before and after, 8 fixed prompts" in out


@pytest.mark.usefixtures("in_float64")
def test_evaluation_rows_hold_what_the_laboratory_needs(cli, write_config, tmp_path: Path) -> None:
    assert cli("train", write_config())[0] == 0
    before = read_rows(tmp_path / "run/eval/step-0.jsonl")
    after = read_rows(tmp_path / "run/eval/step-3.jsonl")
    assert [row["prompt_id"] for row in before] == [row["prompt_id"] for row in after]
    assert after[0].keys() >= {
        "step",
        "episodes",
        "prompt_id",
        "prompt",
        "response",
        "response_ids",
        "length",
        "finished",
        "proxy",
        "kl_k1_nats",
        "kl_exact_nats",
    }
    assert after[0]["episodes"] == 48
    assert all(row["kl_exact_nats"] == pytest.approx(0, **FLOAT64_APPROX) for row in before)
    assert sum(row["kl_exact_nats"] for row in after) > 0


def test_the_saved_model_loads_with_from_pretrained_and_is_the_trained_one(
    cli, write_config, tmp_path: Path, gpt2: Path
) -> None:
    assert cli("train", write_config())[0] == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    start = AutoModelForCausalLM.from_pretrained(gpt2)
    assert AutoTokenizer.from_pretrained(tmp_path / "run/model").pad_token is None
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    head = load_file(tmp_path / "run/critic/value_head.safetensors")
    assert head["weight"].shape == (1, 32)
    assert head["weight"].abs().sum() > 0


@pytest.mark.usefixtures("in_float64")
def test_a_lora_run_saves_an_adapter_that_peft_loads_and_a_run_can_start_from(
    cli, write_config, tmp_path: Path, gpt2: Path
) -> None:
    first = write_config(policy={"model": str(gpt2), "tuning": "lora"}, critic={"kind": "lora"})
    assert cli("train", first)[0] == 0
    adapter = tmp_path / "run/model"
    assert (adapter / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run/critic/critic/adapter_model.safetensors").is_file()
    AutoPeftModelForCausalLM.from_pretrained(adapter)
    second = write_config(
        output_dir=str(tmp_path / "second"),
        policy={"model": str(gpt2), "tuning": "lora", "adapter": str(adapter)},
    )
    assert cli("train", second)[0] == 0
    assert read_rows(tmp_path / "second/metrics.jsonl")[0]["kl/sequence_nats"] == pytest.approx(
        0, **FLOAT64_APPROX
    )


def test_the_reward_rises_on_an_easy_task(cli, write_config, tmp_path: Path) -> None:
    config = write_config(
        ppo={"num_steps": 15, "batch_size": 32, "num_epochs": 4},
        evaluation={"num_prompts": 16},
        kl={"coef": 0.01},
    )
    assert cli("train", config)[0] == 0
    figures = json.loads((tmp_path / "run/run_status.json").read_text())["before_after"]["proxy"]
    assert figures["low"] > 0, "the 95% interval of the paired difference lies above zero"


def test_the_same_seed_gives_the_same_run(cli, write_config, tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        assert cli("train", write_config(output_dir=str(tmp_path / name)))[0] == 0
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        runs.append(
            [
                {
                    k: v
                    for k, v in row.items()
                    if k.split("/")[0] not in ("time", "memory", "throughput")
                }
                for row in rows
            ]
        )
    assert runs[0] == runs[1]


def test_gold_scores_the_samples_after_training_and_never_trains(
    cli, write_config, tmp_path: Path, roberta: Path
) -> None:
    gold = {"kind": "classifier", "model": str(roberta), "label": "POSITIVE"}
    code, out, _ = cli("train", write_config(gold=gold))
    assert code == 0
    rows = read_rows(tmp_path / "run/eval/step-3.jsonl")
    assert all(isinstance(row["gold"], float) for row in rows)
    assert re.search(r"gold: (rose|fell|no clear change)", out)
    assert "gold" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_parts_of_a_sum_are_logged_by_name(
    cli, write_config, tmp_path: Path, roberta: Path, reward_file: Path
) -> None:
    parts = {
        "good": {"reward": {"kind": "function", "function": f"{reward_file}:good"}},
        "mood": {
            "reward": {"kind": "classifier", "model": str(roberta), "label": "POSITIVE"},
            "weight": 0.5,
            "normalize": True,
        },
        "short": {"reward": {"kind": "length", "max_tokens": 4}, "weight": 0.1},
        "fresh": {"reward": {"kind": "repetition"}},
    }
    assert cli("train", write_config(reward={"kind": "sum", "parts": parts}))[0] == 0
    row = read_rows(tmp_path / "run/metrics.jsonl")[0]
    assert {f"reward/part/{name}" for name in parts} <= row.keys()


GPT2_IMDB_NAMES = ("policy.model", "reward.model", "data.train")


@pytest.fixture
def imdb_like(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.jsonl"
    text = "the movie was good and I liked it very very much"
    rows = [
        {"text": f"{'a film' if i % 2 else 'it'} {text} {i}", "label": i % 2} for i in range(1100)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_gpt2_imdb_recipe_runs_on_models_of_its_two_architectures(
    cli, tmp_path: Path, gpt2: Path, roberta: Path, imdb_like: Path
) -> None:
    names = dict(zip(GPT2_IMDB_NAMES, (gpt2, roberta, imdb_like), strict=True))
    code, _, err = cli(
        "train",
        "gpt2-imdb",
        *(f"{key}={value}" for key, value in names.items()),
        f"output_dir={tmp_path}/imdb",
        "ppo.num_steps=2",
    )
    assert code == 0, err
    rows = read_rows(tmp_path / "imdb/metrics.jsonl")
    assert len(rows) == 2
    assert all(row["update/num_optimizer_steps"] == 16 for row in rows)
    prompts = {row["prompt"] for row in read_rows(tmp_path / "imdb/eval/step-0.jsonl")}
    assert {len(prompt.split()) for prompt in prompts} <= set(range(2, 9))


@pytest.mark.slow
def test_the_gpt2_imdb_recipe_runs_whole_with_only_its_three_names_overridden(
    cli, tmp_path: Path, gpt2: Path, roberta: Path, imdb_like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = dict(zip(GPT2_IMDB_NAMES, (gpt2, roberta, imdb_like), strict=True))
    code, _, err = cli("train", "gpt2-imdb", *(f"{key}={value}" for key, value in names.items()))
    assert code == 0, err
    run = tmp_path / "runs/gpt2-imdb"
    assert json.loads((run / "run_status.json").read_text())["state"] == "done"
    metrics = read_rows(run / "metrics.jsonl")
    assert len(metrics) == 100
    assert all(row["update/num_optimizer_steps"] == 16 for row in metrics)
    # Whether the score rises is not claimed: the models are random and the recipe's learning rate
    # is meant for trained ones. That it learns is shown by the quickstart and by the easy task.
    after = read_rows(run / "eval/step-100.jsonl")
    assert sum(row["kl_exact_nats"] for row in after) > 0
    AutoModelForCausalLM.from_pretrained(run / "model")


def test_a_run_ends_with_a_report_that_knows_who_set_what(cli, write_config, tmp_path) -> None:
    code, out, err = cli("train", write_config(), "kl.coef=0.125")
    assert code == 0, err
    run = tmp_path / "run"
    assert f"Report: {run / 'report.html'}" in out
    assert "Verdict: not enough data. There are no gold scores" in out
    started = json.loads((run / "started.json").read_text())
    assert started["name"] == "small"
    assert started["origins"]["kl.coef"] == "command line"
    assert started["versions"].keys() >= {"python", "klippo", "torch", "transformers"}
    page = (run / "report.html").read_text()
    assert "<code>0.125</code></td><td>command line</td>" in page
    assert f"torch {started['versions']['torch']}" in page


def test_a_report_that_fails_costs_the_run_nothing(
    cli, write_config, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr("klippo.report.write.write_report", fail)
    code, out, err = cli("train", write_config())
    assert code == 0, err
    assert "There is no report: ValueError: no ink." in out
    assert json.loads((tmp_path / "run/run_status.json").read_text())["state"] == "done"
