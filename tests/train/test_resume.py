"""A run that ended too early goes on, to the same bytes as one that did not."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from klippo import PPOTrainer
from klippo.errors import ConfigError, DivergedError, RewardError
from klippo.runs.folder import read_rows
from klippo.train.resume import differences, is_safe

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kill_and_resume.py"
EVERY_STEP = {"every": 1, "every_minutes": None}


def the_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fingerprint = the_script().fingerprint


def train(config: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: one that has done other things before may end a bit beside it."""
    return subprocess.run(
        [sys.executable, "-m", "klippo", "train", str(config), *more],
        env={"OMP_NUM_THREADS": "1"} | os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def begin(config: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "klippo", "train", str(config), *more],
        env={"OMP_NUM_THREADS": "1"} | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture
def slow_config(write_config: Callable[..., Path], tmp_path: Path) -> Path:
    """Every step takes a fifth of a second, and the reward draws random numbers of its own."""
    (tmp_path / "slow.py").write_text(
        "import random, time\n"
        "def slow(responses):\n"
        "    time.sleep(0.2)\n"
        "    return [random.random() for _ in responses]\n"
    )
    return write_config(
        reward={"kind": "function", "function": f"{tmp_path / 'slow.py'}:slow"},
        ppo={"num_steps": 8, "batch_size": 8, "num_epochs": 1},
        evaluation={"num_prompts": 4, "num_shown": 0},
        checkpoint=EVERY_STEP | {"every": 2},
    )


def test_a_killed_run_goes_on_by_itself_to_the_same_bytes(slow_config: Path, tmp_path) -> None:
    assert train(slow_config, f"output_dir={tmp_path / 'whole'}").returncode == 0
    run = tmp_path / "killed"
    process = begin(slow_config, f"output_dir={run}")
    wait_for(run / "checkpoints/step-00000004", process)
    process.kill()
    process.communicate()
    ended = train(slow_config, f"output_dir={run}")
    assert ended.returncode == 0, ended.stderr
    assert f"Resuming {run} after 4 of 8 steps" in ended.stdout
    assert fingerprint(run) == fingerprint(tmp_path / "whole")
    assert not (run / "checkpoints").exists()
    assert not (run / ".lock").exists()
    resumed = json.loads((run / "started.json").read_text())["resumed"]
    assert [one["after_steps"] for one in resumed] == [4]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_leaves_a_checkpoint_and_the_command_that_goes_on(
    cli, slow_config: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    process = begin(slow_config, "checkpoint.every=null")
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    status = json.loads((run / "run_status.json").read_text())
    done = status["num_steps_done"]
    assert status["state"] == "interrupted"
    assert 1 <= done < 8
    assert status["checkpoint_step"] == done
    command = f"klippo train {run / 'config.yaml'} --resume"
    assert status["resume"] == command
    assert f"To resume after step {done}: {command}" in out
    code, out, err = cli("train", run / "config.yaml", "--resume")
    assert code == 0, err
    assert f"Resuming {run} after {done} of 8 steps" in out
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == list(range(8))


def test_a_second_process_is_kept_off_a_run_that_is_on(cli, slow_config, tmp_path) -> None:
    process = begin(slow_config, "ppo.num_steps=400")
    wait_for(tmp_path / "run/metrics.jsonl", process)
    for option in ([], ["--resume"], ["--overwrite"]):
        code, _, err = cli("train", slow_config, "ppo.num_steps=400", *option)
        assert code == 2, err
        assert f"another process (process {process.pid}) trains there now" in err
    process.kill()
    process.communicate()


def lengths(responses: list[str]) -> list[float]:
    return [float(len(text)) for text in responses]


class StopError(Exception):
    """Ends a run from inside its reward."""


def run_until(config: dict, step: int | None, **options: bool) -> PPOTrainer:
    """A run whose reward fails in a step, counted from 0."""
    calls = 0

    def reward(responses: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if step is not None and calls == step + 2:  # the first call is the evaluation's
            raise StopError
        return [float(len(text)) for text in responses]

    trainer = PPOTrainer(config, reward=reward, quiet=True, **options)
    if step is None:
        trainer.train()
    else:
        with pytest.raises(RewardError, match="StopError"):
            trainer.train()
    return trainer


@pytest.fixture
def config(gpt2: Path, prompts_file: Path, tmp_path: Path) -> dict:
    return {
        "output_dir": str(tmp_path / "run"),
        "policy": {"model": str(gpt2)},
        "data": {"train": str(prompts_file)},
        "rollout": {"response_length": 6},
        "ppo": {"num_steps": 4, "batch_size": 8, "num_epochs": 1},
        "optimizer": {"learning_rate": 1e-3, "schedule": "linear"},
        "evaluation": {"num_prompts": 4, "num_shown": 0},
    }


VARIANTS = {
    "full": {},
    "last layers": {"policy": {"tuning": "last_layers", "num_unfrozen_layers": 1}},
    "LoRA, LoRA critic": {"policy": {"tuning": "lora"}, "critic": {"kind": "lora"}},
    "separate critic": {"critic": {"kind": "separate"}, "score": {"normalize": True}},
    "bfloat16": {"policy": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_failed_in_the_middle_of_a_step_goes_on_exactly(config, gpt2, tmp_path, name) -> None:
    config |= {key: value for key, value in VARIANTS[name].items() if key != "policy"}
    config["policy"] = {"model": str(gpt2)} | VARIANTS[name].get("policy", {})
    run_until(config | {"output_dir": str(tmp_path / "whole")}, None)
    run_until(config, 2)
    status = json.loads((tmp_path / "run/run_status.json").read_text())
    assert (status["state"], status["checkpoint_step"]) == ("failed", 2)
    trainer = run_until(config, None)
    assert trainer.session.learner.num_steps_done == 4
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_changed_config_is_refused_with_what_differs_and_what_is_safe(config) -> None:
    run_until(config, 2)
    changed = config | {
        "seed": 5,
        "optimizer": {"learning_rate": 1e-4, "schedule": "linear"},
    }
    with pytest.raises(ConfigError) as refused:
        PPOTrainer(changed, reward=lengths, quiet=True).train()
    unsafe, safe = str(refused.value).split("\nSafe to change")
    assert "\n  seed=5 (was 0)" in unsafe
    assert "learning_rate" not in unsafe
    assert "--resume continues with the new value:" in safe
    assert "\n  optimizer.learning_rate=0.0001 (was 0.001)" in safe
    with pytest.raises(ConfigError, match="These must not change"):
        PPOTrainer(changed, reward=lengths, quiet=True, resume=True).train()


def test_a_safe_change_takes_effect_from_there(config, tmp_path) -> None:
    run_until(config, 2)
    longer = config | {"ppo": config["ppo"] | {"num_steps": 6}}
    with pytest.raises(ConfigError, match=r"ppo\.num_steps=6"):
        PPOTrainer(longer, reward=lengths, quiet=True).train()
    run_until(longer, None, resume=True)
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(6))
    rates = [row["update/learning_rate"] for row in rows]
    assert rates == pytest.approx([1e-3 * x for x in (1, 3 / 4, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])


def test_a_finished_run_goes_on_only_if_it_kept_its_checkpoint(config, tmp_path) -> None:
    run_until(config | {"checkpoint": {"keep_when_done": True}}, None)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
    longer = config | {"ppo": config["ppo"] | {"num_steps": 5}}
    run_until(longer, None, resume=True)
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 5
    with pytest.raises(ConfigError, match="that run is done"):
        PPOTrainer(longer, reward=lengths, quiet=True, resume=True).train()


def test_other_data_and_another_model_are_found_out(config, prompts_file, gpt2, tmp_path) -> None:
    run_until(config, 2)
    text = prompts_file.read_text()
    prompts_file.write_text(text.replace("the movie was", "the film was"))
    with pytest.raises(ConfigError, match=r"another data \(fingerprint \w+, now \w+\)"):
        PPOTrainer(config, reward=lengths, quiet=True).train()
    prompts_file.write_text(text)
    other = tmp_path / "other"
    shutil.copytree(gpt2, other)
    weights = load_file(other / "model.safetensors")
    name = min(weights)
    weights[name] = weights[name] + 1
    from safetensors.torch import save_file

    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(other)
    model.config.name_or_path = str(gpt2)
    with pytest.raises(ConfigError, match="another model "):
        PPOTrainer(
            config,
            policy=model,
            tokenizer=AutoTokenizer.from_pretrained(gpt2),
            reward=lambda responses: [0.0 for _ in responses],
            quiet=True,
        ).train()
    run_until(config, None)  # and nothing was lost


def test_a_damaged_checkpoint_is_passed_over_and_its_steps_come_again(
    config, tmp_path, capsys
) -> None:
    run_until(config | {"output_dir": str(tmp_path / "whole")}, None)
    run_until(config | {"checkpoint": EVERY_STEP}, 3)
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    names = [path.name for path in checkpoints]  # the last is of the failure: nothing goes for it
    assert names == ["step-00000001", "step-00000002", "step-00000003"]
    (checkpoints[2] / "weights.safetensors").write_bytes(b"no weights")
    run_until(config | {"checkpoint": EVERY_STEP}, None)
    assert "step-00000003/weights.safetensors is damaged" in capsys.readouterr().err
    ours, whole = (fingerprint(tmp_path / name) for name in ("run", "whole"))
    assert {k: v for k, v in ours.items() if k != "config.yaml"} == {
        k: v for k, v in whole.items() if k != "config.yaml"
    }


def test_without_a_whole_checkpoint_nothing_is_begun_again(config, tmp_path) -> None:
    run_until(config, 2)
    (tmp_path / "run/checkpoints/step-00000002/state.json").unlink()
    with pytest.raises(ConfigError, match=r"none of its checkpoints is intact.*state\.json"):
        PPOTrainer(config, reward=lengths, quiet=True).train()
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 2


def test_lost_lines_of_metrics_are_named_and_cost_nothing_else(config, tmp_path, capsys) -> None:
    run_until(config, 3)
    file = tmp_path / "run/metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    run_until(config, None)
    assert "metrics.jsonl has lost the lines of 1 steps (2 to 2)" in capsys.readouterr().err
    assert [row["step"] for row in read_rows(file)] == [0, 1, 3]


def test_weights_that_are_not_finite_are_not_written_down(config, tmp_path) -> None:
    broken = []

    def reward(responses: list[str]) -> list[float]:
        if len(broken) == 3:
            head = trainer.session.policy.critic.head.weight
            with torch.no_grad():
                head.fill_(float("nan"))
        broken.append(1)
        return [0.0 for _ in responses]

    trainer = PPOTrainer(config | {"checkpoint": EVERY_STEP}, reward=reward, quiet=True)
    with pytest.raises(DivergedError, match=r"critic\.head\.weight is not finite after 2 steps"):
        trainer.train()
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000001"]


def test_an_unfinished_run_without_checkpoints_is_not_begun_again_unasked(config, tmp_path) -> None:
    off = config | {"checkpoint": {"every_minutes": None}}
    run_until(off, 2)
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(ConfigError, match="an unfinished run without a checkpoint; pass --resume"):
        PPOTrainer(off, reward=lengths, quiet=True).train()
    run_until(off, None, resume=True)
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 4


def test_options_that_contradict_and_a_run_that_is_not_there(config) -> None:
    with pytest.raises(ConfigError, match="choose one"):
        PPOTrainer(config, reward=lengths, quiet=True, resume=True, overwrite=True).train()
    with pytest.raises(ConfigError, match="there is no run to resume"):
        PPOTrainer(config, reward=lengths, quiet=True, resume=True).train()


@pytest.mark.parametrize(
    ("key", "safe"),
    [
        ("ppo.num_steps", True),
        ("ppo.num_epochs", False),
        ("checkpoint.every", True),
        ("reward.api.max_usd", True),
        ("reward.parts.judge.reward.outage_patience_s", True),
        ("reward.api.model", False),
        ("optimizer.learning_rate", True),
        ("evaluation.num_prompts", False),
    ],
)
def test_what_may_change(key: str, safe: bool) -> None:
    assert is_safe(key) is safe


def test_the_resolved_config_is_the_same_run_as_the_one_that_was_given(config, tmp_path) -> None:
    from klippo.config.load import load_config

    run_until(config, 2)
    assert differences(load_config(tmp_path / "run/config.yaml").config, tmp_path / "run") == {}


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_end_with_the_same_bytes(kills: int) -> None:
    command = [sys.executable, str(SCRIPT), "--kills", str(kills)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert sum(told["kills"].values()) == kills
    assert told["runs_that_differ"] == 0
