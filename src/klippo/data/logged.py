"""Responses that exist already, with their rewards: from rows to what offline PPO learns from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from klippo.data.files import Row, require_column
from klippo.data.settings import OfflineSettings
from klippo.errors import ConfigError
from klippo.types import BASELINE, Completion, LoggedResponse, Prompt, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response of a row, not tokenized yet."""

    row: Row
    place: str
    """Where a user finds it again."""
    text: str
    reward: float
    token_ids: list[int] | None
    logprobs: list[float] | None


def read_answers(
    rows: Sequence[Row], settings: OfflineSettings, reward_column: str, source: str
) -> list[Answer]:
    """Every response of every row, checked; a row may hold a list of them.

    Raises ConfigError, with the row, for a missing column, an empty response, a reward that is no
    finite number, and lists of different lengths.
    """
    if not rows:
        return []
    names = {"response": settings.response_column, "reward": reward_column}
    names |= {
        key: name
        for key, name in {
            "token_ids": settings.token_ids_column,
            "logprobs": settings.logprobs_column,
        }.items()
        if name is not None
    }
    for key, name in names.items():
        setting = "reward.column" if key == "reward" else f"offline.{key}_column"
        require_column(name, rows[0].columns, setting, source)
    return [answer for row in rows for answer in _answers(row, names, source)]


def refuse_equal_rewards(answers: Sequence[Answer], reward_column: str, source: str) -> None:
    """Raises ConfigError where there is nothing to learn from."""
    rewards = {answer.reward for answer in answers}
    if len(rewards) == 1:
        raise ConfigError(
            f"{source}: all {len(answers)} rewards in column {reward_column!r} are "
            f"{rewards.pop():g}, so nothing tells a good response from a bad one; check how they "
            "were made"
        )


def _answers(row: Row, names: Mapping[str, str], source: str) -> Iterator[Answer]:
    place = row.place(source)
    values = {key: row.columns[name] for key, name in names.items()}
    if not isinstance(values["response"], list):
        yield _answer(row, place, names, values)
        return
    sizes = {
        names[key]: len(value) if isinstance(value, list) else None for key, value in values.items()
    }
    if len(set(sizes.values())) > 1:
        told = ", ".join(
            f"{name!r} {'no list' if size is None else size}" for name, size in sizes.items()
        )
        raise ConfigError(
            f"{place}: a list of responses needs lists of the same length in its other columns; "
            f"there are {told}"
        )
    for i in range(len(values["response"])):
        one = {key: value[i] for key, value in values.items()}
        yield _answer(row, f"{place}, response {i}", names, one)


