"""Before and after as tables: in the terminal, as Markdown, and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable
from rich.text import Text

from klippo.evaluation.samples import SampleRow
from klippo.evaluation.statistics import PairedComparison, compare_paired
from klippo.report.text import escape_markdown, number, one_line, share, with_interval

SCORES = {"proxy": "reward", "gold": "gold"}
"""Key in a file of samples -> what people read: the reward trains the policy (the literature calls
it a proxy), gold is a second opinion that never does."""
MEASURES = SCORES | {
    "kl_exact_nats": "KL to the start (nats/response)",
    "length": "length (tokens)",
    "finished": "ends by itself (share)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells of text: the first column names the row."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_prose: bool = False
    """Whether the cells are words, not figures."""
    num_code: int = 0
    """Leading columns that hold code."""

    def for_terminal(self) -> RichTable:
        """The first column on the left, figures on the right."""
        table = RichTable(title=Text(self.title), title_justify="left")
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if i and not self.is_prose else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """Cells hold no foreign text."""
        rule = ["---" if self.is_prose else "--:"] * (len(self.headings) - 1)
        lines = [self.headings, ["---", *rule], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def compare_rows(
    before: Sequence[SampleRow], after: Sequence[SampleRow]
) -> dict[str, PairedComparison]:
    """Paired comparison of every measure that both sides have, by its key in MEASURES."""
    compared = {}
    for key in MEASURES:
        if all(key in row for row in (*before, *after)):
            result = compare_paired([row[key] for row in before], [row[key] for row in after])
            if result is not None:
                compared[key] = result
    return compared


def change_table(compared: Mapping[str, PairedComparison], num_prompts: int) -> Table:
    """Before, after and change of every measure, with 95% intervals."""
    return Table(
        title=f"Before and after, {num_prompts:,} fixed prompts",
        headings=(
            "Mean per response",
            "Before",
            "After",
            "Change (95% interval)",
            "In sd of before",
        ),
        rows=[_change_cells(key, result) for key, result in compared.items()],
    )


def _change_cells(key: str, result: PairedComparison) -> tuple[str, ...]:
    shown = share if key == "finished" else number
    change = result.difference
    has_sd = key in SCORES and result.before_sd > 0
    return (
        MEASURES[key],
        shown(result.before.mean),
        shown(result.after.mean),
        with_interval(change.mean, change.low, change.high),
        number(result.difference_in_sd, signed=True) if has_sd else "",
    )


def score_words(row: SampleRow) -> str:
    """`reward +0.31 · gold −0.20`."""
    return " · ".join(
        f"{name} unscored" if row[key] is None else f"{name} {number(row[key], signed=True)}"
        for key, name in SCORES.items()
        if key in row
    )


def samples_table(before: Sequence[SampleRow], after: Sequence[SampleRow]) -> RichTable:
    """The same prompts before and after, with their scores, for the terminal."""
    title = "The same prompts before and after"
    table = RichTable(title=title, title_justify="left", show_lines=True)
    for name, ratio in (("prompt", 2), ("before", 5), ("after", 5)):
        table.add_column(name, ratio=ratio)
    for pair in zip(before, after, strict=True):
        answers = (
            Text(f"{one_line(row['response'])}\n").append(score_words(row), style="dim")
            for row in pair
        )
        table.add_row(Text(one_line(pair[0]["prompt"])), *answers)
    return table


def before_after_markdown(
    compared: Mapping[str, PairedComparison],
    before: Sequence[SampleRow],
    after: Sequence[SampleRow],
) -> str:
    """Both tables as Markdown."""
    samples = Table(
        title="",
        headings=("prompt", "before", "after"),
        is_prose=True,
        rows=[
            [escape_markdown(pair[0]["prompt"])]
            + [f"{escape_markdown(row['response'])}<br>*{score_words(row)}*" for row in pair]
            for pair in zip(before, after, strict=True)
        ],
    )
    return change_table(compared, len(before)).markdown() + "\n" + samples.markdown()
