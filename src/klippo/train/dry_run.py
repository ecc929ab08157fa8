"""`klippo train --dry-run`: what a run would do, cost and need."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import cycle, islice

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
from klippo.runs.memory import GIB
from klippo.train.dry_run_plan import (
    BYTES_PER_TOKEN,
    CHARS_PER_TOKEN,
    Plan,
    passed_caps,
    plan_run,
    texts_of,
)
from klippo.train.memory import MemoryEstimate, memory_budget, refusal, stored_estimate
from klippo.train.prepare import prepare
from klippo.train.session import Session, open_session
from klippo.train.trial import Trial, trial_learner


def dry_run(config: RunConfig, *, trust_remote_code: bool = False) -> int:
    """Say what the run would do; train nothing, write nothing, ask no judge.

    A run that does not fit into the memory is not timed, and not loaded if its weights alone are
    too much.
    """
    trust_code(config, trust_remote_code)
    device = choose_device(config.device)
    plan = plan_run(config, texts_of(config, load_rows(config.data, config.seed)))
    estimate, seconds = stored_estimate(config, device), None
    problem = refusal(config, estimate, device)
    if problem is None:
        free = config.model_copy(update={"reward": _without_judges(config.reward), "gold": None})
        run = prepare(config_from_mapping(free), trust_remote_code=trust_remote_code)
        session = open_session(run)
        with_gold = run.config.model_copy(update={"gold": config.gold})
        estimate = Trial(replace(session, run=replace(run, config=with_gold))).measured()
        problem = refusal(config, estimate, device)
        if problem is None:
            seconds = time_micro_batch(session)
        session.reward.close()
    console = Console()
    console.print(_plan_table(config, plan, seconds))
    for note in _notes(config, plan, seconds):
        console.print(Text(note), soft_wrap=True)
    console.print(_memory_table(estimate, memory_budget(config, device)))
    phases = (f"{name} {estimate.total(name) / GIB:.2f}" for name in estimate.phases)
    note = f"GiB by phase: {', '.join(phases)}. docs/memory.md says how far off this was."
    console.print(Text(note), soft_wrap=True)
    if problem is not None:
        console.print(Text(problem[0].upper() + problem[1:]), soft_wrap=True)
    return 0


def _without_judges(reward: RewardSettings) -> RewardSettings:
    """The same reward with something free in place of every judge."""
    if isinstance(reward, JudgeSettings):
        return LengthSettings(kind="length", max_tokens=1)
    if isinstance(reward, SumSettings):
        parts = {
            name: part.model_copy(update={"reward": _without_judges(part.reward)})
            for name, part in reward.parts.items()
        }
        return reward.model_copy(update={"parts": parts})
    return reward


def time_micro_batch(session: Session) -> dict[str, float]:
    """Seconds of each phase for one micro-batch, the second time. No weight moves."""
    offline, size = session.offline, session.config.ppo.micro_batch
    learner = trial_learner(session, size)
    seconds: dict[str, float] = {}
    last = 0.0

    def lap(phase: str) -> None:
        nonlocal last
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
        now = time.perf_counter()
        seconds[phase], last = now - last, now

    for _ in range(2):
        lap("start")
        if offline is not None:
            rollout = offline.source(list).rollout(offline.train[:size])
        else:
            online = session.sampling()
            rollout = online.source.answer([*islice(cycle(online.train_prompts), size)])
        lap("generate")
        forward = learner.forward(rollout)
        lap("forward")
        experience = learner.experience(rollout, session.reward.score(rollout), forward)
        lap("score")
        learner.learn(experience)
        lap("update")
    return seconds


def _run_seconds(config: RunConfig, plan: Plan, seconds: Mapping[str, float]) -> float:
    """The whole run's, scaled from one micro-batch."""
    every_response = plan.num_training + plan.num_evaluation + plan.num_early_stop
    total = (seconds["generate"] + seconds["forward"] + seconds["score"]) * every_response
    total += (seconds["generate"] + seconds["score"]) * plan.num_measured
    total += seconds["update"] * config.ppo.num_epochs * plan.num_training
    return total / config.ppo.micro_batch


def _plan_table(config: RunConfig, plan: Plan, seconds: Mapping[str, float] | None) -> Table:
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
    for judge in plan.judges:
        name, spends = f"{judge.name} ({judge.settings.api.model})", (judge.expected, judge.worst)
        usd = [f"{spend.nano_usd / 1e9:,.2f}" for spend in spends]
        if judge.settings.api.prices is None:
            usd = ["unknown", "unknown"]
        table.add_row(Text(f"{name}: calls"), *(f"{spend.calls:,}" for spend in spends))
        table.add_row(Text(f"{name}: tokens"), *(f"{spend.tokens:,}" for spend in spends))
        table.add_row(Text(f"{name}: USD"), *usd)
    if seconds is not None:
        table.add_row("time, an estimate", _duration(_run_seconds(config, plan, seconds)))
    return table


def _notes(config: RunConfig, plan: Plan, seconds: Mapping[str, float] | None) -> Iterator[str]:
    """What the table rests on."""
    if seconds is not None:
        yield (
            f"Time is scaled from {config.ppo.micro_batch} responses: {seconds['generate']:.2f} s "
            f"to sample, {seconds['forward']:.2f} s for log-probs and values, "
            f"{seconds['score']:.2f} s to score, {seconds['update']:.2f} s to learn from once; "
            "larger batches often sample faster."
        )
    if not plan.judges:
        return
    yield "The judge was not asked, and its own time is not in the estimate."
    yield (
        "Expected: full-length responses, every question answered at once, nothing cached, and "
        f"{CHARS_PER_TOKEN} characters per token. At worst: the longest prompt, every question "
        "paid at all of its attempts, each as the budget reserves it, a token per byte, "
        f"{BYTES_PER_TOKEN} bytes per response token; an outage may repeat questions beyond that."
    )
    apis = [judge.settings.api for judge in plan.judges]
    if any(api.prices is None for api in apis):
        yield (
            "USD is unknown without usd_per_million_prompt_tokens and "
            "usd_per_million_completion_tokens."
        )
    for judge in plan.judges:
        if judge.spent.calls:
            yield (
                f"{judge.name}: its budget has spent {judge.spent.calls:,} calls, "
                f"{judge.spent.tokens:,} tokens and {judge.spent.nano_usd / 1e9:,.2f} USD before, "
                "which count against the caps; stored answers cost nothing again."
            )
    if any(
        (api.max_calls, api.max_tokens_total, api.max_usd) != (None, None, None) for api in apis
    ):
        yield from passed_caps(plan) or ["No cap would be passed."]


def _memory_table(estimate: MemoryEstimate, budget: int | None) -> Table:
    """The components of the fullest phase."""
    phase = estimate.peak_phase
    table = Table(title=f"Memory in the fullest phase ({phase})", title_justify="left")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in estimate.biggest(phase):
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("together", f"{estimate.peak / GIB:.2f}", style="bold")
    if budget is not None:
        table.add_row("available, or max_memory_gib", f"{budget / GIB:.2f}")
    return table


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
