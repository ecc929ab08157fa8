"""The memory that a run needs, estimated and measured.

    python benchmarks/memory_estimate.py

Every case is a real run of two PPO steps on the CPU in a process of its own. Its peak resident size
stands against the estimate by a trial step in another process. Writes
benchmarks/results/memory.json and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import measuring
import workload as shared
from page import RESULTS, write_page
from prepare_smollm import SMOLLM
from workload import W1

MMAP_VARIABLE, MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_", "1048576"
HALVES = ("estimate", "measure")
FILE = RESULTS / "memory.json"
SMOLLM_CASE = {"model": "smollm", "batch": 16}
CASES: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "full, micro-batches of 8": {"micro": 8},
    "full, separate critic": {"critic": "separate"},
    "full, separate critic, micro-batches of 8": {"critic": "separate", "micro": 8},
    "full, response 128": {"response": 128},
    "full, response 128, micro-batches of 8": {"response": 128, "micro": 8},
    "full, checkpointing, micro-batches of 8": {"micro": 8, "checkpointing": True},
    "last 2 layers": {"tuning": "last_layers"},
    "last 2 layers, micro-batches of 8": {"tuning": "last_layers", "micro": 8},
    "last 2 layers, separate critic": {"tuning": "last_layers", "critic": "separate"},
    "LoRA": {"tuning": "lora"},
    "LoRA, micro-batches of 8": {"tuning": "lora", "micro": 8},
    "LoRA, LoRA critic": {"tuning": "lora", "critic": "lora"},
    "full, evaluation of 64": {"micro": 8, "evaluate": 64},
    "full, ensemble of 5": {"micro": 8, "members": 5},
    "full, autocast": {"autocast": True},
    "full, MALLOC_MMAP_THRESHOLD_": {"mmap": True},
    "full, response 128, micro-batches of 8, MALLOC_MMAP_THRESHOLD_": {
        "response": 128,
        "micro": 8,
        "mmap": True,
    },
    "LoRA, MALLOC_MMAP_THRESHOLD_": {"tuning": "lora", "mmap": True},
    "SmolLM2-135M, full": SMOLLM_CASE,
    "SmolLM2-135M, full, micro-batches of 4": {**SMOLLM_CASE, "micro": 4},
    "SmolLM2-135M, LoRA, micro-batches of 4": {**SMOLLM_CASE, "micro": 4, "tuning": "lora"},
}
"""Name -> what differs from W1's shape (benchmarks/workload.py) with full fine-tuning."""


def build_models(folder: Path, num_members: int) -> None:
    """A policy and reward models of W1's shape, random weights."""
    tokenizer = shared.load_tokenizer(SMOLLM)
    shared.build_policy(W1, tokenizer).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    for seed in range(1, num_members + 1):
        shared.build_scorer(W1, tokenizer, seed=seed).save_pretrained(folder / f"reward{seed}")
        tokenizer.save_pretrained(folder / f"reward{seed}")


def settings(case: Mapping[str, Any], folder: Path, output: Path) -> dict[str, Any]:
    """The case as a config."""
    batch = case.get("batch", W1.batch_size)
    members = [str(folder / f"reward{k}") for k in range(1, case.get("members", 1) + 1)]
    reward: dict[str, Any] = {"kind": "classifier", "model": members[0]}
    if len(members) > 1:
        reward = {"kind": "ensemble", "members": members, "standardize": "none"}
    if case.get("model") == "smollm":
        reward = {"kind": "length", "max_tokens": 1}
    return {
        "output_dir": str(output),
        "device": "cpu",
        "num_threads": W1.num_threads,
        "policy": {
            "model": str(SMOLLM if case.get("model") == "smollm" else folder / "policy"),
            "tuning": case.get("tuning", "full"),
            "gradient_checkpointing": case.get("checkpointing", False),
            "autocast": case.get("autocast", False),
        },
        "critic": {"kind": case.get("critic", "trunk")},
        "data": {"train": str(folder / "prompts.jsonl")},
        "rollout": {"response_length": case.get("response", 32), "stop_at_eos": False},
        "reward": reward,
        "ppo": {
            "num_steps": 2,
            "batch_size": batch,
            "num_epochs": 1,
            "micro_batch_size": case.get("micro"),
        },
        "evaluation": {"num_prompts": case.get("evaluate", 0)},
    }


def run_half(name: str, half: str, folder: Path) -> dict[str, Any]:
    """Estimate by a trial step, or train, in this process."""
    from klippo import PPOTrainer
    from klippo.config.load import config_from_mapping
    from klippo.ranks import choose_device
    from klippo.runs.memory import peak_memory_gib
    from klippo.train.trial import Trial

    device = choose_device("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        loaded = config_from_mapping(settings(CASES[name], folder, Path(scratch) / "run"))
        trainer = PPOTrainer(loaded, quiet=True)
        if half == "measure":
            trainer.train()
            return {"measured_gib": round(peak_memory_gib(device), 4)}
        estimate = Trial(trainer.session).measured()
    return {
        "name": name,
        "estimate_gib": round(estimate.peak / 2**30, 4),
        "phase": estimate.peak_phase,
        "components_mib": {
            part: round(size / 2**20, 1) for part, size in estimate.biggest(estimate.peak_phase)
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="measure this one, in this process")
    parser.add_argument("--half", choices=HALVES, help="of --case")
    parser.add_argument("--folder", type=Path, help="the models, for --case")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    chosen = parser.parse_args(arguments)
    if chosen.case is not None:
        measuring.print_result(run_half(chosen.case, chosen.half, chosen.folder))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build_models(folder, 5)
        rows = [json.dumps({"prompt": text}) for text in shared.prompts()]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
        with ThreadPoolExecutor(chosen.jobs) as pool:
            cases = list(pool.map(lambda name: _in_processes(name, folder), CASES))
    FILE.write_text(json.dumps(_result(cases, chosen.jobs), indent=1) + "\n")
    write_page()


def _in_processes(name: str, folder: Path) -> dict[str, Any]:
    environment = os.environ | ({MMAP_VARIABLE: MMAP_THRESHOLD} if CASES[name].get("mmap") else {})
    result: dict[str, Any] = {}
    for half in HALVES:
        command = [sys.executable, __file__, "--case", name, "--half", half]
        command += ["--folder", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
        result |= json.loads(done.stdout.strip().splitlines()[-1])
    measuring.print_result(result)
    return result


def _result(cases: Sequence[Mapping[str, Any]], jobs: int) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "name": "Memory, estimated and measured",
        "kind": "memory",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/memory_estimate.py --jobs {jobs}",
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "cases": list(cases),
    }


if __name__ == "__main__":
    main()
