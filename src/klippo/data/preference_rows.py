"""Rows of preference data, read and checked: pairs, or responses with a rating.

A row's units are what must not be on both sides of the hold-out: its prompt, or its responses where
the data has no prompts.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klippo.data.files import Row, require_column
from klippo.data.settings import PreferenceSettings
from klippo.errors import ConfigError
from klippo.types import Prompt

PROMPT = "prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two responses to one prompt, and which is better."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    """By how much the chosen one must win, in reward units."""
    units: tuple[str, ...]
    """Its prompt, or its two responses where there are no prompts."""


@dataclass(frozen=True, slots=True)
class Rated:
    """One response with one number."""

    prompt: Prompt
    response: str
    rating: float
    units: tuple[str, ...]


def read_rows(rows: Sequence[Row], settings: PreferenceSettings, source: str) -> list[Any]:
    """Rows as pairs or as rated responses, checked."""
    reader = _Reader(settings, source, rows[0].columns)
    read = reader.pair if settings.format == "pairs" else reader.rated
    return [read(row) for row in rows]


class _Reader:
    """Reads the rows of one source; every error names row and column."""

    def __init__(
        self, settings: PreferenceSettings, source: str, columns: Mapping[str, Any]
    ) -> None:
        self._settings = settings
        self._source = source
        names = (
            ["chosen_column", "rejected_column", "preference_column", "margin_column"]
            if settings.format == "pairs"
            else ["response_column", "rating_column"]
        )
        for name in names:
            column = getattr(settings, name)
            if column is not None:
                self._check_column(name, column, columns)
        self._prompt_columns = self._find_prompt(columns)

    def _find_prompt(self, columns: Mapping[str, Any]) -> list[str]:
        """The prompt's columns; none where the setting is the default and there is no such one."""
        chosen = self._settings.prompt_column
        names = [] if chosen is None else [chosen] if isinstance(chosen, str) else chosen
        if names == [PROMPT] and PROMPT not in columns:
            near = [c for c in columns if PROMPT in c.lower()]
            if near:
                raise ConfigError(
                    f"{self._source}: there is no column {PROMPT!r}, but {near[0]!r}; set "
                    f"data.prompt_column: {near[0]}, or null where the data has no prompts"
                )
            names = []
        for name in names:
            self._check_column("prompt_column", name, columns)
        return names

    def _check_column(self, name: str, column: str, columns: Mapping[str, Any]) -> None:
        require_column(column, columns, f"data.{name}", self._source)

    def pair(self, row: Row) -> Pair:
        s = self._settings
        before, chosen = self._response(row, s.chosen_column)
        _, rejected = self._response(row, s.rejected_column)
        prompt = self._prompt(row, before)
        if chosen == rejected:
            raise ConfigError(
                f"{row.place(self._source)}: columns {s.chosen_column!r} and "
                f"{s.rejected_column!r} hold the same text {chosen[:40]!r}; a pair needs two "
                "different responses: remove the row"
            )
        if s.preference_column is not None and self._second_is_better(row, s.preference_column):
            chosen, rejected = rejected, chosen
        margin = (
            None
            if s.margin_column is None
            else self._number(row, s.margin_column, row.columns[s.margin_column])
        )
        units = (_key(prompt),) if prompt.text else (chosen, rejected)
        return Pair(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin, units=units)

    def rated(self, row: Row) -> Rated:
        s = self._settings
        before, response = self._response(row, s.response_column)
        prompt = self._prompt(row, before)
        units = (_key(prompt),) if prompt.text else (response,)
        return Rated(prompt, response, self._rating(row), units)

    def _prompt(self, row: Row, before: list[dict[str, Any]]) -> Prompt:
        """The row's prompt; chat messages before the response stand in for a column."""
        columns = dict(row.columns)
        value: Any = row.prompt(self._prompt_columns) if self._prompt_columns else (before or "")
        if not self._prompt_columns and before:
            columns[PROMPT] = before
        if _is_chat(value):
            text = "\n".join(str(message.get("content") or "") for message in value)
        elif isinstance(value, str):
            text = value
        else:
            text = ""
        if self._prompt_columns and not text.strip():
            raise ConfigError(
                f"{row.place(self._source)}: the prompt in column "
                f"{', '.join(self._prompt_columns)!r} is empty ({value!r}); fill or remove the "
                "row, or set data.prompt_column: null where the data has no prompts"
            )
        return Prompt(id=row.number, text=text, token_ids=[], content=text, meta=columns)

    def _response(self, row: Row, column: str) -> tuple[list[dict[str, Any]], str]:
        """Chat messages before the response (none for text), and the response."""
        value = row.columns[column]
        before: list[dict[str, Any]] = []
        text = value
        if _is_chat(value):
            before, text = value[:-1], value[-1].get("content")
        if isinstance(text, str) and text.strip():
            return before, text
        raise ConfigError(
            f"{row.place(self._source)}: column {column!r} holds {str(value)[:60]!r} where a "
            "response is needed (text, or chat messages that end with it); fill or remove the row"
        )

    def _second_is_better(self, row: Row, column: str) -> bool:
        value = row.columns[column]
        if value not in (1, 2):
            raise ConfigError(
                f"{row.place(self._source)}: column {column!r} holds {value!r}; 1 says that the "
                f"response in {self._settings.chosen_column!r} is better, 2 that the other is: "
                "mend the row"
            )
        return bool(value == 2)

    def _rating(self, row: Row) -> float:
        column = self._settings.rating_column
        value = row.columns[column]
        if not isinstance(value, list):
            return self._number(row, column, value)
        ratings = [self._number(row, column, one) for one in value]
        if not ratings:
            raise ConfigError(
                f"{row.place(self._source)}: column {column!r} holds no rating; fill or remove "
                "the row"
            )
        if self._settings.rater == "one":
            return random.Random(f"{self._settings.seed}:rater:{row.number}").choice(ratings)
        return sum(ratings) / len(ratings)

    def _number(self, row: Row, column: str, value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and math.isfinite(value):
            return float(value)
        raise ConfigError(
            f"{row.place(self._source)}: column {column!r} holds {str(value)[:60]!r} where a number"
            f"{' or a list of numbers' if column == self._settings.rating_column else ''} is "
            "needed; mend the row, or choose another column"
        )


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt.text)
