"""Before and after as tables: in the terminal, and as Markdown in the run folder."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from klippo.evaluation.samples import SampleRow
from klippo.evaluation.statistics import PairedComparison, compare_paired

MEASURES = {
    "proxy": "proxy reward",
    "gold": "gold reward",
    "kl_exact_nats": "KL to the start (nats/response)",
    "length": "length (tokens)",
    "finished": "ends by itself (share)",
}

REWARDS = ("proxy", "gold")


def clean(text: str) -> str:
    """Model output as harmless single-line text: no control characters, white space folded."""
    kept = (
        " " if ch.isspace() else ch
        for ch in text
        if ch.isspace() or unicodedata.category(ch)[0] != "C"
    )
    return " ".join("".join(kept).split())


def compare_rows(
    before: Sequence[SampleRow], after: Sequence[SampleRow]
) -> dict[str, PairedComparison]:
    """Paired comparison of every measure that both sides have, by its key in MEASURES."""
    compared: dict[str, PairedComparison] = {}
    for key in MEASURES:
        if all(key in row for row in (*before, *after)):
            result = compare_paired(
                [_value(row, key) for row in before], [_value(row, key) for row in after]
            )
            if result is not None:
                compared[key] = result
    return compared


def _value(row: SampleRow, key: str) -> float | None:
    return None if row[key] is None else float(row[key])


def change_table(compared: dict[str, PairedComparison], num_prompts: int) -> Table:
    """Before, after and difference with 95% intervals."""
    table = Table(title=f"Before and after, {num_prompts} fixed prompts", title_justify="left")
    for name in ("", "before", "after", "difference (95% interval)", "in sd of before"):
        table.add_column(name, justify="left" if name == "" else "right")
    for key, result in compared.items():
        table.add_row(MEASURES[key], *change_cells(key, result))
    return table


def change_cells(key: str, result: PairedComparison) -> tuple[str, str, str, str]:
    """The four figures of one measure."""
    difference = result.difference
    has_sd = key in REWARDS and result.before_sd > 0
    in_sd = f"{result.difference_in_sd:+.2f}" if has_sd else ""
    return (
        f"{result.before.mean:.2f}",
        f"{result.after.mean:.2f}",
        f"{difference.mean:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})",
        in_sd,
    )


def samples_table(before: Sequence[SampleRow], after: Sequence[SampleRow]) -> Table:
    """The same prompts before and after, with their scores."""
    table = Table(title="The same prompts before and after", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("before", ratio=5)
    table.add_column("after", ratio=5)
    for first, second in zip(before, after, strict=True):
        table.add_row(Text(clean(first["prompt"])), _sample(first), _sample(second))
    return table


def _sample(row: SampleRow) -> Text:
    return Text(f"{clean(row['response'])}\n") + Text(scores_of(row), style="dim")


def scores_of(row: SampleRow) -> str:
    """`proxy +0.31  gold -0.20`."""
    scores = ((key, row[key]) for key in REWARDS if key in row)
    return "  ".join(
        f"{key} unscored" if value is None else f"{key} {value:+.2f}" for key, value in scores
    )


def markdown(
    compared: dict[str, PairedComparison], before: Sequence[SampleRow], after: Sequence[SampleRow]
) -> str:
    """Both tables as Markdown."""
    lines = ["| | before | after | difference (95% interval) | in sd of before |"]
    lines.append("|---|--:|--:|--:|--:|")
    for key, result in compared.items():
        lines.append(f"| {MEASURES[key]} | " + " | ".join(change_cells(key, result)) + " |")
    lines += ["", "| prompt | before | after |", "|---|---|---|"]
    for first, second in zip(before, after, strict=True):
        cells = (
            escape_markdown(first["prompt"]),
            f"{escape_markdown(first['response'])}<br>*{scores_of(first)}*",
            f"{escape_markdown(second['response'])}<br>*{scores_of(second)}*",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Foreign text as harmless Markdown on one line."""
    text = clean(text)
    for special in "\\`*_|[]":
        text = text.replace(special, "\\" + special)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
