"""One model against another on the same prompts: every figure of `klippo compare`.

P prompts that both models answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from klippo.evaluation.statistics import Estimate, PairedComparison, compare_paired, estimate, share
from klippo.evaluation.style import STYLE, WordShift
from klippo.policy.actor_critic import CausalLM, Reference
from klippo.policy.weights import WeightChange
from klippo.types import Rollout, TokenBatch

Values = Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one model said to one prompt."""

    prompt_id: int
    prompt: str  # as people read it
    group: str  # part of the data that the prompt belongs to; empty if it is not split
    text: str
    values: Values  # name of a measure -> its value; None if absent


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Two answers to one prompt compared directly."""

    margin: float | None  # -1 to 1, above 0 if the answer after is better; None without a verdict
    num_questions: int = 0  # asked in both orders
    num_turned: int = 0  # of these, questions whose two orders prefer different answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Duel:
    """All direct comparisons of two models by one judge."""

    num_won: int
    num_lost: int
    num_drawn: int
    win_rate: Estimate  # won, plus half of what was drawn, over all
    num_unjudged: int
    turned_share: float | None  # num_turned over num_questions; None if none was asked


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputChange:
    """How far the probabilities of two models are apart."""

    kl: Estimate  # exact KL(after || before) of each token, summed over after's answer, nats
    logprob: Estimate  # mean |log p_after - log p_before| per token of before's answers, nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The prompts of one kind."""

    num_prompts: int
    measures: Mapping[str, PairedComparison]
    duels: Mapping[str, Duel]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One AFTER beside BEFORE."""

    name: str
    model: str
    whole: Group
    groups: Mapping[str, Group] = field(default_factory=dict)
    num_identical: int
    words: WordShift
    weights: WeightChange | str  # or why they cannot be compared
    outputs: OutputChange | str


def style_values(rollout: Rollout, row: int) -> dict[str, float | None]:
    """Length in tokens (a stop token counts), whether it ended by itself, and the style."""
    values: dict[str, float | None] = {
        "length": float(rollout.tokens.response_mask[row].sum()),
        "finished": float(rollout.finished[row]),
    }
    return values | {name: measure(rollout.responses[row]) for name, measure in STYLE.items()}


def compare_answers(
    before: Sequence[Answer], after: Sequence[Answer], matches: Mapping[str, Sequence[Match]]
) -> Group:
    """Paired differences of every measure, and the duels; the same prompts on both sides."""
    names = dict.fromkeys(name for answer in (*before, *after) for name in answer.values)
    measures = {
        name: compare_paired(*([of.values.get(name) for of in side] for side in (before, after)))
        for name in names
    }
    duels = {name: found for name, some in matches.items() if (found := duel(some)) is not None}
    known = {name: compared for name, compared in measures.items() if compared is not None}
    return Group(num_prompts=len(before), measures=known, duels=duels)


def by_group(
    before: Sequence[Answer], after: Sequence[Answer], matches: Mapping[str, Sequence[Match]]
) -> dict[str, Group]:
    """The same for the prompts of each group alone; empty if the data is not split."""
    rows: dict[str, list[int]] = {}
    for i, answer in enumerate(before):
        if answer.group:
            rows.setdefault(answer.group, []).append(i)
    return {
        group: compare_answers(
            [before[i] for i in own],
            [after[i] for i in own],
            {name: [some[i] for i in own] for name, some in matches.items()},
        )
        for group, own in sorted(rows.items())
    }


def duel(matches: Sequence[Match]) -> Duel | None:
    """The score of all matches; None if none has a verdict."""
    margins = [match.margin for match in matches if match.margin is not None]
    if not margins:
        return None
    won, lost = sum(m > 0 for m in margins), sum(m < 0 for m in margins)
    drawn = len(margins) - won - lost
    asked = sum(match.num_questions for match in matches)
    turned = sum(match.num_turned for match in matches)
    return Duel(
        num_won=won,
        num_lost=lost,
        num_drawn=drawn,
        win_rate=share(won + drawn / 2, len(margins)),
        num_unjudged=len(matches) - len(margins),
        turned_share=turned / asked if asked else None,
    )


@torch.no_grad()
def output_change(
    before: CausalLM, after: CausalLM, said_before: Rollout, said_after: Rollout, batch_size: int
) -> OutputChange:
    """Compare the probabilities of two models that share one vocabulary."""
    old, new = Reference(before), Reference(after)
    kls, changes = [], []
    for tokens in _batches(said_after, batch_size):
        kls += old.kl_from(after, tokens, said_after.temperature).sum(1).tolist()
    for tokens in _batches(said_before, batch_size):
        first, second = (side.logprobs(tokens, said_before.temperature) for side in (old, new))
        changes += ((second - first).abs().sum(1) / tokens.response_mask.sum(1)).tolist()
    return OutputChange(kl=estimate(kls), logprob=estimate(changes))


def _batches(rollout: Rollout, size: int) -> Iterator[TokenBatch]:
    rows = torch.arange(len(rollout), device=rollout.tokens.response_ids.device)
    return (rollout.tokens.rows(index) for index in torch.split(rows, size))
