"""The judge's mind: one response at a time, from a rubric to a reward."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from klippo.errors import JudgeError
from klippo.judge.fencing import is_blank
from klippo.judge.messages import JudgeBackend
from klippo.judge.parsing import HIGHEST, SOURCES, Reading, Source, read_answer
from klippo.judge.rubric import (
    Material,
    Question,
    check_settings,
    load_rubric,
    reads_reference,
    render,
)
from klippo.judge.scoring import (
    FLOOR,
    INSTRUCTIONS,
    Cell,
    Judgement,
    absolute,
    both_orders,
    count_votes,
    difference,
    make_request,
    weighted,
)
from klippo.judge.settings import JudgeSettings

T = TypeVar("T")

NO_MATTER = {"api", "on_unscored", "unscored_value", "probes", "outage_patience_s"}
"""What in a judge's settings does not change its scores."""

SAMPLE = Material(
    prompt="What is the capital of France?",
    response="The capital of France is Paris.",
    reference="Paris is the capital of France.",
)
"""What the first call is about."""
CAN_RETRY = {"transport"}
"""Causes that another try may mend; other answers are stored and would come again."""
WHOLE = "score"
"""The name of the only criterion, where none are set."""


def judge_label(settings: JudgeSettings) -> str:
    """A short name for people; equal exactly for judges of the same model, rubric and settings."""
    rubric = load_rubric(settings.rubric_name)
    chosen = settings.model_dump(mode="json", exclude=NO_MATTER | {"rubric"})
    chosen = {key: value for key, value in chosen.items() if not key.startswith("max_unscored")}
    asked = [rubric.text, rubric.criteria, rubric.lower_is_better]
    text = json.dumps([settings.api.model, settings.api.url, asked, chosen], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"judge {settings.api.model} by {Path(rubric.name).stem} #{digest}"


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
    causes: Counter[str] = field(default_factory=Counter)
    """Answers that gave no score, by cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One criterion's share of a judgement."""

    reward: float | None
    cause: str | None = None
    score: float | None = None
    reference_score: float | None = None
    orders: tuple[float, float] | None = None
    spread: float = 0.0
    rationale: str | None = None
    was_cut: bool = False


class Judge:
    """Judges responses by a rubric through a backend; knows no policy and no tensors."""

    def __init__(self, settings: JudgeSettings, backend: JudgeBackend) -> None:
        """Read and check the rubric. Raises ConfigError."""
        self.settings = settings
        self.backend = backend
        self.rubric = check_settings(settings)
        criteria = settings.criteria or {}
        self.criteria: dict[str, str | None] = {name: one.text for name, one in criteria.items()}
        self.weights = {name: one.weight for name, one in criteria.items()}
        if not criteria:
            self.criteria, self.weights = {WHOLE: None}, {WHOLE: 1.0}
        self.tally = Tally()
        chosen = settings.score_source
        self.source: Source | None = None if chosen == "auto" else chosen
        self._references: dict[tuple[str, str, str], Cell] = {}
        self._locks: dict[tuple[str, str, str], asyncio.Lock] = {}

    @property
    def reads_reference(self) -> bool:
        """Whether a response can only be judged where its row has a reference."""
        return reads_reference(self.settings, self.rubric)

    async def choose_source(self) -> dict[Source, Reading]:
        """Ask about one plain sample, and settle where scores are read from now on.

        Returns what each source tried gave. Raises JudgeError when none gives a score.
        """
        asked = self.settings.score_source
        sources = SOURCES if asked == "auto" else (asked,)
        tried: dict[Source, Reading] = {}
        for source in sources:
            if source == "logprobs" and self.settings.rationale:
                continue
            tried[source] = await self.try_source(source)
            if tried[source].score is not None:
                self.source = source
                return tried
            if tried[source].cause in CAN_RETRY:
                break
        found = ", ".join(f"{source}: {reading.cause}" for source, reading in tried.items())
        raise JudgeError(
            f"the judge {self.settings.api.model} gave no score on a plain sample ({found}); "
            "transport means that it cannot be reached, rejected that its server refuses the "
            "request, parse that it does not keep to the form, and truncated or empty that it "
            "needs more max_tokens; klippo judge test shows more"
        )

    async def try_source(self, source: Source) -> Reading:
        """What one call about a plain sample gives, read in this form."""
        reading, _ = await self._ask(SAMPLE, next(iter(self.criteria)), source, 0)
        return reading

    @property
    def questions_per_response(self) -> int:
        """Calls that a response takes, its reference's not counted."""
        votes = 1 if self.source == "logprobs" else self.settings.votes
        orders = 2 if self.settings.mode == "pairwise" else 1
        return len(self.criteria) * votes * orders

    async def judge(self, material: Material, *, floors_empty: bool = True) -> Judgement:
        """The reward of one response; an empty one gets the floor without a call."""
        if floors_empty and is_blank(material.response):
            parts = dict.fromkeys(self.criteria, FLOOR)
            return Judgement(reward=FLOOR, cause="empty_response", parts=parts)
        if self.reads_reference and is_blank(material.reference or ""):
            return Judgement(reward=None, cause="no_reference")
        parts_of = await together(self._part(material, name) for name in self.criteria)
        return self._whole(dict(zip(self.criteria, parts_of, strict=True)))

    def _whole(self, parts: dict[str, _Part]) -> Judgement:
        rewards = {name: part.reward for name, part in parts.items() if part.reward is not None}
        causes = [part.cause for part in parts.values() if part.cause is not None]
        scores = {name: part.score for name, part in parts.items() if part.score is not None}
        for name, part in parts.items():
            if part.reference_score is not None:
                key = "reference" if len(parts) == 1 else f"{name}/reference"
                scores[key] = part.reference_score
        return Judgement(
            reward=None if causes else weighted(rewards, self.weights),
            cause=next(iter(causes), None),
            parts=rewards,
            scores=scores,
            orders={name: part.orders for name, part in parts.items() if part.orders},
            rationales={n: part.rationale for n, part in parts.items() if part.rationale},
            spread=sum(part.spread for part in parts.values()) / len(parts),
            was_cut=any(part.was_cut for part in parts.values()),
            can_retry=bool(causes) and any(cause in CAN_RETRY for cause in causes),
        )

    async def _part(self, material: Material, name: str) -> _Part:
        """One criterion, as the mode wants it."""
        match self.settings.mode:
            case "absolute":
                cell, was_cut = await self._cell(material, name)
                reward = None if cell.score is None else absolute(cell.score)
                return self._as_part(cell, reward, was_cut)
            case "difference":
                reference = await self._reference(material, name)
                if reference.score is None:
                    return _Part(reward=None, cause=reference.cause)
                cell, was_cut = await self._cell(material, name)
                if cell.score is None:
                    return self._as_part(cell, None, was_cut)
                reward = difference(cell.score, reference.score)
                return self._as_part(cell, reward, was_cut, reference.score)
        turned = Material(
            prompt=material.prompt, response=material.reference or "", reference=material.response
        )
        (first, was_cut), (second, _) = await together(
            self._cell(one, name) for one in (material, turned)
        )
        if first.score is None or second.score is None:
            return self._as_part(first if first.score is None else second, None, was_cut)
        score = both_orders(first.score, second.score)
        joined = Cell(
            score=score,
            cause=None,
            spread=(first.spread + second.spread) / 2,
            rationale=first.rationale,
        )
        part = self._as_part(joined, absolute(score), was_cut)
        return replace(part, orders=(first.score, HIGHEST - second.score))

    def _as_part(
        self, cell: Cell, reward: float | None, was_cut: bool, reference: float | None = None
    ) -> _Part:
        if reward is not None and self.rubric.lower_is_better:
            reward = -reward
        return _Part(
            reward=reward,
            cause=cell.cause if reward is None else None,
            score=cell.score,
            reference_score=reference,
            spread=cell.spread,
            rationale=cell.rationale,
            was_cut=was_cut,
        )

    async def _reference(self, material: Material, name: str) -> Cell:
        """The reference's own score, asked for once per run."""
        key = (material.prompt, material.reference or "", name)
        async with self._locks.setdefault(key, asyncio.Lock()):
            if key not in self._references:
                alone = Material(prompt=material.prompt, response=material.reference or "")
                cell, _ = await self._cell(alone, name, is_policy=False)
                if cell.cause in CAN_RETRY:
                    return cell
                self._references[key] = cell
            return self._references[key]

    async def _cell(
        self, material: Material, name: str, *, is_policy: bool = True
    ) -> tuple[Cell, bool]:
        """All votes on one question."""
        assert self.source is not None, "choose_source() comes first"
        source = self.source
        votes = 1 if source == "logprobs" else self.settings.votes
        asked = await together(
            self._ask(material, name, source, vote, is_policy=is_policy) for vote in range(votes)
        )
        return count_votes([reading for reading, _ in asked]), asked[0][1]

    async def _ask(
        self,
        material: Material,
        name: str,
        source: Source,
        vote: int,
        *,
        is_policy: bool = True,
    ) -> tuple[Reading, bool]:
        """One vote; and whether the judge saw a cut text."""
        settings = self.settings
        question = self.question(material, name, source)
        request = make_request(
            question.text,
            source,
            rationale=settings.rationale,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            vote=vote,
        )
        answer = await self.backend.ask(request)
        tally = self.tally
        tally.num_answers += 1
        tally.num_cached += answer.cached
        tally.num_calls += answer.num_attempts
        tally.prompt_tokens += answer.prompt_tokens
        tally.completion_tokens += answer.completion_tokens
        tally.cost_is_known &= answer.cost_usd is not None
        tally.cost_usd += answer.cost_usd or 0.0
        texts = (material.response, material.reference or "") if is_policy else ()
        judged = texts if settings.mode == "pairwise" else texts[:1]
        reading = read_answer(answer, source, judged=judged, rationale=settings.rationale)
        if reading.cause is not None:
            tally.causes[reading.cause] += 1
        return reading, question.was_cut

    def question(self, material: Material, name: str, source: Source) -> Question:
        """The message about one response by one criterion."""
        return render(
            self.rubric,
            material,
            INSTRUCTIONS[source, self.settings.rationale],
            criteria=self.criteria[name],
            max_chars=self.settings.max_response_chars,
        )
