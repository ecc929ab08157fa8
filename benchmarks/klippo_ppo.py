"""Klippo's arm: PPO on the shared workload through PPOTrainer; prints one JSON line.

python benchmarks/klippo_ppo.py --workload w1 --critic trunk --updates 4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import flops
import measuring
import torch
import workload as shared
from prepare_smollm import SMOLLM
from workload import WORKLOADS, Workload

PHASES = ("generate", "forward", "score", "update")


def run(
    workload: Workload,
    tokenizer_folder: Path = SMOLLM,
    *,
    critic: str = "trunk",
    engine: str = "hf",
    updates: int,
) -> dict[str, Any] | None:
    """Train `updates` PPO steps; `critic` is trunk or separate, `engine` hf or vllm.

    Of several processes the first alone has a result.
    """
    from klippo import PPOTrainer

    torch.set_num_threads(workload.num_threads)
    tokenizer = shared.tokenizer_for(workload, tokenizer_folder)
    prompts = shared.prompts_for(workload, tokenizer)
    policy = shared.build_policy(workload, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        rewards = save_rewards(workload, tokenizer, Path(scratch))
        measuring.reset_gpu_peak(workload)
        trainer = PPOTrainer(
            settings(workload, rewards, Path(scratch) / "run", critic, engine, updates),
            policy=policy,
            prompts=prompts,
            tokenizer=tokenizer,
            quiet=True,
        )
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.train()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        session = trainer.session
        peak = sum(session.ranks.gather(measuring.peak_rss_gb()))
        if not session.ranks.is_main:
            return None
        lines = (trainer.output_dir / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    seconds = [step["time/step_s"] for step in metrics]
    result = measuring.report(
        f"klippo, critic {critic}, engine {engine}",
        workload,
        seconds,
        {name: [step[f"time/{name}_s"] for step in metrics] for name in PHASES},
        vocabulary=len(tokenizer),
        num_threads=torch.get_num_threads(),
        cpu_s_per_update=round(cpu / updates, 3),
        outside_updates_s=round(wall - sum(seconds), 3),
        response_length=sorted({step["response/length_tokens"] for step in metrics}),
        optimizer_steps_per_update=sorted({step["update/num_optimizer_steps"] for step in metrics}),
        parameters_policy_and_critic=shared.num_parameters(session.policy),
    )
    trunk = session.policy.critic.trunk if critic == "separate" else None
    counted = flops.of_update(
        workload,
        prompts,
        tokenizer,
        session.policy.lm.model,
        trunk,
    )
    return result | {"peak_rss_gb": round(peak, 3)} | counted


def save_rewards(workload: Workload, tokenizer: Any, folder: Path) -> list[str]:
    """Folders of the reward models, which differ by seed."""
    found = []
    for number in range(1, workload.num_members + 1):
        name = folder / f"reward{number}"
        shared.build_scorer(workload, tokenizer, seed=number).save_pretrained(name)
        tokenizer.save_pretrained(name)
        found.append(str(name))
    return found


def settings(
    workload: Workload,
    rewards: list[str],
    output_dir: Path,
    critic: str,
    engine: str,
    updates: int,
) -> dict[str, Any]:
    """The workload as a config; what it does not name stays at Klippo's defaults."""
    policy: dict[str, Any] = {"dtype": workload.dtype}
    if workload.lora_rank is not None:
        policy |= {
            "tuning": "lora",
            "lora": {"rank": workload.lora_rank, "alpha": shared.LORA_ALPHA},
        }
    reward: dict[str, Any] = {"kind": "classifier", "model": rewards[0]}
    if len(rewards) > 1:
        reward = {"kind": "ensemble", "members": rewards, "standardize": "none"}
    return {
        "seed": workload.seed,
        "device": workload.device,
        "num_threads": workload.num_threads,
        "output_dir": str(output_dir),
        "policy": policy,
        "critic": {"kind": critic},
        "rollout": {
            "engine": engine,
            "response_length": workload.response_length,
            "stop_at_eos": False,
        },
        "reward": reward | {"dtype": workload.dtype},
        "kl": {"coef": workload.kl_coef},
        "ppo": {
            "num_steps": updates,
            "batch_size": workload.batch_size,
            "minibatch_size": workload.batch_size // workload.num_minibatches,
            "micro_batch_size": workload.micro_batch_size,
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
    parser.add_argument("--workload", choices=WORKLOADS, default="w1")
    parser.add_argument("--critic", choices=("trunk", "separate"), default="trunk")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--updates", type=int, default=4)
    arguments = parser.parse_args()
    result = run(
        WORKLOADS[arguments.workload],
        critic=arguments.critic,
        engine=arguments.engine,
        updates=arguments.updates,
    )
    if result is not None:
        measuring.print_result(result)


if __name__ == "__main__":
    main()
