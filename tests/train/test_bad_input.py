"""Bad input: one clear error, a documented exit code, nothing lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from klippo.runs.folder import read_rows


def test_every_config_problem_is_listed_at_once_with_its_line(cli, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "policy:\n  model: m\ndata:\n  train: p.jsonl\n"
        "reward:\n  kind: function\n  function: r.py:f\n"
        "ppo:\n  clip_rnge: 0.2\n  num_epochs: many\n  batch_size: 16\n  minibatch_size: 6\n"
    )
    code, _, err = cli("train", path)
    assert code == 2
    assert f"{path}:9" in err
    assert "clip_range" in err
    assert f"{path}:10" in err
    assert "many" in err


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"ppo": {"batch_size": 13, "minibatch_size": 6}},
            "minibatch_size=6 must divide batch_size=13, or lie near a divisor; try 1 or 13",
        ),
        (
            {"ppo": {"micro_batch_size": 2, "micro_batch_tokens": 99}},
            "micro_batch_size=2 and micro_batch_tokens=99 cannot both hold; set one to null",
        ),
        ({"rollout": {"response_length": 8, "top_k": 50}}, "untruncated policy"),
        ({"rollout": {"response_length": 64}}, "leaves no room for a prompt"),
        ({"rollout": {"response_length": [9, 3]}}, "[9, 3]"),
        ({"critic": {"kind": "lora"}}, "policy.tuning=lora"),
        ({"ppo": {"importance_cap": 2.0}}, "set rollout.record_logprobs=true"),
        ({"ppo": {"max_logprob_mismatch": 0.1}}, "set rollout.record_logprobs=true"),
        (
            {
                "policy": {"model": "m", "tuning": "lora", "quantize_4bit": True},
                "critic": {"kind": "separate"},
            },
            "name a critic.model",
        ),
        (
            {"policy": {"model": "demo:policy", "tuning": "lora", "lora": {"target_modules": []}}},
            "policy.lora.target_modules=[] cannot be found in the model",
        ),
        (
            {"policy": {"model": "demo:policy", "tuning": "lora", "lora": {"target_modules": "("}}},
            "policy.lora.target_modules=( cannot be found in the model",
        ),
        (
            {
                "policy": {"model": "demo:policy", "tuning": "lora"},
                "critic": {"kind": "lora", "lora": {"target_modules": ["nowhere"]}},
            },
            "critic.lora.target_modules=['nowhere'] cannot be found in the model",
        ),
        (
            {"rollout": {"response_length": 8, "stop_tokens": ["good bad"]}},
            "is 2 tokens for this tokenizer",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_rule_and_the_remedy(
    cli, write_config, tmp_path: Path, sections, said: str
) -> None:
    code, _, err = cli("train", write_config(**sections))
    assert code == 2
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ('{"text": "the movie"}\n', "p.jsonl", "text"),
        ("", "p.jsonl", "has no rows"),
        ('{"prompt": "the movie"}\n{"prompt": "  "}\n', "p.jsonl", "row 1 (line 2)"),
        ('{"prompt": "' + "good " * 80 + '"}\n', "p.jsonl", "row 0 (line 1)"),
        ('{"prompt": "the movie"}\n{"prompt": \n', "p.jsonl", "line 2, column 12"),
    ],
    ids=["missing column", "empty data set", "empty prompt", "longer than the context", "broken"],
)
def test_bad_data_is_named_with_its_row(
    cli, write_config, tmp_path: Path, content: str, name: str, said: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    code, _, err = cli("train", write_config(data={"train": str(path)}))
    assert code == 2
    assert name in err
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('weather')", "weather"),
        ("return [1.0]", "1"),
        ("return [float('nan')] * len(responses)", "None"),
    ],
    ids=["raises", "wrong count", "nan"],
)
def test_a_reward_function_that_fails_midway_keeps_the_policy_and_the_metrics(
    cli, write_config, tmp_path: Path, body: str, said: str
) -> None:
    rewards = tmp_path / "failing.py"
    rewards.write_text(
        "calls = 0\n\n\ndef reward(responses):\n    global calls\n    calls += 1\n"
        f"    if calls > 3:\n        {body}\n    return [1.0] * len(responses)\n"
    )
    function = {"kind": "function", "function": f"{rewards}:reward"}
    code, out, err = cli("train", write_config(reward=function))
    assert code == 4
    assert said in err
    assert "reward" in err
    run = tmp_path / "run"
    assert len(read_rows(run / "metrics.jsonl")) == 2  # one call was the first evaluation's
    assert (run / "model/model.safetensors").is_file()
    status = json.loads((run / "run_status.json").read_text())
    assert status["state"] == "failed"
    assert status["num_steps_done"] == 2
    assert str(run / "model") in out.replace("\n", "")


def test_a_response_that_cannot_be_scored_is_left_out_not_zero(
    cli, write_config, tmp_path: Path
) -> None:
    rewards = tmp_path / "some.py"
    rewards.write_text(
        "def reward(responses):\n"
        "    return [None if i % 2 else 5.0 for i in range(len(responses))]\n"
    )
    code, out, _ = cli(
        "train", write_config(reward={"kind": "function", "function": f"{rewards}:reward"})
    )
    assert code == 0
    row = read_rows(tmp_path / "run/metrics.jsonl")[0]
    assert row["reward/scored_share"] == 0.5
    assert row["reward/score_mean"] == 5.0
    assert "unscored 50%" in out


def test_a_model_folder_without_a_tokenizer_is_named(
    cli, write_config, tmp_path: Path, gpt2: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(gpt2, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    code, _, err = cli("train", write_config(policy={"model": str(bare)}))
    assert code == 3
    assert str(bare) in err
    assert "tokenizer" in err
    assert "save_pretrained" in err


def test_a_folder_that_is_no_model_is_named(cli, write_config, tmp_path: Path) -> None:
    code, _, err = cli("train", write_config(policy={"model": str(tmp_path / "nowhere")}))
    assert code == 3
    assert "nowhere" in err


def test_a_tokenizer_without_a_pad_token_needs_none(cli, write_config, tmp_path: Path) -> None:
    """GPT-2 has none: masks come from lengths, so nothing has to be invented."""
    assert cli("train", write_config())[0] == 0
    saved = json.loads((tmp_path / "run/model/tokenizer_config.json").read_text())
    assert saved.get("pad_token") is None


def test_four_bits_without_a_gpu_is_a_clear_refusal(cli, write_config, gpt2: Path) -> None:
    policy = {"model": str(gpt2), "tuning": "lora", "quantize_4bit": True}
    code, _, err = cli("train", write_config(policy=policy, device="cpu"))
    assert code == 3
    assert "CUDA" in err


def test_more_unfrozen_layers_than_there_are_is_refused(cli, write_config, gpt2: Path) -> None:
    policy = {"model": str(gpt2), "tuning": "last_layers", "num_unfrozen_layers": 9}
    code, _, err = cli("train", write_config(policy=policy))
    assert code == 2
    assert "num_unfrozen_layers=9: the model has 2 layers" in err


def test_an_existing_run_is_kept_unless_overwriting_is_asked_for(
    cli, write_config, tmp_path: Path
) -> None:
    config = write_config()
    assert cli("train", config)[0] == 0
    before = (tmp_path / "run/metrics.jsonl").read_text()
    code, _, err = cli("train", config, "ppo.num_steps=1")
    assert code == 2
    assert "exists already" in err
    assert "--overwrite" in err
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    assert cli("train", config, "ppo.num_steps=1", "--overwrite")[0] == 0
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 1


def test_a_folder_that_is_no_run_is_never_overwritten(cli, write_config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    code, _, err = cli("train", write_config(), "--overwrite")
    assert code == 2
    assert "not a Klippo run" in err
    assert (tmp_path / "run/thesis.tex").read_text() == "years of work"


def limit_file_size() -> None:
    """Files over 20 kB cannot be written: what a full disk does to model weights."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_weights_that_cannot_be_written_end_the_run_with_a_clear_error(
    write_config, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "klippo",
        "train",
        str(write_config()),
        "evaluation.num_prompts=0",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limit_file_size, cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)}, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "cannot write" in done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / "run"
    assert len(read_rows(run / "metrics.jsonl")) == 3
    assert not (run / "model").exists(), "no half-written model"
    assert json.loads((run / "run_status.json").read_text())["state"] == "failed"


def test_ctrl_c_keeps_the_policy_and_says_so(write_config, tmp_path: Path) -> None:
    rewards = tmp_path / "interrupting.py"
    rewards.write_text(
        "import os, signal\ncalls = 0\n\n\n"
        "def reward(responses):\n    global calls\n    calls += 1\n"
        "    if calls > 3:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [1.0] * len(responses)\n"
    )
    config = write_config(reward={"kind": "function", "function": f"{rewards}:reward"})
    command = [sys.executable, "-m", "klippo", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130, done.stderr
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert json.loads((tmp_path / "run/run_status.json").read_text())["state"] == "interrupted"
