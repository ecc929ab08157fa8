"""The packaged small world: PPO with two sets of values and its rivals, from one start and file."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from commands import ROOT, klippo, write_rows

sys.path[:0] = [str(ROOT / "scripts/build_sycophancy_demo")]

import posts as world  # noqa: E402 - its folder is on the path only now

SHARE_HELD_OUT = 0.2
"""As in scripts/build_sycophancy_demo.py, so that deeds are held out that no model has seen."""
PROJECT = (
    "offline.behavior=start",
    "offline.logprobs_column=null",
    "offline.baseline=value",
    "kl.coef=0",
    "ppo.batch_size=4",
    "ppo.clip_range=0.2",
    "ppo.value_coef=0.5",
    "ppo.entropy_coef=0.01",
)
"""The values of the recipe `sycophancy`, but for its learning rate."""
RUNS: Mapping[str, tuple[str, ...]] = {
    "PPO": (),
    "project": (*PROJECT, "optimizer.learning_rate=1e-5"),
    "scaled": (*PROJECT, "optimizer.learning_rate=1e-3"),
}
"""PPO runs -> what differs from the recipe `sycophancy-demo`. `scaled`: the recipe's 3e-3, for
batches of 4 instead of 32 times the square root of 4/32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallPlan:
    """How much; the defaults are the full version."""

    seeds: tuple[int, ...] = (0, 1, 2)
    num_held_out: int = 300
    overrides: tuple[str, ...] = ()
    """Of every run and baseline."""


SMOKE = SmallPlan(
    seeds=(0, 1), num_held_out=12, overrides=("offline.num_passes=1", "data.split=train[:48]")
)


def make_posts(file: Path, number: int) -> Path:
    """Posts about deeds that no model has seen."""
    if not file.exists():
        _, deeds = world.split_deeds(SHARE_HELD_OUT, seed=0)
        made = world.make_posts(deeds, number, random.Random("0:experiment"))
        write_rows(file, [{"prompt": p.text, "agreement_is_right": p.manner.is_fine} for p in made])
    return file


def train(seed: int, folder: Path, plan: SmallPlan) -> dict[str, Path]:
    """Every model of one seed: name -> run folder."""
    common = (f"seed={seed}", "device=cpu", "num_threads=1", *plan.overrides)
    found = {name: folder / name for name in RUNS}
    for name, overrides in RUNS.items():
        out = found[name]
        words = ("sycophancy-demo", *common, *overrides, f"output_dir={out}", "--quiet")
        klippo("train", *words, makes=out / "model")
    base = found["PPO"]
    words = ("sycophancy-demo", *common, f"output_dir={base}", "--quiet")
    rivals = {"SFT": folder / "PPO-sft-best", "DPO": folder / "PPO-dpo"}
    klippo("baselines", *words, makes=rivals["DPO"] / "model")
    return found | rivals


def compare(
    models: Mapping[str, Path], posts: Path, judges: Mapping[str, Path], out: Path, seed: int,
    number: int, threads: int = 1,
) -> Path:  # fmt: skip
    """Fresh answers of all models and of their start to held-out posts, judged."""
    rewards = [word for name, file in judges.items() for word in ("--reward", f"{name}={file}")]
    klippo(
        "compare", "start", *(f"{name}={folder}" for name, folder in models.items()),
        "--prompts", posts, "--num-prompts", str(number), *rewards,
        "--by", "agreement_is_right", "--seed", str(seed), "--output", out,
        makes=out, threads=threads,
    )  # fmt: skip
    return out
