"""What the report plots and tabulates, computed from a run's evaluations.

S evaluated steps, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from klippo.evaluation.history import Floats, History, history
from klippo.evaluation.samples import SampleRow
from klippo.evaluation.scaling import Curve, Fit, fit
from klippo.evaluation.statistics import Estimate, compare_paired, estimate
from klippo.evaluation.verdict import Verdict, judge
from klippo.report.reading import Point, RunData

PHASES = ("generate", "forward", "score", "update")
NOTHING_SAMPLED = (
    "The run learnt from responses that exist already. Their rewards were there before and say "
    "nothing about the policy, and the run sampled none of its own. klippo compare start RUN "
    "measures on fresh responses whether it got better."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A mean and its 95% interval at each step."""

    steps: list[int]
    mean: Floats  # (S,)
    low: Floats
    high: Floats


def changes(run: RunData, key: str) -> Series | None:
    """Paired changes of `proxy` or `gold` from the first evaluation, in its standard deviations.

    If nothing varied at the start, the unit is the score's own. None without two evaluations.
    """
    start = {row["prompt_id"]: row.get(key) for row in run.before}
    found: dict[int, Estimate] = {}
    for step, rows in sorted(run.evaluations.items()):
        both = [(start[id], row.get(key)) for row in rows if (id := row["prompt_id"]) in start]
        compared = compare_paired([first for first, _ in both], [last for _, last in both])
        if compared is not None:
            found[step] = compared.difference
    return series_of(found, unit=spread(run, key)) if len(found) > 1 else None


def spread(run: RunData, key: str) -> float:
    """Standard deviation of single samples at the start; 1 if nothing varied."""
    values = [float(row[key]) for row in run.before if row.get(key) is not None]
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return sd or 1.0


def levels(run: RunData, value: Callable[[SampleRow], float | None]) -> Series | None:
    """Means of a number of every row; None if no row has it."""
    found: dict[int, Estimate] = {}
    for step, rows in sorted(run.evaluations.items()):
        if known := [number for number in map(value, rows) if number is not None]:
            found[step] = estimate(known)
    return series_of(found) if found else None


def series_of(estimates: Mapping[int, Estimate | Point], unit: float = 1.0) -> Series:
    """Estimates by step (or by n); the interval of one that has none is NaN or infinite."""
    mean, low, high = np.array([(e.mean, e.low, e.high) for e in estimates.values()]).T / unit
    return Series(steps=list(estimates), mean=mean, low=low, high=high)


def metric(run: RunData, key: str) -> Series | None:
    """A number of metrics.jsonl after each PPO step; None if no step has it."""
    known = {int(row["step"]) + 1: row[key] for row in run.metrics if key in row}
    known = {step: value for step, value in known.items() if not math.isnan(value)}
    column = np.array(list(known.values()), dtype=np.float64)
    return Series(steps=list(known), mean=column, low=column, high=column) if known else None


def mean_metric(run: RunData, key: str) -> float | None:
    """Mean over all steps that have it."""
    series = metric(run, key)
    return None if series is None else float(series.mean.mean())


def verdict_of(run: RunData) -> Verdict:
    """`judge`, with a sentence if there is nothing to judge."""
    if run.evaluations:
        seen = _history(run)
        if seen is not None:
            return judge(seen)
        reason = "No prompt was evaluated at every evaluated step."
    elif run.is_offline:
        reason = NOTHING_SAMPLED
    else:
        reason = "The run evaluated no samples, so nothing says what became of the policy."
    return Verdict(outcome="not enough data", reason=reason)


def _history(run: RunData) -> History | None:
    """None if no prompt was evaluated at every step."""
    try:
        return history(run.evaluations)
    except ValueError:
        return None


def law_of(run: RunData, key: str) -> Fit | None:
    """R_RL(d) = d (alpha - beta log d) for the change of `proxy` or `gold`, in sd of the start.

    None if it cannot be fitted: fewer than three evaluations away from the start, or no scores.
    """
    seen = _history(run)
    values = None if seen is None else (seen.proxy if key == "proxy" else seen.gold)
    if seen is None or values is None:
        return None
    known = ~np.isnan(values).any(0) & ~np.isnan(seen.kl).any(0)
    if int(known.sum()) < 2:
        return None
    result = fit("rl", [Curve(gold=values[:, known] / spread(run, key), kl=seen.kl[:, known])])
    return None if result is None or math.isnan(result.alpha.value) else result


def distances(run: RunData, steps: Sequence[int]) -> Floats:
    """sqrt of the mean exact KL at these steps."""
    kls = ([row["kl_exact_nats"] for row in run.evaluations[step]] for step in steps)
    known = ([kl for kl in kl_of_step if kl is not None] for kl_of_step in kls)
    means = np.array([np.mean(kl_of_step or [np.nan]) for kl_of_step in known], dtype=np.float64)
    return np.sqrt(np.maximum(means, 0.0))


def by_rank(run: RunData) -> tuple[str, dict[str, SampleRow]]:
    """The key (gold, or else proxy), and the best, median and worst row by it, each once."""
    rows = run.after or run.before
    key = "gold" if any(row.get("gold") is not None for row in rows) else "proxy"
    scored = sorted((row for row in rows if row.get(key) is not None), key=lambda row: row[key])
    names = dict(zip(("best", "median", "worst"), (-1, (len(scored) - 1) // 2, 0), strict=True))
    ranked: dict[str, SampleRow] = {}
    for name, index in names.items() if scored else ():
        if scored[index] not in ranked.values():
            ranked[name] = scored[index]
    return key, ranked


def mean_phases(run: RunData) -> dict[str, float]:
    """Mean seconds of each phase of a PPO step."""
    keys = {key: None for row in run.metrics for key in row if key.startswith("time/")}
    names = [key.removeprefix("time/").removesuffix("_s") for key in keys if key != "time/step_s"]
    names.sort(key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES))
    means = {name: mean_metric(run, f"time/{name}_s") for name in names}
    return {name: mean for name, mean in means.items() if mean is not None}
