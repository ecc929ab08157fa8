"""A run folder as it was before a step: what came later will come again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from klippo.runs.folder import (
    DIAGNOSTICS_FILE,
    EVAL_DIR,
    METRICS_FILE,
    BrokenLineError,
    sync,
    write_bytes,
    writing,
)


def rewind(run: Path, step: int) -> list[int]:
    """Leave what is known before PPO step `step`, byte for byte.

    Returns the steps before it whose line in metrics.jsonl is lost. Raises BrokenLineError for a
    damaged line, except a last one that was cut.
    """
    kept = _keep_before(run / METRICS_FILE, step)
    _keep_before(run / DIAGNOSTICS_FILE, step)
    with writing(run):
        for file in (run / EVAL_DIR).glob("step-*.jsonl"):
            number = file.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                file.unlink()
        for unfinished in [*run.glob(".model-*"), *run.glob(".critic-*")]:
            shutil.rmtree(unfinished, ignore_errors=True)
    return sorted(set(range(step)) - kept)


def sync_lines(run: Path) -> None:
    """What was appended to metrics and diagnostics so far survives the loss of power too."""
    for name in (METRICS_FILE, DIAGNOSTICS_FILE):
        if (run / name).is_file():
            with writing(run / name):
                sync(run / name)


def _keep_before(file: Path, step: int) -> set[int]:
    """Cut a JSON-lines file where `step` begins; the steps that stay."""
    if not file.is_file():
        return set()
    content = file.read_bytes()
    *lines, _cut = content.split(b"\n")
    steps: set[int] = set()
    end = 0
    for number, line in enumerate(lines, start=1):
        try:
            row_step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            raise BrokenLineError(file, number, "no line of a step") from None
        if row_step >= step:
            break
        steps.add(row_step)
        end += len(line) + 1
    if end < len(content):
        write_bytes(file, content[:end])
    return steps
