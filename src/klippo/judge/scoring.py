"""From readings of 0 to 10 to rewards of -1 to 1: votes, criteria, references, orders."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from klippo.judge.messages import Request
from klippo.judge.parsing import HIGHEST, LABELS, LOWEST, Reading, Source

Mode = Literal["absolute", "difference", "pairwise"]
FLOOR = -1.0
"""The lowest reward that there is, in every mode."""

_SCALE = f"a whole number from {LOWEST} to {HIGHEST}"
_OPTIONS = "\n".join(f"{label}) {i} out of {HIGHEST}" for i, label in enumerate(LABELS))
"""Options in a list, as in an examination: small models answer these, and not a list in a line."""
_FIRST_WHY = "First say in at most four sentences why. "
INSTRUCTIONS: Mapping[tuple[Source, bool], str] = {
    ("logprobs", False): (
        f"Choose one option, and answer with its capital letter alone.\n\n{_OPTIONS}"
    ),
    ("json", False): f'Answer with this JSON alone, where N is {_SCALE}: {{"score": N}}',
    ("json", True): (
        "Answer with this JSON alone, where the rationale has at most four sentences and N is "
        f'{_SCALE}: {{"rationale": "…", "score": N}}'
    ),
    ("line", False): f"Answer with this line alone, where N is {_SCALE}:\nScore: N",
    ("line", True): (
        _FIRST_WHY + f"Then end with this line, where N is {_SCALE}, and write no other line that "
        "begins with Score:\nScore: N"
    ),
}
DEFAULT_TOKENS: Mapping[tuple[Source, bool], int] = {
    ("logprobs", False): 4,
    ("json", False): 256,
    ("line", False): 256,
    ("json", True): 600,
    ("line", True): 600,
}


def answer_schema(rationale: bool) -> dict[str, Any]:
    """The JSON schema of an answer; the rationale is written before the score."""
    score = {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))}
    properties: dict[str, Any] = {"rationale": {"type": "string"}} if rationale else {}
    properties["score"] = score
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def make_request(
    question: str,
    source: Source,
    *,
    rationale: bool = False,
    max_tokens: int | None = None,
    temperature: float | None = None,
    vote: int = 0,
) -> Request:
    """One question for the backend."""
    return Request(
        messages=({"role": "user", "content": question},),
        max_tokens=DEFAULT_TOKENS[source, rationale] if max_tokens is None else max_tokens,
        schema=answer_schema(rationale) if source == "json" else None,
        labels=LABELS if source == "logprobs" else (),
        vote=vote,
        temperature=temperature,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What the votes on one question came to."""

    score: float | None
    """0 to 10, the mean of the votes that were read; None where fewer than half were."""
    cause: str | None
    spread: float
    """Standard deviation of the votes."""
    rationale: str | None
    num_votes: int = 1


def count_votes(readings: Sequence[Reading]) -> Cell:
    """The mean of the votes; where fewer than half were read, the most common cause."""
    scores = [reading.score for reading in readings if reading.score is not None]
    rationale = next((r.rationale for r in readings if r.rationale is not None), None)
    if not scores or 2 * len(scores) < len(readings):
        causes = Counter(r.cause or "parse" for r in readings if r.score is None)
        cause = causes.most_common(1)[0][0]
        return Cell(score=None, cause=cause, spread=0.0, rationale=rationale)
    return Cell(
        score=statistics.fmean(scores),
        cause=None,
        spread=statistics.pstdev(scores),
        rationale=rationale,
        num_votes=len(readings),
    )


def absolute(score: float) -> float:
    """s / 5 - 1: 0 is -1, 5 is 0, 10 is 1."""
    return score / 5 - 1


def difference(score: float, reference: float) -> float:
    """(s - s_ref) / 10: 1 where a perfect response stands against a worthless reference."""
    return (score - reference) / 10


def both_orders(first: float, second: float) -> float:
    """A comparison in both orders as one score of 0 to 10; `second` had the response second."""
    return (first + HIGHEST - second) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What became of one response."""

    reward: float | None
    """-1 to 1; None where it could not be scored."""
    cause: str | None = None
    """Why not; `empty_response` for the floor that an empty response gets."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Reward by criterion, -1 to 1."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """The judge's own 0 to 10 by criterion, and those of the reference as `reference`."""
    orders: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """With mode pairwise, by criterion: the response's 0 to 10 as the first of the two, and as the
    second (10 - what the reference got as the first); 5 is a tie."""
    rationales: Mapping[str, str] = field(default_factory=dict)
    spread: float = 0.0
    """Standard deviation of the votes on 0 to 10, mean over questions."""
    was_cut: bool = False
    can_retry: bool = False
    """True where asking again may help: the cause was the way to the judge, not its answer."""


def weighted(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """sum_i w_i r_i / sum_i w_i: on the scale of the parts."""
    total = sum(weights[name] for name in parts)
    return sum(weights[name] * value for name, value in parts.items()) / total
