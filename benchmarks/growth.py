"""How the time of an update, by phase, and the peak memory grow; what five reward models cost.

    python benchmarks/growth.py

A small policy of W1's shape with one quantity changed at a time: batch, response length,
vocabulary, reward models of the policy's size, processes. Every row runs in processes of its own,
all rows in turn in each round. Then whole PPO steps with five small reward models against steps
with one, in turn. Writes benchmarks/results/growth.json, docs/growth.png and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import growth_plot
import klippo_ppo
import measuring
import workload as shared
from page import RESULTS, write_page
from workload import W1, Shape, Workload

SHAPE = Shape(num_layers=2, width=128, vocabulary=8192)
BASE = Workload(
    name="growth", shape=SHAPE, batch_size=32, prompt_length=16, num_epochs=2, num_threads=1
)
VALUES: Mapping[str, Sequence[int]] = {
    "batch_size": (64, 128),
    "response_length": (64, 128),
    "vocabulary": (16_384, 32_768),
    "num_members": (2, 5),
    "num_processes": (2,),
}
FIVE_MEMBERS = {"members": ["demo:proxy_seed{seed}"], "seeds": [1, 2, 3, 4, 5]}
REWARDS: Mapping[str, Mapping[str, Any]] = {
    "one": {"kind": "classifier", "model": "demo:proxy_seed1"},
    "five": {"kind": "ensemble", **FIVE_MEMBERS},
}


@dataclass(frozen=True, slots=True)
class Row:
    workload: Workload = BASE
    num_processes: int = 1


def rows() -> dict[str, Row]:
    """Every row by its key, the base first."""
    found = {"base": Row()}
    for quantity, values in VALUES.items():
        for value in values:
            found[f"{quantity}={value}"] = _row(quantity, value)
    return found


def _row(quantity: str, value: int) -> Row:
    if quantity == "num_processes":
        return Row(num_processes=value)
    if quantity == "vocabulary":
        return Row(replace(BASE, shape=replace(SHAPE, vocabulary=value)))
    changed: dict[str, Any] = {quantity: value}
    return Row(replace(BASE, **changed))


def run_row(key: str, updates: int) -> dict[str, Any]:
    """One row in processes of its own."""
    script = [str(Path(__file__)), "--row", key, "--updates", str(updates)]
    number = rows()[key].num_processes
    if number == 1:
        return measuring.run_process([sys.executable, *script])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    return measuring.run_process([sys.executable, *launcher, *script])


def ensemble_steps(pairs: int, policies: Sequence[str]) -> list[dict[str, Any]]:
    """For each policy whole steps with one and with five small reward models, in turn."""
    import torch

    torch.set_num_threads(W1.num_threads)
    return [compare_members(name, pairs) for name in policies]


def compare_members(name: str, pairs: int) -> dict[str, Any]:
    """Seconds of each step and of its scoring; the first pair is not counted."""
    seconds: dict[str, list[float]] = {f"{arm}{what}": [] for arm in REWARDS for what in PARTS}
    with tempfile.TemporaryDirectory() as scratch:
        sessions = {arm: POLICIES[name](reward, scratch) for arm, reward in REWARDS.items()}
        for number in range(pairs + 1):
            for arm in sorted(REWARDS, reverse=number % 2 == 1):  # neither is always the first
                whole, scoring = timed_step(sessions[arm])
                if number > 0:
                    seconds[f"{arm}_s"].append(round(whole, 3))
                    seconds[f"{arm}_score_s"].append(round(scoring, 3))
    ratios = [
        round(five / one, 3) for one, five in zip(seconds["one_s"], seconds["five_s"], strict=True)
    ]
    print(f"{name}: five / one {ratios}", flush=True)
    return {"name": name, "ratios": ratios, **seconds}


PARTS = ("_s", "_score_s")


def timed_step(session: Any) -> tuple[float, float]:
    """Seconds of a whole PPO step, and of the scores in it."""
    start = time.perf_counter()
    rollout = session.source.next()
    forward = session.learner.forward(rollout)
    score_start = time.perf_counter()
    scores = session.score(rollout)
    scoring = time.perf_counter() - score_start
    session.learner.learn(session.learner.experience(rollout, scores, forward))
    return time.perf_counter() - start, scoring


def quickstart_session(reward: Mapping[str, Any], scratch: str) -> Any:
    """The quickstart recipe with another reward, every response of full length."""
    from klippo import PPOTrainer, load_config

    recipe = load_config("quickstart").config.model_dump(exclude_unset=True)
    config = recipe | {
        "output_dir": scratch,
        "num_threads": W1.num_threads,
        "reward": dict(reward),
        "gold": None,
        "rollout": recipe["rollout"] | {"stop_at_eos": False},
    }
    return PPOTrainer(config, quiet=True).session


def w1_session(reward: Mapping[str, Any], scratch: str) -> Any:
    """W1 with another reward."""
    from klippo import PPOTrainer

    tokenizer = shared.tokenizer_for(W1)
    config = klippo_ppo.settings(W1, ["demo:proxy"], Path(scratch), "trunk", "hf", updates=1)
    return PPOTrainer(
        config | {"reward": dict(reward)},
        policy=shared.build_policy(W1, tokenizer),
        prompts=shared.prompts(),
        tokenizer=tokenizer,
        quiet=True,
    ).session


POLICIES = {"quickstart": quickstart_session, "W1": w1_session}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3, help="the first is left out of medians")
    parser.add_argument("--pairs", type=int, default=5, help="of steps with one and five members")
    parser.add_argument("--row", choices=rows(), help="measure this one, in this process")
    arguments = parser.parse_args()
    if arguments.row is not None:
        found = klippo_ppo.run(rows()[arguments.row].workload, updates=arguments.updates)
        if found is not None:
            measuring.print_result(found)
        return
    os.environ.update(measuring.PASSIVE)
    load = os.getloadavg()[0]
    rounds = []
    for number in range(arguments.rounds):
        rounds.append({key: run_row(key, arguments.updates) for key in rows()})
        times = {key: one["median_s"] for key, one in rounds[-1].items()}
        print(f"round {number + 1}  {json.dumps(times)}", flush=True)
    result = {
        "kind": "growth",
        "name": "How it grows",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/growth.py --rounds {arguments.rounds} --updates "
        f"{arguments.updates} --pairs {arguments.pairs}",
        "base": BASE.as_dict(),
        "values": VALUES,
        "load_average": round(load, 2),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "rounds": rounds,
        "ensemble_steps": ensemble_steps(arguments.pairs, list(POLICIES)),
    }
    (RESULTS / "growth.json").write_text(json.dumps(result, indent=1) + "\n")
    growth_plot.draw(result)
    write_page()


if __name__ == "__main__":
    main()
