"""The command under launchers: several processes are one run, and end as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from klippo.runs.folder import read_rows
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import assert_same_tensors

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(num: int, *arguments: object, program: str = "klippo") -> list[str]:
    """`klippo train` under torchrun; with `program="tests.float64"` computed in float64."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num)]
    return [sys.executable, *launcher, "-m", program, "train", *map(str, arguments)]


def finish(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "1"} | os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def whole_config(write_config: Callable[..., Path], reward_file: Path) -> Path:
    """Everything that looks at the batch as a whole, and evaluation prompts that do not divide."""
    parts = {
        "good": {"reward": {"kind": "function", "function": f"{reward_file}:good"}},
        "short": {"reward": {"kind": "length", "max_tokens": 4}, "normalize": True},
    }
    parts["good"] |= {"normalize": True, "weight": 0.5}
    return write_config(
        device="cpu",
        rollout={"response_length": [2, 8], "generation_batch_size": 5},
        reward={"kind": "sum", "parts": parts},
        score={"normalize": True, "whiten": True},
        kl={"controller": "adaptive", "target": 0.5, "horizon": 100},
        ppo={
            "num_steps": 5,
            "batch_size": 16,
            "num_epochs": 2,
            "minibatch_size": 8,
            "micro_batch_size": 2,
        },
        evaluation={"num_prompts": 9, "every": 2, "num_shown": 2},
    )


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    own = ("time/", "throughput/", "memory/")
    return {key: value for key, value in metrics.items() if not key.startswith(own)}


@pytest.mark.usefixtures("in_float64")
def test_one_and_two_processes_have_the_same_metrics_samples_and_weights(
    cli, whole_config: Path, gpt2: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ended = finish(torchrun(2, whole_config, f"output_dir={two}", program="tests.float64"))
    assert ended.stdout.startswith("2 processes")
    for code, out, err in (
        cli("train", whole_config, f"output_dir={one}"),
        (ended.returncode, ended.stdout, ended.stderr),
    ):
        assert code == 0, err
        assert out.count("evaluation at step 0") == 1
        assert "Warning" not in err
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (one, two))
    assert len(ours) == len(theirs) == 5
    for a, b in zip(ours, theirs, strict=True):
        assert without_times(a) == pytest.approx(without_times(b), **FLOAT64_APPROX)
    for step in (0, 2, 4, 5):
        ours, theirs = (read_rows(folder / f"eval/step-{step}.jsonl") for folder in (one, two))
        assert len(ours) == len(theirs) == 9
        for a, b in zip(ours, theirs, strict=True):
            for name in ("kl_k1_nats", "kl_exact_nats", "proxy"):
                assert a.pop(name) == pytest.approx(b.pop(name), **FLOAT64_APPROX)
            assert a == b
    for file in ("model/model.safetensors", "critic/value_head.safetensors"):
        ours, theirs = (load_file(folder / file) for folder in (one, two))
        assert_same_tensors(ours, theirs, **FLOAT64)
    start = load_file(gpt2 / "model.safetensors")
    trained = load_file(one / "model/model.safetensors")
    changes = [float((trained[name] - weight).abs().max()) for name, weight in start.items()]
    assert max(changes) > 1e-3


@pytest.mark.slow
def test_accelerate_launches_it_from_its_config_file(whole_config: Path, tmp_path: Path) -> None:
    """One evaluation prompt for two processes: the first evaluates alone."""
    settings = tmp_path / "accelerate.yaml"
    settings.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\n"
        "machine_rank: 0\nnum_processes: 2\nmixed_precision: 'no'\nuse_cpu: false\n"
    )
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(settings)]
    launcher += ["--main_process_port", str(free_port()), "-m", "klippo", "train"]
    overrides = ["ppo.num_steps=1", "evaluation.num_prompts=1", f"output_dir={tmp_path / 'run'}"]
    ended = finish([sys.executable, *launcher, str(whole_config), *overrides])
    assert ended.returncode == 0, ended.stderr
    assert "2 processes" in ended.stdout
    assert len(read_rows(tmp_path / "run/eval/step-1.jsonl")) == 1


@pytest.mark.slow
def test_what_is_wrong_everywhere_is_said_once(whole_config: Path, tmp_path: Path) -> None:
    ended = finish(torchrun(2, whole_config, "ppo.batch_size=15", "ppo.minibatch_size=15",
                            "ppo.micro_batch_size=5"))  # fmt: skip
    assert ended.returncode != 0
    assert (
        ended.stderr.count("ppo.batch_size=15 must be a multiple of the 2 processes; try 16") == 1
    )
    assert "bug in Klippo" not in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_that_is_taken_is_said_once_and_left_alone(
    whole_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("mine")
    ended = finish(torchrun(2, whole_config))
    assert ended.returncode != 0
    assert ended.stderr.count("exists already") == 1
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_failure_of_one_process_ends_all_with_its_message(
    whole_config: Path, reward_file: Path, tmp_path: Path
) -> None:
    """Where the other one waits for its part of a sum's moments."""
    reward_file.write_text(
        "import os\n\ndef good(responses, step=[]):\n    step.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(step) > 2:\n        raise ValueError('not I')\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    start = time.monotonic()
    ended = finish(torchrun(2, whole_config))
    assert time.monotonic() - start < 60
    assert ended.returncode != 0
    assert ended.stderr.count("raised ValueError: not I") == 1
    assert "bug in Klippo" not in ended.stderr
    status = json.loads((tmp_path / "run/run_status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"].startswith("process 1: ")
    assert status["checkpoint_step"] == 1
    assert (tmp_path / "run/model/model.safetensors").is_file(), "the policy so far is kept"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_the_run_and_keeps_the_policy(
    whole_config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    metrics = tmp_path / "run/metrics.jsonl"
    launched = subprocess.Popen(
        torchrun(2, whole_config, "ppo.num_steps=2000"),
        env={"OMP_NUM_THREADS": "1"} | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        launched.send_signal(number)
        _, stderr = launched.communicate(timeout=40)
    finally:
        launched.kill()
    assert "bug in Klippo" not in stderr
    assert stderr.count("Interrupted.") == (number == signal.SIGINT)
    assert json.loads((tmp_path / "run/run_status.json").read_text())["state"] == "interrupted"
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.usefixtures("in_float64")
def test_offline_runs_are_the_same_for_one_and_two_processes(
    cli, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {"prompt": "the movie was", "response": "good " * (i % 5 + 1), "reward": i % 7}
        for i in range(24)
    ]
    scored = tmp_path / "scored.jsonl"
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(
        device="cpu",
        data={"train": str(scored), "validation_size": 0},
        offline={"num_passes": 2, "behavior": "unknown", "duplicates": "keep"},
        reward={"kind": "column"},
        kl={"coef": 0.02, "placement": "exact"},
        ppo={"batch_size": 8, "num_epochs": 2, "minibatch_size": 4},
    )
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli("train", config, f"output_dir={one}")[0] == 0
    ended = finish(torchrun(2, config, f"output_dir={two}", program="tests.float64"))
    assert ended.returncode == 0, ended.stderr
    ours, theirs = (read_rows(folder / "diagnostics.jsonl") for folder in (one, two))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.pop("warnings") == b.pop("warnings")
        assert a == pytest.approx(b, **FLOAT64_APPROX, nan_ok=True)
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (one, two))
    assert_same_tensors(ours, theirs, **FLOAT64)
