"""Workload W3: Llama 3 8B's shape on a GPU, against TRL 1.12, in interleaved processes.

    python benchmarks/w3.py             # a GPU with about 140 GB, or fewer --arms
    python benchmarks/w3.py --reduced   # a small Llama on the CPU, with the same code

Random weights in bfloat16, LoRA of rank 16 on the policy, batch 64, prompts and responses of 128
tokens. Time by phase, peak memory, and the update's model FLOPs over its time and the rate of
matrix products of its shapes. Writes benchmarks/results/w3.json (w3_reduced.json) and the page.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date

import measuring
import torch
from page import PAGE, RESULTS, write_page
from ppo_vs_trl import ARMS, run_rounds
from sections import ppo
from trl_ppo import TRL_VERSION
from workload import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reduced", action="store_true", help="a small model on the CPU")
    parser.add_argument(
        "--arms", choices=ARMS, nargs="+", default=["trl", "trunk", "separate"], help="with trl"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2, help="the first is left out of medians")
    arguments = parser.parse_args()
    if arguments.updates < 2 or not {"trl", "trunk"} <= set(arguments.arms):
        parser.error("at least 2 updates, and the arms trl and trunk")
    if not arguments.reduced and not torch.cuda.is_available():
        sys.exit("W3 needs a GPU, and there is none here; --reduced runs a small model on the CPU")
    key = "w3_reduced" if arguments.reduced else "w3"
    rounds = run_rounds(key, arguments.arms, arguments.rounds, arguments.updates)
    result = {
        "kind": "large_model",
        "name": WORKLOADS[key].name,
        "date": date.today().isoformat(),
        "command": f"python benchmarks/w3.py {'--reduced ' if arguments.reduced else ''}--rounds "
        f"{arguments.rounds} --updates {arguments.updates}",
        "workload": WORKLOADS[key].as_dict(),
        "machine": measuring.machine(),
        "versions": measuring.versions() | {"trl": TRL_VERSION},
        "rounds": rounds,
    }
    (RESULTS / f"{key}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(ppo.comparison_table(result))
    print(ppo.phase_table(result))
    write_page()
    print(f"wrote {RESULTS / key}.json and {PAGE}")


if __name__ == "__main__":
    main()
