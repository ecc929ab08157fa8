"""What a run would do, cost and take: the stage behind `klippo train --dry-run`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klippo.config.load import config_from_mapping
from klippo.config.schema import RunConfig
from klippo.config.trust import trust_code
from klippo.data.rows import load_rows
from klippo.judge.settings import JudgeSettings
from klippo.ranks import choose_device
from klippo.rewards.settings import LengthSettings, RewardSettings, SumSettings
from klippo.train.dry_run_plan import (
    BYTES_PER_TOKEN,
    CHARS_PER_TOKEN,
    JudgePlan,
    Plan,
    passed_caps,
    plan_run,
    texts_of,
    with_ledger,
)
from klippo.train.memory import MemoryEstimate, memory_budget, refusal, stored_estimate
from klippo.train.prepare import prepare
from klippo.train.session import Session, open_session
from klippo.train.trial import measured_estimate, trial_learner


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


def time_run(session: Session, plan: Plan) -> Timing:
    """Sample, score and learn from one micro-batch, twice; the second counts. No weight moves."""
    ppo, offline = session.config.ppo, session.offline
    size = ppo.micro_batch
    learner = trial_learner(session, size)
    marks: list[float] = []

    def mark() -> None:
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
        marks.append(time.perf_counter())

    for _ in range(2):
        marks.clear()
        mark()
        if offline is not None:
            rollout = offline.source(list).rollout(offline.train[:size])
        else:
            prompts = session.sampling().train_prompts
            rollout = session.sampling().source.answer(
                [prompts[i % len(prompts)] for i in range(size)]
            )
        mark()
        forward = learner.forward(rollout)
        mark()
        experience = learner.experience(rollout, session.reward.score(rollout), forward)
        mark()
        learner.learn(experience)
        mark()
    generate_s, forward_s, score_s, update_s = (b - a for a, b in pairwise(marks))
    every_response = plan.num_training + plan.num_evaluation + plan.num_early_stop
    seconds = (generate_s + forward_s + score_s) * every_response
    seconds += (generate_s + score_s) * plan.num_measured
    seconds += update_s * ppo.num_epochs * plan.num_training
    return Timing(
        num_responses=size,
        generate_s=generate_s,
        forward_s=forward_s,
        score_s=score_s,
        update_s=update_s,
        run_s=seconds / size,
    )


def dry_run(config: RunConfig, *, trust_remote_code: bool = False) -> int:
    """Say what the run would do; train nothing, write nothing, ask no judge.

    A run that does not fit into the memory is not timed, and not loaded if its weights alone are
    too much.
    """
    trust_code(config, trust_remote_code)
    device = choose_device(config.device)
    data = load_rows(config.data, config.seed)
    plan = with_ledger(plan_run(config, texts_of(config, data)))
    estimate, timing = stored_estimate(config, device), None
    problem = refusal(config, estimate, device)
    if problem is None:
        shown = config.model_copy(update={"reward": _without_judges(config.reward), "gold": None})
        run = prepare(config_from_mapping(shown), trust_remote_code=trust_remote_code)
        session = open_session(run)
        with_gold = session.config.model_copy(update={"gold": config.gold})
        estimate = measured_estimate(replace(session, run=replace(run, config=with_gold)))
        problem = refusal(config, estimate, device)
        timing = time_run(session, plan) if problem is None else None
        session.reward.close()
    console = Console()
    tell(plan, timing, console)
    tell_memory(estimate, memory_budget(config, device), console)
    if problem is not None:
        console.print(Text(problem[0].upper() + problem[1:]), soft_wrap=True)
    return 0


def _without_judges(reward: RewardSettings) -> RewardSettings:
    """The same reward with something free in the place of every judge."""
    if isinstance(reward, JudgeSettings):
        return LengthSettings(kind="length", max_tokens=1)
    if isinstance(reward, SumSettings):
        parts = {
            name: part.model_copy(update={"reward": _without_judges(part.reward)})
            for name, part in reward.parts.items()
        }
        return reward.model_copy(update={"parts": parts})
    return reward


def tell_memory(estimate: MemoryEstimate, budget: int | None, console: Console) -> None:
    """The components of the fullest phase, and how full the others are."""
    phase = estimate.peak_phase
    table = Table(title=f"Memory in the fullest phase ({phase})", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in estimate.biggest(phase):
        table.add_row(name, f"{size / 2**30:.2f}")
    table.add_row("together", f"{estimate.peak / 2**30:.2f}", style="bold")
    if budget is not None:
        table.add_row("there is, or max_memory_gib", f"{budget / 2**30:.2f}")
    console.print(table)
    phases = (f"{name} {estimate.total(name) / 2**30:.2f}" for name in estimate.phases)
    note = f"GiB by phase: {', '.join(phases)}. docs/memory.md says how far off this was."
    console.print(Text(note), soft_wrap=True)


def tell(plan: Plan, timing: Timing | None, console: Console) -> None:
    """One table, and what it rests on."""
    table = Table(title="What this run would do", title_justify="left")
    table.add_column("")
    table.add_column("expected", justify="right")
    table.add_column("at worst", justify="right")
    table.add_row("PPO steps", f"{plan.num_steps:,}")
    table.add_row("responses to learn from", f"{plan.num_training:,}")
    table.add_row("responses for evaluation", f"{plan.num_evaluation:,}")
    if plan.num_early_stop:
        table.add_row("responses for early stopping", f"{plan.num_early_stop:,}")
    if plan.num_measured:
        table.add_row("responses to measure ensembles", f"{plan.num_measured:,}")
    table.add_row("optimizer steps", f"{plan.num_optimizer_steps:,}")
    for one in plan.judges:
        expected, worst = one.expected, one.worst
        judge = f"{one.name} ({one.settings.api.model})"
        table.add_row(Text(f"{judge}: calls"), f"{expected.calls:,}", f"{worst.calls:,}")
        table.add_row(Text(f"{judge}: tokens"), f"{expected.tokens:,}", f"{worst.tokens:,}")
        usd = [f"{spend.nano_usd / 1e9:,.2f}" for spend in (expected, worst)]
        table.add_row(Text(f"{judge}: USD"), *(usd if one.has_prices else ["unknown"] * 2))
    if timing is not None:
        table.add_row("time, an estimate", _duration(timing.run_s))
    console.print(table)
    for note in [*_timing_notes(timing), *_judge_notes(plan)]:
        console.print(Text(note), soft_wrap=True)


def _timing_notes(timing: Timing | None) -> Iterator[str]:
    if timing is not None:
        yield (
            f"Time is scaled from {timing.num_responses} responses: {timing.generate_s:.2f} s to "
            f"sample, {timing.forward_s:.2f} s for log-probs and values, {timing.score_s:.2f} s to "
            "score, "
            f"{timing.update_s:.2f} s to learn from once; larger batches often sample faster."
        )


def _judge_notes(plan: Plan) -> Iterator[str]:
    if not plan.judges:
        return
    yield "The judge was not asked, and its own time is not in the estimate."
    yield (
        "Expected: full-length responses, every question answered at once, nothing cached, and "
        f"{CHARS_PER_TOKEN} characters per token. At worst: the longest prompt, every question "
        "paid at all of its attempts, each as the budget reserves it, a token per byte, "
        f"{BYTES_PER_TOKEN} bytes per response token; an outage may repeat questions beyond that."
    )
    if not all(one.has_prices for one in plan.judges):
        yield (
            "USD is unknown without usd_per_million_prompt_tokens and "
            "usd_per_million_completion_tokens."
        )
    for one in plan.judges:
        if one.spent.calls:
            yield (
                f"{one.name}: its budget has spent {one.spent.calls:,} calls, "
                f"{one.spent.tokens:,} tokens and {one.spent.nano_usd / 1e9:,.2f} USD before, "
                "which count against the caps; stored answers cost nothing again."
            )
    if any(_has_cap(one) for one in plan.judges):
        yield from passed_caps(plan) or ["No cap would be passed."]


def _has_cap(one: JudgePlan) -> bool:
    api = one.settings.api
    return any(cap is not None for cap in (api.max_calls, api.max_tokens_total, api.max_usd))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
