"""The judge's mind: one response at a time, from a rubric to a reward of -1 to 1."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from klippo.errors import JudgeError
from klippo.judge.fencing import is_blank
from klippo.judge.messages import Answer, JudgeBackend, Request
from klippo.judge.parsing import HIGHEST, LABELS, LOWEST, SOURCES, Reading, Source, read_answer
from klippo.judge.rubric import Material, check_settings, load_rubric, reads_reference, render
from klippo.judge.settings import JudgeSettings

T = TypeVar("T")

FLOOR = -1.0
"""The lowest reward, in every mode."""
NO_MATTER = {"api", "on_unscored", "unscored_value", "probes", "outage_patience_s"}
"""What in a judge's settings does not change its scores."""
SAMPLE = Material(
    prompt="What is the capital of France?",
    response="The capital of France is Paris.",
    reference="Paris is the capital of France.",
)
"""What the first call is about."""
CAN_RETRY = {"transport"}
"""Causes that another try may remove; other answers are stored and would come again."""

_SCALE = f"a whole number from {LOWEST} to {HIGHEST}"
_OPTIONS = "\n".join(f"{label}) {i} out of {HIGHEST}" for i, label in enumerate(LABELS))
"""Options in a list, as in an examination: small models answer these, and not a list in a line."""
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
        "First say in at most four sentences why. Then end with this line, where N is "
        f"{_SCALE}, and write no other line that begins with Score:\nScore: N"
    ),
}


