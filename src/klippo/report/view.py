"""What a report says about one run, as words and numbers; the templates lay it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from klippo.config.load import DEFAULT
from klippo.evaluation.samples import SampleRow
from klippo.evaluation.scaling import Fit
from klippo.evaluation.statistics import PairedComparison
from klippo.evaluation.verdict import Verdict
from klippo.report.reading import RUNNING, RunData
from klippo.report.sections import (
    health_words,
)
from klippo.report.series import law_of, mean_metric, verdict_of
from klippo.report.tables import SCORES, Table, compare_rows, score_words
from klippo.report.text import duration, number, plain_value, with_minus

UNFINISHED = "still being written, or killed without a word"
MAX_STEPS_NAMED = 12
NAMES_IN_REWARDS = ("model", "function", "name", "file")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run and what its evaluations say."""

    data: RunData
    verdict: Verdict
    compared: Mapping[str, PairedComparison]
    """Before against after, over the prompts that both have."""
    laws: Mapping[str, Fit]
    """proxy, gold -> the fitted law of its change over sqrt(KL)."""

    @property
    def reason(self) -> str:
        """The verdict's sentence, with proper minus signs."""
        return with_minus(self.verdict.reason)


def view(run: RunData) -> RunView:
    """Compare, judge and fit."""
    after = {row["prompt_id"]: row for row in run.after}
    both = [row for row in run.before if row["prompt_id"] in after]
    return RunView(
        data=run,
        verdict=verdict_of(run),
        compared=compare_rows(both, [after[row["prompt_id"]] for row in both]) if both else {},
        laws={key: law for key in SCORES if (law := law_of(run, key)) is not None},
    )


def reward_words(run: RunData, key: str) -> str:
    """`classifier demo:proxy`, or `none`, for the section `reward` or `gold` of the config."""
    section = {k: v for k, v in run.config.items() if k == key or k.startswith(f"{key}.")}
    if not section or section.get(key, 0) is None:
        return "none"
    names = list(dict.fromkeys(_names(section)))
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{section.get(f'{key}.kind', '')} {shown}".strip() or "not recorded"


