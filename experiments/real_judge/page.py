"""docs/real_judge.md from results.json: no figure is typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = "real_judge.md"
SERVERS = {"vllm": "vLLM", "transformers": "`transformers serve`"}
Figures = dict[str, Any]


def write_page(results: Figures, docs: Path) -> None:
    """The page; what people write between its marks is kept."""
    page = docs / PAGE
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    discussion = old.partition("<!-- discussion -->")[2].partition("<!-- end -->")[0] or "\n"
    page.write_text(render(results, discussion), encoding="utf-8")


def render(results: Figures, discussion: str) -> str:
    """The whole page."""
    lines = [
        "# A real LLM as a judge, measured",
        "",
        "Written by `python experiments/real_judge/run.py` from "
        "`experiments/real_judge/results.json`; only the reading of the figures is typed by hand. "
        "SmolLM2-135M-Instruct, its weights once rounded to 4 bits (Q4_1) and served in float32 "
        f"({results['machine']}), judges up to "
        f"{results['num_texts']} sentences of film reviews, each rated by about 15 people "
        "(Hutto and Gilbert 2014). It is one of the smallest chat models that there are: the page "
        "shows that everything between Klippo and a real server works, and what a judge of this "
        "size is worth. It says nothing about larger ones; run the script with yours.",
        "",
        "Spearman and Pearson are correlations of the score with the mean human rating; pairs is "
        "the share of pairs, of those whose mean ratings differ by 1 or more (of -4 to 4), that "
        "the scores order alike, equal scores counted half. In brackets 95% bootstrap intervals "
        "over texts; for shares Wilson's. The rubric film is `experiments/real_judge/film.md`.",
        "",
        "<!-- discussion -->" + discussion + "<!-- end -->",
        "",
    ]
    for server, found in results["servers"].items():
        lines += server_part(server, found)
    lines += ["## Without a language model", "", *worth_head("judge")]
    lines += [worth_row(name, found) for name, found in results["baselines"].items()]
    return "\n".join(lines) + "\n"


def server_part(server: str, found: Figures) -> list[str]:
    """Everything about one server."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"## {SERVERS[server]}", ""]
    lines += [f"{versions}; {found['threads']} threads; {found['minutes']:.0f} minutes.", ""]
    arms = {name: arm for name, arm in found["arms"].items() if "error" not in arm}
    failed = {name: arm["error"] for name, arm in found["arms"].items() if "error" in arm}
    lines += [f"- {name} could not be measured: {error}" for name, error in failed.items()]
    lines += ["### Are there scores?", "", *scored_table(arms), ""]
    if any(arm["worth"]["num"] > 2 for arm in arms.values()):
        lines += ["### Do they say what people say?", "", *worth_head("rubric, score from")]
        for name, arm in arms.items():
            lines.append(worth_row(name, arm["worth"]))
            if "argmax" in arm:
                lines.append(worth_row(f"{name}: likeliest label", arm["argmax"]["worth"]))
        lines += ["", *expected_lines(arms)]
    lines += ["### What do worthless answers get?", "", *probe_table(arms), ""]
    lines += injection_lines(arms)
    lines += ["### Agreement with itself", "", *lines_of_agreement(arms)] if voted(arms) else []
    if any("mass" in arm for arm in arms.values()):
        lines += ["### Labels", "", *label_table(arms), ""]
    return [*lines, "### Time and commands", "", *time_lines(found), ""]


def scored_table(arms: Figures) -> list[str]:
    lines = [
        "| rubric, score from | texts | scored | why not | score, mean (sd; lowest to highest) |",
        "|---|--:|--:|---|--:|",
    ]
    for name, arm in arms.items():
        causes = ", ".join(f"{cause} {number}" for cause, number in arm["causes"].items()) or "-"
        lines.append(
            f"| {name} | {arm['num']} | {percent(arm['scored'])} | {causes} "
            f"| {spread(arm.get('scores'))} |"
        )
    return lines


def worth_head(first: str) -> list[str]:
    return [f"| {first} | texts | Spearman | Pearson | pairs |", "|---|--:|--:|--:|--:|"]


def worth_row(name: str, worth: Figures) -> str:
    cells = [interval(worth["spearman"], "+.2f"), interval(worth["pearson"], "+.2f")]
    return f"| {name} | {worth['num']} | {' | '.join(cells)} | {percent(worth['pairs'])} |"


