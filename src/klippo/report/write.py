"""The stage behind `klippo report`: run folders to one HTML file, plots and a model card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.text import Text

from klippo.errors import ConfigError, KlippoError
from klippo.evaluation.samples import SampleRow
from klippo.report.card import CARD_FILE, card
from klippo.report.content import RunView, view
from klippo.report.page import groups, render
from klippo.report.reading import read_runs
from klippo.report.tables import clean, compare_rows, markdown
from klippo.report.text import visible
from klippo.runs.folder import write_text, writing

REPORT_FILE = "report.html"
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
        name = f"{clean(run.data.label)}: " if len(paths) > 1 else ""
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
    sections = groups(views)
    folder = file.with_suffix("") if file.suffix else file.with_name(file.name + "-plots")
    for section in sections.values():
        for picture in section.pictures:
            _write_bytes(folder / f"{picture.name}.svg", picture.svg)
            _write_bytes(folder / f"{picture.name}.png", picture.png)
    if len(views) == 1:
        _write_card(views[0], paths[0] / CARD_FILE, console)
    write_text(file, render(views, sections, version("klippo")))
    return views


def _write_card(run: RunView, path: Path, console: Console | None) -> None:
    existing = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    text = card(run, existing)
    if text is not None:
        write_text(path, text)
    elif console is not None:
        console.print(Text(f"{path} lost the marks around its figures, and was left as it is."))


def _write_bytes(path: Path, content: bytes) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def write_figures(
    run: Path, evaluations: Mapping[int, Sequence[SampleRow]]
) -> dict[str, dict[str, float]]:
    """before_after.md of a run; returns the figures for run_status.json."""
    before, after = evaluations[min(evaluations)], evaluations[max(evaluations)]
    compared = compare_rows(before, after)
    write_text(run / BEFORE_AFTER_FILE, markdown(compared, before, after))
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
    """Write the run's report and say where; the run is whole without it."""
    try:
        views = write_report([run], run / REPORT_FILE, console=console)
    except Exception as error:
        known = isinstance(error, KlippoError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        told = f"There is no report: {reason}. `klippo report {run}` tries again."
        console.print(Text(told), soft_wrap=True)
        return []
    console.print(Text(f"Report: {run / REPORT_FILE}"), soft_wrap=True)
    return views