def _answer(row: Row, place: str, names: Mapping[str, str], values: Mapping[str, Any]) -> Answer:
    text, reward = values["response"], values["reward"]
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(
            f"{place}: the response in column {names['response']!r} is {_shown(text)}; a response "
            "needs text: fill or remove this row"
        )
    if isinstance(reward, str):
        reward = _number(reward)
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise ConfigError(
            f"{place}: the reward in column {names['reward']!r} is {_shown(values['reward'])}; it "
            "must be a finite number: score or remove this row"
        )
    return Answer(
        row=row,
        place=place,
        text=text,
        reward=float(reward),
        token_ids=_numbers(place, names, values, "token_ids", int),
        logprobs=_numbers(place, names, values, "logprobs", float),
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _numbers(
    place: str, names: Mapping[str, str], values: Mapping[str, Any], key: str, kind: type
) -> list[Any] | None:
    """A list of token ids or of log-probs; CSV files hold it as JSON text."""
    if key not in names:
        return None
    value = values[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    allowed = int if kind is int else int | float
    if (
        not isinstance(value, list)
        or not value
        or any(isinstance(x, bool) or not isinstance(x, allowed) for x in value)
    ):
        what = "token ids" if kind is int else "log-probs"
        raise ConfigError(
            f"{place}: column {names[key]!r} holds {_shown(values[key])}; a list of {what}, one "
            "per response token, is needed"
        )
    return [kind(x) for x in value]


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def without_duplicates(
    answers: Sequence[Answer], settings: OfflineSettings, prompt_columns: Sequence[str]
) -> list[Answer]:
    """As `duplicates` wants it. Raises ConfigError that names a pair."""
    if settings.duplicates == "keep":
        return list(answers)
    first: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        key = (_prompt_key(answer.row, prompt_columns), answer.text)
        if key in first and settings.duplicates == "error":
            raise ConfigError(
                f"{answer.place}: the same prompt and response as {first[key].place}; it would "
                "count twice: remove one, or set offline.duplicates to keep or drop"
            )
        first.setdefault(key, answer)
    return list(first.values())


def leave_one_out(answers: Sequence[Answer], prompt_columns: Sequence[str]) -> list[float]:
    """For each response the mean reward of the others to its prompt.

    Raises ConfigError where there are no others.
    """
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(_prompt_key(answer.row, prompt_columns), []).append(answer)
    alone = [group[0] for group in groups.values() if len(group) == 1]
    if alone:
        raise ConfigError(
            f"{alone[0].place}: the only response to its prompt ({len(alone)} of {len(groups)} "
            "prompts have one alone), and offline.baseline=leave_one_out compares it with others; "
            "use baseline: value, or remove such rows"
        )
    baselines = []
    for answer in answers:
        group = groups[_prompt_key(answer.row, prompt_columns)]
        total = math.fsum(one.reward for one in group)
        baselines.append((total - answer.reward) / (len(group) - 1))
    return baselines


def _prompt_key(row: Row, prompt_columns: Sequence[str]) -> str:
    return json.dumps(row.prompt(prompt_columns), default=str)


def log_responses(
    answers: Sequence[Answer],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    settings: OfflineSettings,
    *,
    reward_column: str,
    prompt_columns: Sequence[str],
    stop_ids: frozenset[int],
    context: int | None,
) -> list[LoggedResponse]:
    """Answers as token ids, each behind its prompt as the policy reads it.

    Answers whose prompt was left out (overlong) are left out too. Raises ConfigError, with the
    row, for a response that does not fit and for log-probs that do not belong to its tokens.
    """
    by_row = {prompt.id: prompt for prompt in prompts}
    kept = [answer for answer in answers if answer.row.number in by_row]
    baselines: Sequence[float | None] = [None] * len(kept)
    if settings.baseline == "leave_one_out":
        baselines = leave_one_out(kept, prompt_columns)
    found = []
    for answer, baseline in zip(kept, baselines, strict=True):
        prompt = by_row[answer.row.number]
        meta = dict(prompt.meta) | {
            settings.response_column: answer.text,
            reward_column: answer.reward,
        }
        if baseline is not None:
            meta[BASELINE] = baseline
        completion = _completion(answer, tokenizer, stop_ids)
        length = len(prompt.token_ids) + len(completion.token_ids)
        if context is not None and length > context:
            raise ConfigError(
                f"{answer.place}: prompt and response are {len(prompt.token_ids)} + "
                f"{len(completion.token_ids)} tokens, and the model's context is {context}; "
                "shorten or remove this row"
            )
        found.append(
            LoggedResponse(
                prompt=replace(prompt, meta=meta), completion=completion, reward=answer.reward
            )
        )
    return found


def _completion(answer: Answer, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> Completion:
    if answer.token_ids is not None:
        ids = answer.token_ids
        unknown = [i for i in ids if not 0 <= i < len(tokenizer)]
        if unknown:
            raise ConfigError(
                f"{answer.place}: {unknown[0]} is no token of this tokenizer, which has "
                f"{len(tokenizer)}; the ids must be those of the policy's own tokenizer"
            )
    else:
        end = tokenizer.eos_token_id
        if end is None:
            raise ConfigError(
                "the policy's tokenizer has no end token to put behind responses; name the token "
                "ids with offline.token_ids_column"
            )
        ids = [*tokenizer.encode(answer.text, add_special_tokens=False), end]
    logprobs = answer.logprobs
    if logprobs is not None:
        if len(logprobs) != len(ids):
            raise ConfigError(
                f"{answer.place}: {len(logprobs)} log-probs for {len(ids)} response tokens (the "
                "end token counts); log-probs need the tokens that were sampled: name them with "
                "offline.token_ids_column, or use behavior: start"
            )
        wrong = [x for x in logprobs if not math.isfinite(x) or x > 0]
        if wrong:
            raise ConfigError(
                f"{answer.place}: {wrong[0]} is no log-prob; log-probs are finite and at most 0"
            )
    return Completion(token_ids=ids, finished=ids[-1] in stop_ids, logprobs=logprobs)
