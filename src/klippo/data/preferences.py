"""Preferences: which of two responses is better, from pairs or from ratings."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from typing import Any

from klippo.data.files import Row, finite_number, is_chat, source_of
from klippo.data.rows import hold_out_units, load_sources
from klippo.data.settings import PreferenceSettings
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


@dataclass(frozen=True, slots=True)
class Rated:
    """One response with one number."""

    prompt: Prompt
    response: str
    rating: float


def units_of(item: Pair | Rated) -> tuple[str, ...]:
    """What must not be on both sides: its prompt, or its responses if there are no prompts."""
    if item.prompt.text:
        return (json.dumps(item.prompt.text),)
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item.response,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """Pairs to train on and pairs to test on."""

    train: list[Pair]
    held_out: list[Pair]
    notes: list[str] = field(default_factory=list)
    """What was left out or flipped, in words."""


def load_preferences(settings: PreferenceSettings) -> Preferences:
    """Training pairs (label noise included, bagging not) and held-out pairs.

    Raises ConfigError for everything that is wrong with the data.
    """
    rows, validation_rows = load_sources(settings)
    source, notes = source_of(rows), []
    items = _read(rows, settings)
    held_out: list[Any] = []
    if settings.validation is not None:
        held_out = _unseen(items, _read(validation_rows, settings), source_of(validation_rows))
        if num_seen := len(validation_rows) - len(held_out):
            notes.append(
                f"{num_seen} held-out rows left out because they share a {_unit_name(items)} with "
                "training rows"
            )
    elif settings.validation_size != 0:
        units = [units_of(item) for item in items]
        items, held_out = hold_out_units(items, units, settings, settings.seed, source)
    if settings.format == "ratings":
        items = _draw(items, settings, "num_pairs", source, notes)
        if held_out:
            source = settings.validation or source
            held_out = _draw(held_out, settings, "num_validation_pairs", source, notes)
    train = flip(items, settings.label_noise, settings.seed)
    if settings.label_noise > 0:
        notes.append(f"{num_flipped(len(train), settings.label_noise)} training pairs flipped")
    return Preferences(train=train, held_out=held_out, notes=notes)


def flip(pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """The pairs with round(share * n) of them, drawn by `seed`, flipped; margins stay."""
    number = num_flipped(len(pairs), share)
    flipped = set(random.Random(f"{seed}:label_noise").sample(range(len(pairs)), number))
    return [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if i in flipped else pair
        for i, pair in enumerate(pairs)
    ]


def num_flipped(num_pairs: int, share: float) -> int:
    """How many of n pairs label noise flips."""
    return round(share * num_pairs)


def bag(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """A bootstrap sample: n draws with replacement (Breiman 1996)."""
    return random.Random(f"{seed}:bagging").choices(pairs, k=len(pairs))


def _read(rows: Sequence[Row], settings: PreferenceSettings) -> list[Any]:
    """Rows as pairs or as rated responses, checked."""
    names = ["chosen_column", "rejected_column", "preference_column", "margin_column"]
    if settings.format == "ratings":
        names = ["response_column", "rating_column"]
    for name in names:
        if (column := getattr(settings, name)) is not None:
            rows[0].require(column, f"data.{name}")
    columns = _prompt_columns(rows[0], settings)
    read = _pair if settings.format == "pairs" else _rated
    return [read(row, settings, columns) for row in rows]


def _prompt_columns(row: Row, settings: PreferenceSettings) -> list[str]:
    """The prompt's columns; none if the setting is the default and the data has no such one."""
    chosen = settings.prompt_column
    names = [] if chosen is None else [chosen] if isinstance(chosen, str) else chosen
    if names == [PROMPT] and PROMPT not in row.columns:
        near = [column for column in row.columns if PROMPT in column.lower()]
        if near:
            raise ConfigError(
                f"{row.source}: there is no column {PROMPT!r}, but {near[0]!r}; set "
                f"data.prompt_column: {near[0]}, or null if the data has no prompts"
            )
        return []
    for name in names:
        row.require(name, "data.prompt_column")
    return names


def _pair(row: Row, settings: PreferenceSettings, prompt_columns: list[str]) -> Pair:
    before, chosen = _response(row, settings.chosen_column)
    _, rejected = _response(row, settings.rejected_column)
    prompt = _prompt(row, prompt_columns, before)
    if chosen == rejected:
        raise ConfigError(
            f"{row}: columns {settings.chosen_column!r} and {settings.rejected_column!r} hold the "
            f"same text {chosen[:40]!r}; a pair needs two different responses: remove the row"
        )
    if (column := settings.preference_column) is not None:
        better = row.columns[column]
        if better not in (1, 2):
            raise ConfigError(
                f"{row}: column {column!r} holds {better!r}; 1 says that the response in "
                f"{settings.chosen_column!r} is better, 2 that the other is: fix the row"
            )
        chosen, rejected = (chosen, rejected) if better == 1 else (rejected, chosen)
    margin = None
    if (column := settings.margin_column) is not None:
        margin = finite_number(row.columns[column])
        if margin is None:
            raise row.unusable(column, "a number", "fix the row, or choose another column")
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin)


