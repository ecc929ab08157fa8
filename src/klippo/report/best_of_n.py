"""Plots of best-of-n: what picking by each reward does to that reward and to gold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from klippo.evaluation.scaling import Fit
from klippo.report.reading import BestOfN, RunData
from klippo.report.series import Series, distances, levels, series_of
from klippo.report.style import (
    INK,
    STYLE,
    Picture,
    draw,
    draw_law,
    draw_points,
    plot_label,
    run_look,
    write_figure,
)
from klippo.report.tables import SCORES
from klippo.report.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DISTANCE = "√(upper bound of KL / nats), bound = log n − (n − 1)/n"


def best_of_n_pictures(run: RunData) -> Iterator[Picture]:
    """Best-of-n over its KL bound, beside what PPO reached."""
    result = run.best_of_n
    for key in ("gold", "proxy") if result is not None else ():
        assert result is not None
        if arms := {name: series_of(points) for name, points in result.curves(key).items()}:
            yield _beside_ppo(run, key, result, arms)


def _beside_ppo(run: RunData, key: str, result: BestOfN, arms: Mapping[str, Series]) -> Picture:
    ppo = levels(run, lambda row: row.get(key))
    name = SCORES[key]

    def paint(ax: Axes) -> None:
        if ppo is not None:
            look = {"color": INK, "marker": "o", "ls": "-", "label": "PPO (exact KL)"}
            draw_points(ax, distances(run, ppo.steps), ppo, look)
        for i, (arm, series) in enumerate(arms.items()):
            look = run_look(i + 1) | {"ls": "--", "label": f"best of n: {plot_label(arm)}"}
            draw_points(ax, np.sqrt(result.kl_bound), series, look)
        ax.legend(loc="best")

    ends = ", ".join(
        f"{arm} ends at {number(series.mean[-1], signed=True)}" for arm, series in arms.items()
    )
    return draw(
        f"best_of_n_{name}",
        paint,
        title=name,
        x="√(KL / nats): best of n an upper bound, PPO exact",
        caption=f"{name.capitalize()} of the best of n samples, n = 1 to {max(result.ns)}, over "
        "the upper bound log n − (n − 1)/n of its KL, beside PPO over its exact KL. The two are "
        "not comparable at equal KL alone: they move the policy in different ways.",
        alt=f"Lines of {name} over the square root of KL. Best of n: {ends}.",
    )


def draw_best_of_n(content: Mapping[str, Any], laws: Mapping[str, Fit], path: Path) -> None:
    """Gold (with the fitted law and its band) and the reward over distance, one colour per arm.

    `content` is what best_of_n.json holds. Writes `path` with the endings .png and .svg.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    result = BestOfN.model_validate(content)
    panels = {key: arms for key in ("gold", "proxy") if (arms := result.curves(key))}
    d = np.sqrt(result.kl_bound)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.5 * len(panels), 3.8), layout="constrained")
        title = f"Best of n: {result.num_prompts} prompts, {result.num_samples} samples of each"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (key, arms) in zip(axes, panels.items(), strict=True):
            for i, (name, points) in enumerate(arms.items()):
                series, look = series_of(points), run_look(i)
                law = laws.get(name) if key == "gold" and result.ns[0] == 1 else None
                width = 0.8 if law is None else 0
                label = plot_label(name)
                draw_points(ax, d, series, look | {"lw": width, "ms": 3.5, "label": label})
                if law is not None and math.isfinite(law.alpha.value):
                    line = {key: look[key] for key in ("color", "ls")}
                    draw_law(ax, law, float(d[-1]), line, start=float(series.mean[0]))
            ax.set(xlabel=DISTANCE, ylabel=f"{SCORES[key]} of the picked sample")
            ax.set_title(f"{SCORES[key]}, with 95% intervals over prompts")
        axes[0].legend()
        write_figure(figure, path)
