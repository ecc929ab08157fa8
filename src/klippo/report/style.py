"""How plots look: colours that colour-blind readers can tell apart, on a plain white ground."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from klippo.report.text import visible

INK, BLUE, ORANGE, GREY = "#222222", "#0072b2", "#d55e00", "#8a8a8a"
COLOURS = {"proxy": BLUE, "gold": ORANGE}
# Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is faint on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One plot, ready to be written and shown."""

    name: str
    """Of its files, without ending."""
    caption: str
    """What it shows, in a sentence or two."""
    alt: str
    """What a person who cannot see it should know: kind of plot, axes, where it starts and ends."""
    svg: bytes
    png: bytes


def run_style(index: int, num_runs: int) -> dict[str, Any]:
    """Colour, marker and line of the i-th run; a single run is blue."""
    if num_runs == 1:
        return {"color": BLUE, "marker": "o"}
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[index % len(MARKERS)],
        "ls": LINES[index // len(PALETTE) % len(LINES)],
    }


def draw(
    name: str,
    paint: Callable[[Any], None],
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
        return Picture(name=name, caption=caption, alt=alt, **files_of(figure))


def whole_numbers() -> Any:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10])


def files_of(figure: Any) -> dict[str, bytes]:
    """The figure as SVG and PNG; the same figure gives the same bytes."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return {"svg": svg.getvalue(), "png": png.getvalue()}


def plot_label(text: str) -> str:
    """Foreign text as a label: no mathematics in it, and none that the legend would leave out."""
    text = visible(" ".join(text.split()))
    if len(text) > MAX_LABEL:
        text = "…" + text[-MAX_LABEL + 1 :]
    text = text.replace("\\", "\N{REVERSE SOLIDUS OPERATOR}").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
