"""Keys and tokens in the environment reach no file, no screen and no page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.judge.server import FaultServer, Hit, Step, error, ok

CANARY = "sk-CANARY-0123456789"
VARIABLES = (
    "JUDGE_KEY",
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "GEMINI_API_KEY",
    "HF_TOKEN",
    "KLIPPO_ROLLOUT_TOKEN",
)


def config(url: str) -> dict[str, object]:
    return {
        "output_dir": "run",
        "device": "cpu",
        "policy": {"model": "demo:policy"},
        "data": {"train": "demo:prompts"},
        "rollout": {"response_length": 8},
        "reward": {
            "kind": "judge",
            "probes": False,
            "score_source": "line",
            "api": {
                "provider": "local",
                "model": "toy",
                "base_url": url,
                "api_key_env": "JUDGE_KEY",
            },
        },
        "ppo": {"num_steps": 2, "batch_size": 8, "num_epochs": 1},
        "evaluation": {"num_prompts": 4, "num_shown": 2},
        "checkpoint": {"every": 1, "keep_when_done": True},
    }


def klippo(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        name: f"{CANARY}-{name}" for name in VARIABLES if name != "HF_TOKEN"
    }
    return subprocess.run(
        [sys.executable, "-m", "klippo", *words],
        capture_output=True, text=True, cwd=folder, check=False, timeout=300,
        env=environment | {"HF_TOKEN": f"hf_{CANARY}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def assert_nowhere(folder: Path, *done: subprocess.CompletedProcess[str]) -> None:
    """No part of the canary in any file, its name, or what was said."""
    for one in done:
        assert "CANARY" not in one.stdout + one.stderr
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 2
    for path in files:
        assert "CANARY" not in str(path.relative_to(folder))
        assert b"CANARY" not in path.read_bytes(), path


def test_a_run_and_its_report_hold_no_key_of_the_environment(tmp_path: Path) -> None:
    """The judge says the key back in every answer; log files, cache, report and card are read."""

    def echo(hit: Hit) -> Step:
        key = hit.headers["authorization"].removeprefix("Bearer ")
        return ok(f"Your key is {key}.\nScore: {len(str(hit.body)) % 11}")

    with FaultServer(otherwise=echo) as server:
        (tmp_path / "run.yaml").write_text(json.dumps(config(server.url)))
        trained = klippo(tmp_path, "train", "run.yaml")
        assert trained.returncode == 0, trained.stderr
        assert server.hits[0].headers["authorization"] == f"Bearer {CANARY}-JUDGE_KEY"
        others = [
            klippo(tmp_path, "report", "run"),
            klippo(tmp_path, "doctor", "--json"),
            klippo(tmp_path, "config", "show", "run.yaml"),
        ]
    assert [one.returncode for one in others] == [0, 0, 0]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "config.yaml", "started.json", "run_status.json", "report.html", "checkpoints", "model",
    }  # fmt: skip
    assert (tmp_path / "runs/judge.sqlite").is_file()
    assert_nowhere(tmp_path, trained, *others)


def test_a_run_that_fails_with_the_key_in_the_answer_says_it_nowhere(tmp_path: Path) -> None:
    answers = [ok("Score: 5")] * 13

    def refuse(hit: Hit) -> Step:
        return error(401, f"Incorrect API key provided: {hit.headers['authorization']}")

    with FaultServer(answers, otherwise=refuse) as server:
        (tmp_path / "run.yaml").write_text(json.dumps(config(server.url)))
        done = klippo(tmp_path, "train", "run.yaml")
    assert done.returncode == 4, done.stderr
    assert json.loads((tmp_path / "run/run_status.json").read_text())["state"] == "failed"
    assert_nowhere(tmp_path, done)


@pytest.mark.parametrize(
    "api",
    [
        {"api_key": CANARY},
        {"token": CANARY},
        {"api_key_env": CANARY},
        {"base_url": f"https://user:{CANARY}@judge.example/v1"},
        {"base_url": f"https://judge.example/v1?key={CANARY}"},
    ],
    ids=["key", "token", "in the place of a name", "in an address", "in a query"],
)
@pytest.mark.parametrize("how", ["file", "command line"])
def test_a_key_written_into_a_config_is_refused_and_not_said_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch, api, how: str
) -> None:
    from klippo.cli.main import app

    monkeypatch.chdir(tmp_path)
    given = config("https://judge.example/v1")
    words: list[str] = []
    if how == "file":
        given["reward"]["api"] |= api  # type: ignore[index]
    else:
        words = [f"reward.api.{name}={value}" for name, value in api.items()]
    (tmp_path / "run.yaml").write_text(json.dumps(given))
    with pytest.raises(SystemExit) as ended:
        app(["train", "run.yaml", *words], prog_name="klippo")
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "CANARY" not in said.out + said.err
    assert "api_key_env" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
