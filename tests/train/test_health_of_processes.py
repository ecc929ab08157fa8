"""What stops one process of a run, and what stops all: they end together, and the first one keeps.

Several processes under a launcher, whole and sharded. Each case is a real run.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from klippo.runs.folder import read_rows
from tests.train.test_health import checkpoints_of, status_of, stopping
from tests.train.test_processes import finish, torchrun, without_times
from tests.train.test_resume import EVERY_STEP

BOUND_S = 60
SATURATES = """
def good(responses, calls=[]):
    calls.append(1)
    return [1.0 if len(calls) > 3 else float(len(r)) for r in responses]
"""
"""From step 3 on it no longer tells responses apart."""
NAN_IN_ONE = """
import os
from pathlib import Path

def good(responses, calls=[]):
    calls.append(1)
    scores = [float(len(r)) for r in responses]
    marker = Path(__file__).with_name("failed")
    if os.environ.get("RANK") == "1" and len(calls) == 3 and not marker.exists():
        marker.touch()
        scores[5] = float("nan")
    return scores
"""
"""In step 2, in the second process alone, once."""
SLOW_REPORT = """
import time
from klippo.train import rescue

at_once = rescue.refresh_report

def slowly(*arguments):
    time.sleep(8)
    at_once(*arguments)

rescue.refresh_report = slowly
"""


@pytest.fixture
def config(write_config: Callable[..., Path], reward_file: Path) -> Callable[..., Path]:
    """A run of six steps with checkpoints of all, whose reward is this code."""

    def write(code: str, **sections: Any) -> Path:
        reward_file.write_text(code)
        return write_config(
            device="cpu",
            ppo={"num_steps": 6, "batch_size": 16, "num_epochs": 2, "minibatch_size": 8},
            evaluation={"num_prompts": 0},
            checkpoint=EVERY_STEP,
            **sections,
        )

    return write


def exit_codes(stderr: str) -> list[int]:
    """Of the processes that failed, in torchrun's table: that of the first to fail comes last."""
    return [int(code) for code in re.findall(r"exitcode\s+: (-?\d+)", stderr)]


def assert_model_is_that_of(run: Path, checkpoint: str) -> None:
    """A plain Hugging Face model, or an adapter, with the policy's weights in the checkpoint."""
    kept = load_file(run / "checkpoints" / checkpoint / "weights.safetensors")
    policy = {name: weight for name, weight in kept.items() if not name.startswith("critic.")}
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    found = {f"lm.model.{name}": weight for name, weight in model.named_parameters()}
    assert policy
    assert all(torch.equal(weight, found[name]) for name, weight in policy.items())


@pytest.mark.parametrize(
    ("sharding", "tuning"),
    [
        ("fsdp", "full"),
        pytest.param("fsdp", "lora", marks=pytest.mark.slow),
        pytest.param("none", "full", marks=pytest.mark.slow),
    ],
)
def test_a_rail_ends_both_processes_and_the_model_is_that_of_the_checkpoint(
    config, gpt2: Path, tmp_path: Path, sharding: str, tuning: str
) -> None:
    policy = {"model": str(gpt2), "tuning": tuning, "lora": {"rank": 2}}
    stop = stopping("reward_saturation")
    start = time.monotonic()
    ended = finish(torchrun(2, config(SATURATES, policy=policy, sharding=sharding, **stop)))
    assert time.monotonic() - start < BOUND_S
    run = tmp_path / "run"
    assert ("each with a shard of the weights" in ended.stdout) is (sharding != "none")
    assert exit_codes(ended.stderr)[-1] == 6
    assert ended.stderr.count("health check reward_saturation at step 3: all 16 scores") == 1
    assert "bug in Klippo" not in ended.stderr
    status = status_of(run)
    assert (status["state"], status["stopped_by"]) == ("failed", "reward_saturation")
    assert status["checkpoint_step"] == 2
    assert checkpoints_of(run) == ["step-00000001", "step-00000002"]
    assert_model_is_that_of(run, "step-00000002")
    assert "The policy as it was after 2 steps, before that, is in" in ended.stdout
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0, 1, 2, 3]
    assert "reward_saturation" in (run / "report.html").read_text()


