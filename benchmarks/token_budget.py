"""Micro-batches by a budget of tokens against fixed ones, responses of unlike lengths, in turn.

    python benchmarks/token_budget.py --pairs 3

Both arms have the same weights, rows and memory: the fixed size is what the budget holds of rows
as long as the longest. Prints and writes benchmarks/results/token_budget.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import workload as shared
from lean_update import copied, timed
from prepare_smollm import SMOLLM
from sections.token_budget import section
from workload import W1

from klippo.policy.loading import LoadedPolicy, load_policy
from klippo.policy.settings import CriticSettings, PolicySettings
from klippo.ppo.learner import Learner
from klippo.ppo.settings import PPOSettings
from klippo.ppo.update import parts_of
from klippo.rollouts.collate import collate
from klippo.types import Completion, Prompt, Rollout, Scores, TokenBatch

FILE = Path(__file__).parent / "results" / "token_budget.json"
SHORTEST, LONGEST = 10, 200
FIXED = 8
NUM_EPOCHS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = shared.load_tokenizer(SMOLLM)
    rollout = ragged_rollout(tokenizer)
    widest = rollout.tokens.prompt_ids.shape[1] + rollout.tokens.response_ids.shape[1]
    start = load_policy(
        PolicySettings(model="W1"),
        CriticSettings(),
        torch.device("cpu"),
        model=shared.build_policy(W1, tokenizer),
        tokenizer=tokenizer,
    )
    arms = {
        "fixed": {"micro_batch_size": FIXED},
        "budget": {"micro_batch_tokens": FIXED * widest},
    }
    done = [{name: step(copied(start), rollout, arm) for name, arm in arms.items()}]
    for _ in range(pairs):  # the first pair, above, lays memory out
        done.append({name: step(copied(start), rollout, arm) for name, arm in arms.items()})
        print({name: round(arm["update_cpu_s"], 2) for name, arm in done[-1].items()}, flush=True)
    result = {
        "kind": "token_budget",
        "name": "Micro-batches by tokens",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/token_budget.py --pairs {pairs}",
        "lengths": [SHORTEST, LONGEST],
        "batch_size": W1.batch_size,
        "micro_batch_size": FIXED,
        "micro_batch_tokens": FIXED * widest,
        "real_tokens": int(rollout.tokens.prompt_mask.sum() + rollout.tokens.response_mask.sum()),
        "arms": {
            name: {
                "num_micro_batches": done[0][name]["num_parts"],
                "padded_tokens": done[0][name]["padded"],
                **{
                    key: round(statistics.median(pair[name][key] for pair in done[1:]), 3)
                    for key in SECONDS
                },
            }
            for name in arms
        },
        "ratios": {
            key: [round(pair["fixed"][key] / pair["budget"][key], 3) for pair in done[1:]]
            for key in SECONDS
        },
        "largest_loss_difference": max(loss_difference(pair) for pair in done),
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    FILE.write_text(json.dumps(result, indent=1) + "\n")
    print(section(result))


SECONDS = ("forward_cpu_s", "update_cpu_s")


def ragged_rollout(tokenizer: Any) -> Rollout:
    """The workload's prompts with random responses, lengths drawn evenly from 10 to 200."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (W1.batch_size,), generator=generator).tolist()
    prompts, completions = [], []
    for i, (text, length) in enumerate(zip(shared.prompts(), lengths, strict=False)):
        prompts.append(Prompt(id=i, text=text, token_ids=tokenizer(text)["input_ids"]))
        ids = torch.randint(len(tokenizer), (length,), generator=generator)
        completions.append(Completion(token_ids=ids.tolist(), finished=True))
    return collate(prompts, completions, tokenizer, temperature=1.0, device=torch.device("cpu"))


def step(loaded: LoadedPolicy, rollout: Rollout, arm: Mapping[str, int]) -> dict[str, Any]:
    """Forward phase and update of one PPO step."""
    ppo = PPOSettings.model_validate({"batch_size": W1.batch_size, "num_epochs": NUM_EPOCHS, **arm})
    learner = Learner(loaded.policy, loaded.reference, ppo=ppo)
    forward, _, forward_cpu_s = timed(lambda: learner.forward(rollout))
    reward = torch.randn(W1.batch_size, generator=torch.Generator().manual_seed(1))
    experience = learner.experience(rollout, Scores(reward=reward), forward)
    metrics, _, update_cpu_s = timed(lambda: learner.learn(experience))
    parts = parts_of(ppo, rollout.tokens)
    return {
        "forward_cpu_s": forward_cpu_s,
        "update_cpu_s": update_cpu_s,
        "metrics": metrics,
        "num_parts": len(parts),
        "padded": sum(width_of(rollout.tokens.rows(rows)) * len(rows) for rows in parts),
    }


def width_of(tokens: TokenBatch) -> int:
    return tokens.prompt_ids.shape[1] + tokens.response_ids.shape[1]


def loss_difference(pair: Mapping[str, Mapping[str, Any]]) -> float:
    one, other = pair["fixed"]["metrics"], pair["budget"]["metrics"]
    names = [name for name in one if name.startswith("loss/")]
    return max(abs(float(one[name]) - float(other[name])) for name in names)


if __name__ == "__main__":
    main()
