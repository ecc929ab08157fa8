"""One model against another on the same prompts: every figure of `klippo compare`.

P prompts that both models answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from klippo.evaluation.statistics import Estimate, PairedComparison, compare_paired, estimate, share
from klippo.evaluation.style import STYLE, WordShift, word_shift
from klippo.policy.actor_critic import CausalLM, Reference
from klippo.policy.weights import WeightChange
from klippo.types import Rollout

Values = Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one model said to one prompt."""

    prompt_id: int
    prompt: str
    """As people read it."""
    group: str
    """Which part of the data the prompt belongs to; empty where it is not split."""
    text: str
    values: Values
    """Name of a measure -> its value; None where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Two answers to one prompt compared directly."""

    margin: float | None
    """-1 to 1, above 0 where the answer after is better; None where there is no verdict."""
    num_questions: int = 0
    """Questions that were asked in both orders."""
    num_turned: int = 0
    """Of these, questions whose two orders prefer different answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Duel:
    """All direct comparisons of two models by one judge."""

    num_won: int
    num_lost: int
    num_drawn: int
    win_rate: Estimate
    """Won, plus half of what was drawn, over all."""
    num_unjudged: int
    turned_share: float | None
    """Share of the questions whose two orders prefer different answers; None if none was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputChange:
    """How far the probabilities of two models are apart."""

    kl: Estimate
    """Exact KL(after || before) at each token of after's answers, summed per answer, nats."""
    logprob: Estimate
    """Mean |log p_after - log p_before| per token of before's answers, nats."""


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
    weights: WeightChange | str
    """Or why they cannot be compared."""
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
    measures = {}
    for name in names:
        sides = ([answer.values.get(name) for answer in side] for side in (before, after))
        compared = compare_paired(*sides)
        if compared is not None:
            measures[name] = compared
    fought = {name: duel(found) for name, found in matches.items()}
    return Group(
        num_prompts=len(before),
        measures=measures,
        duels={name: one for name, one in fought.items() if one is not None},
    )


def by_group(
    before: Sequence[Answer], after: Sequence[Answer], matches: Mapping[str, Sequence[Match]]
) -> dict[str, Group]:
    """The same for the prompts of each group alone; empty where the data is not split."""
    groups = sorted({answer.group for answer in before} - {""})
    found = {}
    for group in groups:
        rows = [i for i, answer in enumerate(before) if answer.group == group]
        found[group] = compare_answers(
            [before[i] for i in rows],
            [after[i] for i in rows],
            {name: [one[i] for i in rows] for name, one in matches.items()},
        )
    return found


def duel(matches: Sequence[Match]) -> Duel | None:
    """What became of all matches; None where none has a verdict."""
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


def words_of(before: Sequence[Answer], after: Sequence[Answer]) -> WordShift:
    """The shift of the word frequencies."""
    return word_shift([one.text for one in before], [one.text for one in after])


@torch.no_grad()
def output_change(
    before: CausalLM, after: CausalLM, said_before: Rollout, said_after: Rollout, batch_size: int
) -> OutputChange:
    """Compare the probabilities of two models that share one vocabulary."""
    old, new = Reference(before), Reference(after)
    kls: list[float] = []
    for index in _batches(said_after, batch_size):
        tokens = said_after.tokens.rows(index)
        kls += old.kl_from(after, tokens, said_after.temperature).sum(1).tolist()
    changes: list[float] = []
    for index in _batches(said_before, batch_size):
        tokens = said_before.tokens.rows(index)
        pair = (side.logprobs(tokens, said_before.temperature) for side in (old, new))
        first, second = pair
        changes += ((second - first).abs().sum(1) / tokens.response_mask.sum(1)).tolist()
    return OutputChange(kl=estimate(kls), logprob=estimate(changes))


def _batches(rollout: Rollout, size: int) -> list[torch.Tensor]:
    device = rollout.tokens.response_ids.device
    rows = torch.arange(len(rollout), device=device)
    return [rows[start : start + size] for start in range(0, len(rows), size)]
