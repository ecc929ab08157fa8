"""What a report says about one run, as words and numbers; the page and the card lay it out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from klippo.config.load import DEFAULT
from klippo.evaluation.samples import SampleRow
from klippo.evaluation.scaling import Fit
from klippo.evaluation.statistics import PairedComparison
from klippo.evaluation.verdict import Verdict
from klippo.report.health import HealthView, health_of, health_words
from klippo.report.judges import JudgeView, judges_of
from klippo.report.offline import is_offline, offline_rows
from klippo.report.reading import RUNNING, RunData
from klippo.report.series import by_rank, distances, law_of, mean_metric, verdict_of
from klippo.report.tables import MEASURES, REWARDS, compare_rows
from klippo.report.text import MINUS, duration, interval, number, plain_value, share

Pairs = list[tuple[str, str]]
ENDINGS = {
    RUNNING: "still being written, or killed without a word",
    "done": "done",
    "failed": "failed",
    "interrupted": "interrupted",
}
PHASES = ("generate", "forward", "score", "update")
MAX_STEPS_NAMED = 12
FAR = 100.0
NAMES_IN_REWARDS = ("model", "function", "name", "file")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The same prompt before and after."""

    heading: str
    prompt: str
    before: str | None
    before_scores: str
    after: str
    after_scores: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """Everything about one run that is not a plot."""

    data: RunData
    verdict: Verdict
    reason: str
    """The verdict's sentence, with proper minus signs."""
    facts: Pairs
    compared: Mapping[str, PairedComparison]
    key_figures: list[tuple[str, str, str, str, str]]
    """Measure, before, after, change with its interval, change in sd."""
    laws: Mapping[str, Fit]
    """proxy, gold -> the fitted law of its change over sqrt(KL)."""
    law_rows: list[tuple[str, str, str, str, str]]
    """Measure, alpha, beta, peak, and how to read the peak."""
    phases: Mapping[str, float]
    """Mean seconds per PPO step."""
    samples: list[Sample]
    ranked_by: str
    ranked: list[Sample]
    config_set: list[tuple[str, str, str]]
    config_defaults: list[tuple[str, str, str]]
    versions: Pairs
    judges: list[JudgeView]
    checks: list[HealthView]
    passes: list[tuple[str, ...]]
    """Diagnostics of an offline run."""
    notes: list[str]


def view(run: RunData) -> RunView:
    """Compute everything."""
    verdict = verdict_of(run)
    compared = compared_of(run)
    laws = {key: law for key in ("proxy", "gold") if (law := law_of(run, key)) is not None}
    ranked_by, ranked = by_rank(run.after or run.before)
    config = [
        (key, plain_value(value), run.origins.get(key, "")) for key, value in run.config.items()
    ]
    return RunView(
        data=run,
        verdict=verdict,
        reason=with_minus(verdict.reason),
        facts=list(_facts(run)),
        compared=compared,
        key_figures=[_key_figure(key, result) for key, result in compared.items()],
        laws=laws,
        law_rows=[_law_row(run, key, law) for key, law in laws.items()],
        phases=_phases(run),
        samples=list(_samples(run)),
        ranked_by=ranked_by,
        ranked=[_sample(run, row, name) for name, row in ranked],
        config_set=[row for row in config if row[2] != DEFAULT],
        config_defaults=[row for row in config if row[2] == DEFAULT],
        versions=[(str(k), str(v)) for k, v in _mapping(run.started.get("versions")).items()],
        judges=judges_of(run),
        checks=health_of(run),
        passes=offline_rows(run),
        notes=list(_notes(run)),
    )


def with_minus(text: str) -> str:
    """Hyphens before digits as minus signs."""
    return "".join(
        MINUS
        if ch == "-" and text[i + 1 : i + 2].isdigit() and not text[i - 1 : i].isalnum()
        else ch
        for i, ch in enumerate(text)
    )


def compared_of(run: RunData) -> dict[str, PairedComparison]:
    """Before against after, over the prompts that both have."""
    after = {row["prompt_id"]: row for row in run.after}
    before = [row for row in run.before if row["prompt_id"] in after]
    return compare_rows(before, [after[row["prompt_id"]] for row in before]) if before else {}


def num_steps_done(run: RunData) -> int:
    """As the run says, or else as its metrics do."""
    told = run.status.get("num_steps_done")
    if isinstance(told, int):
        return told
    return int(run.metrics[-1]["step"]) + 1 if run.metrics else 0


def seconds_taken(run: RunData) -> tuple[float | None, str]:
    """Wall-clock from the first to the last word of the run, or else the sum of its steps.

    Of a run that stood still on the way only the steps say what it took.
    """
    begun, ended = _time(run.started.get("started")), _time(run.status.get("ended"))
    if begun is not None and ended is not None and not run.started.get("resumed"):
        return (ended - begun).total_seconds(), ""
    mean = mean_metric(run, "time/step_s")
    return (None if mean is None else mean * len(run.metrics)), " in PPO steps"


