"""The update phase against its floor: the model's floating-point operations at the measured rate.

    python benchmarks/update_floor.py --rounds 3

One epoch (every other one is the same work) of W1, and of W2 where the model of prepare_smollm.py
is there; full fine-tuning, critic on the trunk.
Prints and writes benchmarks/results/update_floor.json and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import Counter
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import workload as shared
from lean_update import W2_BATCH, copied, make_rollout, smollm, timed
from page import RESULTS, write_page
from prepare_smollm import SMOLLM
from workload import W1, Workload

from klippo.policy.loading import load_policy
from klippo.policy.settings import CriticSettings, PolicySettings
from klippo.ppo.experience import Experience
from klippo.ppo.learner import Learner
from klippo.ppo.settings import PPOSettings
from klippo.types import Rollout, Scores

PASSES = 3
"""Forward, gradient of the input, gradient of the weight: a product of the same size each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = shared.load_tokenizer(SMOLLM)
    cases = {"W1": (shared.build_policy(W1, tokenizer), Workload(num_epochs=1))}
    if (SMOLLM / "model.safetensors").exists():
        cases["W2 (SmolLM2-135M)"] = (smollm(), Workload(batch_size=W2_BATCH, num_epochs=1))
    result = {
        "kind": "update_floor",
        "name": "The update against its floor",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/update_floor.py --rounds {arguments.rounds}",
        "num_rounds": arguments.rounds,
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "cases": [
            measure(name, model, tokenizer, work, arguments.rounds)
            for name, (model, work) in cases.items()
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "update_floor.json").write_text(json.dumps(result, indent=1) + "\n")
    write_page()


def measure(name: str, model: Any, tokenizer: Any, work: Workload, rounds: int) -> dict[str, Any]:
    """Ratios of update time to floor; the rate is measured before and after each update."""
    rollout = make_rollout(tokenizer, work)
    start = load_policy(
        PolicySettings(model=name),
        CriticSettings(),
        torch.device("cpu"),
        model=model,
        tokenizer=tokenizer,
    )
    gflop = work.num_epochs * floating_point_operations(model, rollout) / 1e9
    loaded = copied(start)
    learner = Learner(
        loaded.policy,
        loaded.reference,
        ppo=PPOSettings(batch_size=work.batch_size, num_epochs=work.num_epochs),
    )
    reward = Scores(reward=torch.randn(work.batch_size, generator=torch.manual_seed(1)))
    done = []
    for _ in range(rounds):
        experience = learner.experience(rollout, reward)
        before = rates(model, rollout)
        _, wall, cpu = timed(partial(learner.learn, experience))
        after = rates(model, rollout)
        cpu_floor, wall_floor = (
            gflop * (1 / one + 1 / other) / 2 for one, other in zip(before, after, strict=True)
        )
        done.append((cpu, cpu / cpu_floor, wall / wall_floor, cpu_floor))
        print(name, [round(x, 2) for x in done[-1]], flush=True)
    seconds, ratios, wall_ratios, floors = (list(one) for one in zip(*done, strict=True))
    middle = sorted(range(rounds), key=lambda i: ratios[i])[rounds // 2]
    return {
        "name": name,
        "gflop": round(gflop, 1),
        "gflops_per_s": round(gflop / floors[middle], 2),
        "floor_s": round(floors[middle], 3),
        "update_cpu_s": round(seconds[middle], 3),
        "ratios": [round(x, 3) for x in ratios],
        "wall_ratios": [round(x, 3) for x in wall_ratios],
        "profile": profile(learner, learner.experience(rollout, reward)),
    }


def products(model: Any, rollout: Rollout) -> list[tuple[int, int, int, int]]:
    """(rows, inputs, outputs, how many) of the forward pass's products with weights.

    Blocks see every token but the last column's; the LM head the positions that emit a response.
    """
    tokens = rollout.tokens
    rows = len(tokens) * (tokens.prompt_ids.shape[1] + tokens.response_ids.shape[1] - 1)
    head = model.get_output_embeddings().weight
    inputs = model.get_input_embeddings().weight
    found: Counter[tuple[int, int]] = Counter()
    for name, weight in model.base_model.named_parameters():
        if weight.dim() == 2 and weight is not inputs and "wpe" not in name:
            found[min(weight.shape), max(weight.shape)] += 1
    shapes = [(rows, small, large, number) for (small, large), number in found.items()]
    return [*shapes, (int(tokens.response_mask.sum()), head.shape[1], head.shape[0], 1)]


def floating_point_operations(model: Any, rollout: Rollout) -> float:
    """Of one forward and backward pass: products with weights, and queries with keys and values."""
    of_weights = sum(2 * n * i * o * number for n, i, o, number in products(model, rollout))
    tokens, config = rollout.tokens, model.config
    length = tokens.prompt_ids.shape[1] + tokens.response_ids.shape[1] - 1
    attention = 2 * 2 * len(tokens) * length**2 * config.hidden_size * config.num_hidden_layers
    return float(PASSES * (of_weights + attention))


def rates(model: Any, rollout: Rollout, seconds: float = 0.5) -> tuple[float, float]:
    """GFLOP/s (processor time, wall time) of products of the model's own shapes.

    Each shape counts by its share of the work; the LM head's in chunks, as the loss runs it.
    """
    from klippo.tensors.head import CHUNK_ELEMENTS

    work = cpu_total = wall_total = 0.0
    for rows, inputs, outputs, number in products(model, rollout):
        rows_at_once = min(rows, max(CHUNK_ELEMENTS // outputs, 1))
        left, right = torch.randn(rows_at_once, inputs), torch.randn(outputs, inputs)
        out = left @ right.T
        operations, repeats = 2.0 * rows_at_once * inputs * outputs, 0
        start, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            torch.mm(left, right.T, out=out)
            repeats += 1
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        share = 2.0 * rows * inputs * outputs * number
        work += share
        cpu_total += share * cpu / (repeats * operations)
        wall_total += share * wall / (repeats * operations)
    return work / cpu_total / 1e9, work / wall_total / 1e9


GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::baddbmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "soft-max over the vocabulary and its gradient": (
        "aten::_log_softmax",
        "aten::exp",
        "aten::exp_",
        "aten::sum",
        "aten::amax",
        "aten::sub",
        "aten::sub_",
        "aten::mul_",
        "aten::gather",
        "aten::scatter_add_",
        "aten::abs",
        "aten::masked_fill_",
        "aten::eq",
    ),
    "AdamW and gradient clipping": (
        "aten::_fused_adamw_",
        "aten::_foreach_norm",
        "aten::_foreach_mul_",
    ),
}


def profile(learner: Learner, experience: Experience) -> dict[str, float]:
    """Shares of the processor time of an update by kind of operation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        learner.learn(experience)
    of_operation = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    total = sum(of_operation.values())
    shares = {
        name: sum(of_operation.get(key, 0) for key in keys) / total for name, keys in GROUPS.items()
    }
    largest = sorted(of_operation.items(), key=lambda item: -item[1])[:14]
    print({key: f"{share / total:.1%}" for key, share in largest}, flush=True)
    return {**shares, "everything else": 1 - sum(shares.values())}


if __name__ == "__main__":
    main()
