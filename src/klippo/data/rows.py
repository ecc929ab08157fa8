"""Rows for training and rows for validation, from a file or from the hub."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from klippo.data.files import Row, is_file_name, quiet, read_file
from klippo.data.settings import DataSettings
from klippo.errors import ConfigError
from klippo.hub import resolve

Data = tuple[list[Row], list[Row]]
"""Rows to train on, and rows that are held out."""


def load_rows(settings: DataSettings, seed: int) -> Data:
    """Training rows and validation rows; the latter are empty where none were asked for.

    Held-out rows depend on `seed` alone, and no prompt is on both sides.
    Raises ConfigError for everything that is wrong with the data.
    """
    train = _load_all(settings.sources, settings.subset, settings.split)
    if settings.validation is not None:
        return train, _load_validation(settings)
    if settings.validation_size == 0:
        return train, []
    return hold_out(train, settings, seed)


def train_source(settings: DataSettings) -> str:
    """The name of the training rows' source, for `build_prompts` and for messages."""
    return ", ".join(settings.sources)


def validation_source(settings: DataSettings) -> str:
    """The name of the validation rows' source, for `build_prompts` and for messages."""
    if settings.validation is None:
        return train_source(settings)
    if is_file_name(resolve(settings.validation)):
        return settings.validation
    return f"{train_source(settings)} ({settings.validation})"


def hold_out(rows: list[Row], settings: DataSettings, seed: int) -> tuple[list[Row], list[Row]]:
    """Take `validation_size` rows (or that share) away, chosen by `seed`; order is kept.

    Rows with the same prompt are taken together: a prompt on both sides would be no test.
    """
    size = settings.validation_size
    wanted = size if isinstance(size, int) else max(1, round(size * len(rows)))
    groups: dict[str, list[Row]] = {}
    for row in rows:
        prompt = row.prompt(settings.prompt_columns)
        prompt = row.number if prompt is None else prompt
        groups.setdefault(json.dumps(prompt, default=str), []).append(row)
    keys = list(groups)
    random.Random(f"{seed}:hold_out").shuffle(keys)
    held: set[int] = set()
    for key in keys:
        if len(held) >= wanted:
            break
        held.update(row.number for row in groups[key])
    if len(held) >= len(rows):
        raise ConfigError(
            f"validation_size={size} leaves nothing to train on: {train_source(settings)} has "
            f"{len(rows)} rows with {len(groups)} different prompts; make it smaller"
        )
    return [r for r in rows if r.number not in held], [r for r in rows if r.number in held]


def _load_validation(settings: DataSettings) -> list[Row]:
    assert settings.validation is not None
    if is_file_name(resolve(settings.validation)):
        return _load(settings.validation, None, "train")
    for name in settings.sources:
        if is_file_name(resolve(name)):
            raise ConfigError(
                f"validation={settings.validation!r} is not a file, and train={name!r} is a "
                "file, which has no other splits; name a file, or set validation_size"
            )
    return _load_all(settings.sources, settings.subset, settings.validation)


def _load_all(names: Sequence[str], subset: str | None, split: str) -> list[Row]:
    """The rows of all sources, one source after the other, each row with all of their columns."""
    if len(names) == 1:
        return _load(names[0], subset, split)
    rows: list[Row] = []
    first = 0
    for name in names:
        own = _load(name, subset, split)
        rows += [replace(r, number=first + r.number, source=name, first=first) for r in own]
        first = rows[-1].number + 1
    columns = list(dict.fromkeys(column for row in rows for column in row.columns))
    return [replace(r, columns={name: r.columns.get(name) for name in columns}) for r in rows]


def _load(name: str, subset: str | None, split: str) -> list[Row]:
    path = resolve(name)
    if not is_file_name(path):
        return _load_hub(path, subset, split)
    if subset is not None:
        raise ConfigError(f"subset={subset!r}: {name} is a file and has no subsets; remove it")
    return _part(read_file(path), name, split)


def _part(rows: list[Row], name: str, split: str) -> list[Row]:
    """The rows that a split such as `train[:1000]` or `train[10%:20%]` selects of a file."""
    if split == "train":
        return rows
    import datasets

    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"split={split!r}: {name} is a file, whose only split is `train` or a part of it such "
            f"as train[:1000] ({error})"
        ) from None
    chosen = [row for part in parts for row in rows[part.from_ : part.to]]
    if not chosen:
        raise ConfigError(f"split={split!r} selects none of the {len(rows)} rows of {name}")
    return chosen


def _load_hub(name: str, subset: str | None, split: str) -> list[Row]:
    import datasets

    try:
        with quiet(datasets):
            table: Any = datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        chosen = f"subset={subset!r}, split={split!r}"
        raise ConfigError(
            f"{name}: neither a file nor a data set that the hub gave us with {chosen} "
            f"({type(error).__name__}: {error}); check the name, the subset and the split, and "
            "set HF_TOKEN for a gated one"
        ) from error
    if len(table) == 0:
        raise ConfigError(f"{name}: split={split!r} has no rows; at least one prompt is needed")
    return [Row(number, dict(columns)) for number, columns in enumerate(table)]


def as_rows(prompts: Sequence[Any], prompt_columns: Sequence[str]) -> list[Row]:
    """Prompts from Python (texts, chat messages, or mappings with all columns) as rows.

    A bare prompt goes under the first prompt column, and the others stay empty.
    """
    first, *others = prompt_columns
    return [
        Row(
            number=i,
            columns=prompt
            if isinstance(prompt, Mapping)
            else {first: prompt} | dict.fromkeys(others),
        )
        for i, prompt in enumerate(prompts)
    ]
