"""What a run would do and cost, worked out from its config and the sizes of its data."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from klippo.config.schema import RunConfig
from klippo.data.rows import Data
from klippo.errors import ConfigError
from klippo.judge.client import MORE_TOKENS
from klippo.judge.judging import INSTRUCTIONS, Judge, judge_label, make_request
from klippo.judge.messages import Answer, Request
from klippo.judge.parsing import Source
from klippo.judge.rubric import Material, render
from klippo.judge.settings import JudgeSettings
from klippo.judge.store import Meter, Spend, spent_in
from klippo.judge.watch import PROBES
from klippo.judge.wire import WIRES, Learned
from klippo.rewards.build import JUDGE_CACHE
from klippo.rewards.settings import RewardSettings, SumSettings, ensembles

ASK_ABOVE_USD = 5.0
"""A run whose judges may cost more than this wants a yes."""
CHARS_PER_TOKEN = 4
"""Of usual text."""
BYTES_PER_TOKEN = 16
"""Of the longest responses."""
BYTES_PER_CHAR = 4
WRITTEN_TOKENS = {False: 12, True: 120}
"""What a judge usually writes, without and with a rationale; one that thinks first writes more."""
SHORT_CHARS = 160
"""No text of the first call and of the probes is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What the data says about the size of a run."""

    num_train: int
    num_held_out: int = 0
    mean_prompt: int = 100
    """Characters."""
    longest_prompt: int = 400
    """Bytes, as the judge's server gets them."""
    mean_reference: int = 0
    longest_reference: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgePlan:
    """What one judge would be asked."""

    name: str
    settings: JudgeSettings
    expected: Spend
    worst: Spend
    """Every call reserved as in the ledger, each question with all of its attempts."""
    account: tuple[str, ...]
    """Its cache, "" for the usual one, and whose budget; judges with the same one share it."""
    spent: Spend = field(default_factory=Spend)
    """What the account has spent before, by the ledger."""

    @property
    def has_prices(self) -> bool:
        return self.settings.api.prices is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would do."""

    num_steps: int
    num_training: int
    """Responses to learn from."""
    num_evaluation: int
    """Responses to the evaluation prompts, over all evaluations."""
    num_early_stop: int
    """Responses that early stopping has gold score."""
    num_measured: int
    """Responses of the starting policy that put ensembles' members on one scale."""
    num_optimizer_steps: int
    judges: Sequence[JudgePlan]

    @property
    def possible_usd(self) -> float:
        """The most that the judges with known prices can cost; max_usd bounds it."""
        total = 0.0
        for shared in _accounts(self.judges):
            worst = sum(one.worst.nano_usd for one in shared) / 1e9
            caps = [one.settings.api.max_usd for one in shared]
            bound = max((cap for cap in caps if cap is not None), default=math.inf)
            left = max(bound - shared[0].spent.nano_usd / 1e9, 0)
            total += min(worst, math.inf if None in caps else left)
        return total


