"""Several models beside each other, against the same one before: tables for the terminal.

They fit 100 columns; more than three models are split over several tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from klippo.evaluation.comparison import Answer, Comparison, Duel, Group, OutputChange
from klippo.evaluation.statistics import Estimate, PairedComparison
from klippo.policy.weights import WeightChange
from klippo.report.text import number, one_line, with_interval

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
    for start in range(0, len(comparisons), PER_TABLE):
        shown = comparisons[start : start + PER_TABLE]
        everything = {one.name: one.whole for one in shown}
        yield _measures("Before and after, {} prompts", everything, lower)
        yield from _duels("After against before, compared directly", everything)
        yield _movement(shown)
        for key in dict.fromkeys(key for one in comparisons for key in one.groups):
            groups = {one.name: one.groups[key] for one in shown if key in one.groups}
            if groups:
                yield _measures(f"{key.replace('{', '{{')}: {{}} prompts", groups, ())
                yield from _duels(f"{key}: compared directly", groups)


def _table(title: str, names: Iterable[str], *, no_wrap: bool = True) -> Table:
    """A first column of row names, and one right-aligned column per name."""
    table = Table(title=Text(title), title_justify="left", caption_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right", no_wrap=no_wrap)
    return table


def _measures(title: str, groups: Mapping[str, Group], lower: Sequence[str]) -> Table:
    """One column per model; the only one has columns of its own for the difference."""
    title = title.format(max(group.num_prompts for group in groups.values()))
    names = dict.fromkeys(name for group in groups.values() for name in group.measures)
    alone = len(groups) == 1
    models = [_short(label, 24 if alone else MAX_NAME) for label in groups]
    more = ["difference\n(95% interval)", "in sd of\nbefore"] if alone else []
    table = _table(title, ["before", *models, *more])
    for name in names:
        compared = [group.measures.get(name) for group in groups.values()]
        start = next(one.before.mean for one in compared if one is not None)
        cells = (cell for one in compared for cell in _after(name, one, alone))
        table.add_row(NAMES.get(name, Text(name)), _figure(name, start), *cells)
    flipped = [name for name in names if name in lower]
    notes = [] if alone else ["Below each mean: difference from before (95% interval)."]
    if flipped:
        notes.append(
            f"{', '.join(flipped)}: a reward, so more is better; the judge's scale is flipped."
        )
    table.caption = " ".join(notes) or None
    return table


def _after(name: str, compared: PairedComparison | None, alone: bool) -> list[Text]:
    """Mean and difference: three cells, or one of two lines beside other models."""
    if compared is None:
        return [Text("")]
    mean = _figure(name, compared.after.mean)
    difference = _difference(name, compared.difference)
    if not alone:
        return [Text(f"{mean}\n") + difference]
    is_reward = name not in NAMES and compared.before_sd > 0
    in_sd = number(compared.difference_in_sd, signed=True) if is_reward else ""
    return [Text(mean), difference, Text(in_sd)]


def _figure(name: str, value: float) -> str:
    return number(value * _scale(name), 1 if name in NAMES else 2)


def _scale(name: str) -> int:
    return 100 if name in SHARES else 1


def _difference(name: str, difference: Estimate) -> Text:
    """Bold if the interval excludes zero; a single prompt has no interval."""
    digits = 1 if name in NAMES else 2
    values = (difference.mean, difference.low, difference.high)
    mean, low, high = (_scale(name) * value for value in values)
    if difference.num == 1:
        return Text(number(mean, digits, signed=True))
    style = "bold" if difference.excludes_zero else ""
    return Text(with_interval(mean, low, high, digits), style=style)


def _duels(title: str, groups: Mapping[str, Group]) -> Iterator[Table]:
    names = dict.fromkeys(name for group in groups.values() for name in group.duels)
    if not names:
        return
    table = _table(title, [_short(label) for label in groups])
    rows: dict[str, Callable[[Duel], str]] = {
        "wins (%, 95% interval)": lambda one: _percent(one.win_rate),
        "won / drawn / lost": lambda one: f"{one.num_won} / {one.num_drawn} / {one.num_lost}",
        "orders disagree (%)": lambda one: (
            "" if one.turned_share is None else number(100 * one.turned_share, 0)
        ),
        "without a verdict": lambda one: str(one.num_unjudged),
    }
    for name in names:
        duels = [group.duels.get(name) for group in groups.values()]
        for row, show in rows.items():
            cells = ["" if duel is None else show(duel) for duel in duels]
            table.add_row(Text(f"{name}: {row}"), *cells)
    table.caption = (
        "Asked in both orders; a draw counts as half a win. Equal answers are draws, unasked."
    )
    yield table


def _percent(rate: Estimate) -> str:
    return with_interval(100 * rate.mean, 100 * rate.low, 100 * rate.high, 0, signed=False)


def _movement(comparisons: Sequence[Comparison]) -> Table:
    """The sanity test: did weights, probabilities and answers change at all, and how far?"""
    names = [_short(one.name) for one in comparisons]
    table = _table("How far it moved from before", names, no_wrap=False)
    columns = [_movement_cells(one) for one in comparisons]
    for name in columns[0]:
        table.add_row(name, *(Text(column[name]) for column in columns))
    return table


def _movement_cells(one: Comparison) -> dict[str, str]:
    weights, outputs, words = one.weights, one.outputs, one.words
    changed = relative = kl = logprob = ""
    if isinstance(weights, WeightChange):
        relative = f"{weights.relative:.2g}"
        changed = f"{weights.num_changed} of {weights.num_tensors}"
    else:
        relative = f"not comparable: {weights}"
    if isinstance(outputs, OutputChange):
        kl, logprob = _interval(outputs.kl), _interval(outputs.logprob)
    else:
        kl = f"not comparable: {outputs}"
    return {
        "identical answers": f"{one.num_identical} of {one.whole.num_prompts}",
        "weights: relative change (L2)": relative,
        "weights: tensors that changed": changed,
        "exact KL from before (nats/answer)": kl,
        "|change of log p| (nats/token)": logprob,
        "word frequencies: distance": number(words.distance, 3),
        "  by chance (95% below)": f"{words.by_chance:.3f} ({words.chance_limit:.3f})",
        "  p": number(words.p_value, 3),
    }


def _interval(value: Estimate) -> str:
    if value.num == 1:
        return f"{value.mean:.3g}"
    return f"{value.mean:.3g} ({value.low:.3g} to {value.high:.3g})"


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
                table.add_row(Text(_short(name)), said)
    return table


def _scores(answer: Answer, rewards: Sequence[str]) -> Iterator[str]:
    for name in rewards:
        if name in answer.values:
            value = answer.values[name]
            yield f"{name} unscored" if value is None else f"{name} {number(value, signed=True)}"


def _cut(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


def _short(name: str, width: int = MAX_NAME) -> str:
    return name if len(name) <= width else "…" + name[1 - width :]