def _rated(row: Row, settings: PreferenceSettings, prompt_columns: list[str]) -> Rated:
    before, response = _response(row, settings.response_column)
    prompt = _prompt(row, prompt_columns, before)
    column = settings.rating_column
    value = row.columns[column]
    values = map(finite_number, value if isinstance(value, list) else [value])
    ratings = [rating for rating in values if rating is not None]
    if not ratings or (isinstance(value, list) and len(ratings) < len(value)):
        needed = "a number or a list of numbers"
        raise row.unusable(column, needed, "fix the row, or choose another column")
    rating = sum(ratings) / len(ratings)
    if settings.rater == "one":
        rating = random.Random(f"{settings.seed}:rater:{row.number}").choice(ratings)
    return Rated(prompt, response, rating)


def _prompt(row: Row, prompt_columns: list[str], before: list[dict[str, Any]]) -> Prompt:
    """The row's prompt; chat messages before the response stand in for a column."""
    columns = dict(row.columns)
    value: Any = row.prompt(prompt_columns) if prompt_columns else (before or "")
    if not prompt_columns and before:
        columns[PROMPT] = before
    text = value if isinstance(value, str) else ""
    if is_chat(value):
        text = "\n".join(str(message.get("content") or "") for message in value)
    if prompt_columns and not text.strip():
        raise ConfigError(
            f"{row}: the prompt in column {', '.join(prompt_columns)!r} is empty ({value!r}); fill "
            "or remove the row, or set data.prompt_column: null if the data has no prompts"
        )
    return Prompt(id=row.number, text=text, token_ids=[], content=text, meta=columns)


def _response(row: Row, column: str) -> tuple[list[dict[str, Any]], str]:
    """Chat messages before the response (none for text), and the response."""
    text = value = row.columns[column]
    before: list[dict[str, Any]] = []
    if is_chat(value):
        before, text = value[:-1], value[-1].get("content")
    if isinstance(text, str) and text.strip():
        return before, text
    needed = "a response (text, or chat messages that end with it)"
    raise row.unusable(column, needed, "fill or remove the row")


def _draw(
    rated: Sequence[Rated],
    settings: PreferenceSettings,
    limit_name: str,
    source: str,
    notes: list[str],
) -> list[Pair]:
    """Pairs of responses with unlike ratings, drawn by the seed; ties are counted in a note.

    Two copies of one text tie, whatever their ratings. Without prompts and without a limit, as
    many pairs as there are responses train, and each held-out response is in one pair.
    """
    side = "train" if limit_name == "num_pairs" else "held-out"
    wanted, has_prompts = getattr(settings, limit_name), bool(rated[0].prompt.text)
    limit = len(rated) if wanted is None and not has_prompts else wanted
    disjoint = side == "held-out" and wanted is None
    num_ties = 0

    def untied() -> Iterator[Pair]:
        nonlocal num_ties
        generator = random.Random(f"{settings.seed}:{side}")
        for pair in _candidates(rated, has_prompts, disjoint, generator):
            worse, better = sorted(pair, key=lambda one: one.rating)
            if worse.rating == better.rating or worse.response == better.response:
                num_ties += 1
            else:
                chosen, rejected = better.response, worse.response
                yield Pair(prompt=better.prompt, chosen=chosen, rejected=rejected)

    pairs = list(islice(untied(), limit))
    among = "responses to the same prompt" if has_prompts else "responses"
    if not pairs:
        why = f"among {len(rated)} rows there are no two {among}"
        if num_ties:
            why = f"all {num_ties} of them tie (equal ratings or equal texts)"
        raise ConfigError(
            f"{source}: no {side} pairs can be made of column {settings.rating_column!r}: {why}; a "
            "pair needs two responses with unlike ratings: add rows, or check data.rating_column "
            "and data.prompt_column"
        )
    if wanted is not None and len(pairs) < wanted:
        raise ConfigError(
            f"data.{limit_name}={wanted}: {source} gives {len(pairs)} {side} pairs of {among} with "
            f"unlike ratings ({num_ties} tie); use at most {len(pairs)}"
        )
    if num_ties:
        notes.append(f"{num_ties} {side} pairs left out because they tie")
    return pairs


def _candidates(
    rated: Sequence[Rated], with_prompts: bool, disjoint: bool, generator: random.Random
) -> Iterator[tuple[Rated, Rated]]:
    """Pairs of rows in random order, each at most once."""
    num = len(rated)
    if not with_prompts and disjoint:
        order = list(rated)
        generator.shuffle(order)
        yield from zip(order[::2], order[1::2], strict=False)
    elif with_prompts or num * (num - 1) // 2 <= MANY_PAIRS:
        groups: dict[tuple[str, ...], list[Rated]] = {}
        for one in rated:
            groups.setdefault(units_of(one) if with_prompts else (), []).append(one)
        listed = [pair for group in groups.values() for pair in combinations(group, 2)]
        generator.shuffle(listed)
        yield from listed
    else:
        seen: set[tuple[int, int]] = set()
        while len(seen) < num * (num - 1) // 4:
            i, j = sorted(generator.sample(range(num), 2))
            if (i, j) not in seen:
                seen.add((i, j))
                yield rated[i], rated[j]


def _unit_name(items: Sequence[Any]) -> str:
    return "prompt" if items[0].prompt.text else "response"


def _unseen(train: list[Any], held_out: list[Any], source: str) -> list[Any]:
    """Held-out rows without those that share a unit with a training row."""
    seen = {unit for item in train for unit in units_of(item)}
    kept = [item for item in held_out if not seen.intersection(units_of(item))]
    if not kept:
        raise ConfigError(
            f"{source}: nothing is left to test on, for all {len(held_out)} rows share a "
            f"{_unit_name(train)} with a training row; give other rows, or set "
            "data.validation_size instead"
        )
    return kept
