"""The plots of a report: one run, or several over each other.

A plot is left out if no run has what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from klippo.evaluation.history import Floats
from klippo.evaluation.scaling import Fit
from klippo.report.bars import histogram, time_per_phase
from klippo.report.best_of_n import best_of_n_pictures
from klippo.report.reading import RunData
from klippo.report.series import Series, changes, distances, levels, metric
from klippo.report.style import (
    GREY,
    LOOKS,
    STEP,
    Look,
    Picture,
    draw,
    draw_law,
    draw_points,
    plot_label,
    run_look,
)
from klippo.report.tables import SCORES
from klippo.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DISTANCE = "distance from the start, √(KL / nats)"
IN_SD = "change in sd of the start"
MEANINGS = {
    "proxy": "reward (what trains the policy)",
    "gold": "gold (a second opinion that never trains it)",
}

Laws = Mapping[tuple[str, str], Fit]
"""(run's label, proxy or gold) -> the fitted law."""


def _metric(key: str) -> Callable[[RunData], Series | None]:
    return partial(metric, key=key)


@dataclass(frozen=True, slots=True)
class Plot:
    """One quantity over PPO steps."""

    name: str
    title: str
    """The quantity with its unit."""
    caption: str
    series: Callable[[RunData], Series | None]
    of_file: bool = False
    """Whether offline runs leave it out: it is a property of their file."""


# fmt: off
TRAINING = (
    Plot("training_reward", "reward in training", "Mean score of each batch.",
         _metric("reward/score_mean")),
    Plot("kl_exact", "KL to the start (nats/response)",
         "Exact KL of the evaluated samples, with 95% intervals.",
         partial(levels, value=lambda row: row["kl_exact_nats"])),
    Plot("kl_training", "KL in training (nats/response)",
         "KL to the reference as training sees it: an estimate from the sampled tokens.",
         _metric("kl/sequence_nats"), of_file=True),
    Plot("entropy", "entropy (nats/token)", "Entropy of the policy's tokens.",
         _metric("policy/entropy_nats")),
    Plot("length", "response length (tokens)", "Mean length in training.",
         _metric("response/length_tokens"), of_file=True),
    Plot("clipped_share", "clipped share of tokens",
         "Share of tokens whose policy loss was clipped.", _metric("policy/clipped_share")),
    Plot("explained_variance", "explained variance of returns",
         "How much of the returns the value function predicts: 1 is all, 0 or less nothing.",
         _metric("value/explained_variance"), of_file=True),
)
DISAGREEMENT = Plot(
    "member_variance", "variance over members",
    "How much the members disagree about the evaluated samples, with 95% intervals.",
    partial(levels, value=lambda row: row["parts"].get("variance")),
)
THROUGHPUT = Plot(
    "throughput", "response tokens per second", "Response tokens per second of whole PPO steps.",
    _metric("throughput/response_tokens_per_s"),
)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A series as it is drawn."""

    label: str
    series: Series
    look: Look
    distance: Floats | None = None
    law: Fit | None = None


def pictures(
    runs: Sequence[RunData], laws: Laws, phases: Mapping[str, Mapping[str, float]]
) -> dict[str, list[Picture]]:
    """All plots that the runs allow, by section; `phases` has each run's mean seconds per phase."""
    all_offline = all(run.is_offline for run in runs)
    training = [plot for plot in TRAINING if not (plot.of_file and all_offline)]
    sections = {
        "better": _changes(runs, laws),
        "best_of_n": best_of_n_pictures(runs[0]),
        "samples": (histogram(runs, key) for key in (*SCORES, "length")),
        "training": (_over_steps(plot, runs) for plot in training),
        "ensemble": (_over_steps(DISAGREEMENT, runs), _lowest_shares(runs)),
        "time": (time_per_phase(phases), _over_steps(THROUGHPUT, runs)),
    }
    return {key: [plot for plot in plots if plot is not None] for key, plots in sections.items()}


def _over_steps(plot: Plot, runs: Sequence[RunData]) -> Picture | None:
    lines = [
        Line(label=run.label, series=series, look=run_look(i))
        for i, run in enumerate(runs)
        if (series := plot.series(run)) is not None
    ]
    legend = len(runs) > 1
    return _draw_lines(plot.name, plot.title, plot.caption, lines, legend=legend) if lines else None


def _lowest_shares(runs: Sequence[RunData]) -> Picture | None:
    """How often each member of one run's ensemble is the lowest."""
    first = runs[0].metrics[0] if len(runs) == 1 and runs[0].metrics else {}
    keys = [key for key in first if key.endswith("_lowest_share")]
    names = [key.removeprefix("ensemble/").removesuffix("_lowest_share") for key in keys]
    lines = [
        Line(label=name, series=series, look=run_look(i))
        for i, (key, name) in enumerate(zip(keys, names, strict=True))
        if (series := metric(runs[0], key)) is not None
    ]
    title = "share of samples where a member is lowest"
    caption = "Which member gives the lowest score, and so rules under WCO."
    return _draw_lines("lowest_share", title, caption, lines) if lines else None


def _draw_lines(
    name: str,
    title: str,
    caption: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    legend: bool = True,
) -> Picture:
    def paint(ax: Axes) -> None:
        if unit == "sd":
            ax.axhline(0, color=GREY, lw=0.6)
        for line in lines:
            series, look = line.series, line.look | {"label": plot_label(line.label)}
            has_interval = series.low is not series.mean
            if not has_interval and len(series.steps) > 1:
                look |= {"markevery": max(len(series.steps) // 8, 1)} if legend else {"marker": ""}
            ax.plot(series.steps, series.mean, **look)
            if has_interval:
                ax.fill_between(
                    series.steps, series.low, series.high, color=look["color"], alpha=0.15, lw=0
                )
        if legend:
            ax.legend(loc="best", ncols=2 if len(lines) > 4 else 1)

    alt = _alt(f"Lines of {title} over {STEP}s", lines, unit)
    return draw(name, paint, title=title, x=STEP, caption=caption, alt=alt)


def _alt(what: str, lines: Sequence[Line], unit: str) -> str:
    """What is drawn, and for each line its two ends."""
    ends = []
    for line in lines:
        steps = line.series.steps
        first, last = (number(float(line.series.mean[i])) for i in (0, -1))
        to = f"{last} {unit}".rstrip()
        ends.append(
            f"{line.label} goes from {first} at step {steps[0]} to {to} at step {steps[-1]}"
        )
    return f"{what}. {'; '.join(ends)}."


def _changes(runs: Sequence[RunData], laws: Laws) -> list[Picture]:
    """Changes of reward and gold over steps, then over sqrt(KL).

    Both scores of one run share a plot; several runs have one plot per score.
    """
    if len(runs) == 1:
        groups = {"scores": [(runs[0], key, SCORES[key], LOOKS[key]) for key in SCORES]}
    else:
        groups = {
            SCORES[key]: [(run, key, run.label, run_look(i)) for i, run in enumerate(runs)]
            for key in SCORES
        }
    over_steps, over_distance = [], []
    for name, entries in groups.items():
        found = {
            (run.label, key): Line(
                label=label,
                series=series,
                look=look,
                distance=distances(run, series.steps),
                law=laws.get((run.label, key)),
            )
            for run, key, label, look in entries
            if (series := changes(run, key)) is not None
        }
        if found:
            title = IN_SD if len(runs) == 1 else f"{name}: {IN_SD}"
            meanings = " and ".join(dict.fromkeys(MEANINGS[key] for _, key in found))
            caption = f"{meanings[0].upper()}{meanings[1:]} on fixed prompts, against the same "
            caption += "prompts at the start. Bands are 95% intervals."
            lines = list(found.values())
            over_steps.append(_draw_lines(f"{name}_over_steps", title, caption, lines, unit="sd"))
            over_distance.append(_over_distance(f"{name}_over_distance", title, lines))
    return over_steps + over_distance


def _over_distance(name: str, title: str, lines: Sequence[Line]) -> Picture:
    def paint(ax: Axes) -> None:
        ax.axhline(0, color=GREY, lw=0.6)
        for line in lines:
            d, colour, law = line.distance, line.look["color"], line.law
            assert d is not None
            draw_points(ax, d, line.series, line.look | {"ls": "", "label": plot_label(line.label)})
            if law is None:
                ax.plot(d, line.series.mean, color=colour, lw=0.8, alpha=0.7)
                continue
            bottom, top = ax.get_ylim()
            farthest = float(np.nanmax(d))
            drawn = draw_law(ax, law, farthest * 1.02, {"color": colour})
            ax.set_ylim(min(bottom, drawn.min()), max(top, drawn.max()))  # the band may be cut
            if law.peak.value <= farthest:
                ax.axvline(law.peak.value, color=colour, lw=1, ls=":")
        ax.legend(loc="best")

    caption = "How far the policy moved, and what that brought; points are evaluations with 95% "
    caption += "intervals. "
    caption += (
        "Lines are the law R(d) = d (α − β log d) with its 95% bootstrap band; a dotted line marks "
        "its peak if the run reached it."
        if any(line.law for line in lines)
        else "Lines join the evaluations: a fit needs three of them away from the start."
    )
    alt = _alt("Points over the distance from the start", lines, "sd")
    return draw(name, paint, title=title, x=DISTANCE, caption=caption, alt=alt)
