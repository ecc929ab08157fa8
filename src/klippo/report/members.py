"""Reward models of one command, side by side: tables, and the reliability diagram."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from klippo.evaluation.pairs import PairReport
from klippo.evaluation.statistics import Estimate
from klippo.report.style import BLUE, GREY, ORANGE, STYLE

COLUMNS = ("accuracy (95% interval)", "log loss", "ECE", "mean", "sd", "min")
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
    """On the held-out pairs, where there are any."""
    mean: float | None = None
    """Of the scores of the reference responses, where there are any."""
    sd: float | None = None
    minutes: float | None = None


def members_table(title: str, members: Sequence[MemberFigures]) -> Table:
    """The figures of every member and the ensemble, for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("member")
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for member in members:
        table.add_row(member.name, *_cells(member))
    return table


def members_markdown(members: Sequence[MemberFigures]) -> str:
    """The same as Markdown."""
    lines = ["| member | " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * len(COLUMNS)]
    lines += [f"| {member.name} | " + " | ".join(_cells(member)) + " |" for member in members]
    return "\n".join(lines) + f"\n\n{LEGEND}\n"


def together_lines(correlation: float | None, better: Estimate | None) -> list[str]:
    """What the members are together, in words."""
    lines = []
    if better is not None:
        lines.append(
            "The ensemble's accuracy minus its members' mean: "
            f"{better.mean:+.3f} ({better.low:+.3f} to {better.high:+.3f})"
        )
    if correlation is not None:
        lines.append(f"Correlation of the members' errors: {correlation:.2f}")
    return lines


def _cells(member: MemberFigures) -> Iterator[str]:
    report = member.report
    if report is None:
        yield from ("", "", "")
    else:
        accuracy = report.accuracy
        yield f"{accuracy.mean:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f})"
        yield f"{report.log_loss_nats:.3f}"
        yield f"{report.calibration_error:.3f}"
    yield "" if member.mean is None else f"{member.mean:+.2f}"
    yield "" if member.sd is None else f"{member.sd:.2f}"
    yield "" if member.minutes is None else f"{member.minutes:.1f}"


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
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(4.5, 4.2), layout="constrained")
        ax.plot([0.5, 1], [0.5, 1], color=GREY, lw=0.8)
        for member in members:
            if member.report is None:
                continue
            points = member.report.reliability
            whole = member.name == ENSEMBLE or len(members) == 1
            ax.plot(
                [point.confidence for point in points],
                [point.accuracy for point in points],
                color=ORANGE if whole else BLUE,
                marker="o",
                ms=4 if whole else 2.5,
                lw=1.8 if whole else 0.8,
                alpha=1 if whole else 0.6,
                label=member.name,
                zorder=3 if whole else 2,
            )
        ax.set(xlabel="confidence: probability of the choice", ylabel="share of right choices")
        ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
        ax.legend(frameon=False, fontsize=8)
        for ending in (".png", ".svg"):
            metadata: dict[str, Any] = {"Date": None} if ending == ".svg" else {}
            # A run's name may have dots, which with_suffix would take for an ending.
            figure.savefig(path.with_name(path.name + ending), dpi=150, metadata=metadata)
        plt.close(figure)
