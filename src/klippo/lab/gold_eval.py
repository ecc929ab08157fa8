"""`klippo gold-eval`, and the gold scores at the end of a run.

A row that has gold names in `gold_model` the reward that gave it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klippo.config.load import load_config
from klippo.errors import ConfigError
from klippo.evaluation.history import History, history
from klippo.evaluation.samples import SampleRow, known, prompt_of, rollout_of
from klippo.evaluation.statistics import estimate
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
    read_object,
    read_rows,
    write_rows,
)
from klippo.types import Prompt

CHUNK = 256
"""Rows between two writes of a file: what a killed command scores again."""
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "prompt_id": int,
    "prompt": str,
    "response": str,
    "response_ids": list,
    "length": int,
    "finished": bool,
    "proxy": (int, float, type(None)),
    "kl_exact_nats": (int, float),
}
_GOLD = {"gold", "gold_model"}
_UNNAMED = "a reward that the rows do not name (an older Klippo)"


def gold_eval(
    path: Path,
    gold: str,
    *,
    is_alpacafarm: bool = False,
    batch_size: int = 32,
    overwrite: bool = False,
) -> int:
    """Add gold scores to the evaluations of a run, and say what they show."""
    console = Console(soft_wrap=True)
    files = evaluation_files(path)
    settings = reward_named(gold, is_alpacafarm=is_alpacafarm, batch_size=batch_size)
    check_reward(settings)
    folder = next(iter(files.values())).parent
    run = folder.parent if folder.name else folder.resolve().parent
    try:
        status = read_object(run / STATUS_FILE)
    except ConfigError:
        status = {}
    is_running = status.get("state") == "running"
    if is_running:
        console.print(
            "The run is still going on: the evaluations that are complete get gold scores; run "
            "this again for those to come."
        )
    for step, file in list(files.items()):
        try:
            read_rows(file)
        except BrokenLineError as error:
            if not (is_running and error.is_last):  # a running run may be writing it
                raise
            console.print(Text(f"Left out: {file}, line {error.line} is not complete."))
            del files[step]
    if not files:
        raise ConfigError("no evaluation is complete yet; wait for the run's first")
    try:
        data = load_config(run / CONFIG_FILE).config.data
    except ConfigError:  # written by another version
        data = None
    evaluations = add_gold(
        files,
        settings,
        console,
        device=choose_device("auto"),
        prompt_column="prompt" if data is None else data.prompt_columns[0],
        has_template=data is not None and data.template is not None,
        overwrite=overwrite,
    )
    try:
        _print(history(evaluations), console)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}, so there is no curve to show") from error
    if "state" in status and not is_running:
        from klippo.report.write import refresh_report, write_figures

        status |= {"before_after": write_figures(run, evaluations), "gold": gold_found(settings)}
        RunFolder(run).write_status(**status)
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
    has_template: bool = False,
    overwrite: bool = False,
) -> dict[int, list[SampleRow]]:
    """The rows of every file, with gold scores also in the files; returned by step.

    Each file is replaced at once after every CHUNK of scores, and rows that have them are left
    alone. The reward is loaded only if there is something to score. Without `prompts` (those of
    the data), the rows say what the reward reads of them; with `has_template` they must hold the
    prompts without it. Raises ConfigError for rows that do not fit, or have other gold scores.
    """
    label = reward_label(settings)
    evaluations = {step: read_rows(file) for step, file in files.items()}
    keys: set[str] = next((set(rows[0]) - _GOLD for rows in evaluations.values() if rows), set())
    for step, rows in evaluations.items():
        if not rows:
            raise ConfigError(f"{files[step]}: has no rows; remove the file")
        for line, row in enumerate(rows, start=1):
            problem = _problem(row, keys, has_template)
            if "gold" in row and row.get("gold_model") != label and not (overwrite or problem):
                problem = (
                    f"has a gold score by {row.get('gold_model', _UNNAMED)}, and scores by {label} "
                    "cannot stand beside it; add --overwrite to replace it"
                )
            if problem is not None:
                raise ConfigError(f"{files[step]}, line {line}: {problem}")
    missing = {
        step: [row for row in rows if "gold" not in row or row.get("gold_model") != label]
        for step, rows in evaluations.items()
    }
    if not any(missing.values()):
        console.print(Text(f"Every row has its gold score by {label} already."), soft_wrap=True)
        return evaluations
    by_id = {prompt.id: prompt for prompt in prompts or ()}
    source = build_reward(settings, device=device, prompt_column=prompt_column)
    for step, lacking in missing.items():
        for start in range(0, len(lacking), CHUNK):
            chunk = lacking[start : start + CHUNK]
            asked = [by_id.get(row["prompt_id"]) or prompt_of(row, prompt_column) for row in chunk]
            gold = known(resolve_scores(source, rollout_of(chunk, asked)).reward)
            for row, score in zip(chunk, gold, strict=True):
                row.update(gold=score, gold_model=label)
            write_rows(files[step], evaluations[step])
        num = len(evaluations[step])
        text = f"{files[step].name}: {len(lacking)} of {num} rows scored with gold"
        console.print(Text(text), soft_wrap=True)
    return evaluations


def _problem(row: SampleRow, keys: set[str], has_template: bool) -> str | None:
    """Why the row is none of the evaluations of one run, whose rows have these keys."""
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(row.get(key, ...), kind)]
    if wrong:
        return (
            f"{', '.join(wrong)} missing or of the wrong type, so this is no row of an evaluation "
            "by this version of Klippo; evaluate again, or remove the line"
        )
    if has_template and "prompt_content" not in row:
        return (
            "the data has a template, and the row does not hold the prompt without it (an older "
            "Klippo wrote it), so gold would read it twice; evaluate again"
        )
    more, less = sorted(set(row) - _GOLD - keys), sorted(keys - set(row))
    if more or less:
        differences = [f"has {', '.join(more)}"] if more else []
        differences += [f"has no {', '.join(less)}"] if less else []
        return (
            f"{' and '.join(differences)}, unlike the first row: the rows were written by "
            "different runs or versions of Klippo; put those of one run into a folder of their own"
        )
    return None


def gold_found(settings: RewardSettings) -> dict[str, Any]:
    """What run_status.json says about gold scores that are there."""
    return {"state": "done", "model": reward_label(settings)}


def gold_missing(run: Path, reason: str) -> dict[str, Any]:
    """What it says about those that are not, with the command that adds them."""
    command = ["klippo", "gold-eval", str(run / EVAL_DIR), f"{run / CONFIG_FILE}:gold"]
    return {"state": "missing", "reason": reason, "command": shlex.join(command)}


def _print(run: History, console: Console) -> None:
    """Proxy, gold and KL at every step, and the verdict."""
    num = len(run.prompt_ids)
    table = Table(title=f"The same {num} prompts at every step", title_justify="left")
    for name in ("step", "reward", "gold (95% interval)", "KL (nats/response)"):
        table.add_column(name, justify="right")
    for i, step in enumerate(run.steps):
        cells = []
        for values in (run.proxy, run.gold):
            scored = [] if values is None else values[i][~np.isnan(values[i])].tolist()
            cells.append(estimate(scored) if scored else None)
        proxy, gold = cells
        table.add_row(
            str(step),
            "" if proxy is None else f"{proxy.mean:+.3f}",
            "" if gold is None else f"{gold.mean:+.3f} ({gold.low:+.3f} to {gold.high:+.3f})",
            f"{run.kl[i].mean():.2f}",
        )
    console.print(table, soft_wrap=False)
    verdict = judge(run)
    console.print(Text(f"{verdict.outcome.capitalize()}. {verdict.reason}"))
