"""Gold scores in the rows of evaluated samples: which rows need them, and adding them.

A row that has gold names in `gold_model` the reward that gave it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klippo.errors import ConfigError
from klippo.evaluation.samples import SampleRow, prompt_of, rollout_of
from klippo.types import Prompt, Rollout, Scores

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
_COME_LATER = {"gold", "gold_model"}
UNNAMED = "a reward that the rows do not name (an older Klippo)"


def check_rows(files: Mapping[Path, Sequence[SampleRow]]) -> None:
    """Raise ConfigError unless all rows hold the same keys, those of Klippo's evaluations."""
    first: tuple[Path, set[str]] | None = None
    for file, rows in files.items():
        if not rows:
            raise ConfigError(f"{file}: has no rows; remove the file")
        for line, row in enumerate(rows, start=1):
            _check_row(file, line, row)
            keys = set(row) - _COME_LATER
            first = first or (file, keys)
            if keys != first[1]:
                more, less = sorted(keys - first[1]), sorted(first[1] - keys)
                told = [f"has {', '.join(more)}"] if more else []
                told += [f"has no {', '.join(less)}"] if less else []
                raise ConfigError(
                    f"{file}, line {line}: {' and '.join(told)}, unlike {first[0]}, line 1: the "
                    "rows were written by different runs or versions of Klippo; put those of one "
                    "run into a folder of their own"
                )


def _check_row(file: Path, line: int, row: SampleRow) -> None:
    wrong = [
        key for key, kind in _NEEDED.items() if key not in row or not isinstance(row[key], kind)
    ]
    if wrong:
        raise ConfigError(
            f"{file}, line {line}: {', '.join(wrong)} missing or of the wrong type, so this is no "
            "row of an evaluation by this version of Klippo; evaluate again, or remove the line"
        )


def rows_to_score(
    file: Path, rows: Sequence[SampleRow], gold_model: str, *, overwrite: bool
) -> list[int]:
    """Numbers of the rows without a gold score by `gold_model`.

    Raises ConfigError where another reward gave gold scores, and `overwrite` is off.
    """
    missing = []
    for number, row in enumerate(rows):
        if "gold" in row and row.get("gold_model") == gold_model:
            continue
        if "gold" in row and not overwrite:
            raise ConfigError(
                f"{file}, line {number + 1}: has a gold score by {row.get('gold_model', UNNAMED)}, "
                f"and scores by {gold_model} cannot stand beside it; add --overwrite to replace it"
            )
        missing.append(number)
    return missing


def with_gold(
    rows: Sequence[SampleRow],
    gold_model: str,
    score: Callable[[Rollout], Scores],
    prompts: Mapping[int, Prompt] | None = None,
    prompt_column: str = "prompt",
) -> list[SampleRow]:
    """The same rows with a gold score each (null where it could not be scored).

    `prompts` by id are those of the data; without them they come from the rows.
    """
    asked = [
        prompt_of(row, prompt_column) if prompts is None else prompts[row["prompt_id"]]
        for row in rows
    ]
    gold: list[Any] = score(rollout_of(rows, asked)).reward.tolist()
    return [
        row | {"gold": None if value != value else value, "gold_model": gold_model}  # NaN
        for row, value in zip(rows, gold, strict=True)
    ]
