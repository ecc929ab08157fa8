"""Curves of one run as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from klippo.evaluation.samples import SampleRow
from klippo.evaluation.statistics import estimate
from klippo.types import Metrics

INK, BLUE, ORANGE, GREY = "#222222", "#2f6db3", "#d9762b", "#8a8a8a"


def draw_curves(
    metrics: Sequence[Metrics],
    evaluations: Mapping[int, Sequence[SampleRow]],
    path: Path,
    title: str,
) -> None:
    """Reward, proxy and gold over KL, KL and entropy, and length over PPO steps.

    `evaluations` maps a step to its rows. Writes `path` with the endings .png and .svg.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "text.color": INK,
        "svg.hashsalt": "klippo",  # the same run draws the same file
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        steps = [row["step"] for row in metrics]
        _evaluated(axes[0, 0], evaluations)
        _over_kl(axes[0, 1], evaluations)
        _line(
            axes[1, 0],
            steps,
            metrics,
            "kl/sequence_nats",
            "KL to the reference (nats/response)",
            BLUE,
        )
        _line(
            axes[1, 1], steps, metrics, "response/length_tokens", "response length (tokens)", BLUE
        )
        twin = axes[1, 1].twinx()
        twin.spines["right"].set_visible(True)
        _line(twin, steps, metrics, "policy/entropy_nats", "entropy (nats/token)", ORANGE)
        for ending in (".png", ".svg"):
            figure.savefig(path.with_suffix(ending), dpi=150, metadata=_no_date(ending))
        plt.close(figure)


def _no_date(ending: str) -> dict[str, Any]:
    return {"Date": None} if ending == ".svg" else {}


def _series(
    evaluations: Mapping[int, Sequence[SampleRow]], key: str
) -> tuple[list[int], list[float], list[float]]:
    """Steps, mean changes from the first evaluation in its sd, and half widths of intervals."""
    steps: list[int] = []
    means: list[float] = []
    halves: list[float] = []
    start, spread = 0.0, 1.0
    for step in sorted(evaluations):
        values = [row[key] for row in evaluations[step] if row.get(key) is not None]
        if not values:
            continue
        result = estimate(values)
        if not steps:
            start = result.mean
            variance = sum((value - start) ** 2 for value in values) / max(len(values) - 1, 1)
            spread = variance**0.5 or 1.0
        steps.append(step)
        means.append((result.mean - start) / spread)
        halves.append((result.high - result.mean) / spread)
    return steps, means, halves


def _evaluated(ax: Any, evaluations: Mapping[int, Sequence[SampleRow]]) -> None:
    for key, colour in (("proxy", BLUE), ("gold", ORANGE)):
        steps, means, halves = _series(evaluations, key)
        if steps:
            ax.errorbar(
                steps, means, yerr=halves, color=colour, marker="o", ms=3, lw=1.5, capsize=2
            )
            ax.annotate(
                key, (steps[-1], means[-1]), xytext=(6, 8), textcoords="offset points", color=colour
            )
    ax.axhline(0, color=GREY, lw=0.6)
    ax.set(xlabel="PPO step", ylabel="change in sd of the start")
    ax.set_title(
        "fixed prompts: proxy trains it, gold never does (95% intervals)", loc="left", fontsize=9
    )


def _over_kl(ax: Any, evaluations: Mapping[int, Sequence[SampleRow]]) -> None:
    for key, colour in (("proxy", BLUE), ("gold", ORANGE)):
        steps, means, _ = _series(evaluations, key)
        distance = [
            max(estimate([row["kl_exact_nats"] for row in evaluations[step]]).mean, 0.0) ** 0.5
            for step in steps
        ]
        if steps:
            ax.plot(distance, means, color=colour, marker="o", ms=3, lw=1.5)
    ax.axhline(0, color=GREY, lw=0.6)
    ax.set(xlabel="distance from the start: sqrt(KL / nats)", ylabel="change in sd of the start")
    ax.set_title("the same, over how far the policy moved", loc="left", fontsize=9)


def _line(
    ax: Any, steps: Sequence[float], metrics: Sequence[Metrics], key: str, label: str, colour: str
) -> None:
    ax.plot(steps, [row.get(key, float("nan")) for row in metrics], color=colour, lw=1.2)
    ax.set_xlabel("PPO step")
    ax.set_ylabel(label, color=colour)
