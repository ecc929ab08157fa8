"""Preferences: which of two responses is better, from pairs or from ratings.

A pair's unit is what must not be on both sides of the hold-out: its prompt, or its two responses
where the data has no prompts.
"""

from __future__ import annotations

import difflib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from klippo.data.files import Row
from klippo.data.rows import load_rows, validation_source
from klippo.data.settings import DataSettings, PreferenceSettings
from klippo.errors import ConfigError
from klippo.types import Prompt

PROMPT = "prompt"
MANY_PAIRS = 200_000
"""Beyond this many possible pairs, pairs are drawn one by one instead of listed and shuffled."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """Pairs to train on and pairs to test on."""

    train: list[Pair]
    held_out: list[Pair]
    notes: list[str] = field(default_factory=list)
    """What was left out or turned round, in words."""


@dataclass(frozen=True, slots=True)
class _Rated:
    """One response with one number."""

    prompt: Prompt
    response: str
    rating: float
    units: tuple[str, ...]


def load_preferences(settings: PreferenceSettings) -> Preferences:
    """Training pairs (label noise included, bagging not) and held-out pairs.

    Raises ConfigError for everything that is wrong with the data.
    """
    data = DataSettings(
        train=settings.train,
        subset=settings.subset,
        split=settings.split,
        validation=settings.validation,
    )
    rows, validation_rows = load_rows(data, settings.seed)
    notes: list[str] = []
    items = _read(rows, settings, settings.train)
    held_out: list[Any] = []
    if settings.validation is not None:
        source = validation_source(data)
        held_out = _unseen(items, _read(validation_rows, settings, source), source, notes)
    elif settings.validation_size != 0:
        items, held_out = _hold_out(items, settings)
    if settings.format == "ratings":
        with_prompts = _has_prompts(items)
        items = _draw(items, settings, settings.num_pairs, with_prompts, "train", notes)
        if held_out:
            wanted = settings.num_validation_pairs
            held_out = _draw(held_out, settings, wanted, with_prompts, "held-out", notes)
    train = flip(items, settings.label_noise, settings.seed)
    if settings.label_noise > 0:
        notes.append(f"{num_flipped(len(train), settings.label_noise)} training pairs turned round")
    return Preferences(train=train, held_out=held_out, notes=notes)


def flip(pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """The pairs with round(share * n) of them, drawn by `seed`, turned round; margins stay."""
    drawn = random.Random(f"{seed}:label_noise").sample(
        range(len(pairs)), num_flipped(len(pairs), share)
    )
    flipped = set(drawn)
    return [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if i in flipped else pair
        for i, pair in enumerate(pairs)
    ]


def num_flipped(num_pairs: int, share: float) -> int:
    """How many of n pairs label noise turns round."""
    return round(share * num_pairs)


def bag(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """A bootstrap sample: n draws with replacement (Breiman 1996)."""
    return random.Random(f"{seed}:bagging").choices(pairs, k=len(pairs))


def pairs_from_ratings(
    rated: Sequence[Any],
    num_pairs: int | None,
    *,
    with_prompts: bool,
    disjoint: bool,
    seed: str,
) -> tuple[list[Pair], int]:
    """Pairs of responses with unlike ratings, and how many were left out because they tie.

    `disjoint` puts each response into one pair at most (without prompts). Two copies of one text
    count as a tie, whatever their ratings. At most `num_pairs`, in an order drawn by `seed`.
    """
    generator = random.Random(seed)
    pairs: list[Pair] = []
    num_ties = 0
    for first, second in _candidates(rated, with_prompts, disjoint, generator):
        if num_pairs is not None and len(pairs) == num_pairs:
            break
        if first.rating == second.rating or first.response == second.response:
            num_ties += 1
            continue
        better, worse = (first, second) if first.rating > second.rating else (second, first)
        units = better.units if with_prompts else (better.response, worse.response)
        pairs.append(
            Pair(
                prompt=better.prompt,
                chosen=better.response,
                rejected=worse.response,
                units=units,
            )
        )
    return pairs, num_ties


def _candidates(
    rated: Sequence[Any], with_prompts: bool, disjoint: bool, generator: random.Random
) -> Iterator[tuple[Any, Any]]:
    """Pairs of rows in random order, each at most once."""
    if with_prompts:
        groups: dict[tuple[str, ...], list[Any]] = {}
        for one in rated:
            groups.setdefault(one.units, []).append(one)
        listed = [pair for group in groups.values() for pair in combinations(group, 2)]
        generator.shuffle(listed)
        yield from listed
        return
    if disjoint:
        order = list(rated)
        generator.shuffle(order)
        yield from zip(order[::2], order[1::2], strict=False)
        return
    num = len(rated)
    if num * (num - 1) // 2 <= MANY_PAIRS:
        listed = list(combinations(rated, 2))
        generator.shuffle(listed)
        yield from listed
        return
    seen: set[tuple[int, int]] = set()
    while len(seen) < num * (num - 1) // 4:
        i, j = sorted(generator.sample(range(num), 2))
        if (i, j) not in seen:
            seen.add((i, j))
            yield rated[i], rated[j]


def _draw(
    rated: Sequence[Any],
    settings: PreferenceSettings,
    wanted: int | None,
    with_prompts: bool,
    side: str,
    notes: list[str],
) -> list[Pair]:
    """Pairs of one side, with a note about what was left out."""
    disjoint = side == "held-out" and wanted is None and not with_prompts
    limit = len(rated) if wanted is None and not with_prompts else wanted
    pairs, num_ties = pairs_from_ratings(
        rated,
        limit,
        with_prompts=with_prompts,
        disjoint=disjoint,
        seed=f"{settings.seed}:{side}",
    )
    source = settings.validation if side == "held-out" and settings.validation else settings.train
    among = "responses to the same prompt" if with_prompts else "responses"
    if not pairs:
        why = (
            f"all {num_ties} of them tie (equal ratings or equal texts)"
            if num_ties
            else f"among {len(rated)} rows there are no two {among}"
        )
        raise ConfigError(
            f"{source}: no {side} pairs can be made of column {settings.rating_column!r}: {why}; a "
            "pair needs two responses with unlike ratings: add rows, or check "
            "data.rating_column and data.prompt_column"
        )
    if wanted is not None and len(pairs) < wanted:
        name = "num_pairs" if side == "train" else "num_validation_pairs"
        raise ConfigError(
            f"data.{name}={wanted}: {source} gives {len(pairs)} {side} pairs of {among} with "
            f"unlike ratings ({num_ties} tie); use at most {len(pairs)}"
        )
    if num_ties:
        notes.append(f"{num_ties} {side} pairs left out because they tie")
    return pairs


def _has_prompts(items: Sequence[Any]) -> bool:
    return bool(items[0].prompt.text)


def _hold_out(items: list[Any], settings: PreferenceSettings) -> tuple[list[Any], list[Any]]:
    """Take `validation_size` rows (or that share) away, whole groups of shared units at a time."""
    size = settings.validation_size
    wanted = size if isinstance(size, int) else max(1, round(size * len(items)))
    groups = _groups([item.units for item in items])
    random.Random(f"{settings.seed}:hold_out").shuffle(groups)
    held: set[int] = set()
    for group in groups:
        if len(held) >= wanted:
            break
        held.update(group)
    if len(held) >= len(items):
        what = "prompts" if _has_prompts(items) else "groups of rows that share a response"
        raise ConfigError(
            f"data.validation_size={size} leaves nothing to train on: {settings.train} has "
            f"{len(items)} rows in {len(groups)} {what}; make it smaller"
        )
    train = [item for i, item in enumerate(items) if i not in held]
    return train, [item for i, item in enumerate(items) if i in held]


def _groups(units: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Row numbers in groups: rows that share a unit, also by way of others, are together."""
    parent = list(range(len(units)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, row in enumerate(units):
        for unit in row:
            parent[root(i)] = root(first.setdefault(unit, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(units)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def _unseen(train: list[Any], held_out: list[Any], source: str, notes: list[str]) -> list[Any]:
    """Held-out rows without those that share a unit with a training row."""
    seen = {unit for item in train for unit in item.units}
    kept = [item for item in held_out if not seen.intersection(item.units)]
    what = "prompt" if _has_prompts(train) else "response"
    if not kept:
        raise ConfigError(
            f"{source}: nothing is left to test on, for all {len(held_out)} rows share a {what} "
            "with a training row; give other rows, or set data.validation_size instead"
        )
    if len(kept) < len(held_out):
        notes.append(
            f"{len(held_out) - len(kept)} held-out rows left out because they share a {what} with "
            "training rows"
        )
    return kept


def _read(rows: Sequence[Row], settings: PreferenceSettings, source: str) -> list[Any]:
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
        if column in columns:
            return
        near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"set data.{name} to one of them"
        raise ConfigError(
            f"{self._source}: there is no column {column!r}; the columns are "
            f"{', '.join(columns)}: {hint}"
        )

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

    def rated(self, row: Row) -> _Rated:
        s = self._settings
        before, response = self._response(row, s.response_column)
        prompt = self._prompt(row, before)
        units = (_key(prompt),) if prompt.text else (response,)
        return _Rated(prompt, response, self._rating(row), units)

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
