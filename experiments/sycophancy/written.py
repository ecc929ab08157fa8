"""docs/sycophancy.md from results.json: no figure is typed by hand outside the discussion."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

PAGE = "sycophancy.md"
KINDS = {
    "PPO": "PPO",
    "project": "PPO, `sycophancy`'s values",
    "scaled": "the same, larger steps",
    "SFT": "SFT on the best",
    "DPO": "DPO",
}
GROUPS = {
    "agreement_is_right = false": "agreement is wrong",
    "agreement_is_right = true": "agreement is right",
}
GAINS = ("sycophancy", "helpfulness")
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
        "# Less sycophancy from scored answers, measured",
        "",
        "Written by `python experiments/sycophancy/run.py` from "
        "`experiments/sycophancy/results.json`; only the reading of the figures is typed by hand. "
        "[Offline PPO](offline.md) learns from answers of a model that says what pleases, scored "
        "by a judge of sycophancy. Then start and trained models answer posts about deeds that "
        "none of them has seen, at temperature 1, and the same judge scores these answers, for "
        "helpfulness too. The judge (`examples/sycophancy/agreement_judge.py`) looks words up in "
        "the world that the posts come from: it is exact there, and it is no person.",
        "",
        "Both scores are rewards of -1 to 1, 0.1 is half a point of 10, and more is better: "
        "sycophancy rises when there is *less* of it. Differences are paired by post, with 95% "
        "intervals of Student's t over posts; where there are several seeds, a post's differences "
        "are averaged over them first.",
        "",
        "<!-- discussion -->" + discussion + "<!-- end -->",
        "",
    ]
    if "small" in results:
        lines += small_part(results["small"])
    if "real" in results:
        lines += real_part(results["real"])
    return "\n".join(lines).rstrip() + "\n"


def small_part(found: Figures) -> list[str]:
    """The packaged world."""
    models, seeds = found["models"], found["seeds"]
    lines = [
        "## The small world",
        "",
        f"The packaged model, adapter and scored answers (`demo:scored_posts`), "
        f"{len(seeds)} seeds, {found['num_posts']} posts, one answer per seed to each. All start "
        "from the same model and read the same file. *PPO*: the recipe `sycophancy-demo`. "
        "*PPO, `sycophancy`'s values*: those of the recipe for Llama 3 8B "
        "(clip 0.2, value critic with 0.5, entropy 0.01, no KL penalty, batch 4, learning rate "
        "1e-5), which are too small for a model of this size; *larger steps*: the same with "
        "1e-3, the demo recipe's 3e-3 times the square root of 4/32. *SFT on the best* and *DPO*: "
        f"[`klippo baselines`](baselines.md). Run on {found['machine']} that had other work.",
        "",
        *models_table(models, found["seconds"]),
        "",
        *groups_table(models),
        "",
        "Each seed by itself, difference from the start:",
        "",
        "| | seed | sycophancy | helpfulness | length |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, model in trained(models):
        for seed, own in zip(seeds, model["seeds"], strict=True):
            cells = [interval(own[key], form_of(key)) for key in (*GAINS, "length")]
            lines.append(f"| {KINDS[name]} | {seed} | {' | '.join(cells)} |")
    lines += [
        "",
        "Against *PPO*, paired:",
        "",
        "| | sycophancy | helpfulness |",
        "|---|--:|--:|",
    ]
    for name, model in trained(models):
        if model["over_first"] is not None:
            cells = [interval(model["over_first"][key], "+.2f") for key in GAINS]
            lines.append(f"| {KINDS[name]} | {' | '.join(cells)} |")
    lines += ["", *diagnostics_table(found["diagnostics"]), "", *example_lines(found["examples"])]
    return lines


def real_part(found: Figures) -> list[str]:
    """SmolLM2."""
    sft, seconds = found["sft_nats_per_token"], found["seconds"]
    return [
        "## SmolLM2-135M-Instruct",
        "",
        "The same on a real chat model, by Klippo's commands: `klippo sft` trains a LoRA adapter "
        f"on {found['num_examples']} answers of the small world, most of them sycophantic "
        f"(held-out loss {sft['before']['mean']:.2f} to {sft['after']['mean']:.2f} nats "
        "per token); both together "
        f"answer {found['num_posts']} posts ({found['num_drawn']} answers, of which "
        f"{found['num_answers']} ended and give their tokens back); `klippo judge score` scores "
        f"them (sycophancy {spread(found['score'])} of 10, top answers "
        f"{spread(found['top_score'])}); `klippo train sycophancy-demo` goes on in the adapter "
        f"for {found['num_steps']} steps (state: {found['ended']}; batch 16, up to "
        f"{found['num_passes']} passes, learning rate {found['learning_rate']:g}, base in "
        "bfloat16). One seed.",
        "",
        *models_table(found["models"], {"PPO": [seconds["train"]]}),
        "",
        *groups_table(found["models"]),
        "",
        f"Seconds on {found['machine']} that had other work: SFT {seconds['sft']:.0f}, PPO "
        f"{seconds['train']:.0f}, comparison {seconds['compare']:.0f}.",
        "",
        *diagnostics_table({"PPO": [found["diagnostics"]]}),
        "",
        *example_lines(found["examples"]),
    ]


def trained(models: Figures) -> list[tuple[str, Figures]]:
    return [(name, model) for name, model in models.items() if name != "before"]


def models_table(models: Figures, seconds: Figures) -> list[str]:
    """All models beside each other."""
    lines = [
        "| | sycophancy | helpfulness | length, tokens | same answer | KL, nats per answer "
        "| change of weights | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    before = models["before"]["whole"]
    cells = [interval(before[key]["after"], form_of(key)) for key in (*GAINS, "length")]
    lines.append(f"| before | {' | '.join(cells)} | | | | |")
    for name, model in trained(models):
        whole = model["whole"]
        cells = [interval(whole[key]["difference"], form_of(key)) for key in (*GAINS, "length")]
        cells += [
            f"{model['identical'] / model['num_answers']:.0%}",
            over_seeds(model["kl"]),
            f"{fmean(model['weights']):.2g}",
            f"{fmean(seconds[name]):.0f}" if name in seconds else "",
        ]
        lines.append(f"| {KINDS[name]} | {' | '.join(cells)} |")
    note = (
        "*before* has its means; below it stand differences from it. KL: mean, and the seeds' "
        "lowest and highest."
    )
    if "baselines" in seconds:
        note += f" SFT and DPO took {fmean(seconds['baselines']):.0f} seconds together."
    return [*lines, "", note]


def groups_table(models: Figures) -> list[str]:
    """Differences where agreement is right and where it is not."""
    shown = [group for group in GROUPS if group in trained(models)[0][1]["groups"]]
    heads = [f"{key}, {GROUPS[group]}" for group in shown for key in GAINS]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name, model in trained(models):
        cells = [
            interval(model["groups"][group][key]["difference"], "+.2f")
            for group in shown
            for key in GAINS
        ]
        lines.append(f"| {KINDS[name]} | {' | '.join(cells)} |")
    numbers = [
        f"{model['groups'][group][GAINS[0]]['difference']['num']} where {GROUPS[group]}"
        for _, model in trained(models)[:1]
        for group in shown
    ]
    return [*lines, "", f"Posts: {' and '.join(numbers)}."]


def diagnostics_table(found: Figures) -> list[str]:
    """What PPO says of itself after the last pass, on the logged answers."""
    names = {
        "clipped_share_good": "clipped, good answers",
        "clipped_share_bad": "clipped, bad answers",
        "ess_responses": "effective share of answers",
        "kl_start_nats": "KL from the start, nats",
    }
    lines = [
        "The last diagnostics of the training, on the answers that were learnt from:",
        "",
        "| | " + " | ".join(names.values()) + " |",
        "|---|" + "--:|" * len(names),
    ]
    for name, runs in found.items():
        cells = [f"{fmean(run[key] for run in runs):.2g}" for key in names]
        lines.append(f"| {KINDS[name]} | {' | '.join(cells)} |")
    return lines


def example_lines(rows: list[dict[str, str]]) -> list[str]:
    """The first posts of the first seed, with every answer."""
    lines = ["The first posts, with all answers; nobody chose them:", ""]
    for row in rows:
        lines.append(f"- **{row['post']}**")
        for name, answer in row.items():
            if name != "post":
                said = " ".join(answer.split()) or "(nothing)"
                lines.append(f"  - {KINDS.get(name, name)}: {said}")
    return [*lines, ""]


def form_of(key: str) -> str:
    return "+.1f" if key == "length" else "+.2f"


def interval(found: Figures, form: str) -> str:
    mean, low, high = (format(found[key], form) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def over_seeds(values: list[float]) -> str:
    """The mean, and with several seeds the lowest and the highest."""
    ends = f" ({min(values):.2g} to {max(values):.2g})" if len(values) > 1 else ""
    return f"{fmean(values):.2g}{ends}"


def spread(found: Figures) -> str:
    return f"{found['mean']:.1f} ({found['low']:.1f} to {found['high']:.1f})"
