"""The stage behind `klippo gold-eval`, and behind the gold scores at the end of a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klippo.config.load import load_config
from klippo.data.settings import DataSettings
from klippo.errors import ConfigError
from klippo.evaluation.gold import check_rows, rows_to_score, with_gold
from klippo.evaluation.history import History, history
from klippo.evaluation.samples import SampleRow
from klippo.evaluation.statistics import Estimate, estimate
from klippo.evaluation.verdict import judge
from klippo.lab.reward_names import check_reward, reward_label, reward_named
from klippo.ranks import choose_device
from klippo.rewards.build import build_reward
from klippo.rewards.resolve import resolve_scores
from klippo.rewards.settings import RewardSettings
from klippo.runs.folder import (
    CONFIG_FILE,
    EVAL_DIR,
    STATUS_FILE,
    BrokenLineError,
    RunFolder,
    evaluation_files,
    read_rows,
    write_rows,
)
from klippo.types import Prompt

CHUNK = 256
"""Rows between two writes of a file: what a killed command scores again."""


def gold_eval(
    path: Path,
    gold: str,
    *,
    is_alpacafarm: bool = False,
    batch_size: int = 32,
    overwrite: bool = False,
) -> int:
    """Add gold scores to the evaluations of a run, and say what they show."""
    console = Console()
    files = evaluation_files(path)
    settings = reward_named(gold, is_alpacafarm=is_alpacafarm, batch_size=batch_size)
    check_reward(settings)
    folder = next(iter(files.values())).parent
    run = folder.parent if folder.name else folder.resolve().parent
    status = _status(run)
    evaluations = _read(files, console, still_running=status.get("state") == "running")
    data = _data(run)
    if data is not None and data.template is not None:
        _check_content(files, evaluations)
    evaluations = add_gold(
        {step: files[step] for step in evaluations},
        settings,
        console,
        device=choose_device("auto"),
        prompt_column="prompt" if data is None else data.prompt_columns[0],
        overwrite=overwrite,
    )
    try:
        tell(history(evaluations), console)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}, so there is no curve to tell") from error
    if status and status.get("state") != "running":
        from klippo.report.write import refresh_report, write_figures

        figures = write_figures(run, evaluations)
        details = {key: value for key, value in status.items() if key != "state"}
        details |= {"before_after": figures, "gold": gold_found(settings)}
        RunFolder(run).write_status(str(status["state"]), **details)
        refresh_report(run, console)
    return 0


def add_gold(
    files: Mapping[int, Path],
    settings: RewardSettings,
    console: Console,
    *,
    device: torch.device,
    prompts: Sequence[Prompt] | None = None,
    prompt_column: str = "prompt",
    overwrite: bool = False,
) -> dict[int, list[SampleRow]]:
    """The rows of every file, with gold scores also in the files; returned by step.

    Each file is replaced as a whole after every CHUNK of scores, and rows that have them are left
    alone. The reward is loaded only where there is something to score. Without `prompts` (those of
    the data), the rows say what the reward reads of them.
    """
    label = reward_label(settings)
    evaluations = {step: read_rows(file) for step, file in files.items()}
    check_rows({files[step]: rows for step, rows in evaluations.items()})
    missing = {
        step: rows_to_score(files[step], rows, label, overwrite=overwrite)
        for step, rows in evaluations.items()
    }
    if not any(missing.values()):
        console.print(Text(f"Every row has its gold score by {label} already."), soft_wrap=True)
        return evaluations
    by_id = None if prompts is None else {prompt.id: prompt for prompt in prompts}
    source = build_reward(settings, device=device, prompt_column=prompt_column)
    for step, numbers in missing.items():
        rows = evaluations[step]
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK]
            scored = with_gold(
                [rows[number] for number in chunk],
                label,
                lambda rollout: resolve_scores(source, rollout),
                by_id,
                prompt_column,
            )
            for number, row in zip(chunk, scored, strict=True):
                rows[number] = row
            write_rows(files[step], rows)
        told = f"{files[step].name}: {len(numbers)} of {len(rows)} rows scored with gold"
        console.print(Text(told), soft_wrap=True)
    return evaluations


def tell(run: History, console: Console) -> None:
    """Proxy, gold and KL at every step, and the verdict."""
    num = len(run.prompt_ids)
    table = Table(title=f"The same {num} prompts at every step", title_justify="left")
    for name in ("step", "proxy", "gold (95% interval)", "KL (nats/response)"):
        table.add_column(name, justify="right")
    for i, step in enumerate(run.steps):
        gold = None if run.gold is None else _mean(run.gold[i])
        proxy = _mean(run.proxy[i])
        table.add_row(
            str(step),
            "" if proxy is None else f"{proxy.mean:+.3f}",
            "" if gold is None else f"{gold.mean:+.3f} ({gold.low:+.3f} to {gold.high:+.3f})",
            f"{run.kl[i].mean():.2f}",
        )
    console.print(table)
    verdict = judge(run)
    outcome = f"{verdict.outcome[0].upper()}{verdict.outcome[1:]}"
    console.print(Text(f"{outcome}. {verdict.reason}"), soft_wrap=True)


def gold_found(settings: RewardSettings) -> dict[str, Any]:
    """What run_status.json says about gold scores that are there."""
    return {"state": "done", "model": reward_label(settings)}


def gold_missing(run: Path, reason: str) -> dict[str, Any]:
    """What it says about those that are not, with the command that adds them."""
    command = ["klippo", "gold-eval", str(run / EVAL_DIR), f"{run / CONFIG_FILE}:gold"]
    return {"state": "missing", "reason": reason, "command": shlex.join(command)}


def _read(
    files: Mapping[int, Path], console: Console, *, still_running: bool
) -> dict[int, list[SampleRow]]:
    """The files that are whole. Of a run that goes on, the others are named and left out."""
    if still_running:
        console.print(
            "The run is still going on: the evaluations that are whole get gold scores; run this "
            "again for those to come.",
            soft_wrap=True,
        )
    whole = {}
    for step, file in files.items():
        try:
            whole[step] = read_rows(file)
        except BrokenLineError as error:
            if not (still_running and error.is_last):
                raise
            console.print(Text(f"Left out: {file}, line {error.line} is not whole."))
    if not whole:
        raise ConfigError("no evaluation is whole yet; wait for the run's first")
    return whole


def _status(run: Path) -> dict[str, Any]:
    """The content of run_status.json; empty where there is none to read."""
    try:
        found = json.loads((run / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "state" in found else {}


def _data(run: Path) -> DataSettings | None:
    """How the run read its prompts; None where its config cannot tell (another version's)."""
    try:
        return load_config(run / CONFIG_FILE).config.data
    except ConfigError:
        return None


def _check_content(
    files: Mapping[int, Path], evaluations: Mapping[int, Sequence[SampleRow]]
) -> None:
    """Raise ConfigError where a reward would read the data's template as part of the prompt."""
    for step, rows in evaluations.items():
        if any("prompt_content" not in row for row in rows):
            raise ConfigError(
                f"{files[step]}: the data has a template, and the rows do not hold the prompts "
                "without it (an older Klippo wrote them), so gold would read it twice; evaluate "
                "again"
            )


def _mean(values: Any) -> Estimate | None:
    known = [value for value in values.tolist() if value == value]
    return estimate(known) if known else None
