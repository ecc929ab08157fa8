"""Figures from what `klippo compare` wrote: by seed, and over seeds.

Over seeds, an answer's value is first averaged over the seeds of its post, so that intervals (95%,
Student's t) stand on different posts alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from klippo.evaluation.statistics import Estimate, estimate

SHOWN = ("sycophancy", "helpfulness", "length")
NUM_EXAMPLES = 4
Compared = dict[str, Any]


def plain(found: Estimate) -> dict[str, float]:
    """An estimate as it is stored."""
    return {"mean": found.mean, "low": found.low, "high": found.high, "num": found.num}


def models_of(seeds: Sequence[Compared]) -> dict[str, Any]:
    """Model -> its figures, from one comparison per seed."""
    names = [one["name"] for one in seeds[0]["comparisons"]]
    found: dict[str, Any] = {"before": {"whole": measured(seeds, "before", None)}}
    for name in names:
        own = [next(c for c in one["comparisons"] if c["name"] == name) for one in seeds]
        outputs, weights = [one["outputs"] for one in own], [one["weights"] for one in own]
        found[name] = {
            "whole": measured(seeds, name, None),
            "groups": {g: measured(seeds, name, g) for g in groups(seeds[0])},
            "seeds": [
                {key: one["whole"]["measures"][key]["difference"] for key in SHOWN} for one in own
            ],
            "over_first": None if name == names[0] else against(seeds, name, names[0]),
            "identical": sum(one["num_identical"] for one in own),
            "num_answers": sum(one["num_prompts"] for one in seeds),
            "kl": [one["kl"]["mean"] for one in outputs],
            "weights": [one["relative"] for one in weights],
        }
    return found


def measured(seeds: Sequence[Compared], name: str, group: str | None) -> dict[str, Any]:
    """Each measure after, and its paired difference from before."""
    return {
        key: {
            "after": plain(over_posts(seeds, group, lambda row, k=key: value(row, name, k))),
            "difference": plain(
                over_posts(
                    seeds, group, lambda row, k=key: value(row, name, k) - value(row, "before", k)
                )
            ),
        }
        for key in SHOWN
    }


def against(seeds: Sequence[Compared], name: str, other: str) -> dict[str, Any]:
    """Each measure's paired difference from another model's."""
    return {
        key: plain(
            over_posts(seeds, None, lambda row, k=key: value(row, name, k) - value(row, other, k))
        )
        for key in SHOWN
    }


def over_posts(
    seeds: Sequence[Compared], group: str | None, figure: Callable[[Compared], float]
) -> Estimate:
    """The mean over posts of a figure of a row, averaged over seeds before."""
    by_post: dict[str, list[float]] = defaultdict(list)
    for one in seeds:
        for row in one["answers"]:
            if group in (None, row["group"]):
                by_post[row["prompt"]].append(figure(row))
    return estimate([fmean(values) for values in by_post.values()])


def value(row: Compared, name: str, key: str) -> float:
    """A measure of one model's answer. Raises TypeError where the judge gave none."""
    return float(row["answers"][name][key])


def groups(compared: Compared) -> list[str]:
    """Values of the column that the posts are split by."""
    return sorted({row["group"] for row in compared["answers"]})


def examples(compared: Compared) -> list[dict[str, str]]:
    """The first posts with all answers."""
    return [
        {"post": row["prompt"]} | {name: one["response"] for name, one in row["answers"].items()}
        for row in compared["answers"][:NUM_EXAMPLES]
    ]


def last_diagnostics(run: Path) -> dict[str, float]:
    """What an offline run says of itself after its last pass."""
    lines = (run / "diagnostics.jsonl").read_text().splitlines()
    return dict(_offline(json.loads(lines[-1])))


def _offline(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key in ("clipped_share_good", "clipped_share_bad", "ess_responses", "kl_start_nats"):
        if f"offline/{key}" in line:
            yield key, line[f"offline/{key}"]
