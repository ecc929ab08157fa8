"""Faults injected into real runs: each is named, and the last good checkpoint stays.

Damaged checkpoints and cut metrics are in test_resume.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from klippo import PPOTrainer
from klippo.errors import HealthError, NotFiniteRewardError
from klippo.runs.folder import read_rows
from tests.train.test_resume import EVERY_STEP, fingerprint, lengths, run_until

FAST = {"learning_rate": 0.3}


@pytest.fixture
def config(gpt2: Path, prompts_file: Path, tmp_path: Path) -> dict:
    return {
        "output_dir": str(tmp_path / "run"),
        "policy": {"model": str(gpt2)},
        "data": {"train": str(prompts_file)},
        "rollout": {"response_length": 6},
        "ppo": {"num_steps": 6, "batch_size": 16, "num_epochs": 2, "minibatch_size": 8},
        "optimizer": {"learning_rate": 3e-3},
        "evaluation": {"num_prompts": 4, "num_shown": 0},
        "checkpoint": EVERY_STEP,
    }


def status_of(run: Path) -> dict:
    return json.loads((run / "run_status.json").read_text())


def checkpoints_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def stopping(*names: str) -> dict:
    return {"health": dict.fromkeys(names, "stop")}


def test_a_healthy_demo_run_fires_no_rail(cli, tmp_path) -> None:
    run = tmp_path / "demo"
    code, out, err = cli(
        "train", "quickstart", f"output_dir={run}", "ppo.num_steps=4", "ppo.batch_size=32",
        "ppo.minibatch_size=16", "evaluation.num_prompts=0", "gold=null",
    )  # fmt: skip
    assert code == 0, err
    assert "Health check" not in out
    assert "health" not in status_of(run)
    assert "- Health checks: none fired" in (run / "MODEL_CARD.md").read_text()
    for row in read_rows(run / "metrics.jsonl"):
        assert 0.9 < row["policy/largest_ratio_mean"] < 1.1
        assert 0 <= row["policy/largest_update_kl_nats_per_token"] < 0.1
        assert row["value/mean_squared_error"] < 2 * row["value/mean_squared_return"]
        assert row["response/repeated_share"] < 0.05


def test_a_learning_rate_a_hundred_times_too_high_is_named_and_undone(config, tmp_path) -> None:
    """The run goes on with it from step 3; with the old one, from the checkpoint, to the end."""
    run_until(config | {"output_dir": str(tmp_path / "whole")}, None)
    run_until(config, 3)
    fast = config | {"optimizer": FAST} | stopping("kl_explosion", "ratio_explosion")
    with pytest.raises(HealthError) as stopped:
        PPOTrainer(fast, reward=lengths, quiet=True, resume=True).train()
    assert stopped.value.exit_code == 6
    assert stopped.value.check in ("kl_explosion", "ratio_explosion")
    status = status_of(tmp_path / "run")
    assert status["stopped_by"] == stopped.value.check
    assert 4 <= status["num_steps_done"] <= 5  # within two updates
    assert "optimizer.learning_rate" in status["health"][stopped.value.check]["diagnosis"]
    assert status["checkpoint_step"] == 3
    assert status["resume"].endswith("--resume")
    assert stopped.value.check in (tmp_path / "run/report.html").read_text()
    run_until(config, None, resume=True)
    ours, whole = (fingerprint(tmp_path / name) for name in ("run", "whole"))
    assert ours == whole


def test_the_model_of_a_stopped_run_is_that_of_the_checkpoint(config, tmp_path) -> None:
    run_until(config | {"ppo": config["ppo"] | {"num_steps": 3}}, None)
    run_until(config | {"output_dir": str(tmp_path / "stopped")}, 3)
    fast = config | {"output_dir": str(tmp_path / "stopped"), "optimizer": FAST}
    with pytest.raises(HealthError):
        PPOTrainer(
            fast | stopping("kl_explosion", "ratio_explosion"),
            reward=lengths,
            quiet=True,
            resume=True,
        ).train()
    good, kept = (tmp_path / f"{name}/model/model.safetensors" for name in ("run", "stopped"))
    assert kept.read_bytes() == good.read_bytes()


def test_what_a_rollout_shows_stops_the_run_before_its_policy_is_a_checkpoint(
    config, tmp_path
) -> None:
    """One optimizer step per update: only the next rollout can show what it did."""
    alone = config | {"ppo": config["ppo"] | {"num_epochs": 1, "minibatch_size": 16}}
    run_until(alone, 3)
    fast = alone | {"optimizer": FAST} | stopping("kl_explosion")
    with pytest.raises(HealthError, match="kl_explosion at step 4: the KL to the reference"):
        PPOTrainer(fast, reward=lengths, quiet=True, resume=True).train()
    assert checkpoints_of(tmp_path / "run")[-1] == "step-00000003"
    assert status_of(tmp_path / "run")["checkpoint_step"] == 3
    assert read_rows(tmp_path / "run/metrics.jsonl")[-1]["step"] == 4  # the evidence


def test_a_checkpoint_that_no_rail_had_seen_is_set_aside(config, tmp_path) -> None:
    """The reward fails right after the bad update, so that the run leaves its policy behind."""
    run_until(config, 3)
    run_until(config | {"optimizer": FAST}, 0, resume=True)  # fails in the second step from here
    assert checkpoints_of(tmp_path / "run")[-1] == "step-00000004"
    with pytest.raises(HealthError, match="kl_explosion at step 4"):
        PPOTrainer(
            config | {"optimizer": FAST} | stopping("kl_explosion"),
            reward=lengths, quiet=True, resume=True,
        ).train()  # fmt: skip
    names = checkpoints_of(tmp_path / "run")
    assert "suspect-step-00000004" in names
    assert [name for name in names if name.startswith("step-")][-1] == "step-00000003"
    assert status_of(tmp_path / "run")["checkpoint_step"] == 3


@pytest.mark.parametrize(("value", "shown"), [("nan", "nan"), ("inf", "inf")])
def test_a_reward_that_is_not_finite_is_named_with_its_row_and_prompt(
    cli, write_config, tmp_path, value, shown
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        "calls = []\n"
        "def broken(responses):\n"
        "    calls.append(1)\n"
        "    scores = [float(len(r)) for r in responses]\n"
        f"    scores[5] = float('{value}') if len(calls) == 3 else 0.0\n"
        "    return scores\n"
    )
    reward = {"kind": "function", "function": f"{file}:broken"}
    config = write_config(reward=reward, evaluation={"num_prompts": 0}, checkpoint=EVERY_STEP)
    code, _, err = cli("train", config)
    assert code == 4
    assert f"returned {shown} for row 5 (prompt 'the" in err
    assert "health.reward_not_finite=skip" in err
    status = status_of(tmp_path / "run")
    assert status["stopped_by"] == "reward_not_finite"
    assert status["checkpoint_step"] == 2  # the policy before it, which it never reached
    assert status["health"]["reward_not_finite"]["first_step"] == 2
    assert "reward_not_finite" in (tmp_path / "run/report.html").read_text()

    file.write_text(file.read_text().replace("len(calls) == 3", "len(calls) == 1"))
    code, out, err = cli("train", config, "--resume", "health.reward_not_finite=skip")
    assert code == 0, err
    assert "Health check reward_not_finite at step 2: 1 rewards of the batch" in out
    last = read_rows(tmp_path / "run/metrics.jsonl")[-1]
    assert last["reward/scored_share"] == pytest.approx(15 / 16)
    assert last["reward/num_not_finite"] == 1


def test_a_source_of_ones_own_that_overflows_is_named_too(config) -> None:
    class Overflows:
        def score(self, rollout):
            from klippo.types import Scores

            return Scores(reward=torch.tensor([1.0, float("-inf")] * (len(rollout) // 2)))

    with pytest.raises(NotFiniteRewardError, match=r"Overflows.score returned -inf for row 1 \("):
        PPOTrainer(config, reward=Overflows(), quiet=True).train()


@pytest.mark.parametrize("fault", ["huge constant", "garbage"])
def test_a_broken_critic_is_named_within_two_updates(config, tmp_path, fault) -> None:
    def reward(responses: list[str]) -> list[float]:
        head = trainer.session.policy.critic.head
        if trainer.session.learner.num_steps_done == 2:  # after the values of step 2 were taken
            with torch.no_grad():
                if fault == "garbage":
                    head.weight.normal_(std=30, generator=torch.Generator().manual_seed(0))
                else:
                    head.bias.fill_(1e3)
        return [float(len(text)) for text in responses]

    trainer = PPOTrainer(config | stopping("value_failure"), reward=reward, quiet=True)
    with pytest.raises(HealthError, match="value_failure at step 3: the mean squared error"):
        trainer.train()
    assert status_of(tmp_path / "run")["stopped_by"] == "value_failure"
    assert checkpoints_of(tmp_path / "run")[-1] == "step-00000002"


def test_a_loss_that_is_not_finite_is_named_and_can_be_left_out(config, tmp_path) -> None:
    def trained(**more):
        def reward(responses: list[str]) -> list[float]:
            if trainer.session.learner.num_steps_done == 1:
                trainer.session.policy.critic.head.bias.data.fill_(float("nan"))
            return [float(len(text)) for text in responses]

        changed = config | {"checkpoint": {"every_minutes": None}} | more
        trainer = PPOTrainer(changed, reward=reward, quiet=True, overwrite=True)
        trainer.train()

    with pytest.raises(HealthError, match="loss_not_finite at step 1: the loss of 4 minibatch"):
        trained()
    trained(health={"loss_not_finite": "skip"})
    record = status_of(tmp_path / "run")["health"]["loss_not_finite"]
    assert (record["action"], record["first_step"], record["num_steps"]) == ("skip", 1, 5)


def test_rails_of_a_run_that_went_on_remember_what_they_saw(config, tmp_path) -> None:
    eager = config | {"health": {"max_kl_jump": 1e-7, "max_length_factor": 1.01}}
    run_until(eager | {"output_dir": str(tmp_path / "whole")}, None)
    run_until(eager, 3)
    run_until(eager, None)
    ours, whole = (status_of(tmp_path / name)["health"] for name in ("run", "whole"))
    assert whole["kl_explosion"]["num_steps"] == 6
    assert ours == whole


def test_an_impossible_action_is_refused_with_the_reason(cli, write_config) -> None:
    code, _, err = cli("train", write_config(health={"repetition": "skip"}))
    assert code == 2
    assert "health.repetition=skip: this check sees what updates have done" in err


ON_A_SMALL_DISK = """
import json, subprocess, sys
from pathlib import Path

