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
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any

import flops
import torch
import workload as shared
from flops import Sequences
from lean_update import W2_BATCH, copied, make_rollout, smollm, timed
from page import RESULTS, write_page
from prepare_smollm import SMOLLM
from workload import W1, Workload

from klippo.policy.loading import load_policy
from klippo.policy.settings import CriticSettings, PolicySettings
from klippo.ppo.experience import Experience
from klippo.ppo.learner import Learner
from klippo.ppo.settings import PPOSettings
from klippo.tensors.head import CHUNK_ELEMENTS
from klippo.types import Rollout, Scores


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
    sequences = sequences_of(rollout)
    products = sequences.policy_products(model)
    operations = flops.operations(products) + sequences.attention(model.config)
    gflop = work.num_epochs * operations / 1e9
    measured_rates = partial(flops.rates, products, most_elements=CHUNK_ELEMENTS)
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
        before = measured_rates()
        _, wall, cpu = timed(partial(learner.learn, experience))
        after = measured_rates()
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


def sequences_of(rollout: Rollout) -> Sequences:
    """Every position of the batch, padding too; all responses have the same length here."""
    tokens = rollout.tokens
    return Sequences(
        number=len(tokens),
        prompt_length=tokens.prompt_ids.shape[1],
        response_length=tokens.response_ids.shape[1],
    )


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