def plan_run(config: RunConfig, texts: Texts) -> Plan:
    """Counts, calls and costs, from the config and the sizes of the data's texts."""
    ppo, evaluation = config.ppo, config.evaluation
    num_prompts = min(evaluation.num_prompts, texts.num_held_out or texts.num_train)
    num_evaluations = 1 + (1 if evaluation.every is None else -(-ppo.num_steps // evaluation.every))
    num_training = ppo.num_steps * ppo.batch_size
    num_evaluation = num_evaluations * num_prompts
    num_early_stop = num_evaluations * config.early_stop.gold_prompts
    fresh = min(texts.num_train, num_training + (0 if texts.num_held_out else num_prompts)) + min(
        texts.num_held_out, num_prompts
    )
    judges = []
    for name, settings in named_judges(config):
        is_gold = name.startswith("gold")
        judged = num_evaluation + (num_early_stop if is_gold else num_training)
        asked_once = num_prompts + config.early_stop.gold_prompts if is_gold else fresh
        expected, worst = _cost(settings, config, texts, judged, asked_once)
        whose = judge_label(settings) if is_gold else config.output_dir
        judges.append(
            JudgePlan(
                name=name,
                settings=settings,
                expected=expected,
                worst=worst,
                account=(settings.api.cache or "", whose),
            )
        )
    return Plan(
        num_steps=ppo.num_steps,
        num_training=num_training,
        num_evaluation=num_evaluation,
        num_early_stop=num_early_stop,
        num_measured=sum(
            one.reference_size
            for one in ensembles(config.reward)
            if one.standardize == "start" and one.moments is None
        ),
        num_optimizer_steps=ppo.num_steps * ppo.num_epochs * (ppo.batch_size // ppo.minibatch),
        judges=judges,
    )


def named_judges(config: RunConfig) -> Iterator[tuple[str, JudgeSettings]]:
    """Every judge that a run asks, by its place in the config."""

    def within(name: str, reward: RewardSettings) -> Iterator[tuple[str, JudgeSettings]]:
        if isinstance(reward, JudgeSettings):
            yield name, reward
        elif isinstance(reward, SumSettings):
            for key, part in reward.parts.items():
                yield from within(f"{name}.{key}", part.reward)

    yield from within("reward", config.reward)
    if config.gold is not None:
        yield from within("gold", config.gold)


def _cost(
    settings: JudgeSettings, config: RunConfig, texts: Texts, judged: int, references: int
) -> tuple[Spend, Spend]:
    """Expected and worst case of so many responses, and of references that are asked once."""
    sizes = _Sizes(settings, config, texts)
    is_difference = settings.mode == "difference"
    orders = 2 if settings.mode == "pairwise" else 1
    num_probes = len(PROBES) if settings.probes else 0
    num_opening = (1 + num_probes) * orders  # one plain sample, then the probes
    if is_difference:
        num_opening += 1 + (num_probes > 0)
    votes = settings.votes
    expected, worst = Spend(), Spend()
    for criterion in sizes.judge.criteria:
        typical, most = sizes.typical(criterion), sizes.worst(criterion)
        short = sizes.opening(criterion)
        expected = _add(expected, typical["response"], judged * orders * votes)
        worst = _add(worst, most["response"], judged * orders * votes)
        if is_difference:
            expected = _add(expected, typical["reference"], references * votes)
            # One that fails on the way is asked for again with the next response.
            worst = _add(worst, most["reference"], max(judged, references) * votes)
        expected = _add(expected, short[0], num_opening * votes)
        worst = _add(worst, short[1], num_opening * votes)
    first = next(iter(sizes.judge.criteria))
    worst = _add(worst, sizes.opening(first)[1], len(sizes.sources) - 1)
    return expected, worst


class _Sizes:
    """What one question of one judge costs."""

    def __init__(self, settings: JudgeSettings, config: RunConfig, texts: Texts) -> None:
        self.settings = settings
        self.judge = Judge(settings, _Nobody())
        self.sources = self.judge.sources
        self._meter = Meter(settings.api)
        length = config.rollout.response_length
        low, high = (length, length) if isinstance(length, int) else length
        seen = settings.max_response_chars
        self._mean_response = min(CHARS_PER_TOKEN * (low + high) // 2, seen)
        self._longest_response = min(BYTES_PER_TOKEN * high, BYTES_PER_CHAR * seen)
        self._mean_reference = min(texts.mean_reference, seen)
        self._longest_reference = min(texts.longest_reference, BYTES_PER_CHAR * seen)
        self._texts = texts

    def typical(self, criterion: str) -> dict[str, Spend]:
        """Of a question that is answered at once."""
        prompt, reference = self._texts.mean_prompt, self._mean_reference
        return {
            "response": self._typical(criterion, prompt, self._mean_response, reference),
            "reference": self._typical(criterion, prompt, reference, 0),
        }

    def worst(self, criterion: str) -> dict[str, Spend]:
        """Of a question that is paid at every attempt."""
        prompt, reference = self._texts.longest_prompt, self._longest_reference
        return {
            "response": self._worst(criterion, prompt, self._longest_response, reference),
            "reference": self._worst(criterion, prompt, reference, 0),
        }

    def opening(self, criterion: str) -> tuple[Spend, Spend]:
        """Expected and worst case of the short texts at the start."""
        short = (criterion, SHORT_CHARS, SHORT_CHARS, SHORT_CHARS)
        return self._typical(*short), self._worst(*short)

    def _question(self, criterion: str, source: Source, *chars: int) -> str:
        prompt, response, reference = ("x" * num for num in chars)
        return render(
            self.judge.rubric,
            Material(prompt=prompt, response=response, reference=reference),
            INSTRUCTIONS[source, self.settings.rationale],
            criteria=self.judge.criteria[criterion],
            max_chars=10**9,
        ).text

    def _typical(self, criterion: str, *chars: int) -> Spend:
        source: Source = self.sources[0] if len(self.sources) == 1 else "json"
        question = self._question(criterion, source, *chars)
        request = make_request(question, source, self.settings)
        written = min(WRITTEN_TOKENS[self.settings.rationale], request.max_tokens)
        read = len(question) // CHARS_PER_TOKEN
        return self._meter.spend(read, written)

    def _worst(self, criterion: str, *chars: int) -> Spend:
        return max(
            (self._all_attempts(criterion, source, *chars) for source in self.sources),
            key=lambda spend: (spend.nano_usd, spend.tokens),
        )

    def _all_attempts(self, criterion: str, source: Source, *chars: int) -> Spend:
        """The first answer is cut, and all others, with more tokens, are lost after being paid."""
        settings = self.settings
        request = make_request(self._question(criterion, source, *chars), source, settings)
        api = settings.api
        more = MORE_TOKENS * request.max_tokens
        body = WIRES[api.wire_format].body(api.model, request, more, Learned())
        num_bytes = len(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))
        first = self._meter.worst(num_bytes, len(request.messages), request.max_tokens)
        again = self._meter.worst(num_bytes, len(request.messages), more)
        return _add(first, again, api.max_attempts - 1)


class _Nobody:
    """A plan asks nobody."""

    async def ask(self, request: Request) -> Answer:
        raise AssertionError(f"a dry run calls no judge, not even for {request}")


def _add(total: Spend, one: Spend, times: int) -> Spend:
    return Spend(
        calls=total.calls + times * one.calls,
        tokens=total.tokens + times * one.tokens,
        nano_usd=total.nano_usd + times * one.nano_usd,
    )


def _accounts(judges: Iterable[JudgePlan]) -> list[list[JudgePlan]]:
    found: dict[tuple[str, ...], list[JudgePlan]] = {}
    for one in judges:
        found.setdefault(one.account, []).append(one)
    return list(found.values())


def passed_caps(plan: Plan) -> list[str]:
    """A sentence for every cap that the run, with what was spent before, would pass, or could."""
    told = []
    for shared in _accounts(plan.judges):
        expected = worst = shared[0].spent
        for one in shared:
            expected, worst = _add(expected, one.expected, 1), _add(worst, one.worst, 1)
        for one in shared:
            api = one.settings.api
            pairs: list[tuple[str, float | None, float, float]] = [
                ("max_calls", api.max_calls, expected.calls, worst.calls),
                ("max_tokens_total", api.max_tokens_total, expected.tokens, worst.tokens),
                ("max_usd", api.max_usd, expected.nano_usd / 1e9, worst.nano_usd / 1e9),
            ]
            for name, cap, usual, most in pairs:
                if cap is None or most <= cap:
                    continue
                will = "would be passed" if usual > cap else "could be passed in the worst case"
                told.append(f"{one.name}: {name}={cap:g} {will}; the run then ends with code 5")
    return told


def texts_of(config: RunConfig, data: Data) -> Texts:
    """Sizes of the data's prompts and references."""
    rows, held_out = data
    everything = [*rows, *held_out]
    prompts = [row.prompt(config.data.prompt_columns) for row in everything]
    columns = {
        s.reference_column for _, s in named_judges(config) if s.reference_column is not None
    }
    references = [row.columns.get(name) for row in everything for name in columns]
    return Texts(
        num_train=len(rows),
        num_held_out=len(held_out),
        mean_prompt=round(statistics.fmean(len(_text(one)) for one in prompts)),
        longest_prompt=max(_num_bytes(one) for one in prompts),
        mean_reference=round(statistics.fmean([len(_text(one)) for one in references] or [0])),
        longest_reference=max((_num_bytes(one) for one in references), default=0),
    )


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _num_bytes(value: Any) -> int:
    """Inside a body's JSON."""
    return len(json.dumps(_text(value), ensure_ascii=False).encode("utf-8", "replace")) - 2


def with_ledger(plan: Plan) -> Plan:
    """The plan with what its accounts have spent before."""
    judges = [replace(one, spent=_spent(one)) for one in plan.judges]
    return replace(plan, judges=judges)


def _spent(one: JudgePlan) -> Spend:
    cache, account = one.account
    return spent_in(Path(cache).expanduser() if cache else JUDGE_CACHE, account)


def agree_to_cost(config: RunConfig, data: Data, *, yes: bool) -> None:
    """Ask before a run whose judges may cost much. Raises ConfigError where the answer is no."""
    if yes or not any(_costs(settings) for _, settings in named_judges(config)):
        return
    plan = with_ledger(plan_run(config, texts_of(config, data)))
    most = plan.possible_usd
    if most <= ASK_ABOVE_USD:
        return
    usual = sum(one.expected.nano_usd for one in plan.judges) / 1e9
    told = f"the judges may cost up to {most:,.2f} USD (about {usual:,.2f} USD expected)"
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{told}, more than {ASK_ABOVE_USD:g}, and there is no terminal to ask at; pass --yes, "
            "or set a lower max_usd; --dry-run tells more"
        )
    answer = Console(stderr=True).input(Text(f"T{told[1:]}. Train? [y/N] "))
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError("not started; a lower max_usd or fewer steps cost less")


def _costs(settings: JudgeSettings) -> bool:
    return settings.api.prices is not None and any(settings.api.prices)
