"""What a run would do and cost, from its config and the sizes of its data."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from klippo.judge.reward import PROBES
from klippo.judge.rubric import Material, render
from klippo.judge.settings import JudgeSettings
from klippo.judge.store import Meter, Spend, spent_in
from klippo.judge.wire import WIRES
from klippo.rewards.build import JUDGE_CACHE
from klippo.rewards.settings import RewardSettings, SumSettings, ensembles

ASK_ABOVE_USD = 5.0
"""A run whose judges may cost more than this must be confirmed."""
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
    account: tuple[Path, str]
    """Its cache and whose budget; judges with the same account share it."""
    spent: Spend
    """What the account has spent before, by the ledger."""


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
    def accounts(self) -> list[list[JudgePlan]]:
        """The judges by account."""
        accounts: dict[tuple[Path, str], list[JudgePlan]] = {}
        for judge in self.judges:
            accounts.setdefault(judge.account, []).append(judge)
        return list(accounts.values())

    @property
    def possible_usd(self) -> float:
        """The most that the judges with known prices can cost; max_usd bounds it."""
        total = 0.0
        for judges in self.accounts:
            caps = [judge.settings.api.max_usd for judge in judges]
            cap = max(math.inf if cap is None else cap for cap in caps)
            left = max(cap - judges[0].spent.nano_usd / 1e9, 0)
            total += min(sum(judge.worst.nano_usd for judge in judges) / 1e9, left)
        return total


def plan_run(config: RunConfig, texts: Texts) -> Plan:
    """Counts, calls and costs, from the config, the sizes of the data's texts and the ledger."""
    ppo, evaluation = config.ppo, config.evaluation
    num_prompts = min(evaluation.num_prompts, texts.num_held_out or texts.num_train)
    num_evaluations = 1 + (1 if evaluation.every is None else -(-ppo.num_steps // evaluation.every))
    num_training = ppo.num_steps * ppo.batch_size
    num_evaluation = num_evaluations * num_prompts
    num_early_stop = num_evaluations * config.early_stop.gold_prompts
    num_rows = min(texts.num_train, num_training + (0 if texts.num_held_out else num_prompts))
    num_rows += min(texts.num_held_out, num_prompts)
    judges = []
    for name, settings in named_judges(config):
        is_gold = name.startswith("gold")
        num_judged = num_evaluation + (num_early_stop if is_gold else num_training)
        num_references = num_prompts + config.early_stop.gold_prompts if is_gold else num_rows
        expected, worst = _spend(settings, config, texts, num_judged, num_references)
        cache = settings.api.cache
        path = JUDGE_CACHE if cache is None else Path(cache).expanduser()
        account = path, judge_label(settings) if is_gold else config.output_dir
        judges.append(
            JudgePlan(
                name=name,
                settings=settings,
                expected=expected,
                worst=worst,
                account=account,
                spent=spent_in(*account),
            )
        )
    return Plan(
        num_steps=ppo.num_steps,
        num_training=num_training,
        num_evaluation=num_evaluation,
        num_early_stop=num_early_stop,
        num_measured=sum(
            ensemble.reference_size
            for ensemble in ensembles(config.reward)
            if ensemble.standardize == "start" and ensemble.moments is None
        ),
        num_optimizer_steps=ppo.num_steps * ppo.num_epochs * (ppo.batch_size // ppo.minibatch),
        judges=judges,
    )


def named_judges(config: RunConfig) -> Iterator[tuple[str, JudgeSettings]]:
    """Every judge that a run asks, by its key in the config."""

    def within(name: str, reward: RewardSettings) -> Iterator[tuple[str, JudgeSettings]]:
        if isinstance(reward, JudgeSettings):
            yield name, reward
        elif isinstance(reward, SumSettings):
            for key, part in reward.parts.items():
                yield from within(f"{name}.{key}", part.reward)

    yield from within("reward", config.reward)
    if config.gold is not None:
        yield from within("gold", config.gold)


def _spend(
    settings: JudgeSettings, config: RunConfig, texts: Texts, num_judged: int, num_references: int
) -> tuple[Spend, Spend]:
    """Expected and worst case of so many responses, and of references that are asked once."""
    judge = Judge(settings, _Nobody())
    length, seen = config.rollout.response_length, settings.max_response_chars
    low, high = (length, length) if isinstance(length, int) else length
    mean_response = min(CHARS_PER_TOKEN * (low + high) // 2, seen)
    mean_reference = min(texts.mean_reference, seen)
    longest_response = min(BYTES_PER_TOKEN * high, BYTES_PER_CHAR * seen)
    longest_reference = min(texts.longest_reference, BYTES_PER_CHAR * seen)
    orders = 2 if settings.mode == "pairwise" else 1
    num_probes = len(PROBES) if settings.probes else 0
    num_opening = (1 + num_probes) * orders  # one plain sample, then the probes
    if settings.mode == "difference":
        num_opening += 1 + (num_probes > 0)
        # A reference that fails is asked for again with the next response.
        references = num_references, max(num_judged, num_references)
    else:
        references = 0, 0
    short = (SHORT_CHARS, SHORT_CHARS, SHORT_CHARS)
    # Sizes of prompt, response and reference, and how many: expected, then at worst.
    questions = [
        ((texts.mean_prompt, mean_response, mean_reference), num_judged * orders,
         (texts.longest_prompt, longest_response, longest_reference), num_judged * orders),
        ((texts.mean_prompt, mean_reference, 0), references[0],
         (texts.longest_prompt, longest_reference, 0), references[1]),
        (short, num_opening, short, num_opening),
    ]  # fmt: skip
    expected, worst = Spend(), Spend()
    for criterion in judge.criteria:
        for typical, usual, longest, most in questions:
            expected += _answered_at_once(judge, criterion, typical) * (usual * settings.votes)
            worst += _every_attempt(judge, criterion, longest) * (most * settings.votes)
    first = next(iter(judge.criteria))
    return expected, worst + _every_attempt(judge, first, short) * (len(judge.sources) - 1)


def _request(judge: Judge, criterion: str, source: Source, sizes: tuple[int, int, int]) -> Request:
    prompt, response, reference = ("x" * size for size in sizes)
    text, _ = render(
        judge.rubric,
        Material(prompt=prompt, response=response, reference=reference),
        INSTRUCTIONS[source, judge.settings.rationale],
        criteria=judge.criteria[criterion],
        max_chars=10**9,
    )
    return make_request(text, source, judge.settings)


def _answered_at_once(judge: Judge, criterion: str, sizes: tuple[int, int, int]) -> Spend:
    source: Source = judge.sources[0] if len(judge.sources) == 1 else "json"
    request = _request(judge, criterion, source, sizes)
    read = len(request.messages[0]["content"]) // CHARS_PER_TOKEN
    written = min(WRITTEN_TOKENS[judge.settings.rationale], request.max_tokens)
    return Meter(judge.settings.api).spend(read, written)


def _every_attempt(judge: Judge, criterion: str, sizes: tuple[int, int, int]) -> Spend:
    """The first answer is cut, and all others, with more tokens, are lost after being paid."""
    api, meter = judge.settings.api, Meter(judge.settings.api)
    spends = []
    for source in judge.sources:
        request = _request(judge, criterion, source, sizes)
        more = MORE_TOKENS * request.max_tokens
        body = WIRES[api.wire_format]().body(api.model, request, more)
        size = len(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))
        first, again = (
            meter.worst(size, len(request.messages), tokens)
            for tokens in (request.max_tokens, more)
        )
        spends.append(first + again * (api.max_attempts - 1))
    return max(spends, key=lambda spend: (spend.nano_usd, spend.tokens))


class _Nobody:
    """A plan asks nobody."""

    async def ask(self, request: Request) -> Answer:
        raise AssertionError(f"a dry run calls no judge, not even for {request}")


def passed_caps(plan: Plan) -> list[str]:
    """A sentence for every cap that the run, with what was spent before, would or could pass."""
    sentences = []
    for judges in plan.accounts:
        expected = sum((judge.expected for judge in judges), judges[0].spent)
        worst = sum((judge.worst for judge in judges), judges[0].spent)
        for judge in judges:
            api = judge.settings.api
            pairs: list[tuple[str, float | None, float, float]] = [
                ("max_calls", api.max_calls, expected.calls, worst.calls),
                ("max_tokens_total", api.max_tokens_total, expected.tokens, worst.tokens),
                ("max_usd", api.max_usd, expected.nano_usd / 1e9, worst.nano_usd / 1e9),
            ]
            for name, cap, usual, most in pairs:
                if cap is not None and most > cap:
                    how = "would be passed" if usual > cap else "could be passed in the worst case"
                    sentences.append(
                        f"{judge.name}: {name}={cap:g} {how}; the run then ends with code 5"
                    )
    return sentences


def texts_of(config: RunConfig, data: Data) -> Texts:
    """Sizes of the data's prompts and references."""
    rows = [*data[0], *data[1]]
    columns = {s.reference_column for _, s in named_judges(config)} - {None}
    prompts = [_as_text(row.prompt(config.data.prompt_columns)) for row in rows]
    references = [_as_text(row.columns.get(name)) for row in rows for name in columns if name]
    return Texts(
        num_train=len(data[0]),
        num_held_out=len(data[1]),
        mean_prompt=round(statistics.fmean(map(len, prompts))),
        longest_prompt=_most_bytes(prompts),
        mean_reference=round(statistics.fmean(map(len, references or [""]))),
        longest_reference=_most_bytes(references),
    )


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _most_bytes(texts: Iterable[str]) -> int:
    """Of the longest text inside a body's JSON."""
    bodies = (json.dumps(text, ensure_ascii=False).encode("utf-8", "replace") for text in texts)
    return max((len(body) - 2 for body in bodies), default=0)


def agree_to_cost(config: RunConfig, data: Data) -> None:
    """Ask before a run whose judges may cost much. Raises ConfigError if the answer is no."""
    if not any(any(settings.api.prices or ()) for _, settings in named_judges(config)):
        return
    plan = plan_run(config, texts_of(config, data))
    if plan.possible_usd <= ASK_ABOVE_USD:
        return
    usual = sum(judge.expected.nano_usd for judge in plan.judges) / 1e9
    cost = f"he judges may cost up to {plan.possible_usd:,.2f} USD (about {usual:,.2f} expected)"
    if not sys.stdin.isatty():
        raise ConfigError(
            f"t{cost}, more than {ASK_ABOVE_USD:g}, and there is no terminal to ask at; pass "
            "--yes, or set a lower max_usd; --dry-run shows more"
        )
    answer = Console(stderr=True).input(Text(f"T{cost}. Train? [y/N] "))
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError("not started; a lower max_usd or fewer steps cost less")
