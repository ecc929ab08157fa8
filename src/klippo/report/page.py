"""The report as one HTML file that fetches nothing and runs nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources

from klippo.evaluation.statistics import Estimate
from klippo.evaluation.verdict import Outcome
from klippo.report import bars, figures
from klippo.report.content import (
    RunView,
    differing,
    gold_words,
    num_steps_done,
    reward_words,
    summary,
)
from klippo.report.offline import HEADINGS, is_offline
from klippo.report.reading import RunData
from klippo.report.style import Picture
from klippo.report.text import interval, number, visible

TEMPLATES = "klippo.report.templates"
SYMBOLS: dict[Outcome, str] = {
    "improved": "↑",
    "over-optimised": "⤵",
    "worse": "↓",
    "unchanged": "=",
    "not enough data": "?",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Plots under one heading."""

    key: str
    pictures: list[Picture]


def groups(views: Sequence[RunView]) -> dict[str, Group]:
    """All plots that the runs allow, by the section that they belong to."""
    runs = [view.data for view in views]
    fits = {(view.data.label, key): law for view in views for key, law in view.laws.items()}
    level, metric = partial(figures.level_over_steps, runs), partial(_metric, runs)
    sections: dict[str, list[Picture | None]] = {
        "better": [
            *figures.scores_over_steps(runs),
            *figures.scores_over_distance(runs, fits),
        ],
        "best_of_n": [figures.best_of_n(run, key) for run in runs[:1] for key in ("gold", "proxy")],
        "training": [
            metric("reward/score_mean"),
            level(
                lambda row: row["kl_exact_nats"],
                "kl_exact",
                "KL to the start (nats/response)",
                "Exact KL of the evaluated samples, with 95% intervals.",
            ),
            metric("kl/sequence_nats"),
            metric("policy/entropy_nats"),
            metric("response/length_tokens"),
            metric("policy/clipped_share"),
            metric("value/explained_variance"),
        ],
        "ensemble": [
            level(
                lambda row: row["parts"].get("variance"),
                "member_variance",
                "variance over members",
                "How much the members disagree about the evaluated samples, with 95% intervals.",
            ),
            *_lowest_shares(runs),
        ],
        "samples": [
            bars.histogram(runs, "proxy", "proxy reward"),
            bars.histogram(runs, "gold", "gold reward"),
            bars.histogram(runs, "length", "response length (tokens)"),
        ],
        "time": [
            bars.phases(runs, {view.data.label: view.phases for view in views}),
            metric("throughput/response_tokens_per_s"),
        ],
    }
    return {
        key: Group(key=key, pictures=[picture for picture in pictures if picture is not None])
        for key, pictures in sections.items()
    }


METRICS = {
    "reward/score_mean": ("training_reward", "reward in training", "Mean score of each batch."),
    "kl/sequence_nats": (
        "kl_training",
        "KL in training (nats/response)",
        "KL to the reference as training sees it: an estimate from the sampled tokens.",
    ),
    "policy/entropy_nats": ("entropy", "entropy (nats/token)", "Entropy of the policy's tokens."),
    "response/length_tokens": ("length", "response length (tokens)", "Mean length in training."),
    "policy/clipped_share": (
        "clipped_share",
        "clipped share of tokens",
        "Share of tokens whose policy loss was clipped.",
    ),
    "value/explained_variance": (
        "explained_variance",
        "explained variance of returns",
        "How much of the returns the value function foresees: 1 is all, 0 or less nothing.",
    ),
    "throughput/response_tokens_per_s": (
        "throughput",
        "response tokens per second",
        "Response tokens per second of whole PPO steps.",
    ),
}


OF_SAMPLES = ("kl/sequence_nats", "response/length_tokens", "value/explained_variance")
"""Of offline runs the table of passes says these, or they are properties of the file."""


def _metric(runs: Sequence[RunData], key: str) -> Picture | None:
    if key in OF_SAMPLES and all(map(is_offline, runs)):
        return None
    return figures.metric_over_steps(runs, key, *METRICS[key])


def _lowest_shares(runs: Sequence[RunData]) -> Iterator[Picture | None]:
    keys = (
        [key for key in runs[0].metrics[0] if key.endswith("_lowest_share")]
        if runs[0].metrics
        else []
    )
    if len(runs) == 1 and keys:
        yield figures.several_metrics(
            runs[0],
            {key.removeprefix("ensemble/").removesuffix("_lowest_share"): key for key in keys},
            "lowest_share",
            "share of samples where a member is lowest",
            "Which member gives the lowest score, and so rules under WCO.",
        )


def render(views: Sequence[RunView], sections: dict[str, Group], version: str) -> str:
    """The page. Foreign text passes `visible` and is escaped, wherever it stands."""
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    files = resources.files(TEMPLATES)
    names = ("report.html.j2", "run.html.j2")
    environment = Environment(
        loader=DictLoader({name: files.joinpath(name).read_text("utf-8") for name in names}),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda v: visible(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = files.joinpath("report.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    runs = [view.data for view in views]
    return environment.get_template("report.html.j2").render(
        title=views[0].data.label if len(views) == 1 else f"{len(views)} runs compared",
        views=views,
        single=len(views) == 1,
        groups=sections,
        differing=differing(runs) if len(runs) > 1 else [],
        rewards_differ=len({(reward_words(r, "reward"), gold_words(r)) for r in runs}) > 1,
        symbols=SYMBOLS,
        css=Markup(css),  # ours
        style_hash=digest,
        summary=summary,
        gold_words=gold_words,
        source=lambda picture: Markup(
            "data:image/svg+xml;base64," + base64.b64encode(picture.svg).decode()
        ),
        change=_change,
        kl_after=_kl_after,
        num_steps=lambda view: number(num_steps_done(view.data), 0),
        pass_headings=HEADINGS,
        css_class=lambda outcome: outcome.replace(" ", "-"),
        version=version,
    )


def _change(estimate: Estimate | None) -> str:
    if estimate is None:
        return "—"
    return (
        f"{number(estimate.mean, signed=True)} "
        f"({interval(estimate.low, estimate.high, signed=True)})"
    )


def _kl_after(view: RunView) -> str:
    kl = view.compared.get("kl_exact_nats")
    return number(None if kl is None else kl.after.mean)
