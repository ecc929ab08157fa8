"""Rollouts per second of two processes against one, each process with one thread.

    python benchmarks/scaling.py --rounds 5

The packaged quickstart model and prompts, through `klippo train` under torchrun; the same global
batch, so that both do the same work. Pairs of runs, one after the other, the first of a pair in
turns. Writes benchmarks/results/scaling.json and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import measuring
from page import RESULTS, write_page
from sections import scaling

WARM_STEPS = 2
"""Steps that are left out: the first ones allocate and compile."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    pairs = []
    for i in range(arguments.rounds):
        order = (1, 2) if i % 2 == 0 else (2, 1)
        found = {num: rate(num, arguments.steps, arguments.batch_size) for num in order}
        pairs.append({"one": found[1], "two": found[2], "load": round(os.getloadavg()[0], 2)})
        print(f"round {i + 1}: {found[1]:.2f} and {found[2]:.2f} rollouts per second", flush=True)
    result = {
        "kind": "scaling",
        "name": "Two processes against one",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/scaling.py --rounds {arguments.rounds}",
        "batch_size": arguments.batch_size,
        "num_steps": arguments.steps - WARM_STEPS,
        "machine": measuring.machine(),
        "versions": measuring.versions(),
        "load_average": statistics.median(pair["load"] for pair in pairs),
        "pairs": pairs,
    }
    (RESULTS / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    write_page()
    print(scaling.section(result))


def rate(num_processes: int, steps: int, batch_size: int) -> float:
    """Rollouts per second of a run's steps after the first ones, by its own metrics."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(num_processes), "-m", "klippo", "train", "quickstart"]
        settings = {
            "device": "cpu",
            "num_threads": 1,
            "sharding": "none",
            "ppo.num_steps": steps,
            "ppo.batch_size": batch_size,
            "evaluation.num_prompts": 0,
            "output_dir": f"{folder}/run",
        }
        overrides = [f"{name}={value}" for name, value in settings.items()]
        subprocess.run(
            [sys.executable, *launcher, *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            check=True,
            capture_output=True,
        )
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["time/step_s"] for line in lines][WARM_STEPS:]
    return batch_size * len(seconds) / float(sum(seconds))


if __name__ == "__main__":
    main()
