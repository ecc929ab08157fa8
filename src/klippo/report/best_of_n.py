"""Best-of-n as pictures: what picking by each proxy does to proxy and gold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from klippo.evaluation.scaling import Fit
from klippo.report.style import LINES, MARKERS, PALETTE, STYLE, files_of, plot_label
from klippo.runs.folder import write_bytes

DISTANCE = "sqrt(upper bound of KL / nats), bound = log n - (n - 1)/n"


def draw_best_of_n(result: Mapping[str, Any], fits: Mapping[str, Fit], path: Path) -> None:
    """Gold (with the fitted law and its band) and proxy over distance, one colour per arm.

    `result` is what best_of_n.json holds. Writes `path` with the endings .png and .svg.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kinds = [kind for kind in ("gold", "proxy") if any(kind in a for a in result["arms"].values())]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.5 * len(kinds), 3.8), layout="constrained")
        axes = figure.subplots(1, len(kinds), squeeze=False)
        figure.suptitle(
            f"Best of n: {result['num_prompts']} prompts, {result['num_samples']} samples of each",
            x=0.01, ha="left", fontweight="bold",
        )  # fmt: skip
        d = np.sqrt(result["kl_bound"])
        for ax, kind in zip(axes[0], kinds, strict=True):
            for i, (name, arm) in enumerate(result["arms"].items()):
                is_fitted = kind == "gold" and name in fits and result["ns"][0] == 1
                turn = i // len(PALETTE)  # the second arm of a colour has another marker
                look = {
                    "color": PALETTE[i % len(PALETTE)],
                    "marker": MARKERS[(i + turn) % len(MARKERS)],
                    "ls": LINES[turn % len(LINES)],
                }
                if kind in arm:
                    _points(ax, d, arm[kind], look, plot_label(name), joined=not is_fitted)
                if is_fitted:
                    _law(ax, d, fits[name], arm[kind][0]["mean"], look)
            ax.set(xlabel=DISTANCE, ylabel=f"{kind} score of the picked sample")
            ax.set_title(f"{kind}, with 95% intervals over prompts")
        axes[0][0].legend()
        for ending, content in files_of(figure).items():
            write_bytes(path.with_name(f"{path.name}.{ending}"), content)


def _points(
    ax: Any,
    d: Any,
    points: Sequence[Mapping[str, float | None]],
    look: Mapping[str, Any],
    label: str,
    *,
    joined: bool,
) -> None:
    distance, means, below, above = [], [], [], []
    for x, point in zip(d, points, strict=True):
        mean, low, high = point["mean"], point["low"], point["high"]
        if mean is not None:
            distance.append(x)
            means.append(mean)
            below.append(0.0 if low is None else mean - low)
            above.append(0.0 if high is None else high - mean)
    ax.errorbar(
        distance, means, yerr=[below, above], ms=3.5, label=label,
        lw=0.8 if joined else 0, elinewidth=0.8, capsize=2, **look,
    )  # fmt: skip


def _law(ax: Any, d: Any, law: Fit, start: float | None, look: Mapping[str, Any]) -> None:
    """The fitted gain, lifted to the first point, and its 95% band."""
    if start is None or not math.isfinite(law.alpha.value):
        return
    fine = np.linspace(0, float(d[-1]), 100)
    low, high = law.band(fine)
    ax.plot(fine, start + law(fine), color=look["color"], ls=look["ls"], lw=1.4)
    ax.fill_between(fine, start + low, start + high, color=look["color"], alpha=0.12, lw=0)
