"""Klippo against TRL 1.12 on workload W1, in interleaved processes: only their ratios count.

    python benchmarks/ppo_vs_trl.py --rounds 3 --updates 4

A round runs TRL, Klippo with its default critic (on the policy's trunk) and Klippo with a separate
critic (what TRL has), each in a process of its own. Prints a table, writes
benchmarks/results/w1.json and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from page import PAGE, RESULTS, comparison_table, write_page
from prepare_smollm import prepare
from trl_ppo import TRL_FOLDER, TRL_VERSION
from workload import W1

HERE = Path(__file__).resolve().parent
ARMS = {
    "trl": ["trl_ppo.py"],
    "trunk": ["klippo_ppo.py", "--critic", "trunk"],
    "separate": ["klippo_ppo.py", "--critic", "separate"],
}
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
"""Threads sleep instead of spinning while they wait: other people's work disturbs less."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4, help="the first is left out of medians")
    arguments = parser.parse_args()
    if arguments.rounds < 3 or arguments.updates < 2:
        parser.error("at least 3 rounds of at least 2 updates")
    prepare()
    install_trl()
    rounds = []
    for number in range(arguments.rounds):
        done: dict[str, Any] = {}
        for arm in ARMS:
            done[arm] = run_arm(arm, arguments.updates)
            print(f"round {number + 1}  {json.dumps(done[arm])}", flush=True)
        rounds.append(done)
    result = {
        "name": "W1",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/ppo_vs_trl.py --rounds {arguments.rounds} "
        f"--updates {arguments.updates}",
        "workload": W1.as_dict(),
        "machine": machine(),
        "versions": versions(),
        "rounds": rounds,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "w1.json").write_text(json.dumps(result, indent=1) + "\n")
    print(comparison_table(result))
    write_page()
    print(f"wrote {RESULTS / 'w1.json'} and {PAGE}")


def run_arm(arm: str, updates: int) -> dict[str, Any]:
    """One process; its result with the load of the machine before and after."""
    script, *options = ARMS[arm]
    load_before = os.getloadavg()[0]
    finished = subprocess.run(
        [sys.executable, str(HERE / script), *options, "--updates", str(updates)],
        env=os.environ | PASSIVE,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        sys.exit(f"{arm} failed:\n{finished.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return result | {
        "load_before": round(load_before, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def install_trl() -> None:
    """TRL beside the environment, without its dependencies, which are there already."""
    if (TRL_FOLDER / "trl").is_dir():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(TRL_FOLDER), f"trl=={TRL_VERSION}"], check=True)


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "float32_matmul_gflops": round(matmul_gflops(), 1),
    }


def matmul_gflops(size: int = 2048, repeats: int = 10) -> float:
    """The best float32 rate of a square matrix product with the workload's threads."""
    import torch

    torch.set_num_threads(W1.num_threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def versions() -> dict[str, str]:
    found = {name: version(name) for name in ("klippo", "torch", "transformers", "accelerate")}
    return found | {"trl": TRL_VERSION, "python": platform.python_version(), "commit": commit()}


def commit() -> str:
    """The commit that was checked out, marked where Klippo's source differed from it."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ":/src"], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


if __name__ == "__main__":
    main()