def expected_lines(arms: Figures) -> list[str]:
    lines = []
    for name, arm in arms.items():
        if "argmax" not in arm:
            continue
        gain = arm["expected_minus_argmax"]
        said = (
            "cannot be told: the likeliest label is the same everywhere"
            if gain is None
            else interval(gain, "+.2f")
        )
        lines += [
            f"{name}: Spearman of the expected score minus that of the likeliest: {said}.",
            "",
        ]
    return lines


def probe_table(arms: Figures) -> list[str]:
    names = list(next(iter(arms.values()))["probes"])
    lines = ["| rubric, score from | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for name, arm in arms.items():
        cells = [number(arm["probes"][probe]) for probe in names]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", "Scores of 0 to 10; `-` where the answer gave none."]


def injection_lines(arms: Figures) -> list[str]:
    shown = {name: arm["injections"] for name, arm in arms.items() if arm["injections"]}
    if not shown:
        return []
    lines = [
        "A right answer to the probes' question beside the injections of "
        "`tests/judge/injections.py` (orders, verdicts, forged ends, hidden characters):",
        "",
        "| rubric, score from | right answer | injections, mean | scored | above the right answer "
        "| above 8 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, found in shown.items():
        lines.append(
            f"| {name} | {found['plain']:.2f} | {found['mean']:.2f} "
            f"| {found['above_plain']['num']} of {found['num_asked']} "
            f"| {percent(found['above_plain'])} | {percent(found['above_8'])} |"
        )
    return [*lines, ""]


def voted(arms: Figures) -> Figures:
    return {name: arm["agreement"] for name, arm in arms.items() if "agreement" in arm}


def lines_of_agreement(arms: Figures) -> list[str]:
    lines = []
    for name, found in voted(arms).items():
        icc = "undefined" if found["icc"] is None else f"{found['icc']:.2f}"
        lines += [
            f"{name}, at temperature 1, {found['num']} texts: the votes on a text have a standard "
            f"deviation of {found['mean_sd']:.2f} of 10 on average, all {found['votes']} are equal "
            f"on {found['all_equal']:.0%} of the texts, and the intraclass correlation ICC(1,1) is "
            f"{icc} (1: a vote tells the next one; 0: only chance).",
            "",
        ]
    return lines


def label_table(arms: Figures) -> list[str]:
    lines = [
        "| rubric, score from | mass on labels, mean (sd; lowest to highest) | "
        + " | ".join("ABCDEFGHIJK") + " |",
        "|---|--:|" + "--:|" * 11,
    ]  # fmt: skip
    for name, arm in arms.items():
        if "mass" in arm:
            shares = " | ".join(f"{share:.2f}" for share in arm["labels"])
            lines.append(f"| {name} | {spread(arm['mass'])} | {shares} |")
    return [*lines, "", "A stands for 0 and K for 10: mean share of the mass, over texts."]


def time_lines(found: Figures) -> list[str]:
    lines = ["| rubric, score from | calls | seconds per call, 8 at a time |", "|---|--:|--:|"]
    for name, arm in found["arms"].items():
        if arm.get("seconds_per_call") is not None:
            lines.append(f"| {name} | {arm['calls']} | {arm['seconds_per_call']:.2f} |")
    if "overhead" in found:
        took = found["overhead"]
        lines += [
            "",
            "Arms that ask about the same texts by the same rubric as one before them find the "
            "start of their questions in vLLM's cache.",
            "",
            f"One call at a time, {took['num']} questions, at most 4 tokens: a bare POST takes "
            f"{took['bare_ms']:.0f} ms, the same through Klippo's client (budget, cache, checks) "
            f"{took['klippo_ms']:.0f} ms; median difference "
            f"{interval(took['difference_ms'], '+.1f')} ms.",
        ]
    if "commands" in found:
        ran = found["commands"]
        lines += [
            "",
            f"`klippo judge test` and twice `klippo judge score` on the first arm's texts end with "
            f"{', '.join(map(str, ran['exit_codes']))}; scores are read from {ran['read_from']}, "
            f"{ran['num_scored']} of {ran['num']} rows have one, and the two commands made "
            f"{' and '.join(map(str, ran['calls']))} calls, because the arm's answers are stored.",
        ]
    return lines


def percent(share: Figures | None) -> str:
    return "-" if share is None else (
        f"{share['value']:.0%} ({share['low']:.0%} to {share['high']:.0%})"
    )  # fmt: skip


def interval(found: Figures | None, form: str) -> str:
    if found is None:
        return "-"
    value, low, high = (format(found[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def spread(found: Figures | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.2f} ({found['sd']:.2f}; {found['low']:.2f} to {found['high']:.2f})"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