disk, config = Path(sys.argv[1]), sys.argv[2]
train = [sys.executable, "-m", "klippo", "train", config]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(disk)], check=True)
full = subprocess.run(train, capture_output=True, text=True)
checkpoints = sorted(p.name for p in (disk / "run/checkpoints").glob("step-*"))
status = (disk / "run/run_status.json").read_text()
lines = (disk / "run/metrics.jsonl").read_text()
subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
again = subprocess.run(train, capture_output=True, text=True)
done = json.loads((disk / "run/run_status.json").read_text())
print(json.dumps([full.returncode, full.stderr, checkpoints, json.loads(status), lines,
                  again.returncode, again.stdout + again.stderr, done["num_steps_done"]]))
"""


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    write_config, tmp_path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    can = shutil.which("unshare") and subprocess.run(
        [*alone, "mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not can or can.returncode != 0:
        pytest.skip("this system lets nobody mount a small disk of one's own")
    config = write_config(
        output_dir=str(disk / "run"),
        ppo={"num_steps": 5, "batch_size": 8, "num_epochs": 1},
        evaluation={"num_prompts": 0},
        checkpoint=EVERY_STEP | {"keep": 5},
    )
    ended = subprocess.run(
        [*alone, sys.executable, "-c", ON_A_SMALL_DISK, str(disk), str(config)],
        env={"OMP_NUM_THREADS": "1"} | os.environ, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    told = json.loads(ended.stdout)
    code, err, checkpoints, status, lines, code_again, out_again, done = told
    assert code == 3
    assert "No space left on device" in err
    assert "free some space or choose another output_dir" in err
    assert checkpoints
    assert status["state"] == "failed"
    assert "No space left on device" in status["reason"]
    assert status["checkpoint_step"] == int(checkpoints[-1].removeprefix("step-"))
    assert all(json.loads(line) for line in lines.splitlines())
    assert (code_again, done) == (0, 5), out_again
