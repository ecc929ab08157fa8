"""What a run would do, cost and take: the stage behind `klippo train --dry-run`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from klippo.config.schema import RunConfig
from klippo.errors import ConfigError
from klippo.rewards.judge.settings import JudgeSettings
from klippo.stages.dry_run_plan import (
    BYTES_PER_TOKEN,
    JudgePlan,
    Plan,
    named_judges,
    passed_caps,
    plan_run,
    texts_of,
)

ASK_ABOVE_USD = 5.0
"""A run whose judges may cost more than this wants a yes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of a slice, and of the run that it was scaled to."""

    num_responses: int
    generate_s: float
    forward_s: float
    score_s: float
    update_s: float
    """One pass over the slice."""
    run_s: float


def time_run(config: RunConfig, plan: Plan) -> Timing:
    """Sample, score and learn from one micro-batch of the real model, twice; the second counts.

    A reward with a judge gives zeros here. Nothing is written.
    """
    import torch

    from klippo.stages.session import open_session

    ppo = config.ppo
    size = ppo.micro_batch_size or ppo.minibatch_size or ppo.batch_size
    small = {
        "num_steps": 2,
        "batch_size": size,
        "minibatch_size": size,
        "micro_batch_size": size,
        "num_epochs": 1,
        "num_critic_warmup_steps": 0,
    }
    timed = config.model_copy(update={"ppo": ppo.model_copy(update=small), "gold": None})
    asks_a_judge = any(name.startswith("reward") for name, _ in named_judges(config))
    session = open_session(timed, reward=_zeros if asks_a_judge else None)
    marks: list[float] = []

    def mark() -> None:
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
        marks.append(time.perf_counter())

    for _ in range(2):
        marks.clear()
        mark()
        rollout = session.source.next()
        mark()
        forward = session.learner.forward(rollout)
        mark()
        experience = session.learner.experience(rollout, session.score(rollout), forward)
        mark()
        session.learner.learn(experience)
        mark()
    session.close_reward()
    generate_s, forward_s, score_s, update_s = (b - a for a, b in pairwise(marks))
    every_response = plan.num_training + plan.num_evaluation + plan.num_guard
    seconds = (generate_s + forward_s + score_s) * every_response
    seconds += update_s * ppo.num_epochs * plan.num_training
    return Timing(
        num_responses=size,
        generate_s=generate_s,
        forward_s=forward_s,
        score_s=score_s,
        update_s=update_s,
        run_s=seconds / size,
    )


def _zeros(responses: Sequence[str], **_: Any) -> list[float]:
    return [0.0] * len(responses)


def dry_run(config: RunConfig) -> int:
    """Say what the run would do; train nothing, write nothing, ask no judge."""
    plan = plan_run(config, texts_of(config))
    timing = time_run(config, plan)
    tell(plan, timing, Console())
    return 0


def tell(plan: Plan, timing: Timing, console: Console) -> None:
    """One table, and what it rests on."""
    table = Table(title="What this run would do", title_justify="left")
    table.add_column("")
    table.add_column("expected", justify="right")
    table.add_column("at worst", justify="right")
    table.add_row("PPO steps", f"{plan.num_steps:,}")
    table.add_row("responses to learn from", f"{plan.num_training:,}")
    table.add_row("responses for evaluation", f"{plan.num_evaluation:,}")
    if plan.num_guard:
        table.add_row("responses for the guard", f"{plan.num_guard:,}")
    table.add_row("optimizer steps", f"{plan.num_optimizer_steps:,}")
    for one in plan.judges:
        expected, worst = one.expected, one.worst
        judge = f"{one.name} ({one.settings.api.model})"
        table.add_row(Text(f"{judge}: calls"), f"{expected.calls:,}", f"{worst.calls:,}")
        table.add_row(Text(f"{judge}: tokens"), f"{expected.tokens:,}", f"{worst.tokens:,}")
        usd = [f"{spend.nano_usd / 1e9:,.2f}" for spend in (expected, worst)]
        table.add_row(Text(f"{judge}: USD"), *(usd if one.has_prices else ["unknown"] * 2))
    table.add_row("time, an estimate", _duration(timing.run_s))
    console.print(table)
    notes = [
        f"Time is scaled from {timing.num_responses} responses: {timing.generate_s:.2f} s to sample"
        f", {timing.forward_s:.2f} s for log-probs and values, {timing.score_s:.2f} s to score, "
        f"{timing.update_s:.2f} s to learn from once; larger batches often sample faster."
    ]
    if plan.judges:
        notes += [
            "The judge was not asked, and its own time is not in the estimate.",
            "Expected: full-length responses, every question answered at once, nothing cached. At "
            "worst: the longest prompt, every question paid at all of its attempts, each as the "
            f"budget reserves it, {BYTES_PER_TOKEN} bytes per response token; an outage may repeat "
            "questions beyond that.",
        ]
        if not all(one.has_prices for one in plan.judges):
            notes.append(
                "USD is unknown without usd_per_million_prompt_tokens and "
                "usd_per_million_completion_tokens."
            )
        capped = [one for one in plan.judges if _has_cap(one)]
        notes += passed_caps(plan) or (["No cap would be passed."] if capped else [])
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def _has_cap(one: JudgePlan) -> bool:
    api = one.settings.api
    return any(cap is not None for cap in (api.max_calls, api.max_tokens_total, api.max_usd))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def agree_to_cost(config: RunConfig, *, yes: bool) -> None:
    """Ask before a run whose judges may cost much. Raises ConfigError where the answer is no."""
    if yes or not any(_costs(settings) for _, settings in named_judges(config)):
        return
    plan = plan_run(config, texts_of(config))
    most = plan.possible_usd
    if most <= ASK_ABOVE_USD:
        return
    usual = sum(one.expected.nano_usd for one in plan.judges) / 1e9
    told = f"the judges may cost up to {most:,.2f} USD (about {usual:,.2f} USD expected)"
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{told}, more than {ASK_ABOVE_USD:g}, and there is no terminal to ask at; pass --yes, "
            "or set a lower max_usd; --dry-run tells more"
        )
    answer = Console(stderr=True).input(Text(f"T{told[1:]}. Train? [y/N] "))
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError("not started; a lower max_usd or fewer steps cost less")


def _costs(settings: JudgeSettings) -> bool:
    return settings.api.prices is not None and any(settings.api.prices)
