"""FSDP2 under launchers: the run of full models, in shards."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from klippo.runs.folder import read_rows
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import assert_same_tensors
from tests.train.test_processes import (
    finish,
    free_port,
    torchrun,
    without_times,
)

EXAMPLES = Path(__file__).parents[2] / "examples/launch"
SEPARATE: dict[str, Any] = {"critic": {"kind": "separate"}, "kl": {"coef": 0.1}}
LORA: dict[str, Any] = {
    "critic": {"kind": "lora", "lora": {"rank": 2}},
    "kl": {"coef": 0.1, "placement": "exact"},
}


def accelerate(settings: Path, *arguments: object) -> list[str]:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(settings)]
    launcher += [
        "--num_processes",
        "2",
        "--main_process_port",
        str(free_port()),
        "-m",
        "klippo",
        "train",
    ]
    return [sys.executable, *launcher, *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("sharding", ["fsdp", "shard_grad_op"])
def test_sharded_runs_have_the_metrics_samples_and_weights_of_whole_ones(
    write_config: Callable[..., Path], gpt2: Path, tmp_path: Path, sharding: str, kind: str
) -> None:
    """One process; two with a shard each, whose evaluation prompts do not divide."""
    config = write_config(
        device="cpu",
        policy={"model": str(gpt2), "tuning": kind, "lora": {"rank": 2}},
        rollout={"response_length": [2, 8], "generation_batch_size": 5},
        score={"normalize": True, "whiten": True},
        ppo={"num_steps": 3, "batch_size": 16, "minibatch_size": 8, "micro_batch_size": 2},
        evaluation={"num_prompts": 9, "every": 2, "num_shown": 0},
        early_stop={"max_kl": 1e6},
        **(LORA if kind == "lora" else SEPARATE),
    )
    one, two = tmp_path / "one", tmp_path / "two"
    for num, folder in ((1, one), (2, two)):
        overrides = f"output_dir={folder}", f"sharding={sharding}"
        ended = finish(torchrun(num, config, *overrides, program="tests.float64"))
        assert ended.returncode == 0, ended.stderr
        assert "Warning" not in ended.stderr
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (one, two))
    for a, b in zip(ours, theirs, strict=True):
        assert without_times(a) == pytest.approx(without_times(b), **FLOAT64_APPROX)
    for step in (0, 2, 3):
        ours, theirs = (read_rows(folder / f"eval/step-{step}.jsonl") for folder in (one, two))
        assert len(ours) == len(theirs) == 9
        for a, b in zip(ours, theirs, strict=True):
            assert a["response_ids"] == b["response_ids"]
            assert a["kl_exact_nats"] == pytest.approx(b["kl_exact_nats"], **FLOAT64_APPROX)
    files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    assert len(files) == 6, "policy, critic and value head, of the end and of the best step"
    for file in files:
        assert_same_tensors(load_file(one / file), load_file(two / file), **FLOAT64)


FAULT = """
import os, signal
from pathlib import Path

def good(responses, calls=[]):
    calls.append(1)
    marker = Path(__file__).with_name("killed")
    if os.environ["RANK"] == "1" and len(calls) == 5 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(r)) for r in responses]
"""
"""The second process kills itself while it scores its second evaluation, once."""


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp", "shard_grad_op"])
def test_two_processes_of_which_one_is_killed_go_on_to_the_same_bytes(
    write_config: Callable[..., Path], reward_file: Path, tmp_path: Path, sharding: str
) -> None:
    """Also from one process's checkpoint to two and back; unlike numbers of micro-batches."""
    reward_file.write_text(FAULT)
    config = write_config(
        device="cpu",
        sharding=sharding,
        ppo={"num_steps": 6, "batch_size": 8, "micro_batch_tokens": 24},
        rollout={"response_length": [2, 8]},
        evaluation={"num_prompts": 3, "every": 3, "num_shown": 0},
        checkpoint={"every": 2},
        early_stop={"max_kl": 1e6},
    )
    killed, whole = tmp_path / "killed-run", tmp_path / "whole"
    ended = finish(torchrun(2, config, f"output_dir={killed}"))
    assert ended.returncode != 0
    assert (tmp_path / "killed").exists(), ended.stderr
    for folder in (killed, whole):
        ended = finish(torchrun(2, config, f"output_dir={folder}"))
        assert ended.returncode == 0, ended.stderr
        assert ("after 2 of 6 steps" in ended.stdout) is (folder == killed)
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (killed, whole))
    assert [without_times(row) for row in ours] == [without_times(row) for row in theirs]
    files = sorted(file.relative_to(whole) for file in whole.rglob("*.safetensors"))
    assert files
    for file in files:
        assert (whole / file).read_bytes() == (killed / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "shard_grad_op"])
