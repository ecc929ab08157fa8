"""What a run's health checks said, from its run_status.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from klippo.report.reading import RunData


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthView:
    """One check that fired."""

    name: str
    steps: str
    """`step 3`, or `4 steps from 3 to 9`."""
    did: str
    """What the run did about it."""
    diagnosis: str


DID = {"warn": "warned", "skip": "left it out", "stop": "ended the run"}


def health_of(run: RunData) -> list[HealthView]:
    """Every check that fired, in the order in which they first did."""
    fired = run.status.get("health")
    found = []
    for name, record in fired.items() if isinstance(fired, Mapping) else ():
        if not isinstance(record, Mapping):
            continue
        first, last, number = (record.get(k) for k in ("first_step", "last_step", "num_steps"))
        found.append(
            HealthView(
                name=str(name),
                steps=f"step {first}" if number == 1 else f"{number} steps from {first} to {last}",
                did=DID.get(str(record.get("action")), "not recorded"),
                diagnosis=str(record.get("diagnosis", "")),
            )
        )
    return found


def health_words(run: RunData, checks: list[HealthView]) -> str | None:
    """`none fired`, or their names and steps; None for a run that had no checks."""
    if checks:
        return "; ".join(f"{check.name} ({check.steps})" for check in checks)
    had_rails = any("response/repeated_share" in row for row in run.metrics)
    return "none fired" if had_rails else None
