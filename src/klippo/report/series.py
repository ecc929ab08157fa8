"""What the report plots and tabulates, computed from a run's evaluations.

S evaluated steps, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from klippo.evaluation.history import Floats, History, history
from klippo.evaluation.samples import SampleRow
from klippo.evaluation.scaling import Curve, Fit, fit
from klippo.evaluation.statistics import Estimate, PairedComparison, compare_paired, estimate
from klippo.evaluation.verdict import Verdict, judge
from klippo.report.offline import NOTHING_SAMPLED, is_offline
from klippo.report.reading import RunData


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A mean and its 95% interval at each evaluated step."""

    steps: list[int]
    mean: Floats  # (S,)
    low: Floats
    high: Floats


def changes(run: RunData, key: str) -> Series | None:
    """Paired changes of `proxy` or `gold` from the first evaluation, in its standard deviations.

    Where nothing varied at the start, the unit is the score's own. None without two evaluations.
    """
    steps, estimates = [], []
    unit = spread(run, key)
    for step, compared in _compared(run, key):
        steps.append(step)
        estimates.append(compared.difference)
    if len(steps) < 2:
        return None
    return _series(steps, estimates, unit)


def spread(run: RunData, key: str) -> float:
    """Standard deviation of single samples at the start; 1 where nothing varied."""
    values = [float(row[key]) for row in run.before if row.get(key) is not None]
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return sd or 1.0


def levels(run: RunData, value: Callable[[SampleRow], float | None]) -> Series | None:
    """Means of a number of every row, where there are any."""
    steps, estimates = [], []
    for step, rows in sorted(run.evaluations.items()):
        known = [number for number in map(value, rows) if number is not None]
        if known:
            steps.append(step)
            estimates.append(estimate(known))
    return _series(steps, estimates, 1.0) if steps else None


def _compared(run: RunData, key: str) -> list[tuple[int, PairedComparison]]:
    start = {row["prompt_id"]: row for row in run.before}
    found = []
    for step, rows in sorted(run.evaluations.items()):
        both = [(start[row["prompt_id"]], row) for row in rows if row["prompt_id"] in start]
        result = compare_paired(
            [first.get(key) for first, _ in both], [second.get(key) for _, second in both]
        )
        if result is not None:
            found.append((step, result))
    return found


def _series(steps: list[int], estimates: Sequence[Estimate], unit: float) -> Series:
    def column(name: str) -> Floats:
        return np.array([getattr(item, name) for item in estimates]) / unit

    return Series(steps=steps, mean=column("mean"), low=column("low"), high=column("high"))


def history_of(run: RunData) -> History | None:
    """None where no prompt was evaluated at every step."""
    try:
        return history(run.evaluations)
    except ValueError:
        return None


def verdict_of(run: RunData) -> Verdict:
    """`judge`, with a sentence too where there is nothing to judge."""
    if not run.evaluations and is_offline(run):
        return Verdict(outcome="not enough data", reason=NOTHING_SAMPLED)
    if not run.evaluations:
        return Verdict(
            outcome="not enough data",
            reason="The run evaluated no samples, so nothing says what became of the policy.",
        )
    seen = history_of(run)
    if seen is None:
        return Verdict(
            outcome="not enough data", reason="No prompt was evaluated at every evaluated step."
        )
    return judge(seen)


def law_of(run: RunData, key: str) -> Fit | None:
    """R_RL(d) = d (alpha - beta log d) for the change of `proxy` or `gold`, in sd of the start.

    None where it cannot be fitted: fewer than three evaluations away from the start, or no scores.
    """
    seen = history_of(run)
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
    means = [
        np.mean([row["kl_exact_nats"] for row in run.evaluations[step] if _known(row)] or [np.nan])
        for step in steps
    ]
    return np.sqrt(np.maximum(np.array(means, dtype=np.float64), 0.0))


def _known(row: SampleRow) -> bool:
    return row.get("kl_exact_nats") is not None


def by_rank(rows: Sequence[SampleRow]) -> tuple[str, list[tuple[str, SampleRow]]]:
    """Best, median and worst by gold, or by proxy where there is no gold: the key and the rows."""
    key = "gold" if any(row.get("gold") is not None for row in rows) else "proxy"
    scored = sorted((row for row in rows if row.get(key) is not None), key=lambda row: row[key])
    if not scored:
        return key, []
    places = {"best": len(scored) - 1, "median": (len(scored) - 1) // 2, "worst": 0}
    shown: list[tuple[str, SampleRow]] = []
    used: set[int] = set()
    for name, place in places.items():
        if place not in used:
            used.add(place)
            shown.append((name, scored[place]))
    return key, shown


def mean_metric(run: RunData, key: str) -> float | None:
    """Mean over all steps that have it."""
    values = [row[key] for row in run.metrics if not math.isnan(row.get(key, math.nan))]
    return sum(values) / len(values) if values else None
