"""How plots look: colours that colour-blind readers can tell apart, on a plain white ground."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from klippo.evaluation.history import Floats
from klippo.report.text import visible
from klippo.runs.folder import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

    from klippo.evaluation.scaling import Fit
    from klippo.report.series import Series

INK, BLUE, ORANGE, GREY = "#222222", "#0072b2", "#d55e00", "#8a8a8a"
# Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is faint on white.
PALETTE = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.borderaxespad": 0.2,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.hashsalt": "klippo",  # the same run draws the same file
}
SIZE = (5.2, 3.3)  # inches: one column of the page, and still legible on a phone
DOTS_PER_INCH = 150
MAX_LABEL = 40
STEP = "PPO step"

Look = dict[str, Any]
"""Colour, marker and line, as matplotlib names them."""
LOOKS: Mapping[str, Look] = {
    "proxy": {"color": BLUE, "marker": "o"},
    "gold": {"color": ORANGE, "marker": "s"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One plot, ready to be written and shown."""

    name: str
    """Name of its files, without ending."""
    caption: str
    """What it shows, in a sentence or two."""
    alt: str
    """What a person who cannot see it should know: kind of plot, axes, where it starts and ends."""
    svg: bytes
    png: bytes

    def write(self, folder: Path) -> None:
        """Both files."""
        write_bytes(folder / f"{self.name}.svg", self.svg)
        write_bytes(folder / f"{self.name}.png", self.png)


def run_look(index: int) -> Look:
    """The look of the i-th run or arm; the next one of the same colour has another marker."""
    turn = index // len(PALETTE)
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "ls": LINES[turn % len(LINES)],
    }


def draw(
    name: str,
    paint: Callable[[Axes], None],
    *,
    title: str,
    x: str,
    caption: str,
    alt: str,
    size: tuple[float, float] = SIZE,
) -> Picture:
    """One pair of axes, painted by `paint`; `title` names what goes up, `x` what goes right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=size)
        ax = figure.add_axes((0.105, 0.145, 0.87, 0.755))
        ax.set_title(title, color=INK, pad=8)
        ax.set_xlabel(x)
        if x == STEP:
            ax.xaxis.set_major_locator(whole_numbers())
        paint(ax)
        svg, png = render(figure)
    return Picture(name=name, caption=caption, alt=alt, svg=svg, png=png)


def whole_numbers() -> Locator:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10])


def render(figure: Figure) -> tuple[bytes, bytes]:
    """The figure as SVG and PNG; the same figure gives the same bytes."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


def write_figure(figure: Figure, path: Path) -> None:
    """Write `path` with the endings .svg and .png; its name may have dots of its own."""
    for ending, content in zip(("svg", "png"), render(figure), strict=True):
        write_bytes(path.with_name(f"{path.name}.{ending}"), content)


def plot_label(text: str) -> str:
    """Foreign text as a label: no mathematics in it, and none that the legend would leave out."""
    text = visible(" ".join(text.split()))
    if len(text) > MAX_LABEL:
        text = "…" + text[-MAX_LABEL + 1 :]
    text = text.replace("\\", "\N{REVERSE SOLIDUS OPERATOR}").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def draw_points(ax: Axes, x: Floats, series: Series, look: Look) -> None:
    """Means with error bars; an infinite or unknown interval has none."""
    below, above = (
        np.where(np.isfinite(half), half, 0.0)
        for half in (series.mean - series.low, series.high - series.mean)
    )
    ax.errorbar(x, series.mean, yerr=[below, above], capsize=2, elinewidth=0.9, **look)


def draw_law(ax: Axes, law: Fit, farthest: float, look: Look, start: float = 0.0) -> Floats:
    """The fitted gain above `start` with its 95% band; returns the line's heights."""
    d = np.linspace(0, farthest, 160)
    height = start + law(d)
    low, high = law.band(d)
    ax.plot(d, height, lw=1.3, **look)
    ax.fill_between(d, start + low, start + high, color=look["color"], alpha=0.15, lw=0)
    return height