def test_a_checkpoint_of_two_sharded_processes_starts_one_and_that_of_one_starts_two(
    write_config: Callable[..., Path], tmp_path: Path, sharding: str
) -> None:
    config = write_config(
        device="cpu",
        sharding=sharding,
        ppo={"num_steps": 2, "batch_size": 8},
        evaluation={"num_prompts": 2, "num_shown": 0},
        checkpoint={"keep_when_done": True},
    )
    ends = {}
    for first, second in ((2, 1), (1, 2)):
        folder = tmp_path / f"{first}-{second}"
        for num, steps in ((first, 2), (second, 4)):
            overrides = f"output_dir={folder}", f"ppo.num_steps={steps}"
            command = torchrun(num, config, *overrides, program="tests.float64")
            ended = finish([*command, "--resume"] if steps == 4 else command)
            assert ended.returncode == 0, ended.stderr
        assert f"{second} processes resume what {first} began" in ended.stderr
        ends[first] = load_file(folder / "model/model.safetensors")
    assert_same_tensors(ends[1], ends[2], **FLOAT64)


def test_accelerate_shards_from_its_config_file_and_the_model_is_a_plain_one(
    write_config: Callable[..., Path], tmp_path: Path, gpt2: Path
) -> None:
    config = write_config(device="cpu", evaluation={"num_prompts": 1, "num_shown": 0})
    ended = finish(accelerate(EXAMPLES / "fsdp2.yaml", config, "ppo.num_steps=1"))
    assert ended.returncode == 0, ended.stderr
    assert "2 processes, each with a shard of the weights" in ended.stdout
    start = AutoModelForCausalLM.from_pretrained(gpt2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert type(model) is type(start)
    moved = [
        float((a - b).detach().abs().max())
        for a, b in zip(start.parameters(), model.parameters(), strict=True)
    ]
    assert max(moved) > 1e-3
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight), "still tied"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "its variables"])
def test_a_config_file_for_deepspeed_runs_as_fsdp2(
    write_config: Callable[..., Path], tmp_path: Path, launcher: str
) -> None:
    """Without DeepSpeed accelerate's launcher refuses the file; then its variables stand for it."""
    config = write_config(device="cpu", evaluation={"num_prompts": 1, "num_shown": 0})
    if launcher == "accelerate":
        pytest.importorskip("deepspeed")
        ended = finish(accelerate(EXAMPLES / "zero2.yaml", config, "ppo.num_steps=1"))
    else:
        variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
        ended = finish(torchrun(2, config, "ppo.num_steps=1"), **variables)
    assert ended.returncode == 0, ended.stderr
    assert "2 processes, each with a shard of the weights" in ended.stdout
    assert (
        "accelerate's config file names DeepSpeed ZeRO-2; Klippo runs it as FSDP2 that keeps "
        "gathered weights\n" in ended.stdout
    )
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.slow
def test_the_launch_file_of_one_machine(write_config: Callable[..., Path]) -> None:
    config = write_config(device="cpu", evaluation={"num_prompts": 1, "num_shown": 0})
    ended = finish(accelerate(EXAMPLES / "ddp.yaml", config, "ppo.num_steps=1"))
    assert ended.returncode == 0, ended.stderr
    assert "2 processes\n" in ended.stdout


@pytest.mark.slow
def test_the_launch_file_of_two_machines(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """Both on this one, each with a launcher of its own."""
    config = write_config(device="cpu", evaluation={"num_prompts": 1, "num_shown": 0})
    launcher = ["-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(EXAMPLES / "two_machines.yaml"), "--num_processes", "2"]
    launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    launched = [
        subprocess.Popen(
            [sys.executable, *launcher, "--machine_rank", str(rank), "-m", "klippo", "train",
             str(config), "ppo.num_steps=1"],
            env={"OMP_NUM_THREADS": "1"} | os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in launched]
    assert [process.returncode for process in launched] == [0, 0], told
    assert "2 processes, each with a shard of the weights" in told[0][0]
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.slow
def test_the_slurm_script_starts_what_it_says(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """With a Slurm that has one node, this machine: srun runs its command here."""
    config = write_config(device="cpu", evaluation={"num_prompts": 1, "num_shown": 0})
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (
        ("scontrol", 'test "$*" = "show hostnames here" && echo 127.0.0.1'),
        ("srun", 'test "$1" = --kill-on-bad-exit=1 && shift && exec "$@"'),
    ):
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "GPUS": "2"}
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", str(EXAMPLES / "slurm.sh"), str(config), "ppo.num_steps=1", "sharding=fsdp"],
        env=os.environ | slurm | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "2 processes, each with a shard of the weights" in ended.stdout