def test_a_reward_that_is_not_finite_in_one_process_ends_both_and_is_named(
    config, tmp_path: Path
) -> None:
    start = time.monotonic()
    ended = finish(torchrun(2, config(NAN_IN_ONE)))
    assert time.monotonic() - start < BOUND_S
    run = tmp_path / "run"
    assert exit_codes(ended.stderr)[-1] == 4
    assert len(re.findall(r"process 1: .*returned nan for row 5 \(prompt", ended.stderr)) == 1
    assert ended.stderr.count("returned nan") == 1
    status = status_of(run)
    assert (status["stopped_by"], status["num_steps_done"]) == ("reward_not_finite", 2)
    assert status["health"]["reward_not_finite"]["first_step"] == 2
    assert status["checkpoint_step"] == 2, "of the step that failed, which has changed nothing"
    assert_model_is_that_of(run, "step-00000002")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_what_failed_in_one_process_goes_on_in_both_to_the_same_bytes(
    config, tmp_path: Path, sharding: str
) -> None:
    file = config(NAN_IN_ONE, sharding=sharding)
    failed, whole = tmp_path / "failed-run", tmp_path / "whole"
    ended = finish(torchrun(2, file, f"output_dir={failed}"))
    assert status_of(failed)["checkpoint_step"] == 2
    for folder in (failed, whole):
        ended = finish(torchrun(2, file, f"output_dir={folder}"))
        assert ended.returncode == 0, ended.stderr
        assert ("after 2 of 6 steps" in ended.stdout) is (folder == failed)
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (failed, whole))
    assert [without_times(row) for row in ours] == [without_times(row) for row in theirs]
    for file in ("model/model.safetensors", "critic/value_head.safetensors"):
        assert (failed / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_learning_rate_a_hundred_times_too_high_stops_both_processes(
    config, tmp_path: Path, sharding: str
) -> None:
    run = tmp_path / "run"
    file = config(SATURATES.replace("3", "99"), sharding=sharding)
    ended = finish(torchrun(2, file, "ppo.num_steps=2", "checkpoint.keep_when_done=true"))
    assert ended.returncode == 0, ended.stderr
    good = (run / "model/model.safetensors").read_bytes()
    (run / "model").rename(tmp_path / "good")
    start = time.monotonic()
    ended = finish(
        torchrun(2, file, "--resume", "optimizer.learning_rate=0.3",
                 "health.kl_explosion=stop", "health.ratio_explosion=stop")
    )  # fmt: skip
    assert time.monotonic() - start < BOUND_S
    assert exit_codes(ended.stderr)[-1] == 6
    assert (
        len(re.findall("health check (?:kl_explosion|ratio_explosion) at step", ended.stderr)) == 1
    )
    status = status_of(run)
    assert status["stopped_by"] in ("kl_explosion", "ratio_explosion")
    assert status["num_steps_done"] in (3, 4), "within two updates"
    assert status["checkpoint_step"] == 2
    assert (run / "model/model.safetensors").read_bytes() == good


@pytest.mark.slow
def test_a_first_process_that_keeps_long_is_not_cut_off_by_the_others(
    config, tmp_path: Path
) -> None:
    """Others end by themselves five seconds after they failed, and then a launcher ends all."""
    ended = finish(torchrun(2, config(SATURATES + SLOW_REPORT, **stopping("reward_saturation"))))
    assert exit_codes(ended.stderr)[-1] == 6
    assert re.findall(r"rank\s+: (\d)", ended.stderr)[-1] == "0", "the first to end"
    assert ended.stderr.count("health check reward_saturation at step 3") == 1
    assert (tmp_path / "run/report.html").is_file()


@pytest.mark.slow
def test_a_checkpoint_of_sharded_processes_of_which_one_died_becomes_a_model(
    cli, config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    dies = NAN_IN_ONE.replace('scores[5] = float("nan")', "os.kill(os.getpid(), 9)")
    assert dies != NAN_IN_ONE
    ended = finish(torchrun(2, config(dies, sharding="fsdp")))
    assert exit_codes(ended.stderr)[-1] == -9
    status = json.loads((run / "run_status.json").read_text())
    assert status["checkpoint_step"] == 1
    assert not (run / "model").exists()
    assert "No model is saved: each process had a shard of the weights" in ended.stdout
    more = ["ppo.num_steps=1", "checkpoint.keep_when_done=true"]
    assert " ".join(more) in ended.stdout
    code, _, err = cli("train", run / "config.yaml", "--resume", *more)
    assert code == 0, err
    assert_model_is_that_of(run, "step-00000001")
    assert len(read_rows(run / "metrics.jsonl")) == 1
    code, _, err = cli("train", run / "config.yaml", "--resume", "ppo.num_steps=2")
    assert code == 0, err