def started_at(run: RunData) -> str:
    begun = _time(run.started.get("started"))
    return "not recorded" if begun is None else f"{begun:%Y-%m-%d %H:%M} {begun.tzname() or ''}"


def went_on(run: RunData) -> str:
    """`after 4 steps; after 7 steps with key=value (was value)`: after it had ended too early."""
    times = []
    for one in run.started["resumed"]:
        changed = ", ".join(map(str, one.get("changed", [])))
        times.append(f"after {one.get('after_steps')} steps" + (changed and f" with {changed}"))
    return "; ".join(times)


def reward_words(run: RunData, key: str) -> str:
    """`classifier demo:proxy`; `none` where there is none."""
    section = {k: v for k, v in run.config.items() if k == key or k.startswith(f"{key}.")}
    if not section or section.get(key, 0) is None:
        return "none"
    kind = str(section.get(f"{key}.kind", ""))
    names = list(dict.fromkeys(_names(section)))
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{kind} {shown}".strip() or "not recorded"


def gold_words(run: RunData) -> str:
    """What scored with gold, as the run says, or else as its config does."""
    gold = _mapping(run.status.get("gold"))
    if gold.get("model"):
        return str(gold["model"])
    words = reward_words(run, "gold")
    return "unknown, its scores are there" if words == "none" and run.has_gold else words


def summary(run: RunData) -> str:
    """What ran, in a sentence."""
    policy = str(run.config.get("policy.model", "A policy"))
    if is_offline(run):
        source = run.config.get("data.train", "logged responses")
        return f"{policy} after {num_steps_done(run):,} PPO steps on the responses in {source}."
    text = f"{policy} after {num_steps_done(run):,} PPO steps against {reward_words(run, 'reward')}"
    return text + (f"; second opinion: {gold_words(run)}." if run.has_gold else ".")


def _names(section: Mapping[str, Any]) -> Iterator[str]:
    for key, value in section.items():
        if key.rpartition(".")[2] in NAMES_IN_REWARDS and isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _names(value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, Mapping):
                    yield from _names(item)


def ending_words(run: RunData) -> str:
    """State and reason."""
    reason = str(run.status.get("reason", ""))
    state = ENDINGS.get(run.state, run.state)
    return f"{state}: {reason}" if reason else state


def _facts(run: RunData) -> Iterator[tuple[str, str]]:
    config = run.config
    yield "Config", str(run.started.get("name") or run.label)
    policy = str(config.get("policy.model", "not recorded"))
    tuning = config.get("policy.tuning")
    yield "Policy", f"{policy} (tuning: {tuning})" if tuning else policy
    if is_offline(run):
        yield "Rewards", f"column {run.config.get('reward.column')}"
        yield "Who wrote the responses", str(run.config.get("offline.behavior"))
        yield "Compared with", str(run.config.get("offline.baseline")).replace("_", " ")
    else:
        yield "Proxy reward", reward_words(run, "reward")
        yield "Gold reward", gold_words(run)
    yield "Prompts", str(config.get("data.train", "not recorded"))
    if run.before:
        yield "Evaluated", f"{len(run.before):,} fixed prompts at {_steps(sorted(run.evaluations))}"
    planned = config.get("ppo.num_steps")
    done = num_steps_done(run)
    last = run.metrics[-1].get("episodes") if run.metrics else None
    episodes = "" if last is None else f", {number(last, 0)} episodes"
    yield (
        "PPO steps",
        (f"{done:,} of {planned:,}" if isinstance(planned, int) else f"{done:,}") + (episodes),
    )
    rm_seed = config.get("rm_seed")
    yield (
        "Seed",
        str(config.get("seed", "—")) + ("" if rm_seed is None else f" (reward model: {rm_seed})"),
    )
    yield "Started", started_at(run)
    if run.started.get("resumed"):
        yield "Went on", went_on(run)
    seconds, what = seconds_taken(run)
    yield "Took", duration(seconds) + (what if seconds is not None else "")
    device = run.started.get("device")
    if device:
        processes = run.started.get("num_processes", 1)
        yield "Device", f"{device}" + (f", {processes} processes" if processes != 1 else "")
    speed = mean_metric(run, "throughput/response_tokens_per_s")
    if speed is not None:
        yield "Throughput", f"{number(speed, 0)} response tokens per second"
    memory = max((row.get("memory/peak_gib", math.nan) for row in run.metrics), default=math.nan)
    if not math.isnan(memory):
        yield "Peak memory", f"{number(memory, 1)} GiB"
    words = health_words(run, health_of(run))
    if words is not None:
        yield "health checks", words
    yield "Ended", ending_words(run)


def _steps(steps: Sequence[int]) -> str:
    if len(steps) > MAX_STEPS_NAMED:
        return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
    return ("steps " if len(steps) > 1 else "step ") + ", ".join(map(str, steps))


