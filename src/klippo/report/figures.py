"""The curves of a report: one run, or several over each other.

Every function gives None where no run has what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from klippo.evaluation.history import Floats
from klippo.evaluation.scaling import Fit
from klippo.report.reading import RunData
from klippo.report.series import Series, changes, distances, levels
from klippo.report.style import (
    COLOURS,
    GREY,
    INK,
    MARKERS,
    PALETTE,
    STEP,
    Picture,
    draw,
    plot_label,
    run_style,
)
from klippo.report.text import number

DISTANCE = "distance from the start, √(KL / nats)"
IN_SD = "change in sd of the start"
MEANS = {"proxy": "the reward that trains", "gold": "the second opinion that never trains"}
MAX_MARKED = 30

Fits = Mapping[tuple[str, str], Fit]
"""(run's label, proxy or gold) -> the fitted law."""
Style = dict[str, Any]


def scores_over_steps(runs: Sequence[RunData]) -> Iterator[Picture]:
    """Proxy and gold: together for one run, one plot each for several."""
    keys = ("proxy", "gold")
    if len(runs) == 1:
        found = {key: series for key in keys if (series := changes(runs[0], key))}
        if found:
            yield _scores_of_one(found)
        return
    for key in keys:
        several = {run.label: series for run in runs if (series := changes(run, key))}
        if several:
            yield draw(
                f"{key}_over_steps",
                lambda ax, several=several: _lines(ax, several, runs),  # type: ignore[misc]
                title=f"{key}: {IN_SD}",
                x=STEP,
                caption=f"{key.capitalize()} ({MEANS[key]}) on fixed prompts, against the same "
                "prompts at the start; bands are 95% intervals.",
                alt=_alt(f"Lines of {key} over {STEP}s", several, "sd"),
            )


def _scores_of_one(found: Mapping[str, Series]) -> Picture:
    def paint(ax: Any) -> None:
        ax.axhline(0, color=GREY, lw=0.6)
        for key, series in found.items():
            _band(ax, series, {"color": COLOURS[key], "marker": "os"[key == "gold"], "label": key})
        ax.legend(loc="best")

    return draw(
        "scores_over_steps",
        paint,
        title=IN_SD,
        x=STEP,
        caption="Fixed prompts against themselves at the start: "
        + ", ".join(f"{key} ({MEANS[key]})" for key in found)
        + ". Bands are 95% intervals.",
        alt=_alt(f"Lines over {STEP}s", found, "sd"),
    )


def scores_over_distance(runs: Sequence[RunData], fits: Fits) -> Iterator[Picture]:
    """Proxy and gold over sqrt(KL), with the fitted laws and their bands."""
    keys = ("proxy", "gold")
    if len(runs) == 1:
        curves = [(key, runs[0], key, _key_style(key)) for key in keys]
        picture = _over_distance("scores_over_distance", IN_SD, curves, fits)
        if picture:
            yield picture
        return
    for key in keys:
        curves = [
            (run.label, run, key, run_style(i, len(runs)) | {"ls": ""})
            for i, run in enumerate(runs)
        ]
        picture = _over_distance(f"{key}_over_distance", f"{key}: {IN_SD}", curves, fits)
        if picture:
            yield picture


def _key_style(key: str) -> Style:
    return {"color": COLOURS[key], "marker": "os"[key == "gold"], "ls": ""}


def _over_distance(
    name: str, title: str, curves: Sequence[tuple[str, RunData, str, Style]], fits: Fits
) -> Picture | None:
    points: list[tuple[str, RunData, str, Style, Series, Floats]] = []
    for label, run, key, style in curves:
        series = changes(run, key)
        if series is not None:
            points.append((label, run, key, style, series, distances(run, series.steps)))
    if not points:
        return None
    fitted = [(run, key) for _, run, key, *_ in points if (run.label, key) in fits]

    def paint(ax: Any) -> None:
        ax.axhline(0, color=GREY, lw=0.6)
        for label, run, key, style, series, d in points:
            law = fits.get((run.label, key))
            _errors(ax, d, series, style | {"label": plot_label(label)})
            if law is None:
                ax.plot(d, series.mean, color=style["color"], lw=0.8, alpha=0.7)
            else:
                _law(ax, law, float(np.nanmax(d)), style["color"])
        ax.legend(loc="best")

    caption = "How far the policy moved, and what that brought; points are evaluations with 95% "
    caption += "intervals. "
    caption += (
        "Lines are the law R(d) = d (α − β log d) with its 95% bootstrap band; a dotted line marks "
        "its peak where that was reached."
        if fitted
        else "Lines join the evaluations: a fit needs three of them away from the start."
    )
    shown = {label: series for label, _, _, _, series, _ in points}
    return draw(
        name,
        paint,
        title=title,
        x=DISTANCE,
        caption=caption,
        alt=_alt("Points over the distance from the start", shown, "sd"),
    )


def _law(ax: Any, law: Fit, farthest: float, colour: str) -> None:
    d = np.linspace(0, farthest * 1.02, 160)
    low, high = law.band(d)
    limits = ax.get_ylim()
    ax.plot(d, law(d), color=colour, lw=1.3)
    ax.fill_between(d, low, high, color=colour, alpha=0.15, lw=0)
    if law.peak.value <= farthest:
        ax.axvline(law.peak.value, color=colour, lw=1, ls=":")
    drawn = law(d)
    ax.set_ylim(min(limits[0], float(drawn.min())), max(limits[1], float(drawn.max())))


def metric_over_steps(
    runs: Sequence[RunData], key: str, name: str, title: str, caption: str
) -> Picture | None:
    """A number of metrics.jsonl."""
    found: dict[str, Series] = {}
    for run in runs:
        pairs = [(int(row["step"]) + 1, row[key]) for row in run.metrics if key in row]
        pairs = [(step, value) for step, value in pairs if not math.isnan(value)]
        if pairs:
            steps, values = zip(*pairs, strict=True)
            column = np.array(values, dtype=np.float64)
            found[run.label] = Series(steps=list(steps), mean=column, low=column, high=column)
    if not found:
        return None
    return draw(
        name,
        lambda ax: _lines(ax, found, runs, marked=False),
        title=title,
        x=STEP,
        caption=caption,
        alt=_alt(f"Lines of {title} over {STEP}s", found, ""),
    )


def several_metrics(
    run: RunData, keys: Mapping[str, str], name: str, title: str, caption: str
) -> Picture:
    """Several numbers of one run's metrics.jsonl, by what to call them."""
    steps = [int(row["step"]) + 1 for row in run.metrics]
    columns = {
        label: np.array([row.get(key, math.nan) for row in run.metrics])
        for label, key in keys.items()
    }

    def paint(ax: Any) -> None:
        for i, (label, column) in enumerate(columns.items()):
            style = run_style(i, max(len(columns), 2))
            ax.plot(steps, column, markevery=max(len(steps) // 8, 1), label=label, **style)
        ax.legend(loc="best", ncols=2)

    found = {
        label: Series(steps=steps, mean=column, low=column, high=column)
        for label, column in columns.items()
    }
    alt = _alt(f"Lines of {title} over {STEP}s", found, "")
    return draw(name, paint, title=title, x=STEP, caption=caption, alt=alt)


def level_over_steps(
    runs: Sequence[RunData],
    value: Callable[[Any], float | None],
    name: str,
    title: str,
    caption: str,
) -> Picture | None:
    """The mean of a number of the evaluated samples, with its interval."""
    found = {run.label: series for run in runs if (series := levels(run, value))}
    if not found:
        return None
    return draw(
        name,
        lambda ax: _lines(ax, found, runs),
        title=title,
        x=STEP,
        caption=caption,
        alt=_alt(f"Lines of {title} over {STEP}s", found, ""),
    )


def best_of_n(run: RunData, key: str) -> Picture | None:
    """Best-of-n over its KL bound, beside what PPO reached."""
    result = run.best_of_n
    if result is None:
        return None
    d = np.sqrt(np.array(result["kl_bound"], dtype=np.float64))
    arms = {str(name): arm[key] for name, arm in result["arms"].items() if arm.get(key)}
    if not arms:
        return None
    ppo = levels(run, lambda row: row.get(key))

    def paint(ax: Any) -> None:
        if ppo is not None:
            _errors(
                ax,
                distances(run, ppo.steps),
                ppo,
                {"color": INK, "marker": "o", "ls": "-", "label": "PPO (exact KL)"},
            )
        for i, (name, points) in enumerate(arms.items()):
            mean, low, high = (
                np.array([point[part] for point in points], dtype=np.float64)
                for part in ("mean", "low", "high")
            )
            style = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[(i + 1) % len(MARKERS)]}
            ax.plot(d, mean, ls="--", label=f"best of n: {plot_label(name)}", **style)
            ax.fill_between(d, low, high, color=style["color"], alpha=0.15, lw=0)
        ax.legend(loc="best")

    ends = ", ".join(
        f"{name} ends at {number(points[-1]['mean'], signed=True)}" for name, points in arms.items()
    )
    return draw(
        f"best_of_n_{key}",
        paint,
        title=f"{key} reward",
        x="√(KL / nats): best of n an upper bound, PPO exact",
        caption=f"{key.capitalize()} of the best of n samples, n = 1 to {max(result['ns'])}, over "
        "the upper bound log n − (n − 1)/n of its KL, beside PPO over its exact KL. The two are "
        "not comparable at equal KL alone: they move the policy in different ways.",
        alt=f"Lines of {key} over the square root of KL. Best of n: {ends}.",
    )


def _lines(
    ax: Any, found: Mapping[str, Series], runs: Sequence[RunData], *, marked: bool = True
) -> None:
    for i, run in enumerate(runs):
        series = found.get(run.label)
        if series is None:
            continue
        style = run_style(i, len(runs))
        if not marked and len(series.steps) > MAX_MARKED:
            style["markevery"] = max(len(series.steps) // 8, 1)
        if not marked and len(runs) == 1:
            style["marker"] = "" if len(series.steps) > 1 else "o"
        _band(ax, series, style | {"label": plot_label(run.label)})
    if len(runs) > 1:
        ax.legend(loc="best")


def _band(ax: Any, series: Series, style: Style) -> None:
    ax.plot(series.steps, series.mean, **style)
    if np.isfinite(series.low).all() and (series.high > series.low).any():
        ax.fill_between(
            series.steps, series.low, series.high, color=style["color"], alpha=0.15, lw=0
        )


def _errors(ax: Any, d: Floats, series: Series, style: Style) -> None:
    half = series.high - series.mean
    half = np.where(np.isfinite(half), half, 0.0)
    ax.errorbar(d, series.mean, yerr=half, capsize=2, elinewidth=0.9, **style)


def _alt(what: str, found: Mapping[str, Series], unit: str) -> str:
    """What is drawn, and for each line its two ends."""
    ends = []
    for label, series in found.items():
        first, last = (number(float(series.mean[i])) for i in (0, -1))
        ends.append(
            f"{label} goes from {first} at step {series.steps[0]} to {last} {unit}".rstrip()
            + f" at step {series.steps[-1]}"
        )
    return f"{what}. {'; '.join(ends)}."
