"""What a run's judges cost, and what became of their answers, from its metrics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from klippo.report.reading import RunData
from klippo.report.text import number, share
from klippo.types import Metrics

CALLS, CAUSE = "/num_calls", "/unscored_"
REMEDIES = {
    "transport": "no answer after all attempts",
    "truncated": "cut, also with four times the tokens: raise max_tokens",
    "empty": "no text, also with four times the tokens: raise max_tokens",
    "refusal": "the judge would not judge",
    "parse": "not the form that was asked for: another score_source, or a larger judge",
    "range": "a number outside 0 to 10: say in the rubric what 0 and 10 mean",
    "echo": "the score stands in the response itself: look at the samples",
    "logprobs": "no log-probs in the answer: score_source: json",
    "label_mass": "less than half of the mass on the labels: score_source: json",
    "no_reference": "the row has no reference: mend the data",
    "rejected": "the server refused the request: look at that row",
    "too_large": "a huge answer: look at that row",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeView:
    """One judge of a run."""

    name: str
    """Its place in a sum; empty where it is the whole reward."""
    facts: list[tuple[str, str]]
    causes: list[tuple[str, str, str]]
    """Why training responses have no score: cause, how many, what it means."""


def judges_of(run: RunData) -> list[JudgeView]:
    """The judges in the training reward; empty where there are none."""
    keys = run.metrics[0].keys() if run.metrics else ()
    prefixes = [
        key.removesuffix(CALLS) for key in keys if key.startswith("judge/") and key.endswith(CALLS)
    ]
    return [_view(run.metrics, prefix) for prefix in prefixes]


def _view(rows: Sequence[Metrics], prefix: str) -> JudgeView:
    causes: Counter[str] = Counter()
    for row in rows:
        for key, value in row.items():
            if key.startswith(prefix + CAUSE) and not key.endswith("_share"):
                causes[key.removeprefix(prefix + CAUSE)] += int(value)
    return JudgeView(
        name=prefix.removeprefix("judge").lstrip("/"),
        facts=list(_facts(rows, prefix)),
        causes=[(name, number(n, 0), REMEDIES.get(name, "")) for name, n in causes.most_common()],
    )


def _facts(rows: Sequence[Metrics], prefix: str) -> Iterator[tuple[str, str]]:
    last = rows[-1]

    def mean(key: str) -> float:
        values = [row[f"{prefix}/{key}"] for row in rows if f"{prefix}/{key}" in row]
        return sum(values) / len(values) if values else math.nan

    yield "Calls, with retries", number(last[f"{prefix}/num_calls"], 0)
    yield "Answers from the cache", share(mean("cached_share"))
    yield "Tokens read", number(last.get(f"{prefix}/tokens_read"), 0)
    yield "Tokens written", number(last.get(f"{prefix}/tokens_written"), 0)
    cost = last.get(f"{prefix}/cost_usd")
    yield "Cost", "unknown: the config has no prices" if cost is None else f"{cost:,.4f} USD"
    yield "Responses without a score", share(mean("unscored_share"))
    yield "Empty responses, floored", share(mean("empty_share"))
    yield "Responses cut for the judge", share(mean("cut_share"))
    if (spread := mean("vote_sd")) > 0:
        yield "Spread of votes", f"{number(spread)} sd"
