"""Whole runs that sample on servers: the run of `rollout.engine=hf`, whatever happens to them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from klippo.config.load import load_config
from klippo.errors import ServerError
from klippo.runs.folder import read_rows
from klippo.train.trainer import PPOTrainer
from tests.rollouts.serving import Process, later, server_here, server_process
from tests.train.test_processes import finish, torchrun


def train(config: Path, folder: Path, *overrides: str, at_step_2: Callable[[], None] | None = None):
    """A run whose reward counts a word, and in its second step does something else too."""
    steps: list[int] = []

    def good(responses, **_):
        steps.append(len(responses))
        if at_step_2 is not None and steps.count(16) == 2:
            at_step_2()
        return [float(text.split().count("good")) for text in responses]

    loaded = load_config(str(config), [f"output_dir={folder}", *overrides])
    PPOTrainer(loaded, reward=good, quiet=True).train()


def on(*urls: str, patience_s: float = 60.0) -> list[str]:
    return [
        "rollout.engine=vllm",
        f"rollout.vllm.servers={json.dumps(urls)}",
        f"rollout.vllm.patience_s={patience_s}",
    ]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same responses and nearly the same numbers: the servers decode one prompt at a time."""
    for step in (0, 3):
        rows, others = (read_rows(run / f"eval/step-{step}.jsonl") for run in (ours, theirs))
        for one, other in zip(rows, others, strict=True):
            assert one["response"] == other["response"]
            assert one["kl_exact_nats"] == pytest.approx(other["kl_exact_nats"], abs=1e-4)
    rows, others = (read_rows(run / "metrics.jsonl") for run in (ours, theirs))
    for one, other in zip(rows, others, strict=True):
        for name in ("kl/sequence_nats", "loss/policy", "loss/value", "response/length_tokens"):
            assert one[name] == pytest.approx(other[name], abs=1e-5)
        assert one["engine/logprob_mismatch_nats"] < 1e-5


@pytest.fixture
def config(write_config: Callable[..., Path]) -> Path:
    return write_config(device="cpu", rollout={"response_length": 8, "record_logprobs": True})


def test_a_server_killed_in_the_middle_of_a_run_changes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server_process("tests.rollouts.serving", "copy") as process:
        train(config, tmp_path / "servers", *on(process.url), at_step_2=lambda: restart(process))
    said = capsys.readouterr().err
    assert f"the rollout server {process.url} is lost" in said
    assert f"the rollout server {process.url} is back" in said
    train(config, tmp_path / "alone")
    assert_same_run(tmp_path / "servers", tmp_path / "alone")


def restart(process: Process) -> None:
    process.kill()
    later(process.start, 0.5)


def test_a_run_without_any_server_left_ends_and_keeps_its_policy(
    config: Path, tmp_path: Path
) -> None:
    with server_process("tests.rollouts.serving", "copy") as process:
        servers = on(process.url, patience_s=0.5)
        with pytest.raises(ServerError, match=rf"no rollout server answers: {process.url} .*refus"):
            train(config, tmp_path / "run", *servers, at_step_2=process.kill)
    status = json.loads((tmp_path / "run/run_status.json").read_text())
    assert status["state"] == "failed"
    assert status["num_steps_done"] == 2
    assert process.url in status["reason"]
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_have_a_server_each(config: Path, tmp_path: Path) -> None:
    with server_here() as (one, _), server_here() as (other, _):
        ours = [*on(one.url, other.url), f"output_dir={tmp_path / 'servers'}"]
        ended = finish(torchrun(2, config, *ours))
    assert ended.returncode == 0, ended.stderr
    train(config, tmp_path / "alone")
    assert_same_run(tmp_path / "servers", tmp_path / "alone")
