"""Several models beside each other, against the same one before: tables for the terminal.

They fit 100 columns; where there are more than three models, they are split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from klippo.evaluation.comparison import Answer, Comparison, Duel, Group, OutputChange
from klippo.evaluation.statistics import Estimate, PairedComparison
from klippo.policy.weights import WeightChange
from klippo.report.tables import clean

PER_TABLE = 3
MAX_CHARS = 400
MAX_NAME = 21
SHARES = {
    "finished": "ends by itself (%)",
    "distinct_pairs": "distinct pairs (%)",
    "repetition": "repeated triples (%)",
    "first_person": "first person (%)",
}
NAMES = {"length": "length (tokens)"} | SHARES


def comparison_tables(
    comparisons: Sequence[Comparison], *, lower: Sequence[str] = ()
) -> Iterator[Table]:
    """Measures, direct comparisons, how far it moved; then measures and duels of each group.

    `lower` names judges whose rubric has its good end at 0, for a note.
    """
    groups = list(dict.fromkeys(key for one in comparisons for key in one.groups))
    for start in range(0, len(comparisons), PER_TABLE):
        part = comparisons[start : start + PER_TABLE]
        whole = {one.name: one.whole for one in part}
        num = max(group.num_prompts for group in whole.values())
        yield _measures(f"Before and after, {num} prompts", whole, lower)
        if any(group.duels for group in whole.values()):
            yield _duels("After against before, compared directly", whole)
        yield _movement(part)
        for key in groups:
            own = {one.name: one.groups[key] for one in part if key in one.groups}
            num = max(group.num_prompts for group in own.values())
            yield _measures(f"{key}: {num} prompts", own, ())
            if any(group.duels for group in own.values()):
                yield _duels(f"{key}: compared directly", own)


def _measures(title: str, groups: Mapping[str, Group], lower: Sequence[str]) -> Table:
    names = list(dict.fromkeys(name for group in groups.values() for name in group.measures))
    table = _table(title, ["", "before"])
    if len(groups) == 1:
        (label,) = groups
        for head in (_short(label, 24), "difference\n(95% interval)", "in sd of\nbefore"):
            table.add_column(Text(head), justify="right", no_wrap=True)
    else:
        for label in groups:
            table.add_column(Text(_short(label, MAX_NAME)), justify="right", no_wrap=True)
    for name in names:
        found = [group.measures.get(name) for group in groups.values()]
        start = next(one.before.mean for one in found if one is not None)
        cells = [Text(NAMES.get(name, name)), Text(_figure(name, start))]
        table.add_row(*cells, *(_alone if len(groups) == 1 else _beside)(name, found))
    notes = []
    if len(groups) > 1:
        notes.append("Below each mean: difference from before (95% interval).")
    flipped = [name for name in names if name in lower]
    if flipped:
        notes.append(
            f"{', '.join(flipped)}: a reward, so more is better; the judge's own scale is turned."
        )
    table.caption = " ".join(notes) or None
    return table


def _alone(name: str, found: Sequence[PairedComparison | None]) -> list[Text]:
    """The columns of the only model."""
    (one,) = found
    assert one is not None
    is_reward = name not in NAMES and one.before_sd > 0
    in_sd = f"{one.difference_in_sd:+.2f}" if is_reward else ""
    return [Text(_figure(name, one.after.mean)), _difference(name, one.difference), Text(in_sd)]


def _beside(name: str, found: Sequence[PairedComparison | None]) -> list[Text]:
    """One column per model, in two lines."""
    return [
        Text("")
        if one is None
        else Text(f"{_figure(name, one.after.mean)}\n") + _difference(name, one.difference)
        for one in found
    ]


def _figure(name: str, value: float) -> str:
    if name in SHARES:
        return f"{100 * value:.1f}"
    return f"{value:.1f}" if name == "length" else f"{value:.2f}"


def _difference(name: str, difference: Estimate) -> Text:
    """Bold where the interval is on one side of zero; of one prompt there is no interval."""
    digits = 2 if name not in NAMES else 1
    scale = 100 if name in SHARES else 1
    mean, low, high = (scale * x for x in (difference.mean, difference.low, difference.high))
    if difference.num == 1:
        return Text(f"{mean:+.{digits}f}")
    text = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return Text(text, style="bold" if difference.excludes_zero else "")


def _duels(title: str, groups: Mapping[str, Group]) -> Table:
    names = list(dict.fromkeys(name for group in groups.values() for name in group.duels))
    table = _table(title, [""])
    for label in groups:
        table.add_column(Text(_short(label, MAX_NAME)), justify="right", no_wrap=True)
    rows: dict[str, Callable[[Duel], str]] = {
        "wins (%, 95% interval)": lambda one: _percent(one.win_rate),
        "won / drawn / lost": lambda one: f"{one.num_won} / {one.num_drawn} / {one.num_lost}",
        "orders disagree (%)": lambda one: (
            "" if one.turned_share is None else f"{100 * one.turned_share:.0f}"
        ),
        "without a verdict": lambda one: str(one.num_unjudged),
    }
    for name in names:
        for row, show in rows.items():
            found = [group.duels.get(name) for group in groups.values()]
            cells = [Text("" if one is None else show(one)) for one in found]
            table.add_row(Text(f"{name}: {row}"), *cells)
    table.caption = (
        "Asked in both orders; a draw counts as half a win. Equal answers are draws, unasked."
    )
    return table


def _percent(rate: Estimate) -> str:
    return f"{100 * rate.mean:.0f} ({100 * rate.low:.0f} to {100 * rate.high:.0f})"


def _movement(part: Sequence[Comparison]) -> Table:
    """The sanity test: did weights, probabilities and answers change at all, and how far?"""
    table = _table("How far it moved from before", [""])
    for one in part:
        table.add_column(Text(_short(one.name, MAX_NAME)), justify="right")
    rows: dict[str, Callable[[Comparison], str]] = {
        "identical answers": lambda one: f"{one.num_identical} of {one.whole.num_prompts}",
        "weights: relative change (L2)": lambda one: (
            f"{one.weights.relative:.2g}"
            if isinstance(one.weights, WeightChange)
            else _not_comparable(one.weights)
        ),
        "weights: tensors that changed": lambda one: (
            f"{one.weights.num_changed} of {one.weights.num_tensors}"
            if isinstance(one.weights, WeightChange)
            else ""
        ),
        "exact KL from before (nats/answer)": lambda one: (
            _interval(one.outputs.kl)
            if isinstance(one.outputs, OutputChange)
            else _not_comparable(one.outputs)
        ),
        "|change of log p| (nats/token)": lambda one: (
            _interval(one.outputs.logprob) if isinstance(one.outputs, OutputChange) else ""
        ),
        "word frequencies: distance": lambda one: f"{one.words.distance:.3f}",
        "  by chance (95% below)": lambda one: (
            f"{one.words.by_chance:.3f} ({one.words.chance_limit:.3f})"
        ),
        "  p": lambda one: f"{one.words.p_value:.3f}",
    }
    for name, show in rows.items():
        table.add_row(Text(name), *(Text(show(one)) for one in part))
    return table


def _interval(value: Estimate) -> str:
    if value.num == 1:
        return f"{value.mean:.3g}"
    return f"{value.mean:.3g} ({value.low:.3g} to {value.high:.3g})"


def _not_comparable(reason: str) -> str:
    return f"not comparable: {reason}"


def answers_table(
    answers: Mapping[str, Mapping[int, Answer]], rewards: Sequence[str], num: int
) -> Table:
    """The first prompts with what every model said to them, and its scores."""
    table = Table(title="The same prompts", title_justify="left", show_header=False)
    table.add_column(no_wrap=True, max_width=MAX_NAME)
    table.add_column(ratio=1)
    for id, first in list(answers["before"].items())[:num]:
        table.add_section()
        table.add_row(Text("prompt", style="dim"), Text(_cut(first.prompt), style="bold"))
        for name, side in answers.items():
            if id in side:
                scores = "  ".join(_scores(side[id], rewards))
                said = Text(_cut(side[id].text)) + Text(f"\n{scores}" if scores else "", "dim")
                table.add_row(Text(_short(name, MAX_NAME)), said)
    return table


def _scores(answer: Answer, rewards: Sequence[str]) -> Iterator[str]:
    for name in rewards:
        if name in answer.values:
            value = answer.values[name]
            yield f"{name} unscored" if value is None else f"{name} {value:+.2f}"


def _cut(text: str) -> str:
    text = clean(text)
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]


def _table(title: str, left: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for i, name in enumerate(left):
        table.add_column(name, justify="right" if i else "left")
    return table
