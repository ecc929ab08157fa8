"""What a run would do, cost and take: the stage behind `klippo train --dry-run`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from klippo.config.schema import RunConfig
from klippo.config.trust import trust_code
from klippo.errors import ConfigError
from klippo.judge.database import Spend, spent_in
from klippo.judge.settings import JudgeSettings
from klippo.train.dry_run_plan import (
    BYTES_PER_TOKEN,
    CHARS_PER_TOKEN,
    JudgePlan,
    Plan,
    named_judges,
    passed_caps,
    plan_run,
    texts_of,
)

if TYPE_CHECKING:
    from klippo.data.rows import Data
    from klippo.train.memory import MemoryEstimate

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


def time_run(config: RunConfig, plan: Plan, *, trust_remote_code: bool) -> Timing:
    """Sample, score and learn from one micro-batch of the real model, twice; the second counts.

    A reward with a judge gives zeros here. Nothing is written.
    """
    import torch

    from klippo.config.load import config_from_mapping
    from klippo.train.prepare import Given, prepare
    from klippo.train.session import open_session

    ppo = config.ppo
    size = ppo.micro_batch_size or ppo.minibatch_size or ppo.batch_size
    small = {
        "num_steps": 2,
        "batch_size": size,
        "minibatch_size": size,
        "micro_batch_size": None if ppo.micro_batch_tokens else size,
        "num_epochs": 1,
        "num_critic_warmup_steps": 0,
    }
    timed = config.model_copy(update={"ppo": ppo.model_copy(update=small), "gold": None})
    asks_a_judge = any(name.startswith("reward") for name, _ in named_judges(config))
    given = Given(reward=_zeros if asks_a_judge else None)
    session = open_session(
        prepare(
            config_from_mapping(timed),
            given,
            trust_remote_code=trust_remote_code,
            measures_memory=False,
        )
    )
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
    session.reward.close()
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


def _zeros(responses: Sequence[str], **_: Any) -> list[float]:
    return [0.0] * len(responses)


def dry_run(config: RunConfig, *, trust_remote_code: bool = False) -> int:
    """Say what the run would do; train nothing, write nothing, ask no judge.

    Where it would not fit into the memory, its time is not measured.
    """
    from klippo.data.rows import load_rows
    from klippo.ranks import choose_device
    from klippo.train.memory_check import NoEstimateError, estimate_of, memory_budget, refusal

    trust_code(config, trust_remote_code)
    data = load_rows(config.data, config.seed)
    plan = with_ledger(plan_run(config, texts_of(config, data)))
    device = choose_device(config.device)
    budget = memory_budget(config, device)
    estimate, problem = None, ""
    try:
        estimate = estimate_of(config, data, device)
        if budget is not None and estimate.peak > budget:
            problem = refusal(config, estimate, budget, device)
    except NoEstimateError as error:
        problem = str(error)
    fits = estimate is None or budget is None or estimate.peak <= budget
    timing = time_run(config, plan, trust_remote_code=trust_remote_code) if fits else None
    console = Console()
    tell(plan, timing, console)
    if estimate is not None:
        tell_memory(estimate, budget, console)
    if problem:
        console.print(Text(problem[0].upper() + problem[1:]), soft_wrap=True)
    return 0


def with_ledger(plan: Plan) -> Plan:
    """The plan with what its accounts have spent before."""
    judges = [replace(one, spent=_spent(one)) for one in plan.judges]
    return replace(plan, judges=judges)


def _spent(one: JudgePlan) -> Spend:
    from klippo.rewards.build import JUDGE_CACHE

    cache, account = one.account
    return spent_in(Path(cache).expanduser() if cache else JUDGE_CACHE, account)


def tell_memory(estimate: MemoryEstimate, budget: int | None, console: Console) -> None:
    """The components of the fullest phase, and how full the others are."""
    phase = estimate.peak_phase
    table = Table(title=f"Memory, an estimate: the fullest phase ({phase})", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in estimate.biggest(phase, number=len(estimate.phases[phase])):
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


def agree_to_cost(config: RunConfig, data: Data, *, yes: bool) -> None:
    """Ask before a run whose judges may cost much. Raises ConfigError where the answer is no."""
    if yes or not any(_costs(settings) for _, settings in named_judges(config)):
        return
    plan = with_ledger(plan_run(config, texts_of(config, data)))
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
