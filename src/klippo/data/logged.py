"""Responses that exist already, with their rewards: from rows to what offline training learns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from klippo.data.files import Row, finite_number, source_of
from klippo.data.settings import OfflineSettings
from klippo.errors import ConfigError
from klippo.types import BASELINE, Completion, LoggedResponse, Prompt, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredResponse:
    """One response of a row and its reward, before any tokenizer."""

    row: Row
    text: str
    reward: float
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None


def read_responses(
    rows: Sequence[Row],
    settings: OfflineSettings,
    *,
    reward_column: str,
    prompt_columns: Sequence[str],
) -> list[ScoredResponse]:
    """Every response of every row, checked; a row may hold a list of them.

    Raises ConfigError, with the row, for a missing column, an empty response, a reward that is no
    finite number, lists of different lengths, and for duplicates if the settings refuse them.
    """
    if not rows:
        return []
    columns = {"response": settings.response_column, "reward": reward_column}
    optional = {"token_ids": settings.token_ids_column, "logprobs": settings.logprobs_column}
    columns |= {key: name for key, name in optional.items() if name is not None}
    for key, name in columns.items():
        rows[0].require(name, "reward.column" if key == "reward" else f"offline.{key}_column")
    names = list(columns.values())
    responses = [_read(single, columns) for row in rows for single in _single(row, names)]
    if settings.duplicates == "keep":
        return responses
    first: dict[tuple[str, str], ScoredResponse] = {}
    for one in responses:
        same = first.setdefault((one.row.prompt_key(prompt_columns), one.text), one)
        if same is not one and settings.duplicates == "error":
            raise ConfigError(
                f"{one.row}: the same prompt and response as {same.row}; it would count twice: "
                "remove one, or set offline.duplicates to keep or drop"
            )
    return list(first.values())


def refuse_equal_rewards(responses: Sequence[ScoredResponse], reward_column: str) -> None:
    """Raises ConfigError if there is nothing to learn from."""
    rewards = {response.reward for response in responses}
    if len(rewards) == 1:
        raise ConfigError(
            f"{source_of([response.row for response in responses])}: all {len(responses)} rewards "
            f"in column {reward_column!r} are {rewards.pop():g}, so nothing tells a good response "
            "from a bad one; check how they were made"
        )


def _single(row: Row, columns: Sequence[str]) -> Iterator[Row]:
    """The row, or one row for each response if its response column holds a list of them."""
    values = {name: row.columns[name] for name in columns}
    responses = values[columns[0]]
    if not isinstance(responses, list):
        yield row
        return
    sizes = {n: len(value) if isinstance(value, list) else "no list" for n, value in values.items()}
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"{row}: a list of responses needs lists of the same length in its other columns; "
            f"there are {', '.join(f'{name!r} {size}' for name, size in sizes.items())}"
        )
    for i in range(len(responses)):
        items = {name: value[i] for name, value in values.items()}
        yield replace(row, columns={**row.columns, **items}, index=i)


def _read(row: Row, columns: Mapping[str, str]) -> ScoredResponse:
    text = row.columns[columns["response"]]
    if not isinstance(text, str) or not text.strip():
        raise row.unusable(columns["response"], "text", "fill or remove this row")
    reward = finite_number(row.columns[columns["reward"]])
    if reward is None:
        raise row.unusable(columns["reward"], "a finite number", "score or remove this row")
    lists: dict[str, list[Any]] = {}
    for key, kind, what in (("token_ids", int, "token ids"), ("logprobs", float, "log-probs")):
        if key in columns:
            numbers = _numbers(row.columns[columns[key]], kind)
            if numbers is None:
                raise row.unusable(columns[key], f"a list of {what}", "give one per response token")
            lists[key] = numbers
    return ScoredResponse(row=row, text=text, reward=reward, **lists)


def _numbers(value: object, kind: type) -> list[Any] | None:
    """A list of token ids or of log-probs (CSV files hold it as JSON text); None if it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    allowed = int if kind is int else int | float
    if not isinstance(value, list) or any(
        isinstance(x, bool) or not isinstance(x, allowed) for x in value
    ):
        return None
    return [kind(x) for x in value] or None


def leave_one_out(
    responses: Sequence[ScoredResponse], prompt_columns: Sequence[str]
) -> list[float]:
    """For each response the mean reward of the others to its prompt.

    Raises ConfigError if there are no others.
    """
    keys = [response.row.prompt_key(prompt_columns) for response in responses]
    groups: dict[str, list[ScoredResponse]] = {}
    for key, response in zip(keys, responses, strict=True):
        groups.setdefault(key, []).append(response)
    if alone := [group[0] for group in groups.values() if len(group) == 1]:
        raise ConfigError(
            f"{alone[0].row}: the only response to its prompt ({len(alone)} of {len(groups)} "
            "prompts have one alone), and offline.baseline=leave_one_out compares it with others; "
            "use baseline: value, or remove such rows"
        )
    totals = {key: math.fsum(one.reward for one in group) for key, group in groups.items()}
    return [
        (totals[key] - response.reward) / (len(groups[key]) - 1)
        for key, response in zip(keys, responses, strict=True)
    ]


