"""Klippo's arm: PPO on the shared workload through PPOTrainer; prints one JSON line.

python benchmarks/klippo_ppo.py --critic trunk --updates 4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import workload as shared
from prepare_smollm import SMOLLM
from workload import W1, Workload

PHASES = ("generate", "forward", "score", "update")


def run(workload: Workload, tokenizer_folder: Path, *, critic: str, updates: int) -> dict[str, Any]:
    """Train `updates` PPO steps; `critic` is trunk or separate."""
    from klippo import PPOTrainer

    torch.set_num_threads(workload.num_threads)
    tokenizer = shared.load_tokenizer(tokenizer_folder)
    policy = shared.build_policy(workload, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        reward_folder = Path(scratch) / "reward"
        reward_model = shared.build_scorer(workload, tokenizer, seed=1)
        reward_model.save_pretrained(reward_folder)
        tokenizer.save_pretrained(reward_folder)
        del reward_model
        trainer = PPOTrainer(
            settings(workload, reward_folder, Path(scratch) / "run", critic, updates),
            policy=policy,
            prompts=shared.prompts(),
            tokenizer=tokenizer,
            quiet=True,
        )
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.train()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        lines = (trainer.output_dir / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    seconds = [step["time/step_s"] for step in metrics]
    return shared.report(
        f"klippo, critic {critic}",
        workload,
        seconds,
        {name: [step[f"time/{name}_s"] for step in metrics] for name in PHASES},
        vocabulary=len(tokenizer),
        cpu_s_per_update=round(cpu / updates, 3),
        outside_updates_s=round(wall - sum(seconds), 3),
        response_length=sorted({step["response/length_tokens"] for step in metrics}),
        optimizer_steps_per_update=sorted({step["update/num_optimizer_steps"] for step in metrics}),
        parameters_policy_and_critic=shared.num_parameters(trainer.session.policy),
    )


def settings(
    workload: Workload, reward_folder: Path, output_dir: Path, critic: str, updates: int
) -> dict[str, Any]:
    """The workload as a config; what it does not name stays at Klippo's defaults."""
    return {
        "seed": workload.seed,
        "device": "cpu",
        "num_threads": workload.num_threads,
        "output_dir": str(output_dir),
        "critic": {"kind": critic},
        "rollout": {"response_length": workload.response_length, "stop_at_eos": False},
        "reward": {"kind": "classifier", "model": str(reward_folder)},
        "kl": {"coef": workload.kl_coef},
        "ppo": {
            "num_steps": updates,
            "batch_size": workload.batch_size,
            "minibatch_size": workload.batch_size // workload.num_minibatches,
            "num_epochs": workload.num_epochs,
            "clip_range": workload.clip_range,
            "value_coef": workload.value_coef,
            "gae_lambda": workload.gae_lambda,
        },
        "optimizer": {"learning_rate": workload.learning_rate},
        "evaluation": {"num_prompts": 0},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--critic", choices=("trunk", "separate"), default="trunk")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--tokenizer", type=Path, default=SMOLLM)
    arguments = parser.parse_args()
    shared.print_result(
        run(W1, arguments.tokenizer, critic=arguments.critic, updates=arguments.updates)
    )


if __name__ == "__main__":
    main()