def _names(value: object, key: str = "") -> Iterator[str]:
    """Every name of a model, function or file in a section."""
    if isinstance(value, str) and key.rpartition(".")[2] in NAMES_IN_REWARDS:
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _names(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _names(item)


def gold_words(run: RunData) -> str:
    """What scored with gold: as the run says, or else as its config does."""
    if model := _mapping(run.status.get("gold")).get("model"):
        return str(model)
    words = reward_words(run, "gold")
    return "unknown, its scores are there" if words == "none" and run.has_gold else words


def facts(run: RunData) -> Iterator[tuple[str, str]]:
    """What ran, and how it ended."""
    config, started = run.config, run.started
    yield "Config", str(started.get("name") or run.label)
    tuning = f" (tuning: {config['policy.tuning']})" if config.get("policy.tuning") else ""
    yield "Policy", f"{config.get('policy.model', 'not recorded')}{tuning}"
    if run.is_offline:
        yield "Rewards", f"column {config.get('reward.column')}"
        yield "Who wrote the responses", str(config.get("offline.behavior"))
        yield "Compared with", str(config.get("offline.baseline")).replace("_", " ")
    else:
        yield "Reward", reward_words(run, "reward")
        yield "Gold", gold_words(run)
    yield "Prompts", str(config.get("data.train", "not recorded"))
    if run.before:
        yield "Evaluated", f"{len(run.before):,} fixed prompts at {_steps(sorted(run.evaluations))}"
    planned = config.get("ppo.num_steps")
    steps = f"{num_steps(run):,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    episodes = run.metrics[-1].get("episodes") if run.metrics else None
    yield "PPO steps", steps + (f", {number(episodes, 0)} episodes" if episodes is not None else "")
    rm_seed = config.get("rm_seed")
    member = "" if rm_seed is None else f" (reward model: {rm_seed})"
    yield "Seed", f"{config.get('seed', '—')}{member}"
    begun, ended = _time(started.get("started")), _time(run.status.get("ended"))
    yield "Started", f"{begun:%Y-%m-%d %H:%M} {begun.tzname()}" if begun else "not recorded"
    seconds, mean = None, mean_metric(run, "time/step_s")
    if resumed := started.get("resumed"):
        yield "Resumed", "; ".join(map(_resumed, resumed))
    elif begun and ended:
        seconds = (ended - begun).total_seconds()
    if seconds is None and mean is not None:  # of a run that paused only its steps say what it took
        yield "Took", f"{duration(mean * len(run.metrics))} in PPO steps"
    else:
        yield "Took", duration(seconds)
    if device := started.get("device"):
        processes = started.get("num_processes", 1)
        yield "Device", f"{device}" + (f", {processes} processes" if processes != 1 else "")
    speed = mean_metric(run, "throughput/response_tokens_per_s")
    if speed is not None:
        yield "Throughput", f"{number(speed, 0)} response tokens per second"
    memory = [row["memory/peak_gib"] for row in run.metrics if "memory/peak_gib" in row]
    if memory:
        yield "Peak memory", f"{number(max(memory), 1)} GiB"
    if words := health_words(run):
        yield "Health checks", words
    reason = f": {run.status['reason']}" if run.status.get("reason") else ""
    yield "Ended", (UNFINISHED if run.state == RUNNING else run.state) + reason


def num_steps(run: RunData) -> int:
    """PPO steps that are done: as the run says, or else as its metrics do."""
    recorded = run.status.get("num_steps_done")
    if isinstance(recorded, int):
        return recorded
    return int(run.metrics[-1]["step"]) + 1 if run.metrics else 0


def _steps(steps: Sequence[int]) -> str:
    if len(steps) > MAX_STEPS_NAMED:
        return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def _resumed(time: Mapping[str, Any]) -> str:
    """`after 7 steps with key=value (was value)`."""
    changed = ", ".join(map(str, time.get("changed", [])))
    return f"after {time.get('after_steps')} steps" + (f" with {changed}" if changed else "")


def _time(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo is not None else None


def notes(run: RunData) -> Iterator[str]:
    """What the report lacks, and why."""
    yield from run.notes
    if run.state == RUNNING:
        yield "The run has not ended; the figures are those so far."
    if not run.evaluations and not run.is_offline:
        yield "There are no evaluated samples, so nothing is said about before and after."
    elif run.evaluations and not run.after:
        yield "There is one evaluation only, so nothing is said about before and after."
    if run.evaluations and not run.has_gold:
        yield "There are no gold scores; klippo gold-eval adds them to the recorded samples."
    if reason := _mapping(run.status.get("gold")).get("reason"):
        yield f"Gold scores are missing: {reason}"
    if not run.metrics:
        yield "There are no metrics of PPO steps."
    samples = [row for rows in run.evaluations.values() for row in rows]
    for key, name in SCORES.items():
        num_missing = sum(row.get(key) is None for row in samples)
        if num_missing and (key == "proxy" or run.has_gold):
            total = f"{len(samples):,} samples"
            yield f"{num_missing:,} of {total} have no {name} score and count nowhere."
        known = [row[key] for row in run.before if row.get(key) is not None]
        if len(known) > 1 and len(set(known)) == 1 and run.after:
            yield f"At the start every {name} score is the same, so its changes are not in sd."
    if not run.started:
        yield "The run did not record its start, so date, device and versions are unknown."


def first_samples(run: RunData) -> Sequence[SampleRow]:
    """The evaluated prompts to show, in the data's order."""
    shown = run.config.get("evaluation.num_shown")
    return (run.after or run.before)[: shown if isinstance(shown, int) else 10]


def sample_words(row: SampleRow) -> str:
    """`reward +0.31 · gold −0.20 · KL 4.2 nats · 24 tokens, cut at the limit`."""
    cut = "" if row.get("finished", True) else ", cut at the limit"
    kl, length = number(row["kl_exact_nats"], 1), number(row["length"], 0)
    return f"{score_words(row)} · KL {kl} nats · {length} tokens{cut}"


def config_table(run: RunData, *, of_defaults: bool) -> Table:
    """Key, value and origin of the values that were set, or of the others."""
    rows = [
        (key, plain_value(value), run.origins.get(key, ""))
        for key, value in run.config.items()
        if (run.origins.get(key) == DEFAULT) == of_defaults
    ]
    title = "defaults" if of_defaults else "values that were set"
    headings = ("Key", "Value", "Set by")
    return Table(title=title, headings=headings, rows=rows, is_prose=True, num_code=2)


def config_differences(runs: Sequence[RunData]) -> Table:
    """Config keys whose values differ between runs, except for the folder."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.config if key != "output_dir"):
        values = [plain_value(run.config[key]) if key in run.config else "—" for run in runs]
        if len(set(values)) > 1:
            rows.append((key, *values))
    title, headings = "Config values that differ", ("Key", *(run.label for run in runs))
    return Table(title=title, headings=headings, rows=rows, is_prose=True, num_code=len(headings))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