def judge_label(settings: JudgeSettings) -> str:
    """A short name for people; equal exactly for judges of the same model, rubric and settings."""
    rubric = load_rubric(settings.rubric_name)
    chosen = settings.model_dump(mode="json", exclude=NO_MATTER | {"rubric"})
    chosen = {key: value for key, value in chosen.items() if not key.startswith("max_unscored")}
    asked = [rubric.text, rubric.criteria, rubric.lower_is_better]
    text = json.dumps([settings.api.model, settings.api.url, asked, chosen], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"judge {settings.api.model} by {Path(rubric.name).stem} #{digest}"


def make_request(question: str, source: Source, settings: JudgeSettings, vote: int = 0) -> Request:
    """One question for the backend; of JSON the rationale is written before the score."""
    rationale = settings.rationale
    properties: dict[str, object] = {"rationale": {"type": "string"}} if rationale else {}
    properties["score"] = {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    default_tokens = 4 if source == "logprobs" else 600 if rationale else 256
    return Request(
        messages=({"role": "user", "content": question},),
        max_tokens=default_tokens if settings.max_tokens is None else settings.max_tokens,
        schema=schema if source == "json" else None,
        labels=LABELS if source == "logprobs" else (),
        vote=vote,
        temperature=settings.temperature,
    )


def absolute(score: float) -> float:
    """s / 5 - 1: 0 is -1, 5 is 0, 10 is 1."""
    return score / 5 - 1


def difference(score: float, reference: float) -> float:
    """(s - s_ref) / 10: 1 for a perfect response against a worthless reference."""
    return (score - reference) / 10


def both_orders(first: float, second: float) -> float:
    """A comparison in both orders as one score of 0 to 10; `second` had the response second."""
    return (first + HIGHEST - second) / 2


def count_votes(readings: Sequence[Reading]) -> Reading:
    """The mean of the votes; if fewer than half were read, the most common cause."""
    scores = [reading.score for reading in readings if reading.score is not None]
    rationale = next((r.rationale for r in readings if r.rationale is not None), None)
    counted = replace(readings[0], rationale=rationale)
    if not scores or 2 * len(scores) < len(readings):
        causes = Counter(r.cause or "parse" for r in readings if r.score is None)
        return replace(counted, score=None, cause=causes.most_common(1)[0][0])
    spread = statistics.pstdev(scores)
    return replace(counted, score=statistics.fmean(scores), cause=None, spread=spread)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The reward of one response, or why there is none."""

    reward: float | None
    """-1 to 1; None if it could not be scored."""
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

    @property
    def can_retry(self) -> bool:
        """True if asking again may help: the way to the judge failed, not its answer."""
        return self.reward is None and self.cause in CAN_RETRY


@dataclass(slots=True)
class Tally:
    """What was asked and paid so far."""

    num_answers: int = 0
    num_cached: int = 0
    num_calls: int = 0
    """HTTP calls, retries included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    cost_is_known: bool = True

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        self.num_answers += 1
        self.num_cached += answer.cached
        self.num_calls += answer.num_attempts
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.cost_is_known &= answer.cost_usd is not None
        self.cost_usd += answer.cost_usd or 0.0


async def together(work: Iterable[Awaitable[T]]) -> list[T]:
    """All results in order; the first error cancels the rest, and is raised when they ended."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class Judge:
    """Judges responses by a rubric through a backend; knows no policy and no tensors."""

    def __init__(self, settings: JudgeSettings, backend: JudgeBackend) -> None:
        """Read and check the rubric. Raises ConfigError."""
        self.settings = settings
        self.backend = backend
        self.rubric = check_settings(settings)
        self.reads_reference = reads_reference(settings, self.rubric)
        criteria = settings.criteria or {}
        self.criteria: dict[str, str | None] = {name: one.text for name, one in criteria.items()}
        self.weights = {name: one.weight for name, one in criteria.items()}
        if not criteria:  # one criterion, the rubric's own
            self.criteria, self.weights = {"score": None}, {"score": 1.0}
        self.tally = Tally()
        chosen = settings.score_source
        self.source: Source | None = None if chosen == "auto" else chosen
        self._references: dict[tuple[str, str, str], Reading] = {}
        self._locks: dict[tuple[str, str, str], asyncio.Lock] = {}

    @property
    def sources(self) -> list[Source]:
        """Where scores may be read from, in order of preference."""
        if self.settings.score_source != "auto":
            return [self.settings.score_source]
        return [s for s in SOURCES if not (self.settings.rationale and s == "logprobs")]

    async def choose_source(self) -> None:
        """Ask about one plain sample, and settle where scores are read from now on.

        Raises JudgeError when no source gives a score.
        """
        tried: dict[Source, str | None] = {}
        for source in self.sources:
            reading = await self.try_source(source)
            if reading.score is not None:
                self.source = source
                return
            tried[source] = reading.cause
            if reading.cause in CAN_RETRY:
                break
        causes = ", ".join(f"{source}: {cause}" for source, cause in tried.items())
        raise JudgeError(
            f"the judge {self.settings.api.model} gave no score on a plain sample ({causes}); "
            "transport means that it cannot be reached, rejected that its server refuses the "
            "request, parse that it does not keep to the form, and truncated or empty that it "
            "needs more max_tokens; klippo judge test shows more"
        )

    async def try_source(self, source: Source) -> Reading:
        """What one call about a plain sample gives, read in this form."""
        return await self._ask(SAMPLE, next(iter(self.criteria)), source)

    @property
    def num_votes(self) -> int:
        """With log-probs one vote says all."""
        return 1 if self.source == "logprobs" else self.settings.votes

    @property
    def questions_per_response(self) -> int:
        """Calls that a response takes, its reference's not counted."""
        orders = 2 if self.settings.mode == "pairwise" else 1
        return len(self.criteria) * self.num_votes * orders

    async def judge(self, material: Material, *, floors_empty: bool = True) -> Judgement:
        """The reward of one response; an empty one gets the floor without a call."""
        if floors_empty and is_blank(material.response):
            parts = dict.fromkeys(self.criteria, FLOOR)
            return Judgement(reward=FLOOR, cause="empty_response", parts=parts)
        if self.reads_reference and is_blank(material.reference or ""):
            return Judgement(reward=None, cause="no_reference")
        judged = await together(self._judge(material, name) for name in self.criteria)
        rewards = {name: reward for one in judged for name, reward in one.parts.items()}
        causes = sorted((j.cause for j in judged if j.cause), key=lambda c: c not in CAN_RETRY)
        weighted = sum(self.weights[name] * reward for name, reward in rewards.items())
        total = sum(self.weights[name] for name in rewards)
        return Judgement(
            reward=None if causes else weighted / total,
            cause=next(iter(causes), None),
            parts=rewards,
            scores={name: score for one in judged for name, score in one.scores.items()},
            orders={name: pair for one in judged for name, pair in one.orders.items()},
            rationales={name: text for one in judged for name, text in one.rationales.items()},
            spread=sum(one.spread for one in judged) / len(judged),
            was_cut=any(one.was_cut for one in judged),
        )

    async def _judge(self, material: Material, name: str) -> Judgement:
        """By one criterion, as the mode wants it."""
        reference = Reading()
        orders: dict[str, tuple[float, float]] = {}
        if self.settings.mode == "difference":
            reference = await self._reference(material, name)
            if reference.score is None:
                return Judgement(reward=None, cause=reference.cause)
        if self.settings.mode == "pairwise":
            response, other = material.response, material.reference or ""
            flipped = replace(material, response=other, reference=response)
            reading, second = await together(self._votes(m, name) for m in (material, flipped))
            if reading.score is not None and second.score is None:
                reading = replace(second, was_cut=reading.was_cut)
            elif reading.score is not None and second.score is not None:
                orders[name] = (reading.score, HIGHEST - second.score)
                score = both_orders(reading.score, second.score)
                spread = (reading.spread + second.spread) / 2
                reading = replace(reading, score=score, spread=spread)
        else:
            reading = await self._votes(material, name)
        parts, scores = {}, {}
        if reading.score is not None:
            scores[name] = reading.score
            reward = absolute(reading.score)
            if reference.score is not None:
                reward = difference(reading.score, reference.score)
            parts[name] = -reward if self.rubric.lower_is_better else reward
        if reference.score is not None:
            label = "reference" if len(self.criteria) == 1 else f"{name}/reference"
            scores[label] = reference.score
        return Judgement(
            reward=parts.get(name),
            cause=reading.cause,
            parts=parts,
            scores=scores,
            orders=orders,
            rationales={name: reading.rationale} if reading.rationale else {},
            spread=reading.spread,
            was_cut=reading.was_cut,
        )

    async def _reference(self, material: Material, name: str) -> Reading:
        """The reference's own score, asked for once per run."""
        key = (material.prompt, material.reference or "", name)
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key not in self._references:
                alone = Material(prompt=material.prompt, response=material.reference or "")
                reading = await self._votes(alone, name, is_policy=False)
                if reading.cause in CAN_RETRY:
                    return reading
                self._references[key] = reading
            return self._references[key]

    async def _votes(self, material: Material, name: str, *, is_policy: bool = True) -> Reading:
        """All votes on one question."""
        assert self.source is not None, "choose_source() comes first"
        asked = functools.partial(self._ask, material, name, self.source, is_policy=is_policy)
        return count_votes(await together(asked(vote) for vote in range(self.num_votes)))

    async def _ask(
        self, material: Material, name: str, source: Source, vote: int = 0, is_policy: bool = True
    ) -> Reading:
        """One vote. `is_policy`: the policy wrote the response, and may want to be echoed."""
        settings = self.settings
        text, was_cut = render(
            self.rubric,
            material,
            INSTRUCTIONS[source, settings.rationale],
            criteria=self.criteria[name],
            max_chars=settings.max_response_chars,
        )
        answer = await self.backend.ask(make_request(text, source, settings, vote))
        self.tally.add(answer)
        texts = (material.response, material.reference or "") if is_policy else ()
        judged = texts if settings.mode == "pairwise" else texts[:1]
        reading = read_answer(answer, source, judged=judged, rationale=settings.rationale)
        return replace(reading, was_cut=was_cut)
