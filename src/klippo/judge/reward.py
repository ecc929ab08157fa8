"""An LLM judge as a reward source."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from klippo.judge.judging import SAMPLE, Judge, together
from klippo.judge.messages import JudgeBackend
from klippo.judge.rubric import Material, check_column
from klippo.judge.scoring import FLOOR, Judgement
from klippo.judge.settings import JudgeSettings
from klippo.judge.watch import PROBES, Watch, liked_probes, probe, share
from klippo.types import Metrics, Prompt, Rollout, Scores, TokenBatch

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 60.0
NAN = float("nan")


class JudgeReward:
    """Scores each response by a judge: -1 to 1, NaN where there is no score.

    Before the first score it asks about one plain sample, settles where scores are read, and
    judges worthless answers; it warns when one is liked. A step with too many unscored responses
    is asked again with growing pauses, until `outage_patience_s` is over.

    Raises JudgeError (exit code 4) for a judge that gives no scores, and what the backend raises.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        backend: JudgeBackend,
        *,
        prompt_column: str = "prompt",
        say: Callable[[str], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`say` gets warnings. Raises ConfigError for a rubric that does not fit."""
        self.settings = settings
        self.judge = Judge(settings, backend)
        self.watch = Watch(settings)
        self.probe_rewards: dict[str, float | None] = {}
        self._prompt_column = prompt_column
        self._say = say or _warn
        self._sleep = sleep
        self._clock = clock
        self._opening = asyncio.Lock()
        self._is_open = False
        self._since = _Since()
        self._begun: dict[Material, asyncio.Task[Judgement]] = {}

    async def begin(self, prompt: Prompt, response: str) -> None:
        """Ask about a finished response now, while others are still being sampled."""
        material = self._material(prompt, response)
        if material not in self._begun:
            task = asyncio.ensure_future(self._judge_when_open(material))
            task.add_done_callback(_keep_quiet)
            self._begun[material] = task

    async def score(self, rollout: Rollout) -> Scores:
        """reward: (B,) float32; parts by criterion (B,), where there are several, -1 to 1."""
        self.check_columns({name for prompt in rollout.prompts for name in prompt.meta})
        materials = [
            self._material(prompt, response)
            for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)
        ]
        judgements = await self.judge_all(materials)
        return self._scores(judgements, rollout.tokens.response_ids.device)

    async def compare(
        self, prompts: Sequence[Prompt], responses: Sequence[str], references: Sequence[str]
    ) -> list[Judgement]:
        """Each response judged against a reference that is given here, not by a column."""
        if not prompts:
            return []
        return await self.judge_all(
            [
                replace(self._material(prompt, response), reference=reference)
                for prompt, response, reference in zip(prompts, responses, references, strict=True)
            ]
        )

    async def judge_all(self, materials: Sequence[Material]) -> list[Judgement]:
        """A judgement of each, in order."""
        await self.open()
        judgements = await self.judge_unwatched(materials)
        self.note(judgements)
        return judgements

    def note(self, judgements: Sequence[Judgement]) -> None:
        """Count judgements. Raises JudgeError where too many are missing."""
        self._since.add(judgements)
        self.watch.note(judgements)
        if alarm := self.watch.alarm(judgements):
            self._say(alarm)

    async def open(self) -> None:
        """The first real call, and the probes; once."""
        async with self._opening:
            if self._is_open:
                return
            await self.judge.choose_source()
            if self.settings.probes:
                await self.run_probes()
            self._is_open = True

    async def run_probes(self) -> None:
        """Judge the worthless answers, and warn of those that are liked."""
        found = await together(
            self.judge.judge(probe(text), floors_empty=False) for text in PROBES.values()
        )
        self.probe_rewards = dict(zip(PROBES, (one.reward for one in found), strict=True))
        if liked := liked_probes(self.probe_rewards):
            told = ", ".join(f"{name} gets {self.probe_rewards[name]:+.2f}" for name in liked)
            self._say(
                f"the judge likes worthless answers ({told}; -1 is the lowest reward, 1 the "
                "highest), and a policy may learn to write them; sharpen the rubric, take a better "
                "judge, or add a second reward in a sum"
            )

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise ConfigError when the reference's column is not among these."""
        if self.judge.reads_reference:
            check_column(self.settings.reference_column, columns)

    async def close(self) -> None:
        """Ask for nothing more, and let what is in flight come in, for up to ten seconds."""
        begun, self._begun = list(self._begun.values()), {}
        close = getattr(self.judge.backend, "close", None)
        if close is not None:
            await close()
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)

    def metrics(self) -> Metrics:
        """What was paid so far, and what became of the answers since the last call."""
        tally, since = self.judge.tally, self._since
        self._since = _Since(
            num_answers=tally.num_answers, num_cached=tally.num_cached, causes=Counter()
        )
        num = max(since.num_responses, 1)
        answers = tally.num_answers - since.num_answers
        metrics = {
            "judge/num_calls": float(tally.num_calls),
            "judge/tokens_read": float(tally.prompt_tokens),
            "judge/tokens_written": float(tally.completion_tokens),
            "judge/cached_share": (tally.num_cached - since.num_cached) / max(answers, 1),
            "judge/unscored_share": sum(since.causes.values()) / num,
            "judge/empty_share": since.num_empty / num,
            "judge/cut_share": since.num_cut / num,
            "judge/vote_sd": since.spread / num,
        }
        if tally.cost_is_known:
            metrics["judge/cost_usd"] = tally.cost_usd
        return metrics | {
            f"judge/unscored_{cause}": float(count) for cause, count in since.causes.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """What the watch remembers; answers and the budget are in the cache."""
        return {"watch": self.watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.watch.load_state_dict(state["watch"])

    async def judge_unwatched(self, materials: Sequence[Material]) -> list[Judgement]:
        """Judgements that are not counted; in an outage the missing ones are asked for again."""
        begun = {one: self._begun.pop(one) for one in set(materials) & self._begun.keys()}
        judgements = await together(begun.get(one) or self.judge.judge(one) for one in materials)
        end, pause = self._clock() + self.settings.outage_patience_s, FIRST_PAUSE_S
        while self._is_outage(judgements) and (left := end - self._clock()) > 0:
            self._say(
                f"{sum(one.reward is None for one in judgements)} of {len(judgements)} responses "
                f"have no score; asking the judge again in {min(pause, left):.0f} s"
            )
            await self._sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE_S)
            open_ones = [i for i, one in enumerate(judgements) if one.can_retry]
            again = await together(self.judge.judge(materials[i]) for i in open_ones)
            for i, judgement in zip(open_ones, again, strict=True):
                judgements[i] = judgement
        return judgements

    async def _judge_when_open(self, material: Material) -> Judgement:
        await self.open()
        return await self.judge.judge(material)

    def _is_outage(self, judgements: Sequence[Judgement]) -> bool:
        unscored = share([one.reward is None for one in judgements])
        return unscored > self.settings.max_unscored_step and any(j.can_retry for j in judgements)

    def _material(self, prompt: Prompt, response: str) -> Material:
        column = self.settings.reference_column
        found = None if column is None else prompt.meta.get(column)
        return Material(
            prompt=prompt_text(prompt, self._prompt_column),
            response=response,
            reference=None if found is None else str(found),
        )

    def _scores(self, judgements: Sequence[Judgement], device: torch.device) -> Scores:
        def column(values: Iterable[float | None]) -> torch.Tensor:
            known = [NAN if value is None else value for value in values]
            return torch.tensor(known, dtype=torch.float32, device=device)

        names = list(self.judge.criteria) if len(self.judge.criteria) > 1 else []
        parts = {name: column(one.parts.get(name) for one in judgements) for name in names}
        if self.settings.votes > 1:
            parts["vote_sd"] = column(one.spread for one in judgements)
        return Scores(reward=column(map(self.stand_in, judgements)), parts=parts)

    def stand_in(self, judgement: Judgement) -> float | None:
        """The reward that training sees, by `on_unscored`."""
        if judgement.reward is not None:
            return judgement.reward
        match self.settings.on_unscored:
            case "floor":
                return FLOOR
            case "value":
                return self.settings.unscored_value
        return None


class _Since:
    """Counts since the last metrics."""

    def __init__(
        self, num_answers: int = 0, num_cached: int = 0, causes: Counter[str] | None = None
    ) -> None:
        self.num_answers = num_answers
        self.num_cached = num_cached
        self.causes: Counter[str] = Counter() if causes is None else causes
        self.num_responses = self.num_empty = self.num_cut = 0
        self.spread = 0.0

    def add(self, judgements: Sequence[Judgement]) -> None:
        self.num_responses += len(judgements)
        for one in judgements:
            self.num_empty += one.cause == "empty_response"
            self.num_cut += one.was_cut
            self.spread += one.spread
            if one.reward is None:
                self.causes[one.cause or "parse"] += 1


def prompt_text(prompt: Prompt, prompt_column: str = "prompt") -> str:
    """The prompt as the judge reads it: without the data's template or the chat template.

    A conversation is written out with the role before each message.
    """
    if prompt.content is not None:
        return prompt.content
    raw = prompt.meta.get(prompt_column)
    if isinstance(raw, str) and raw.strip() and raw.strip() in prompt.text:
        return raw
    is_chat = isinstance(raw, list) and all(
        isinstance(m, dict) and str(m.get("content", "")).strip() in prompt.text for m in raw
    )
    if not is_chat or not raw:
        return prompt.text
    if len(raw) == 1:
        return str(raw[0].get("content", ""))
    return "\n\n".join(f"{m.get('role', 'user')}: {m.get('content', '')}" for m in raw)


def opening_rollout(settings: JudgeSettings) -> Rollout:
    """One plain sample: scoring it opens the judge, before anything expensive is loaded."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    mask = torch.ones(1, 1, dtype=torch.bool)
    meta = {"prompt": SAMPLE.prompt}
    if settings.reference_column is not None:
        meta[settings.reference_column] = SAMPLE.reference or ""
    return Rollout(
        prompts=[Prompt(id=0, text=SAMPLE.prompt, token_ids=[0], meta=meta)],
        responses=[SAMPLE.response],
        tokens=TokenBatch(prompt_ids=ids, prompt_mask=mask, response_ids=ids, response_mask=mask),
        finished=torch.ones(1, dtype=torch.bool),
        temperature=1.0,
    )


def _keep_quiet(task: asyncio.Task[Judgement]) -> None:
    """An error is raised where the judgement is wanted; asyncio need not print it as well."""
    if not task.cancelled():
        task.exception()


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
