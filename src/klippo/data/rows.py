"""Rows for training and rows for validation, from files or from the hub."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from klippo.data.files import Row, is_file_name, read_file, source_of
from klippo.data.settings import DataSettings, SourceSettings
from klippo.errors import ConfigError
from klippo.hub import resolve

Data = tuple[list[Row], list[Row]]
"""Rows to train on, and rows that are held out."""
T = TypeVar("T")


def load_rows(settings: DataSettings, seed: int) -> Data:
    """Training rows and validation rows; the latter are empty if none were asked for.

    Held-out rows depend on `seed` alone, and no prompt is on both sides.
    Raises ConfigError for everything that is wrong with the data.
    """
    train, validation = load_sources(settings)
    if settings.validation is None and settings.validation_size != 0:
        return hold_out(train, settings, seed)
    return train, validation


def rows_kept(settings: DataSettings, seed: int) -> list[Row]:
    """The rows that a run with this seed did not train on, or all rows if it held none out."""
    train, validation = load_rows(settings, seed)
    return validation or train


def data_of(source: str, settings: DataSettings) -> DataSettings:
    """All rows of another file or data set, read in the same way."""
    changed = {"train": source, "subset": None, "split": "train"}
    return settings.model_copy(update=changed | {"validation": None, "validation_size": 0})


def load_sources(settings: SourceSettings) -> Data:
    """The rows of `train` and of `validation`. Raises ConfigError."""
    train = _load_all(settings.sources, settings.subset, settings.split)
    validation = settings.validation
    if validation is None:
        return train, []
    if is_file_name(resolve(validation)):
        return train, _load(validation, None, "train")
    for name in settings.sources:
        if is_file_name(resolve(name)):
            raise ConfigError(
                f"validation={validation!r} is not a file, and train={name!r} is a file, which has "
                "no other splits; name a file, or set validation_size"
            )
    rows = _load_all(settings.sources, settings.subset, validation)
    return train, [replace(row, source=f"{row.source} ({validation})") for row in rows]


def hold_out(rows: Sequence[Row], settings: DataSettings, seed: int) -> Data:
    """Take `validation_size` rows (or that share) away, chosen by `seed`; order is kept.

    Rows with the same prompt are taken together: a prompt on both sides would be no test.
    """
    units = [
        (
            row.prompt_key(settings.prompt_columns)
            if row.prompt(settings.prompt_columns) is not None
            else f"row {row.number}",
        )
        for row in rows
    ]
    return hold_out_units(rows, units, settings, seed, source_of(rows))


def hold_out_units(
    items: Sequence[T],
    units: Sequence[tuple[str, ...]],
    settings: SourceSettings,
    seed: int,
    source: str,
) -> tuple[list[T], list[T]]:
    """Take `validation_size` items (or that share) away, those that share a unit together."""
    size = settings.validation_size
    wanted = size if isinstance(size, int) else max(1, round(size * len(items)))
    groups = _groups(units)
    num_groups = len(groups)
    random.Random(f"{seed}:hold_out").shuffle(groups)
    held: set[int] = set()
    while groups and len(held) < wanted:
        held.update(groups.pop(0))
    if len(held) >= len(items):
        raise ConfigError(
            f"data.validation_size={size} leaves nothing to train on: {source} has {len(items)} "
            f"rows in {num_groups} groups with different prompts or responses; make it smaller"
        )
    train = [item for i, item in enumerate(items) if i not in held]
    return train, [item for i, item in enumerate(items) if i in held]


def _groups(units: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Indices in groups: items that share a unit, also by way of others, are together."""
    parent = list(range(len(units)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, names in enumerate(units):
        for unit in names:
            parent[root(i)] = root(first.setdefault(unit, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(units)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def _load_all(names: Sequence[str], subset: str | None, split: str) -> list[Row]:
    """The rows of all sources, one source after the other, each row with all of their columns."""
    rows: list[Row] = []
    for name in names:
        first = rows[-1].number + 1 if rows else 0
        loaded = _load(name, subset, split)
        rows += [replace(row, number=first + row.number, first=first) for row in loaded]
    columns = list(dict.fromkeys(column for row in rows for column in row.columns))
    return [replace(row, columns={c: row.columns.get(c) for c in columns}) for row in rows]


def _load(name: str, subset: str | None, split: str) -> list[Row]:
    path = resolve(name)
    if not is_file_name(path):
        return _load_hub(path, subset, split)
    if subset is not None:
        raise ConfigError(f"subset={subset!r}: {name} is a file and has no subsets; remove it")
    return _part(read_file(path, name), name, split)


def _part(rows: list[Row], name: str, split: str) -> list[Row]:
    """The rows that a split such as `train[:1000]` or `train[10%:20%]` selects of a file."""
    if split == "train":
        return rows
    from datasets import ReadInstruction

    try:
        slices = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"split={split!r}: {name} is a file, whose only split is `train` or a part of it such "
            f"as train[:1000] ({error})"
        ) from None
    chosen = [row for part in slices for row in rows[part.from_ : part.to]]
    if not chosen:
        raise ConfigError(f"split={split!r} selects none of the {len(rows)} rows of {name}")
    return chosen


def _load_hub(name: str, subset: str | None, split: str) -> list[Row]:
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # they would come between the run's own lines
    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        raise ConfigError(
            f"{name}: neither a file nor a data set that the hub gave us with subset={subset!r}, "
            f"split={split!r} ({type(error).__name__}: {error}); check the name, the subset and "
            "the split, and set HF_TOKEN for a gated one"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    if len(table) == 0:
        raise ConfigError(f"{name}: split={split!r} has no rows; at least one prompt is needed")
    return [Row(number, dict(columns), source=name) for number, columns in enumerate(table)]


def as_rows(prompts: Sequence[Any], prompt_columns: Sequence[str]) -> list[Row]:
    """Prompts from Python (texts, chat messages, or mappings with all columns) as rows.

    A bare prompt goes under the first prompt column, and the others stay empty.
    """
    first, *others = prompt_columns
    columns = [
        prompt if isinstance(prompt, Mapping) else {first: prompt} | dict.fromkeys(others)
        for prompt in prompts
    ]
    return [Row(number, row, source="prompts") for number, row in enumerate(columns)]
