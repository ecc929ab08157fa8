"""`early_stop` in real runs."""

import json

import pytest
from transformers import AutoModelForCausalLM

from klippo.runs.folder import read_rows


@pytest.fixture
def many_prompts(tmp_path):
    path = tmp_path / "many.jsonl"
    words = ["movie", "film", "good", "bad", "great", "dull", "it"]
    rows = [{"prompt": f"{a} {b}"} for a in words for b in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stopping_early(write_config, many_prompts, early_stop, **sections):
    return write_config(
        data={"train": str(many_prompts)},
        evaluation={"num_prompts": 16, "every": 2, "num_shown": 2},
        optimizer={"learning_rate": 2e-2},
        ppo={"num_steps": 20, "batch_size": 16, "num_epochs": 2, "minibatch_size": 8},
        kl={"coef": 0.0},
        early_stop=early_stop,
        **sections,
    )


def test_a_kl_budget_ends_the_run_early_and_keeps_the_best(
    cli, write_config, many_prompts, tmp_path
):
    code, out, err = cli("train", stopping_early(write_config, many_prompts, {"max_kl": 0.5}))
    assert code == 0, err
    run = tmp_path / "run"
    status = json.loads((run / "run_status.json").read_text())
    assert status["state"] == "done"
    assert status["reason"].startswith("stopped early: KL ")
    assert status["num_steps_done"] < 20
    best = status["best_step"]
    kl = [row["kl_exact_nats"] for row in read_rows(run / f"eval/step-{best}.jsonl")]
    assert sum(kl) / len(kl) <= 0.5
    assert AutoModelForCausalLM.from_pretrained(run / "best/model") is not None
    assert "The run stops early" in out
    assert f"Best policy: step {best}," in out


def test_a_gold_sample_ends_the_run_when_the_reward_is_fooled(
    cli, write_config, many_prompts, tmp_path
):
    gold = tmp_path / "gold.py"
    gold.write_text(
        "def no_good(responses):\n    return [-float(r.split().count('good')) for r in responses]\n"
    )
    config = stopping_early(
        write_config, many_prompts, {"gold_prompts": 24},
        gold={"kind": "function", "function": f"{gold}:no_good"},
    )  # fmt: skip
    code, _, err = cli("train", config)
    assert code == 0, err
    status = json.loads((tmp_path / "run/run_status.json").read_text())
    assert "over-optimised by early stopping's 24 prompts" in status["reason"]
    assert status["num_steps_done"] < 20
    assert status["best_step"] < status["num_steps_done"]


@pytest.mark.parametrize(
    ("early_stop", "evaluation", "message"),
    [
        ({"max_kl": 1.0}, {"num_prompts": 8}, "early_stop needs evaluations on the way"),
        ({"gold_prompts": 20}, {"num_prompts": 8, "every": 2}, "needs a gold reward"),
        ({"gold_prompts": 4}, {"num_prompts": 8, "every": 2}, "fewer than 16 prompts"),
    ],
)
def test_early_stopping_that_cannot_work_is_refused(
    cli, write_config, early_stop, evaluation, message
):
    code, _, err = cli("train", write_config(early_stop=early_stop, evaluation=evaluation))
    assert code == 2
    assert message in err


def test_too_few_prompts_outside_the_evaluation_are_refused(
    cli, write_config, reward_file, tmp_path
):
    config = write_config(
        early_stop={"gold_prompts": 16},
        evaluation={"num_prompts": 8, "every": 2},
        gold={"kind": "function", "function": f"{reward_file}:good"},
    )
    code, _, err = cli("train", config)
    assert code == 2
    assert "outside the evaluation set" in err
    assert not (tmp_path / "run").exists()
