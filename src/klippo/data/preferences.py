"""Preferences: which of two responses is better, from pairs or from ratings."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from klippo.data.preference_rows import Pair, Rated, read_rows
from klippo.data.rows import load_rows, validation_source
from klippo.data.settings import DataSettings, PreferenceSettings
from klippo.errors import ConfigError

MANY_PAIRS = 200_000
"""Beyond this many possible pairs, pairs are drawn one by one instead of listed and shuffled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """Pairs to train on and pairs to test on."""

    train: list[Pair]
    held_out: list[Pair]
    notes: list[str] = field(default_factory=list)
    """What was left out or turned round, in words."""


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
    items = read_rows(rows, settings, settings.train)
    held_out: list[Any] = []
    if settings.validation is not None:
        source = validation_source(data)
        held_out = _unseen(items, read_rows(validation_rows, settings, source), source, notes)
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
    rated: Sequence[Rated],
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
    rated: Sequence[Rated], with_prompts: bool, disjoint: bool, generator: random.Random
) -> Iterator[tuple[Rated, Rated]]:
    """Pairs of rows in random order, each at most once."""
    if with_prompts:
        groups: dict[tuple[str, ...], list[Rated]] = {}
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
    rated: Sequence[Rated],
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