def log_responses(
    responses: Sequence[ScoredResponse],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    settings: OfflineSettings,
    *,
    reward_column: str,
    prompt_columns: Sequence[str],
    stop_ids: frozenset[int],
    context: int | None,
) -> list[LoggedResponse]:
    """Responses as token ids, each behind its prompt as the policy reads it.

    Responses whose prompt was left out (overlong) are left out too. Raises ConfigError, with the
    row, for a response that does not fit and for log-probs that do not belong to its tokens.
    """
    by_row = {prompt.id: prompt for prompt in prompts}
    kept = [response for response in responses if response.row.number in by_row]
    baselines: Sequence[float | None] = [None] * len(kept)
    if settings.baseline == "leave_one_out":
        baselines = leave_one_out(kept, prompt_columns)
    logged = []
    for response, baseline in zip(kept, baselines, strict=True):
        prompt = by_row[response.row.number]
        meta = dict(prompt.meta)
        meta |= {settings.response_column: response.text, reward_column: response.reward}
        meta |= {} if baseline is None else {BASELINE: baseline}
        completion = _completion(response, tokenizer, stop_ids)
        num_prompt, num_response = len(prompt.token_ids), len(completion.token_ids)
        if context is not None and num_prompt + num_response > context:
            raise ConfigError(
                f"{response.row}: prompt and response are {num_prompt} + {num_response} tokens, "
                f"and the model's context is {context}; shorten or remove this row"
            )
        prompt = replace(prompt, meta=meta)
        logged.append(LoggedResponse(prompt=prompt, completion=completion, reward=response.reward))
    return logged


def _completion(
    response: ScoredResponse, tokenizer: Tokenizer, stop_ids: frozenset[int]
) -> Completion:
    ids, end = response.token_ids, tokenizer.eos_token_id
    if ids is None:
        if end is None:
            raise ConfigError(
                "the policy's tokenizer has no end token to put behind responses; name the token "
                "ids with offline.token_ids_column"
            )
        ids = [*tokenizer.encode(response.text, add_special_tokens=False), end]
    if unknown := [i for i in ids if not 0 <= i < len(tokenizer)]:
        raise ConfigError(
            f"{response.row}: {unknown[0]} is no token of this tokenizer, which has "
            f"{len(tokenizer)}; the ids must be those of the policy's own tokenizer"
        )
    logprobs = response.logprobs
    if logprobs is not None and len(logprobs) != len(ids):
        raise ConfigError(
            f"{response.row}: {len(logprobs)} log-probs for {len(ids)} response tokens (the end "
            "token counts); log-probs need the tokens that were sampled: name them with "
            "offline.token_ids_column, or use behavior: start"
        )
    if wrong := [x for x in logprobs or () if not math.isfinite(x) or x > 0]:
        raise ConfigError(
            f"{response.row}: {wrong[0]} is no log-prob; log-probs are finite and at most 0"
        )
    return Completion(token_ids=ids, finished=ids[-1] in stop_ids, logprobs=logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPairs:
    """Two responses to the same prompt, the better one first, and what was left out."""

    pairs: list[tuple[LoggedResponse, LoggedResponse]]
    num_ties: int
    """Pairs with equal rewards or equal tokens."""
    num_close: int
    """Other pairs whose rewards differ by less than the least margin."""


def best_responses(
    responses: Sequence[LoggedResponse], share: float
) -> tuple[list[LoggedResponse], bool]:
    """The best response to each prompt, the first of equals, in the prompts' order.

    If each prompt has one response alone, the result is the best `share` of them all, at least one,
    in the data's order, and False.
    """
    groups = _by_prompt(responses)
    if len(groups) < len(responses):
        return [max(group, key=lambda one: one.reward) for group in groups], True
    number = math.ceil(share * len(responses))
    order = sorted(range(len(responses)), key=lambda i: -responses[i].reward)
    return [responses[i] for i in sorted(order[:number])], False


def pairs_by_reward(
    responses: Sequence[LoggedResponse], *, min_margin: float, max_per_prompt: int
) -> RewardPairs:
    """Of each prompt the pairs whose rewards lie farthest apart, at most `max_per_prompt`."""
    chosen: list[tuple[LoggedResponse, LoggedResponse]] = []
    num_ties = num_close = 0
    for group in _by_prompt(responses):
        pairs = []
        for first, second in combinations(group, 2):
            better, worse = (first, second) if first.reward > second.reward else (second, first)
            same_tokens = better.completion.token_ids == worse.completion.token_ids
            if better.reward == worse.reward or same_tokens:
                num_ties += 1
            elif better.reward - worse.reward < min_margin:
                num_close += 1
            else:
                pairs.append((better, worse))
        pairs.sort(key=lambda pair: pair[1].reward - pair[0].reward)
        chosen += pairs[:max_per_prompt]
    return RewardPairs(pairs=chosen, num_ties=num_ties, num_close=num_close)


def _by_prompt(responses: Sequence[LoggedResponse]) -> list[list[LoggedResponse]]:
    """Responses to what is one prompt for the policy, in the data's order."""
    groups: dict[tuple[int, ...], list[LoggedResponse]] = {}
    for one in responses:
        groups.setdefault(tuple(one.prompt.token_ids), []).append(one)
    return list(groups.values())
