"""Tables of single sections: fitted laws, health checks, judges, passes of an offline run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from klippo.evaluation.scaling import Fit, Interval
from klippo.report.reading import RunData
from klippo.report.series import distances, mean_metric
from klippo.report.tables import SCORES, Table
from klippo.report.text import number, share, with_interval

Pairs = list[tuple[str, str]]
FAR = 100.0
"""Of sqrt(KL): nobody goes that far, ten thousand nats."""
DID = {"warn": "warned", "skip": "left it out", "stop": "ended the run"}
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
    "no_reference": "the row has no reference: fix the data",
    "rejected": "the server refused the request: look at that row",
    "too_large": "a huge answer: look at that row",
}


def law_table(laws: Sequence[tuple[RunData, str, Fit]], *, named: bool) -> Table:
    """Score, alpha, beta and peak of each fitted law, after its run if they are `named`."""
    headings = ("Score", "α", "β", "Peak at √KL", "The peak is")
    return Table(
        title="Fitted laws",
        headings=("Run", *headings) if named else headings,
        rows=[[run.label] * named + _law_cells(run, key, law) for run, key, law in laws],
    )


def _law_cells(run: RunData, key: str, law: Fit) -> list[str]:
    farthest = float(max(distances(run, sorted(run.evaluations))))
    peak = law.peak
    if math.isinf(peak.value):
        reading = "the fitted curve has no peak"
    elif peak.value > farthest:
        reading = f"beyond the farthest evaluation (√KL {number(farthest)}): extrapolated"
    else:
        reading = "inside the evaluated range"
    alpha, beta = (with_interval(x.value, x.low, x.high) for x in (law.alpha, law.beta))
    return [SCORES[key], alpha, beta, _peak(peak), reading]


def _peak(peak: Interval) -> str:
    ends = (
        f">{number(FAR, 0)}" if FAR < d < math.inf else number(d)
        for d in (peak.value, peak.low, peak.high)
    )
    return "none" if peak.low > FAR else "{} ({} to {})".format(*ends)


def health_table(run: RunData) -> Table | None:
    """Every health check that fired, in the order in which they first did."""
    fired = run.status.get("health")
    rows = []
    for name, record in fired.items() if isinstance(fired, Mapping) else ():
        if isinstance(record, Mapping):
            first, last, num = (record.get(k) for k in ("first_step", "last_step", "num_steps"))
            steps = f"step {first}" if num == 1 else f"{num} steps from {first} to {last}"
            did = DID.get(str(record.get("action")), "not recorded")
            rows.append((str(name), steps, did, str(record.get("diagnosis", ""))))
    if not rows:
        return None
    headings = ("Check", "When", "The run", "Diagnosis")
    return Table(
        title="Health checks that fired", headings=headings, rows=rows, is_prose=True, num_code=1
    )


def health_words(run: RunData) -> str | None:
    """`none fired`, or their names and steps; None for a run that had no checks."""
    if (fired := health_table(run)) is not None:
        return "; ".join(f"{name} ({steps})" for name, steps, *_ in fired.rows)
    had_checks = any("response/repeated_share" in row for row in run.metrics)
    return "none fired" if had_checks else None


def passes_table(run: RunData) -> Table | None:
    """A row per pass of an offline run; likelihoods are of held-out rows if there are any."""
    rows = []
    for line in run.diagnostics:
        of = {key.removeprefix("offline/"): value for key, value in line.items()}
        held_out = "held_out_" if "held_out_nll_nats_per_token" in of else ""
        nll = [of.get(f"{held_out}nll_{side}_nats_per_token") for side in ("good", "bad")]
        clipped = [of.get(f"clipped_share_{side}") for side in ("good", "bad")]
        rows.append(
            (
                number(line["step"], 0),
                number(of.get("kl_start_nats")),
                f"{number(of.get('ratio_p1'))} to {number(of.get('ratio_p99'))}",
                number(of.get("ratio_max")),
                share(of.get("ess_tokens")),
                share(of.get("ess_responses")),
                ", ".join(map(share, clipped)),
                ", ".join(map(number, nll)),
            )
        )
    headings = (
        "After step",
        "KL from the start (nats/response)",
        "Ratio, 98% of tokens",
        "Largest ratio",
        "Effective share of tokens",
        "Effective share of responses",
        "Clipped: good, bad tokens",
        "NLL of good, bad responses (nats/token)",
    )
    return Table(title="Diagnostics of the passes", headings=headings, rows=rows) if rows else None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeView:
    """What a judge cost, and what became of its answers."""

    name: str
    """Its name in a sum; empty if it is the only reward."""
    facts: Pairs
    causes: Table | None
    """Why training responses have no score."""


def judges_of(run: RunData) -> list[JudgeView]:
    """The judges in the training reward."""
    keys = run.metrics[0] if run.metrics else ()
    prefixes = (
        key.removesuffix(CALLS) for key in keys if key.startswith("judge/") and key.endswith(CALLS)
    )
    return [
        JudgeView(
            name=prefix.removeprefix("judge").lstrip("/"),
            facts=list(_judge_facts(run, prefix)),
            causes=_causes(run, prefix + CAUSE),
        )
        for prefix in prefixes
    ]


def _judge_facts(run: RunData, prefix: str) -> Iterator[tuple[str, str]]:
    last = run.metrics[-1]
    yield "Calls, with retries", number(last[f"{prefix}/num_calls"], 0)
    yield "Answers from the cache", share(mean_metric(run, f"{prefix}/cached_share"))
    yield "Tokens read", number(last.get(f"{prefix}/tokens_read"), 0)
    yield "Tokens written", number(last.get(f"{prefix}/tokens_written"), 0)
    cost = last.get(f"{prefix}/cost_usd")
    yield "Cost", "unknown: the config has no prices" if cost is None else f"{cost:,.4f} USD"
    yield "Responses without a score", share(mean_metric(run, f"{prefix}/unscored_share"))
    yield "Empty responses, floored", share(mean_metric(run, f"{prefix}/empty_share"))
    yield "Responses cut for the judge", share(mean_metric(run, f"{prefix}/cut_share"))
    if spread := mean_metric(run, f"{prefix}/vote_sd"):
        yield "Spread of votes", f"{number(spread)} sd"


def _causes(run: RunData, prefix: str) -> Table | None:
    counts: Counter[str] = Counter()
    for row in run.metrics:
        for key, value in row.items():
            if key.startswith(prefix) and not key.endswith("_share"):
                counts[key.removeprefix(prefix)] += int(value)
    rows = [(name, number(n, 0), REMEDIES.get(name, "")) for name, n in counts.most_common()]
    headings = ("Cause", "Responses", "It means")
    title = "Why responses have no score"
    table = Table(title=title, headings=headings, rows=rows, is_prose=True, num_code=1)
    return table if rows else None
