"""What four more reward models cost a whole PPO step: an ensemble of five against one, in turn.

    python benchmarks/ensemble_step.py --pairs 5

The demo's policy and reward models as `rm-ensemble-demo` has them, and W1's policy (a model of 16
million numbers, vocabulary 49,152) with the demo's reward models. Writes
benchmarks/results/ensemble_step.json and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
import workload as shared
from page import RESULTS, write_page
from prepare_smollm import SMOLLM
from workload import W1

NUM_MEMBERS = 5
ARMS: Mapping[str, Mapping[str, Any]] = {
    "one": {"kind": "classifier", "model": "demo:proxy_seed1"},
    "five": {
        "kind": "ensemble",
        "members": ["demo:proxy_seed{seed}"],
        "objective": "UWO",
        "uwo_weight": 0.5,
    }
    | {"seeds": list(range(1, NUM_MEMBERS + 1))},
}
PHASES = ("generate", "forward", "score", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    result = {
        "kind": "ensemble_step",
        "name": "A step with five reward models",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/ensemble_step.py --pairs {pairs}",
        "num_threads": torch.get_num_threads(),
        "cases": [
            compare("demo, as in rm-ensemble-demo", demo_step, pairs),
            compare("W1's policy, the demo's reward models", w1_step, pairs),
        ],
        "load_average": round(os.getloadavg()[0], 2),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    (RESULTS / "ensemble_step.json").write_text(json.dumps(result, indent=1) + "\n")
    write_page()


def demo_step(reward: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The recipe's policy, data and sizes."""
    return {
        "output_dir": folder,
        "policy": {"model": "demo:policy"},
        "data": {"train": "demo:prompts"},
        "rollout": {"response_length": 24},
        "reward": dict(reward),
        "ppo": {"batch_size": 128, "num_epochs": 2, "minibatch_size": 64, "value_coef": 0.2},
        "optimizer": {"learning_rate": 1e-4},
    }


def w1_step(reward: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """W1 with random weights."""
    tokenizer = shared.load_tokenizer(SMOLLM)
    shared.build_policy(W1, tokenizer).save_pretrained(f"{folder}/policy")
    tokenizer.save_pretrained(f"{folder}/policy")
    return {
        "output_dir": folder,
        "policy": {"model": f"{folder}/policy"},
        "data": {"train": "demo:prompts"},
        "rollout": {"response_length": W1.response_length, "stop_at_eos": False},
        "reward": dict(reward),
        "ppo": {"batch_size": W1.batch_size, "num_epochs": W1.num_epochs},
    }


def compare(name: str, config_of: Any, pairs: int) -> dict[str, Any]:
    """Processor seconds by phase of both arms, and ratios of whole steps."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as five:
        folders = {"one": one, "five": five}
        sessions = {arm: opened(config_of(reward, folders[arm])) for arm, reward in ARMS.items()}
    for session in sessions.values():  # memory is laid out in the first step
        step(session)
    done = []
    for _ in range(pairs):
        done.append({arm: step(session) for arm, session in sessions.items()})
        print(name, {arm: round(sum(spent.values()), 2) for arm, spent in done[-1].items()})
    return {
        "name": name,
        "ratios": [
            round(sum(pair["five"].values()) / sum(pair["one"].values()), 3) for pair in done
        ],
        "seconds": {
            arm: {
                phase: round(statistics.median(pair[arm][phase] for pair in done), 3)
                for phase in PHASES
            }
            for arm in ARMS
        },
    }


def opened(config: Mapping[str, Any]) -> Any:
    """A session: models loaded, nothing sampled."""
    from klippo.config.load import config_from_mapping
    from klippo.train.prepare import prepare
    from klippo.train.session import open_session

    options = {"device": "cpu", "num_threads": torch.get_num_threads()}
    return open_session(prepare(config_from_mapping({**config, **options})))


def step(session: Any) -> dict[str, float]:
    """One PPO step: processor seconds of its phases."""
    marks = [time.process_time()]
    rollout = session.source.next()
    marks.append(time.process_time())
    forward = session.learner.forward(rollout)
    marks.append(time.process_time())
    experience = session.learner.experience(rollout, session.score(rollout), forward)
    marks.append(time.process_time())
    session.learner.learn(experience)
    marks.append(time.process_time())
    return {name: b - a for name, a, b in zip(PHASES, marks, marks[1:], strict=False)}


if __name__ == "__main__":
    main()
