"""What reusing work saves in one process: the same step with and without it, taking turns.

    python benchmarks/lean_update.py --pairs 3

Frozen blocks with their output kept against frozen blocks in every pass, the last 2 layers trained.
Both arms start from the same weights in every pair and must give the same gradients and losses.
Prints and writes benchmarks/results/lean_update.json and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
import workload as shared
from page import RESULTS, write_page
from prepare_smollm import SMOLLM
from workload import W1, Workload

from klippo.policy.loading import LoadedPolicy, load_policy
from klippo.policy.settings import CriticSettings, PolicySettings
from klippo.ppo.learner import Learner
from klippo.ppo.settings import PPOSettings
from klippo.rollouts.collate import collate
from klippo.types import Completion, Prompt, Rollout, Scores

NUM_UNFROZEN = 2
W2_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = shared.load_tokenizer(SMOLLM)
    cases = {
        "W1": (shared.build_policy(W1, tokenizer), W1),
        "W2 (SmolLM2-135M, 30 layers)": (smollm(), Workload(batch_size=W2_BATCH)),
    }
    result = {
        "kind": "lean_update",
        "name": "Frozen layers run once",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/lean_update.py --pairs {arguments.pairs}",
        "num_pairs": arguments.pairs,
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "cases": [
            compare(name, model, tokenizer, work, arguments.pairs)
            for name, (model, work) in cases.items()
        ],
    }
    (RESULTS / "lean_update.json").write_text(json.dumps(result, indent=1) + "\n")
    write_page()


def smollm() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.float32)


def compare(name: str, model: Any, tokenizer: Any, work: Workload, pairs: int) -> dict[str, Any]:
    """Medians over pairs of (every block in every pass) / (frozen blocks once)."""
    rollout = make_rollout(tokenizer, work)
    settings = PolicySettings(model=name, tuning="last_layers", num_unfrozen_layers=NUM_UNFROZEN)
    start = load_policy(
        settings, CriticSettings(), torch.device("cpu"), model=model, tokenizer=tokenizer
    )
    assert start.policy.lm.frozen is not None
    done = []
    for _ in range(pairs):
        whole = step(without_reuse(copied(start)), rollout, work)
        kept = step(copied(start), rollout, work)
        done.append((whole, kept))
        print(name, {k: round(whole[k] / kept[k], 2) for k in SECONDS}, flush=True)
    differences = [difference(whole, kept) for whole, kept in done]
    return {
        "name": name,
        "ratios": {
            key: [round(whole[key] / kept[key], 3) for whole, kept in done] for key in SECONDS
        },
        "seconds": {
            arm: {
                key: round(statistics.median(pair[i][key] for pair in done), 3) for key in SECONDS
            }
            for i, arm in enumerate(("whole", "kept"))
        },
        "largest_gradient_difference": max(one[0] for one in differences),
        "largest_loss_difference": max(one[1] for one in differences),
        "kept_mb": round(done[0][1]["kept_bytes"] / 1e6, 1),
    }


SECONDS = ("forward_s", "update_s", "update_cpu_s")


def make_rollout(tokenizer: Any, work: Workload) -> Rollout:
    """Prompts of the workload with random responses of its length."""
    generator = torch.Generator().manual_seed(0)
    prompts, completions = [], []
    for i, text in enumerate(shared.prompts()[: work.batch_size]):
        prompts.append(Prompt(id=i, text=text, token_ids=tokenizer(text)["input_ids"]))
        ids = torch.randint(len(tokenizer), (work.response_length,), generator=generator)
        completions.append(Completion(token_ids=ids.tolist(), finished=False))
    return collate(prompts, completions, tokenizer, temperature=1.0, device=torch.device("cpu"))


def copied(start: LoadedPolicy) -> LoadedPolicy:
    """The same models once more, so that every step begins at the same weights."""
    policy, reference = copy.deepcopy((start.policy, start.reference))
    return LoadedPolicy(policy=policy, reference=reference, tokenizer=start.tokenizer)


def without_reuse(loaded: LoadedPolicy) -> LoadedPolicy:
    loaded.policy.lm.frozen = loaded.reference.lm.frozen = None
    return loaded


def step(loaded: LoadedPolicy, rollout: Rollout, work: Workload) -> dict[str, Any]:
    """One PPO step: seconds of its phases, its losses, the gradients of its first pass."""
    learner = Learner(
        loaded.policy,
        loaded.reference,
        ppo=PPOSettings(batch_size=work.batch_size, num_epochs=work.num_epochs),
    )
    gradients: list[dict[str, torch.Tensor]] = []

    def keep(*_: Any) -> None:
        if not gradients:
            found = {n: p.grad for n, p in loaded.policy.named_parameters() if p.grad is not None}
            gradients.append({name: grad.clone() for name, grad in found.items()})

    learner.optimizer.adam.register_step_pre_hook(keep)
    forward, forward_s, _ = timed(lambda: learner.forward(rollout))
    reward = torch.randn(work.batch_size, generator=torch.Generator().manual_seed(1))
    experience = learner.experience(rollout, Scores(reward=reward), forward)
    metrics, update_s, update_cpu_s = timed(lambda: learner.learn(experience))
    states = experience.tokens.frozen_states
    return {
        "forward_s": forward_s,
        "update_s": update_s,
        "update_cpu_s": update_cpu_s,
        "metrics": metrics,
        "gradients": gradients[0],
        "kept_bytes": 0 if states is None else states.nbytes,
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall seconds, processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of a gradient, and of a loss."""
    pairs = zip(one["gradients"].values(), other["gradients"].values(), strict=True)
    losses = [name for name in one["metrics"] if name.startswith("loss/")]
    return (
        max(float((a - b).abs().max()) for a, b in pairs),
        max(abs(one["metrics"][name] - other["metrics"][name]) for name in losses),
    )


if __name__ == "__main__":
    main()
