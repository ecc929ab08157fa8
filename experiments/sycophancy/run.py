"""Does offline PPO from scored answers make a model less sycophantic? docs/sycophancy.md.

    python experiments/sycophancy/run.py            # both parts; about an hour on two CPU cores
    python experiments/sycophancy/run.py --only small
    python experiments/sycophancy/run.py --smoke    # everything, tiny, into --work alone

The small world is packaged; the real model is SmolLM2-135M-Instruct, which
benchmarks/prepare_smollm.py makes. The judge of examples/sycophancy is started here. Every command
runs once and its files are kept, so the script can be stopped and started.
"""

# ruff: noqa: E402 - the parts can only be imported once their folder is on the path

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import real
import small
from commands import ROOT, judging, seconds_of
from figures import examples, last_diagnostics, models_of
from written import write_page

PARTS = ("small", "real")
RESULTS = HERE / "results.json"


def small_world(work: Path, plan: small.SmallPlan, judges: dict[str, Path]) -> dict[str, Any]:
    """All seeds: figures of each model, and what the PPO runs say of themselves."""
    posts = small.make_posts(work / "held_out.jsonl", plan.num_held_out)
    compared, runs = [], []
    for seed in plan.seeds:
        folder = work / f"seed{seed}"
        models = small.train(seed, folder, plan)
        out = folder / "compared.json"
        small.compare(models, posts, judges, out, seed, plan.num_held_out)
        compared.append(json.loads(out.read_text()))
        runs.append(models)
    return {
        "seeds": list(plan.seeds),
        "num_posts": plan.num_held_out,
        "models": models_of(compared),
        "diagnostics": {
            name: [last_diagnostics(models[name]) for models in runs] for name in small.RUNS
        },
        "seconds": {
            name: [seconds_of(models[name] / "model") for models in runs] for name in small.RUNS
        }
        | {"baselines": [seconds_of(models["DPO"] / "model") for models in runs]},
        "examples": examples(compared[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "build/smollm2-135m-instruct")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--threads", type=int, default=2, help="of the real model's commands")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/sycophancy")
    parser.add_argument("--smoke", action="store_true", help="tiny; the page stays as it is")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results")
    given = parser.parse_args()
    work = (given.work / "smoke" if given.smoke else given.work).resolve()
    results_file = work / "results.json" if given.smoke else RESULTS
    for part in PARTS if given.only is None else (given.only,):
        if given.page_only:
            break
        with judging(work / part / "judges") as judges:
            if part == "small":
                plan = small.SMOKE if given.smoke else small.SmallPlan()
                found = small_world(work / part, plan, judges)
            else:
                whole = real.SMOKE if given.smoke else real.RealPlan()
                model = given.model.resolve()
                found = real.experiment(model, work / part, whole, judges, given.threads)
        found["machine"] = f"{os.cpu_count()} CPU cores"
        results = read(results_file) | {part: found}
        results_file.write_text(json.dumps(results, indent=1) + "\n")
    if not given.smoke:
        write_page(read(results_file), ROOT / "docs")


def read(results: Path) -> dict[str, Any]:
    """What was measured before."""
    return dict(json.loads(results.read_text())) if results.exists() else {}


if __name__ == "__main__":
    main()