def _key_figure(key: str, result: PairedComparison) -> tuple[str, str, str, str, str]:
    change = result.difference
    is_share = key == "finished"
    before, after = (
        share(x.mean) if is_share else number(x.mean) for x in (result.before, result.after)
    )
    in_sd = key in REWARDS and result.before_sd > 0
    return (
        MEASURES[key],
        before,
        after,
        f"{number(change.mean, signed=True)} ({interval(change.low, change.high, signed=True)})",
        number(result.difference_in_sd, signed=True) if in_sd else "",
    )


def _law_row(run: RunData, key: str, law: Fit) -> tuple[str, str, str, str, str]:
    farthest = float(max(distances(run, sorted(run.evaluations))))
    peak = law.peak
    if math.isinf(peak.value):
        reading = "the fitted curve does not turn"
    elif peak.value > farthest:
        reading = f"beyond the farthest evaluation (√KL {number(farthest)}): extrapolated"
    else:
        reading = "inside the evaluated range"
    alpha, beta = (
        f"{number(x.value, signed=True)} ({interval(x.low, x.high, signed=True)})"
        for x in (law.alpha, law.beta)
    )
    told = f"{_far(peak.value)} ({_far(peak.low)} to {_far(peak.high)})"
    return key, alpha, beta, "none" if peak.low > FAR else told, reading


def _far(d: float) -> str:
    """Nobody goes that far: ten thousand nats."""
    return f">{number(FAR, 0)}" if FAR < d < math.inf else number(d)


def _phases(run: RunData) -> dict[str, float]:
    keys = dict.fromkeys(
        key
        for row in run.metrics
        for key in row
        if key.startswith("time/") and key != "time/step_s"
    )
    names = [key.removeprefix("time/").removesuffix("_s") for key in keys]
    ordered = [*(n for n in PHASES if n in names), *(n for n in names if n not in PHASES)]
    means = {name: mean_metric(run, f"time/{name}_s") for name in ordered}
    return {name: mean for name, mean in means.items() if mean is not None}


def _samples(run: RunData) -> Iterator[Sample]:
    shown = run.config.get("evaluation.num_shown")
    rows = run.after or run.before
    for row in rows[: shown if isinstance(shown, int) else 10]:
        yield _sample(run, row, "")


def _sample(run: RunData, row: SampleRow, heading: str) -> Sample:
    before = None
    if run.after:
        before = next((r for r in run.before if r["prompt_id"] == row["prompt_id"]), None)
    return Sample(
        heading=heading,
        prompt=row["prompt"],
        before=None if before is None else before["response"].lstrip(" "),
        before_scores="" if before is None else scores_of(before),
        after=row["response"].lstrip(" "),
        after_scores=scores_of(row),
    )


def scores_of(row: SampleRow) -> str:
    """`proxy +0.31 · gold −0.20 · KL 4.2 nats · 24 tokens, cut`."""
    parts = [
        f"{key} unscored" if row[key] is None else f"{key} {number(row[key], signed=True)}"
        for key in ("proxy", "gold")
        if key in row
    ]
    parts.append(f"KL {number(row['kl_exact_nats'], 1)} nats")
    length = f"{number(row['length'], 0)} tokens"
    parts.append(length if row.get("finished", True) else f"{length}, cut at the limit")
    return " · ".join(parts)


def _notes(run: RunData) -> Iterator[str]:
    yield from run.notes
    if run.is_running:
        yield "The run has not ended; the figures are those so far."
    if not run.evaluations and not is_offline(run):
        yield "There are no evaluated samples, so nothing is said about before and after."
    elif run.evaluations and not run.after:
        yield "There is one evaluation only, so nothing is said about before and after."
    if run.evaluations and not run.has_gold:
        yield "There are no gold scores; klippo gold-eval adds them to the recorded samples."
    gold = _mapping(run.status.get("gold"))
    if gold.get("reason"):
        yield f"Gold scores are missing: {gold['reason']}"
    if not run.metrics:
        yield "There are no metrics of PPO steps."
    for key in ("proxy", "gold"):
        missing = sum(row.get(key) is None for rows in run.evaluations.values() for row in rows)
        everything = sum(map(len, run.evaluations.values()))
        if missing and (key == "proxy" or run.has_gold):
            yield f"{missing:,} of {everything:,} samples have no {key} score and count nowhere."
        known = [row[key] for row in run.before if row.get(key) is not None]
        if len(known) > 1 and len(set(known)) == 1 and run.after:
            yield f"At the start every {key} score is the same, so its changes are not in sd."
    if not run.started:
        yield "The run did not record its start, so date, device and versions are unknown."


def differing(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Config keys whose values differ between runs, but for the folder."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        values = [plain_value(run.config[key]) if key in run.config else "—" for run in runs]
        if len(set(values)) > 1 and key != "output_dir":
            rows.append((key, values))
    return rows


def _time(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo is not None else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
