"""Reward models of one command, side by side: a table, and the reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klippo.evaluation.pairs import PairReport
from klippo.evaluation.statistics import Estimate
from klippo.report.style import BLUE, GREY, ORANGE, STYLE, write_figure
from klippo.report.tables import Table
from klippo.report.text import number, with_interval

LEGEND = (
    "Accuracy, log loss (nats; a coin has 0.693) and expected calibration error (ECE) on held-out "
    "pairs; mean and sd of the scores of the reference responses; minutes of training."
)
ENSEMBLE = "ensemble"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberFigures:
    """One member, or the ensemble of all."""

    name: str
    folder: Path | None = None
    report: PairReport | None = None
    """On the held-out pairs; None without any."""
    mean: float | None = None
    """Of the scores of the reference responses; None without any."""
    sd: float | None = None
    minutes: float | None = None


def members_table(title: str, members: Sequence[MemberFigures]) -> Table:
    """The figures of every member and the ensemble."""
    headings = ("member", "accuracy (95% interval)", "log loss", "ECE", "mean", "sd", "min")
    return Table(title=title, headings=headings, rows=[_row(member) for member in members])


def _row(member: MemberFigures) -> tuple[str, ...]:
    report = member.report
    held_out = ("", "", "")
    if report is not None:
        accuracy = report.accuracy
        held_out = (
            with_interval(accuracy.mean, accuracy.low, accuracy.high, 3, signed=False),
            number(report.log_loss_nats, 3),
            number(report.calibration_error, 3),
        )
    mean = "" if member.mean is None else number(member.mean, signed=True)
    sd = "" if member.sd is None else number(member.sd)
    minutes = "" if member.minutes is None else number(member.minutes, 1)
    return member.name, *held_out, mean, sd, minutes


def together_lines(correlation: float | None, better: Estimate | None) -> list[str]:
    """What the members are together, in words."""
    lines = []
    if better is not None:
        gain = with_interval(better.mean, better.low, better.high, 3)
        lines.append(f"The ensemble's accuracy minus its members' mean: {gain}")
    if correlation is not None:
        lines.append(f"Correlation of the members' errors: {number(correlation)}")
    return lines


def pair_figures(report: PairReport | None) -> dict[str, Any] | None:
    """A report as JSON holds it."""
    if report is None:
        return None
    accuracy = report.accuracy
    return {
        "num_pairs": accuracy.num,
        "accuracy": accuracy.mean,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "log_loss_nats": report.log_loss_nats,
        "calibration_error": report.calibration_error,
        "reliability": [asdict(point) for point in report.reliability],
    }


def draw_reliability(members: Sequence[MemberFigures], path: Path, title: str) -> None:
    """How often each member is right over how sure it is; on the diagonal it is calibrated.

    Writes `path` with the endings .png and .svg.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.5, 4.2), layout="constrained")
        ax = figure.subplots()
        ax.plot([0.5, 1], [0.5, 1], color=GREY, lw=0.8)
        for member in members:
            if member.report is None:
                continue
            is_main = member.name == ENSEMBLE or len(members) == 1
            ax.plot(
                [point.confidence for point in member.report.reliability],
                [point.accuracy for point in member.report.reliability],
                color=ORANGE if is_main else BLUE,
                marker="o",
                ms=4 if is_main else 2.5,
                lw=1.8 if is_main else 0.8,
                alpha=1 if is_main else 0.6,
                label=member.name,
                zorder=3 if is_main else 2,
            )
        ax.set(xlabel="confidence: probability of the choice", ylabel="share of right choices")
        ax.set_title(title, loc="left", fontweight="bold")
        ax.legend()
        write_figure(figure, path)
