"""After training: gold scores, before against after, the report, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from klippo.errors import KlippoError
from klippo.evaluation.samples import SampleRow
from klippo.evaluation.statistics import PairedComparison
from klippo.lab.gold_eval import add_gold, gold_found, gold_missing
from klippo.report.offline import NOTHING_SAMPLED
from klippo.report.tables import (
    MEASURES,
    change_table,
    compare_rows,
    samples_table,
)
from klippo.report.write import refresh_report, write_figures
from klippo.runs.folder import (
    MODEL_DIR,
    RunFolder,
    evaluation_files,
    read_rows,
)
from klippo.train.early_stop import BEST_DIR, RunEarlyStop
from klippo.train.session import Session
from klippo.train.started import now


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did."""

    output_dir: Path
    num_steps: int
    before: Sequence[SampleRow]
    after: Sequence[SampleRow]
    compared: Mapping[str, PairedComparison]
    """By measure: proxy, gold, kl_exact_nats, length, finished."""
    gold_problem: str | None = None
    """Why gold scores are missing, where they are: the run itself is done."""


def conclude(
    session: Session,
    folder: RunFolder,
    console: Console,
    early_stop: RunEarlyStop | None = None,
    stopped: str | None = None,
    also: Mapping[str, Any] | None = None,
) -> Outcome:
    """Score the evaluation samples with gold, write tables and the report, print the summary.

    `stopped` is why an offline run ended before its last step; `also` is what else run_status.json
    should hold.
    What goes wrong with gold, or with the report, costs nothing else: the outcome,
    run_status.json and the screen say so.
    """
    num_steps = session.learner.num_steps_done
    outcome = Outcome(output_dir=folder.path, num_steps=num_steps, before=[], after=[], compared={})
    if not session.ranks.is_main:
        return outcome
    details: dict[str, Any] = {"reason": "all steps done", "num_steps_done": num_steps}
    details |= also or {}
    if early_stop is not None:
        details |= {"best_step": early_stop.best_step, "best_model": f"{BEST_DIR}/{MODEL_DIR}"}
        if early_stop.stopped is not None:
            details["reason"] = f"stopped early: {early_stop.stopped}"
    if stopped is not None:
        details["reason"] = f"stopped early: {stopped}"
    details["ended"] = now()
    details["before_after"] = {}
    if session.evaluation_prompts:
        evaluations, gold = _evaluations(session, folder, console, details)
        before, after = evaluations[0], evaluations[max(evaluations)]
        outcome = Outcome(
            output_dir=folder.path,
            num_steps=num_steps,
            before=before,
            after=after,
            compared=compare_rows(before, after),
            gold_problem=gold.get("reason"),
        )
        _show(session, outcome, console)
        details["before_after"] = write_figures(folder.path, evaluations)
        details |= {"gold": gold} if gold else {}
    folder.write_status("done", **details)
    views = refresh_report(folder.path, console)
    if session.evaluation_prompts:
        for view in views:
            console.print(Text(f"Verdict: {view.verdict.outcome}. {view.reason}"), soft_wrap=True)
    if session.offline is not None:
        told = NOTHING_SAMPLED.replace("RUN", str(folder.path))
        console.print(Text(told), soft_wrap=True)
    console.print(f"Run folder: {folder.path}   Model: {folder.path / MODEL_DIR}", soft_wrap=True)
    if early_stop is not None:
        best = folder.path / BEST_DIR / MODEL_DIR
        console.print(
            f"Best policy: that of step {early_stop.best_step}, in {best}", soft_wrap=True
        )
    return outcome


def _evaluations(
    session: Session, folder: RunFolder, console: Console, details: Mapping[str, Any]
) -> tuple[dict[int, list[SampleRow]], dict[str, Any]]:
    """Rows by step, with gold scores where a gold reward is configured; what became of gold."""
    files = evaluation_files(folder.path)
    settings = session.config.gold
    if settings is None:
        return {step: read_rows(file) for step, file in files.items()}, {}
    # Nothing of the run is lost from here on, not even to a kill.
    unscored = gold_missing(folder.path, "the run ended before it had scored them")
    folder.write_status("done", **details, gold=unscored)
    try:
        evaluations = add_gold(
            files,
            settings,
            console,
            device=session.device,
            prompts=session.evaluation_prompts,
            prompt_column=session.config.data.prompt_columns[0],
        )
        return evaluations, gold_found(settings)
    except (KeyboardInterrupt, SystemExit):
        told = f"The run is done, but for gold scores. This adds them: {unscored['command']}"
        console.print(Text(told), soft_wrap=True)
        raise
    except Exception as error:
        known = isinstance(error, KlippoError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        rows = {step: read_rows(file) for step, file in files.items()}
        return rows, gold_missing(folder.path, reason)


def _show(session: Session, outcome: Outcome, console: Console) -> None:
    number = session.config.evaluation.num_shown
    if number > 0:
        console.print(samples_table(outcome.before[:number], outcome.after[:number]))
    console.print(change_table(dict(outcome.compared), len(outcome.before)))
    console.print(sentence(outcome.compared), soft_wrap=True)


def sentence(compared: Mapping[str, PairedComparison]) -> str:
    """What happened to proxy and gold, in words that the intervals allow."""
    parts = []
    for key in ("proxy", "gold"):
        if key in compared:
            result = compared[key]
            moved = "no clear change"
            if result.difference.excludes_zero:
                moved = "rose" if result.difference.mean > 0 else "fell"
            size = f" ({result.difference_in_sd:+.2f} sd)" if result.before_sd > 0 else ""
            parts.append(f"{MEASURES[key]}: {moved}{size}")
    return "; ".join(parts) if parts else "Nothing could be compared: no sample was scored."
