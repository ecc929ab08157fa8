"""The same on SmolLM2-135M-Instruct: an adapter that pleases, its answers, their scores, PPO."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import ROOT, klippo, read_rows, seconds_of, write_rows
from figures import examples, last_diagnostics, models_of, plain
from small import compare

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import build_sycophancy_demo as demo  # noqa: E402 - its folder is on the path only now
import posts as world  # noqa: E402 - the demo's parts are, too

from klippo.evaluation.statistics import estimate  # noqa: E402 - after those


@dataclass(frozen=True, kw_only=True, slots=True)
class RealPlan:
    """How much; the defaults are the full version."""

    num_examples: int = 240
    num_posts: int = 64  # four answers each
    num_held_out: int = 64
    num_passes: int = 2
    num_evaluated: int = 16
    """Responses, of training rows and of held-out ones each, in the diagnostics."""


SMOKE = RealPlan(num_examples=80, num_posts=6, num_held_out=4, num_passes=1, num_evaluated=4)
SEED = 0
LEARNING_RATE = 2e-4


def make_texts(work: Path, plan: RealPlan) -> None:
    """What the adapter learns, and posts for training and held out; no deed is on both sides."""
    if (work / "held_out.jsonl").exists():
        return
    rng = random.Random(f"{SEED}:real")
    train, held_out = world.split_deeds(demo.SHARE_HELD_OUT, SEED)
    shown = world.make_posts(train, plan.num_examples + plan.num_examples // 10, rng)
    write_rows(work / "sft.jsonl", demo.examples(shown, world.SFT_KINDS, rng))
    for name, deeds, number in (
        ("posts", train, plan.num_posts),
        ("held_out", held_out, plan.num_held_out),
    ):
        rows = [
            {
                "prompt": post.text,
                "top_answer": world.draw_answer(post, world.TOP_KINDS, rng),
                "agreement_is_right": post.manner.is_fine,
            }
            for post in world.make_posts(deeds, number, rng)
        ]
        write_rows(work / f"{name}.jsonl", rows)


def fine_tune(model: Path, work: Path, plan: RealPlan, threads: int) -> Path:
    """The adapter."""
    adapter = work / "sft"
    config = work / "sft.yaml"
    config.write_text(
        f"output_dir: {adapter}\nnum_threads: {threads}\n"
        f"model: {{name: {model}, dtype: bfloat16, tuning: lora}}\n"
        f"data: {{train: {work / 'sft.jsonl'}, format: chat,"
        f" validation_size: {plan.num_examples // 10}}}\n"
        "training: {batch_size: 8, learning_rate: 1e-3}\n"
    )
    klippo("sft", config, makes=adapter / "klippo_sft.json", threads=threads)
    return adapter


def sample(model: Path, adapter: Path, work: Path) -> None:
    """The adapter's answers to the posts; those stay that ended and give their tokens back."""
    if (work / "answers.jsonl").exists():
        return
    print("sampling ->", work / "answers.jsonl", flush=True)
    asked = {row["prompt"]: row for row in read_rows(work / "posts.jsonl")}
    texts = [text for text in asked for _ in range(demo.RESPONSES_PER_POST)]
    answers = demo.Answers(model, adapter).sample(texts, SEED)
    rows = [
        asked[text] | {"model_response": answer[0], "logprobs": answer[1]}
        for text, answer in zip(texts, answers, strict=True)
        if answer is not None
    ]
    number = Counter(row["prompt"] for row in rows)  # leave-one-out needs another to compare with
    write_rows(work / "answers.jsonl", [row for row in rows if number[row["prompt"]] > 1])


def score(work: Path, judge: Path) -> None:
    """Sycophancy of each answer against the top answer's."""
    klippo(
        "judge", "score", work / "answers.jsonl", "--reward", judge, "--mode", "difference",
        "--response-column", "model_response", "--reference-column", "top_answer",
        "--output", work / "scored.jsonl",
        makes=work / "scored.jsonl",
    )  # fmt: skip


def train(model: Path, adapter: Path, work: Path, plan: RealPlan, threads: int) -> Path:
    """PPO on the scored answers, in the adapter."""
    run = work / "ppo"
    settings = {
        "output_dir": run,
        "num_threads": threads,
        "device": "cpu",
        "policy.model": model,
        "policy.adapter": adapter,
        "policy.dtype": "bfloat16",
        "data.train": work / "scored.jsonl",
        "offline.behavior": "start",  # recorded in float32, which is not the policy that learns
        "offline.logprobs_column": "null",
        "offline.num_passes": plan.num_passes,
        "ppo.batch_size": 16,
        "ppo.micro_batch_size": 16,
        "optimizer.learning_rate": LEARNING_RATE,
        "evaluation.num_prompts": plan.num_evaluated,
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    klippo("train", "sycophancy-demo", *words, "--quiet", makes=run / "model", threads=threads)
    return run


def experiment(
    model: Path, work: Path, plan: RealPlan, judges: Mapping[str, Path], threads: int
) -> dict[str, Any]:
    """Every step; what each took and made."""
    make_texts(work, plan)
    adapter = fine_tune(model, work, plan, threads)
    sample(model, adapter, work)
    score(work, judges["sycophancy"])
    run = train(model, adapter, work, plan, threads)
    compared = compare(
        {"PPO": run}, work / "held_out.jsonl", judges, work / "compared.json", SEED,
        plan.num_held_out, threads,
    )  # fmt: skip
    scored = read_rows(work / "scored.jsonl")
    steps = read_rows(run / "metrics.jsonl")
    learnt = json.loads((adapter / "klippo_sft.json").read_text())
    return {
        "num_examples": learnt["num_examples"],
        "sft_nats_per_token": learnt["held_out_nats_per_token"],
        "num_posts": plan.num_posts,
        "num_answers": len(scored),
        "num_drawn": plan.num_posts * demo.RESPONSES_PER_POST,
        "score": plain(estimate([row["judge_scores"]["score"] for row in scored])),
        "top_score": plain(estimate([row["judge_scores"]["reference"] for row in scored])),
        "learning_rate": LEARNING_RATE,
        "num_passes": plan.num_passes,
        "num_steps": len(steps),
        "ended": json.loads((run / "run_status.json").read_text())["state"],
        "diagnostics": last_diagnostics(run),
        "seconds": {
            "sft": 60 * learnt["minutes"],
            "train": sum(step["time/step_s"] for step in steps),
            "compare": seconds_of(compared),
        },
        "models": models_of([json.loads(compared.read_text())]),
        "examples": examples(json.loads(compared.read_text())),
    }
