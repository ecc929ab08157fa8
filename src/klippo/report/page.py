"""The report as one HTML file that fetches nothing and runs nothing, and the model card."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from importlib.metadata import version

from markupsafe import Markup

from klippo.evaluation.verdict import Outcome
from klippo.report import sections, series, tables, text, view
from klippo.report.style import Picture
from klippo.report.text import escape_markdown, visible
from klippo.report.view import RunView, config_differences, gold_words, reward_words

TEMPLATES = resources.files("klippo.report.templates")
START, END = "<!-- klippo: figures, written anew by klippo report -->", "<!-- klippo: end -->"
SYMBOLS: dict[Outcome, str] = {
    "improved": "↑",
    "over-optimised": "⤵",
    "worse": "↓",
    "unchanged": "=",
    "not enough data": "?",
}


def page(views: Sequence[RunView], pictures: Mapping[str, Sequence[Picture]]) -> str:
    """The HTML page. Foreign text passes `visible` and is escaped, wherever it stands."""
    css = TEMPLATES.joinpath("report.css").read_text("utf-8")
    runs = [one.data for one in views]
    laws = [(one.data, key, law) for one in views for key, law in one.laws.items()]
    return _render(
        "report.html.j2",
        visible,
        autoescape=True,
        results=views,
        pictures=pictures,
        changed=config_differences(runs),
        laws=sections.law_table(laws, named=len(runs) > 1),
        rewards_differ=len({(reward_words(r, "reward"), gold_words(r)) for r in runs}) > 1,
        symbols=SYMBOLS,
        css=Markup(css),  # ours
        style_hash=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        base64=lambda content: Markup(base64.b64encode(content).decode()),
        version=version("klippo"),
    )


def card(result: RunView, existing: str | None = None) -> str | None:
    """The model card: what the policy is, what it learnt, how far to trust it.

    The figures of an existing card are written anew between its marks. None if it lost its marks:
    it is the user's now.
    """
    marks = {"start": Markup(START), "end": Markup(END)}
    new = _render("card.md.j2", escape_markdown, autoescape=False, result=result, **marks)
    if existing is None:
        return new
    head, start, rest = existing.partition(START)
    _, end, tail = rest.partition(END)
    figures = new.partition(START)[2].partition(END)[0]
    return f"{head}{START}{figures}{END}{tail}" if start and end else None


def _render(name: str, safe: Callable[[str], str], *, autoescape: bool, **values: object) -> str:
    """A template, with every text that is not ours passed through `safe`."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(lambda name: TEMPLATES.joinpath(name).read_text("utf-8")),
        autoescape=autoescape,
        undefined=StrictUndefined,
        finalize=lambda v: safe(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "sections": sections,
        "series": series,
        "tables": tables,
        "text": text,
        "view": view,
    }
    return environment.get_template(name).render(**values)
