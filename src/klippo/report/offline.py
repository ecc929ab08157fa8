"""What a run on logged responses can say of itself: distances and ratios, never its reward."""

from __future__ import annotations

from klippo.report.reading import RunData
from klippo.report.text import number, share
from klippo.types import Metrics

NOTHING_SAMPLED = (
    "The run learnt from responses that exist already. Their rewards were there before and say "
    "nothing about the policy, and the run sampled none of its own. klippo compare start RUN "
    "measures on fresh responses whether it got better."
)
HEADINGS = (
    "After step",
    "KL from the start (nats/response)",
    "Ratio, 98% of tokens",
    "Largest ratio",
    "Effective share of tokens",
    "Effective share of responses",
    "Clipped: good, bad tokens",
    "NLL of good, bad responses (nats/token)",
)


def is_offline(run: RunData) -> bool:
    return any(key.startswith("offline.") for key in run.config)


def offline_rows(run: RunData) -> list[tuple[str, ...]]:
    """One row per pass, under `HEADINGS`; likelihoods are of held-out rows where there are any."""
    return [_row(row) for row in run.diagnostics]


def _row(row: Metrics) -> tuple[str, ...]:
    def of(name: str) -> float | None:
        return row.get(f"offline/{name}")

    held = "held_out_" if "offline/held_out_nll_nats_per_token" in row else ""
    good, bad = (of(f"{held}nll_{side}_nats_per_token") for side in ("good", "bad"))
    return (
        number(row["step"], 0),
        number(of("kl_start_nats")),
        f"{number(of('ratio_p1'))} to {number(of('ratio_p99'))}",
        number(of("ratio_max")),
        share(of("ess_tokens")),
        share(of("ess_responses")),
        f"{share(of('clipped_share_good'))}, {share(of('clipped_share_bad'))}",
        f"{number(good)}, {number(bad)}",
    )
