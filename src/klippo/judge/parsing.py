"""From a judge's answer to a score of 0 to 10, or to the cause why there is none.

Strict on purpose: a score is read from one place of one form. Nothing is repaired, searched for in
free text, or clamped to the scale; whoever is judged can write anything that a looser reader finds.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from klippo.judge.fencing import clean
from klippo.judge.messages import Answer

Source = Literal["logprobs", "json", "line"]
SOURCES: tuple[Source, ...] = ("logprobs", "json", "line")
LOWEST, HIGHEST = 0, 10
LABELS = tuple("ABCDEFGHIJK")
"""A is 0 and K is 10: each is one token everywhere, and "10" is not."""
MIN_LABEL_MASS = 0.5
"""Share of the first token's probability that must lie on labels."""

_SPACE = " \t\r\n"
_FENCE = re.compile(r"```(?:json)?[ \t]*\r?\n(.*?)\r?\n```", re.DOTALL | re.IGNORECASE)
_LINE = re.compile(r"Score: (10|[0-9])", re.ASCII)
_NUMBER = re.compile(r"Score: [-+]?[0-9]+(?:\.[0-9]+)?", re.ASCII)
_LOOKS_LIKE = re.compile(r"[^\w]*score[^\w]*[:=\uff1a]", re.IGNORECASE)
_MAX_ANSWER = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """An answer as read, or the mean of several votes."""

    score: float | None = None
    """0 to 10; None if there is a `cause` instead."""
    cause: str | None = None
    """`parse`, `range`, `echo`, `logprobs` or `label_mass`, or the backend's."""
    rationale: str | None = None
    spread: float = 0.0
    """Standard deviation over votes, if this is their mean."""
    was_cut: bool = False
    """True if the judge saw a cut response or reference."""


def read_answer(
    answer: Answer, source: Source, *, judged: tuple[str, ...] = (), rationale: bool = False
) -> Reading:
    """The score in an answer, read in the one form that was asked for.

    `judged` are the texts that the policy wrote: a score that occurs there in the same form is an
    echo, and not the judge's.
    """
    if source == "logprobs" and answer.cause in (None, "truncated"):  # one token is all it takes
        if answer.label_logprobs is None:
            return Reading(cause="logprobs")
        return expected_score(answer.label_logprobs)
    if answer.cause is not None:
        return Reading(cause=answer.cause)
    if answer.text is None or not answer.text.strip(_SPACE):
        return Reading(cause="empty")
    if len(answer.text) > _MAX_ANSWER:
        return Reading(cause="parse")
    if source == "json":
        return parse_json(answer.text, judged, rationale=rationale)
    return parse_line(answer.text, judged)


def expected_score(label_logprobs: Mapping[str, float]) -> Reading:
    """sum_i p_i * i over the labels A to K, divided by their mass sum_i p_i.

    A token with a space before or behind its label counts as the label.
    """
    probability = dict.fromkeys(LABELS, 0.0)
    for token, logprob in label_logprobs.items():
        if isinstance(logprob, bool) or not isinstance(logprob, int | float) or math.isnan(logprob):
            return Reading(cause="parse")
        if (label := token.strip(" \u2581\u0120")) in probability:
            probability[label] += math.exp(min(logprob, 0.0))
    mass = sum(probability.values())
    if mass > 1.01:  # no probabilities, whatever they are
        return Reading(cause="parse")
    if mass < MIN_LABEL_MASS:
        return Reading(cause="label_mass")
    return Reading(score=sum(i * p for i, p in enumerate(probability.values())) / mass)


def parse_json(text: str, judged: tuple[str, ...] = (), *, rationale: bool = False) -> Reading:
    """`{"score": n}` and nothing else; with `rationale` a text of that name beside it."""
    body = text.strip(_SPACE)
    if fenced := _FENCE.fullmatch(body):
        body = fenced[1].strip(_SPACE)
    try:
        pairs = json.loads(body, object_pairs_hook=list, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return Reading(cause="parse")
    keys = ["rationale", "score"] if rationale else ["score"]
    is_object = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
    if not is_object or sorted(key for key, _ in pairs) != keys:  # each once
        return Reading(cause="parse")
    value = dict(pairs)
    reason, score = value.get("rationale"), value["score"]
    if rationale and not isinstance(reason, str):
        return Reading(cause="parse")
    cause = None
    if type(score) not in (int, float):
        cause = "parse"
    elif isinstance(score, float) or not LOWEST <= score <= HIGHEST:
        cause = "range"
    elif _is_echo(body, judged):
        cause = "echo"
    return Reading(score=None if cause else float(score), cause=cause, rationale=reason)


def parse_line(text: str, judged: tuple[str, ...] = ()) -> Reading:
    """The last line `Score: N`, if no other line looks like one; the rest is the rationale."""
    lines = text.strip(_SPACE).replace("\r\n", "\n").split("\n")
    last = lines[-1].rstrip(" \t")
    before = "\n".join(lines[:-1]).strip() or None
    match, cause = _LINE.fullmatch(last), None
    if sum(bool(_LOOKS_LIKE.match(line)) for line in lines) > 1 or len(lines[-1].splitlines()) > 1:
        cause = "parse"
    elif match is None:
        cause = "range" if _NUMBER.fullmatch(last) else "parse"
    elif _is_echo(last, judged):
        cause = "echo"
    score = float(match[1]) if match and cause is None else None
    return Reading(score=score, cause=cause, rationale=before)


def _is_echo(said: str, judged: tuple[str, ...]) -> bool:
    """Whether what the score was read from stands in a judged text, as the judge may repeat it.

    Spaces, case, width and what is invisible make no difference.
    """
    said = _squeezed(said)
    return any(said in _squeezed(text) for text in judged)


def _squeezed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", clean(text)).split()).casefold()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
