"""Does an ensemble hold off over-optimisation? Embedded models, five arms, two kinds of labels.

    python experiments/overoptimization/run.py            # under an hour on two cores
    python experiments/overoptimization/run.py --smoke    # a few minutes, a tenth of it

Every run is `klippo train` in a process of its own; runs that are done are not done again, so the
command can be stopped and started. Writes results.json, the figures and docs/overoptimization.md.
"""

# ruff: noqa: E402 - the parts can only be imported once their folder is on the path

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "scripts"), str(ROOT / "scripts/build_demo")]

from analysis import analyse
from page import write_page

from klippo.runs.folder import STATUS_FILE

RESULTS = Path(__file__).parent / "results.json"
NOISES = {"clean": 0.0, "noisy": 0.25}
NUM_MEMBERS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much of everything; the defaults are the full version."""

    num_steps: int = 40
    batch_size: int = 64
    eval_every: int = 4
    num_prompts: int = 96
    seeds: tuple[int, ...] = (1, 2, 3)
    noises: tuple[str, ...] = ("clean", "noisy")
    kl_coef: float = 0.05  # of the arms "… + KL"; the others have no leash
    uwo_weight: float = 0.5
    learning_rate: float = 1.5e-4


SMOKE = Plan(num_steps=10, eval_every=5, num_prompts=64, seeds=(1,), noises=("clean",))


def arms(plan: Plan, members: str, seed: int) -> dict[str, dict[str, Any]]:
    """What the arms' configs say of reward and KL; the single arm's seed picks its member too."""

    def ensemble(objective: str) -> dict[str, Any]:
        return {
            "kind": "ensemble",
            "members": [members],
            "seeds": list(range(1, NUM_MEMBERS + 1)),
            "objective": objective,
            "uwo_weight": plan.uwo_weight,
        }

    single = {"kind": "classifier", "model": members.replace("{seed}", str(seed))}
    free, leash = {"coef": 0.0}, {"coef": plan.kl_coef}
    return {
        "single": {"reward": single, "kl": free},
        "mean": {"reward": ensemble("mean"), "kl": free},
        "WCO": {"reward": ensemble("WCO"), "kl": free},
        "UWO": {"reward": ensemble("UWO"), "kl": free},
        "single + KL": {"reward": single, "kl": leash},
        "mean + KL": {"reward": ensemble("mean"), "kl": leash},
        "UWO + KL": {"reward": ensemble("UWO"), "kl": leash},
    }


def config(plan: Plan, arm: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """One run's config."""
    return {
        "seed": seed,
        "output_dir": str(folder),
        "device": "cpu",
        "num_threads": 1,
        "policy": {"model": "demo:policy"},
        "data": {"train": "demo:prompts"},
        "rollout": {"response_length": 24},
        "gold": {"kind": "classifier", "model": "demo:gold"},
        "ppo": {
            "num_steps": plan.num_steps,
            "batch_size": plan.batch_size,
            "num_epochs": 2,
            "value_coef": 0.2,
        },
        "optimizer": {"learning_rate": plan.learning_rate},
        "evaluation": {"every": plan.eval_every, "num_prompts": plan.num_prompts, "num_shown": 2},
        **arm,
    }


def runs(plan: Plan, work: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Every run's kind of labels, folder and config."""
    for noise in plan.noises:
        for seed in plan.seeds:
            for name, arm in arms(plan, members_of(noise, work), seed).items():
                folder = work / "runs" / noise / name.replace(" + ", "_") / f"seed{seed}"
                yield noise, folder, config(plan, arm, seed, folder)


def members_of(noise: str, work: Path) -> str:
    """The name, with {seed}, of the members whose labels have this noise."""
    if noise == "clean":
        return "demo:proxy_seed{seed}"
    return str(work / f"members_{noise}" / "proxy_seed{seed}")


def build_members(noise: str, work: Path) -> None:
    """Members as the demo's, with a share of their pairs flipped; only once."""
    folder = work / f"members_{noise}"
    if noise == "clean" or (folder / "done").exists():
        return
    import build_demo
    import torch
    from build_demo import Plan as BuildPlan
    from corpus import download, encode, load_corpus, train_tokenizer
    from training import sample, strip_eos

    from klippo.demo import demo_path

    corpus = load_corpus(download(work / "source"), 0, None)
    tokenizer = train_tokenizer([sentence.text for sentence in corpus.train])
    policy = build_demo.reload(demo_path("policy"), build_demo.GPT2LMHeadModel)
    rows = [json.loads(line) for line in demo_path("prompts").read_text().splitlines()]
    prompts = encode(tokenizer, [row["prompt"] for row in rows], eos=False)
    generator = torch.Generator().manual_seed(3)
    plan = BuildPlan()
    drawn = prompts * plan.reference_per_prompt
    reference = [strip_eos(ids) for ids in sample(policy, drawn, 24, generator)]
    build_demo.build_members(corpus, tokenizer, reference, plan, 0, folder, NOISES[noise])
    (folder / "done").touch()


def train(folder: Path, content: dict[str, Any]) -> None:
    """One run, unless it is done."""
    status = folder / STATUS_FILE
    if status.is_file() and json.loads(status.read_text())["state"] == "done":
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps(content, indent=1))
    start = time.monotonic()
    command = [sys.executable, "-m", "klippo", "train", str(file), "--overwrite", "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    print(f"{folder}: {(time.monotonic() - start) / 60:.1f} minutes", flush=True)


def train_all(plan: Plan, work: Path, num_jobs: int) -> None:
    """Members and runs side by side; runs wait for their members."""
    with ThreadPoolExecutor(num_jobs) as pool:
        members = {noise: pool.submit(build_members, noise, work) for noise in plan.noises}

        def ready(noise: str, folder: Path, content: dict[str, Any]) -> None:
            members[noise].result()
            train(folder, content)

        for done in [pool.submit(ready, *run) for run in runs(plan, work)]:
            done.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tenth of it, in minutes")
    parser.add_argument("--work", type=Path, default=None, help="where runs and members go")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--only-analysis", action="store_true", help="of the runs that are there")
    options = parser.parse_args()
    plan = SMOKE if options.smoke else Plan()
    name = "smoke" if options.smoke else "full"
    work = options.work or ROOT / "runs" / f"overoptimization_{name}"
    if not options.only_analysis:
        train_all(plan, work, options.jobs)
    results = analyse(
        {noise: members_of(noise, work) for noise in plan.noises},
        work / "runs",
        plan.seeds,
    )
    if options.smoke:
        print(json.dumps(results["claims"], indent=1))
        return
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results, ROOT / "docs")


if __name__ == "__main__":
    main()
