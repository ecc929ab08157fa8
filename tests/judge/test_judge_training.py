"""PPO end to end against a judge behind a socket, with and without faults."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from klippo import PPOTrainer
from klippo.errors import JudgeError
from klippo.lab.gold_eval import gold_eval
from tests.judge.servers import api, serving


def config(server: Any, folder: Path, **judge: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "policy": {"model": "demo:policy"},
        "data": {"train": "demo:prompts"},
        "rollout": {"response_length": 16},
        "reward": {"kind": "judge", "api": api(server), "probes": False} | judge,
        "kl": {"coef": 0.05},
        "ppo": {"num_steps": 2, "batch_size": 16, "num_epochs": 2, "minibatch_size": 8},
        "optimizer": {"learning_rate": 2e-4},
        "evaluation": {"num_prompts": 8, "num_shown": 2},
    }


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_against_a_judge_masks_what_has_no_score(workplace: Path) -> None:
    with serving(faults=0.15, kinds=("chat",)) as server:
        given = config(server, workplace / "run", max_unscored_step=1, max_unscored_run=1)
        PPOTrainer(given, quiet=True).train()
        shares = [step["reward/scored_share"] for step in metrics(workplace / "run")]
        assert min(shares) < 1
        assert all(share > 0.5 for share in shares)
        hits = server.hits
        assert hits > 0
        PPOTrainer(given, quiet=True, overwrite=True).train()  # the same run again
        assert server.hits == hits  # is free


def test_gold_by_a_judge_is_added_to_a_run(workplace: Path) -> None:
    with serving() as server:
        PPOTrainer(config(server, workplace / "run"), quiet=True).train()
        gold = {"kind": "judge", "api": api(server, model="gold"), "probes": False}
        (workplace / "gold.yaml").write_text(json.dumps(gold))
        assert gold_eval(workplace / "run", str(workplace / "gold.yaml")) == 0
    rows = [json.loads(x) for x in (workplace / "run/eval/step-2.jsonl").read_text().splitlines()]
    assert rows[0]["gold_model"].startswith("judge gold by general #")
    assert all(-1 <= row["gold"] <= 1 for row in rows)


def test_a_judge_without_scores_ends_the_run_before_the_policy_is_loaded(workplace: Path) -> None:
    with (
        serving(faults=1.0, kinds=("chat",)) as server,
        pytest.raises(JudgeError, match="gave no score on a plain sample"),
    ):
        PPOTrainer(config(server, workplace / "run"), quiet=True)
    assert not (workplace / "run").exists()


def test_a_killed_run_pays_no_answer_twice_and_ends_with_the_same_bytes(workplace: Path) -> None:
    """Killed twice with SIGKILL, each time after a checkpoint; every run has a cache of its own."""
    ends, hits = {}, {}
    for name, kills in (("whole", ()), ("killed", ("step-00000001", "step-00000003"))):
        folder = workplace / name
        folder.mkdir()
        with serving() as server:
            given = config(server, folder / "run", api=api(server, concurrency=4))
            given["ppo"] |= {"num_steps": 4}
            given["checkpoint"] = {"every": 1}
            (folder / "run.yaml").write_text(json.dumps(given))
            for checkpoint in (*kills, None):
                kill_after(folder, checkpoint)
            hits[name] = server.hits
        lines = metrics(folder / "run")
        own = ("time/", "throughput/", "memory/", "judge/")
        ends[name] = (
            [{k: v for k, v in line.items() if not k.startswith(own)} for line in lines],
            (folder / "run/model/model.safetensors").read_bytes(),
            (folder / "run/eval/step-4.jsonl").read_bytes(),
        )
    assert ends["killed"] == ends["whole"]
    assert hits["killed"] <= hits["whole"] + 2 * 4, "at most what was in flight is asked again"


def kill_after(folder: Path, checkpoint: str | None) -> None:
    """`klippo train`, killed when it has written that checkpoint; to its end without one."""
    command = [sys.executable, "-m", "klippo", "train", "run.yaml"]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as run:
        if checkpoint is not None:
            while not (folder / "run/checkpoints" / checkpoint).is_dir():
                assert run.poll() is None
                time.sleep(0.005)
            run.kill()
    assert run.returncode == (0 if checkpoint is None else -signal.SIGKILL)


@pytest.mark.slow
def test_the_reward_rises_as_much_with_a_tenth_of_the_answers_broken(workplace: Path) -> None:
    found = {}
    for faults in (0.0, 0.1):
        folder = workplace / f"faults{faults}"
        with serving(faults=faults) as server:
            given = config(server, folder)
            given["ppo"] |= {"num_steps": 20, "batch_size": 64, "minibatch_size": 32}
            given["evaluation"] = {"num_prompts": 128, "num_shown": 2}
            outcome = PPOTrainer(given, quiet=True).train()
            found[faults] = outcome.compared["proxy"].difference
            assert (server.num_faults > 0) == (faults > 0)
        masked = [1 - step["reward/scored_share"] for step in metrics(folder)]
        print(f"faults {faults}: change {found[faults]}, masked {sum(masked) / len(masked):.3f}")
        assert (max(masked) > 0) == (faults > 0)
        assert max(masked) < 0.25
        assert found[faults].low > 0.15
    assert abs(found[0.1].mean - found[0.0].mean) < 0.2
