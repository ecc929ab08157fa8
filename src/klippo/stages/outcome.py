"""After training: gold scores, before against after, pictures, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from klippo.evaluation.samples import SampleRow, add_gold
from klippo.evaluation.statistics import PairedComparison
from klippo.report.curves import draw_curves
from klippo.report.tables import (
    MEASURES,
    change_table,
    compare_rows,
    markdown,
    samples_table,
)
from klippo.rewards.resolve import resolve_scores
from klippo.runs.folder import MODEL_DIR, RunFolder, read_metrics, read_rows, write_text
from klippo.stages.build import build_reward
from klippo.stages.session import Session

BEFORE_AFTER_FILE = "before_after.md"
CURVES_FILE = "curves"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did."""

    output_dir: Path
    num_steps: int
    before: Sequence[SampleRow]
    after: Sequence[SampleRow]
    compared: Mapping[str, PairedComparison]
    """By measure: proxy, gold, kl_exact_nats, length, finished."""


def conclude(session: Session, name: str, folder: RunFolder, console: Console) -> Outcome:
    """Score the evaluation samples with gold, write tables and curves, print the summary."""
    num_steps = session.learner.num_steps_done
    outcome = Outcome(output_dir=folder.path, num_steps=num_steps, before=[], after=[], compared={})
    if not session.ranks.is_main:
        return outcome
    if session.evaluation_prompts:
        evaluations = _evaluations(session, folder)
        before, after = evaluations[0], evaluations[max(evaluations)]
        compared = compare_rows(before, after)
        outcome = Outcome(
            output_dir=folder.path,
            num_steps=num_steps,
            before=before,
            after=after,
            compared=compared,
        )
        _show(session, outcome, console)
        write_text(folder.path / BEFORE_AFTER_FILE, markdown(compared, before, after))
        draw_curves(read_metrics(folder.path), evaluations, folder.path / CURVES_FILE, name)
    figures = {
        key: {
            "before": result.before.mean,
            "after": result.after.mean,
            "difference": result.difference.mean,
            "low": result.difference.low,
            "high": result.difference.high,
            "in_sd": result.difference_in_sd,
            "num": result.difference.num,
        }
        for key, result in outcome.compared.items()
    }
    folder.write_status(
        "done", reason="all steps done", num_steps_done=num_steps, before_after=figures
    )
    console.print(f"Run folder: {folder.path}   Model: {folder.path / MODEL_DIR}", soft_wrap=True)
    return outcome


def _evaluations(session: Session, folder: RunFolder) -> dict[int, list[SampleRow]]:
    """Rows by step, with gold scores where a gold reward is configured."""
    files = sorted((folder.path / "eval").glob("step-*.jsonl"))
    steps = {int(file.stem.removeprefix("step-")): read_rows(file) for file in files}
    if session.config.gold is None:
        return steps
    gold = build_reward(
        session.config.gold,
        device=session.device,
        prompt_column=session.config.data.prompt_columns[0],
    )
    for step, rows in steps.items():
        steps[step] = add_gold(
            rows, session.evaluation_prompts, lambda rollout: resolve_scores(gold, rollout)
        )
        folder.write_rows(step, steps[step])
    return steps


def _show(session: Session, outcome: Outcome, console: Console) -> None:
    number = session.config.evaluation.num_shown
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
