"""Write the report of run folders: one HTML file, plots as files, and a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from klippo.errors import ConfigError, KlippoError
from klippo.evaluation.samples import SampleRow
from klippo.report.figures import pictures
from klippo.report.page import card, page
from klippo.report.reading import read_runs
from klippo.report.series import mean_phases
from klippo.report.tables import before_after_markdown, compare_rows
from klippo.report.text import one_line, visible
from klippo.report.view import RunView, view
from klippo.runs.folder import write_text

REPORT_FILE = "report.html"
CARD_FILE = "MODEL_CARD.md"
BEFORE_AFTER_FILE = "before_after.md"


def report(
    paths: Sequence[Path], *, output: Path | None = None, best_of_n: Path | None = None
) -> int:
    """Write the report of one run into its folder, of several to `output`; print the verdicts."""
    if best_of_n is not None and len(paths) > 1:
        raise ConfigError("--best-of-n goes with one run: best-of-n is of one starting policy")
    if output is not None and output.is_dir():
        raise ConfigError(f"{output}: is a folder; name the HTML file, as {output / REPORT_FILE}")
    file = output or (paths[0] / REPORT_FILE if len(paths) == 1 else Path(REPORT_FILE))
    console = Console(soft_wrap=True, highlight=False)
    for run in write_report(paths, file, best_of_n, console):
        name = f"{one_line(run.data.label)}: " if len(paths) > 1 else ""
        console.print(Text(f"{name}{run.verdict.outcome}. {run.reason}"))
    console.print(Text(f"Report: {visible(str(file))}"))
    return 0


def write_report(
    paths: Sequence[Path], file: Path, best_of_n: Path | None = None, console: Console | None = None
) -> list[RunView]:
    """The page, its plots in a folder of its name, and the model card of a single run.

    Raises ConfigError for what cannot be read, StorageError for what cannot be written.
    """
    views = [view(run) for run in read_runs(paths, best_of_n)]
    laws = {(run.data.label, key): law for run in views for key, law in run.laws.items()}
    phases = {run.data.label: mean_phases(run.data) for run in views}
    sections = pictures([run.data for run in views], laws, phases)
    folder = file.with_suffix("") if file.suffix else file.with_name(file.name + "-plots")
    for picture in (picture for section in sections.values() for picture in section):
        picture.write(folder)
    if len(views) == 1:
        _write_card(views[0], paths[0] / CARD_FILE, console)
    write_text(file, page(views, sections))
    return views


def _write_card(run: RunView, path: Path, console: Console | None) -> None:
    existing = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    text = card(run, existing)
    if text is not None:
        write_text(path, text)
    elif console is not None:
        console.print(Text(f"{path} lost the marks around its figures, and was left as it is."))


def write_figures(
    run: Path, evaluations: Mapping[int, Sequence[SampleRow]]
) -> dict[str, dict[str, float]]:
    """Write before_after.md of a run; returns the figures for run_status.json."""
    before, after = evaluations[min(evaluations)], evaluations[max(evaluations)]
    compared = compare_rows(before, after)
    write_text(run / BEFORE_AFTER_FILE, before_after_markdown(compared, before, after))
    return {
        key: {
            "before": result.before.mean,
            "after": result.after.mean,
            "difference": result.difference.mean,
            "low": result.difference.low,
            "high": result.difference.high,
            "in_sd": result.difference_in_sd,
            "num": result.difference.num,
        }
        for key, result in compared.items()
    }


def refresh_report(run: Path, console: Console) -> list[RunView]:
    """Write a run's report and say where; a failure is reported and changes nothing else."""
    try:
        views = write_report([run], run / REPORT_FILE, console=console)
    except Exception as error:
        known = isinstance(error, KlippoError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        text = f"There is no report: {reason}. `klippo report {run}` tries again."
        console.print(Text(text), soft_wrap=True)
        return []
    console.print(Text(f"Report: {run / REPORT_FILE}"), soft_wrap=True)
    return views
