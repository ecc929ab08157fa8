"""Klippo against TRL 1.12 on one workload, in interleaved processes: only their ratios count.

    python benchmarks/ppo_vs_trl.py --workload w1
    python benchmarks/ppo_vs_trl.py --workload w2 --vllm-python build/vllm/bin/python
    python benchmarks/ppo_vs_trl.py --workload w2_lora

A round runs each arm in a process of its own: TRL, Klippo with its default critic (on the policy's
trunk), Klippo with a separate critic (what TRL has), and Klippo's default that samples with vLLM,
where a Python with vLLM and Klippo is given (`make build/vllm/.installed`). Prints a table, writes
benchmarks/results/{w1,w2,w2_lora}.json and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import measuring
from page import PAGE, RESULTS, write_page
from prepare_smollm import prepare
from sections import ppo
from trl_ppo import TRL_FOLDER, TRL_VERSION
from workload import WORKLOADS

ARMS: Mapping[str, Sequence[str]] = {
    "trl": ["trl_ppo.py"],
    "trunk": ["klippo_ppo.py", "--critic", "trunk"],
    "separate": ["klippo_ppo.py", "--critic", "separate"],
    "vllm": ["klippo_ppo.py", "--critic", "trunk", "--engine", "vllm"],
}
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Its cache in GiB, and no threads bound to cores that training uses as well."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=("w1", "w2", "w2_lora"), default="w1")
    parser.add_argument("--arms", choices=ARMS, nargs="+", help="default: all that can run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2, help="the first is left out of medians")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vLLM")
    arguments = parser.parse_args()
    arms = arguments.arms or [arm for arm in ARMS if arm != "vllm" or arguments.vllm_python]
    if arguments.updates < 2:
        parser.error(f"--updates {arguments.updates}: at least 2, the first does not count")
    if "trl" not in arms:
        parser.error("--arms needs trl, against which the others are measured")
    if "vllm" in arms and not arguments.vllm_python:
        parser.error("--arms vllm needs --vllm-python")
    prepare()
    rounds = run_rounds(
        arguments.workload, arms, arguments.rounds, arguments.updates, arguments.vllm_python
    )
    result = {
        "kind": "ppo",
        "name": WORKLOADS[arguments.workload].name,
        "date": date.today().isoformat(),
        "command": f"python benchmarks/ppo_vs_trl.py --workload {arguments.workload} --rounds "
        f"{arguments.rounds} --updates {arguments.updates}"
        + (" --vllm-python PYTHON" if "vllm" in arms else ""),
        "workload": WORKLOADS[arguments.workload].as_dict(),
        "machine": measuring.machine(),
        "versions": measuring.versions("accelerate") | {"trl": TRL_VERSION},
        "rounds": rounds,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{arguments.workload}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(ppo.comparison_table(result))
    write_page()
    print(f"wrote {file} and {PAGE}")


def run_rounds(
    workload: str,
    arms: Sequence[str],
    rounds: int,
    updates: int,
    vllm_python: Path | None = None,
) -> list[dict[str, Any]]:
    """Every arm's result in every round, the arms in turn."""
    install_trl()
    found = []
    for number in range(rounds):
        done: dict[str, Any] = {}
        for arm in arms:
            done[arm] = run_arm(arm, workload, updates, vllm_python)
            print(f"round {number + 1}  {arm}  {json.dumps(done[arm])}", flush=True)
        found.append(done)
    return found


def run_arm(
    arm: str, workload: str, updates: int, vllm_python: Path | None = None
) -> dict[str, Any]:
    """One arm in a process of its own."""
    script, *options = ARMS[arm]
    python: str | Path = sys.executable
    environment: dict[str, str] = {}
    if arm == "vllm":
        assert vllm_python is not None
        python = vllm_python
        environment = VLLM_ENVIRONMENT | {"OMP_NUM_THREADS": str(WORKLOADS[workload].num_threads)}
    command = [str(python), str(measuring.HERE / script), *options]
    return measuring.run_process(
        [*command, "--workload", workload, "--updates", str(updates)], environment
    )


def install_trl() -> None:
    """TRL beside the environment, without its dependencies, which are there already."""
    if (TRL_FOLDER / "trl").is_dir():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(TRL_FOLDER), f"trl=={TRL_VERSION}"], check=True)


if __name__ == "__main__":
    main()
