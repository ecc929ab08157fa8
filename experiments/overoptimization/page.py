"""docs/overoptimization.md and its pictures from results.json: no figure is typed by hand."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

NAMES = {
    "single": "single",
    "mean": "mean",
    "WCO": "WCO",
    "UWO": "UWO",
    "single_KL": "single + KL",
    "mean_KL": "mean + KL",
    "UWO_KL": "UWO + KL",
}
# Okabe and Ito's colours, told apart by people with any colour vision.
COLOURS = {
    "single": "#D55E00",
    "mean": "#E69F00",
    "WCO": "#0072B2",
    "UWO": "#009E73",
    "single_KL": "#000000",
    "mean_KL": "#56B4E9",
    "UWO_KL": "#CC79A7",
}
MARKERS = {"single": "o", "mean": "s", "WCO": "^", "UWO": "D"} | {
    "single_KL": "x",
    "mean_KL": "P",
    "UWO_KL": "v",
}
TITLES = {"clean": "labels of one rater each", "noisy": "the same with 25% of pairs flipped"}


def write_page(results: dict[str, Any], docs: Path) -> None:
    """The page and three pictures."""
    draw(results, docs / "overoptimization.png", "gold")
    draw(results, docs / "overoptimization_proxy.png", "proxy")
    draw(results, docs / "overoptimization_variance.png", "variance")
    (docs / "overoptimization.md").write_text(render(results, discussion(docs)))


def discussion(docs: Path) -> str:
    """The part that people write: kept as it is."""
    page = docs / "overoptimization.md"
    text = page.read_text() if page.exists() else ""
    return text.partition("<!-- discussion -->")[2].partition("<!-- end -->")[0] or "\n"


def draw(results: dict[str, Any], path: Path, measure: str) -> None:
    """One panel per kind of labels: a measure over sqrt(KL), thin lines for seeds."""
    noises = results["noises"]
    figure, axes = plt.subplots(
        1, len(noises), figsize=(5 * len(noises), 4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (noise, part) in zip(axes[0], noises.items(), strict=True):
        for arm, figures in part["arms"].items():
            for number, seed in enumerate(figures["seeds"]):
                start = seed[measure][0] if measure != "variance" else 0.0
                axis.plot(
                    seed["sqrt_kl"],
                    [value - start for value in seed[measure]],
                    color=COLOURS[arm],
                    marker=MARKERS[arm],
                    markersize=3,
                    linewidth=1,
                    alpha=0.8,
                    label=NAMES[arm] if number == 0 else None,
                )
            if measure == "gold" and figures["fit"] is not None:
                fitted = figures["fit"]["band"]
                axis.plot(fitted["d"], fitted["mean"], color=COLOURS[arm], linestyle=":")
                axis.fill_between(
                    fitted["d"], fitted["low"], fitted["high"], color=COLOURS[arm], alpha=0.08
                )
        axis.axhline(0, color="#888888", linewidth=0.6)
        axis.set_title(TITLES[noise], fontsize=10)
        axis.set_xlabel("sqrt(KL to the start), KL in nats per response")
        axis.spines[["top", "right"]].set_visible(False)
    labels = {
        "gold": "gold, change from the start (sd)",
        "proxy": "the arm's own reward, change from the start",
        "variance": "variance over the five members",
    }
    axes[0][0].set_ylabel(labels[measure])
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def render(results: dict[str, Any], discussed: str) -> str:
    """The page."""
    seeds = len(results["seeds"])
    parts = [
        "# Over-optimisation, measured on the embedded models",
        "",
        "Written by `python experiments/overoptimization/run.py` from "
        "`experiments/overoptimization/results.json`; only the discussion is typed by hand. "
        f"{seeds} seeds per arm; the runs took {results['minutes']:.0f} minutes together, two at a "
        f"time on 2 CPU cores ({results['machine']}).",
        "",
        "The policy is `demo:policy`, the prompts are `demo:prompts`, gold is `demo:gold`, which "
        "never trains. The single arm's seed picks its member as well; the other arms use all five "
        "members. Only the arms with + KL have a KL penalty (coefficient 0.05). All scores are in "
        "standard deviations of the starting policy's samples. Intervals are 95%, over prompts, of "
        "the mean over seeds; the seeds' own values stand beside them, for three seeds say "
        "little about further seeds.",
        "",
        "![Gold over distance](overoptimization.png)",
        "",
    ]
    for noise, part in results["noises"].items():
        parts += [f"## {TITLES[noise].capitalize()}", "", *arm_table(part, results["early"]), ""]
        for step, claims in part["claims"].items():
            parts += [f"The paper's claims, the run read as if it ended at step {step}:", ""]
            parts += [*claim_table(claims), ""]
        parts += [*example_list(part), ""]
    parts += [
        "![The arms' own reward](overoptimization_proxy.png)",
        "",
        "![Disagreement of the members](overoptimization_variance.png)",
        "",
        "## Discussion",
        "",
        f"<!-- discussion -->{discussed}<!-- end -->",
        "",
    ]
    return "\n".join(parts)


def arm_table(part: dict[str, Any], early: int) -> list[str]:
    """Where each arm ended."""
    lines = [
        f"| arm | highest gold on the way | gold, change at step {early} (95%) | gold, change at "
        "the end (95%; seeds) | own reward, change at the end | sqrt(KL) at the end | peak of the "
        "fit d* (95%) | verdicts |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for arm, f in part["arms"].items():
        gold = f["gold_change"]
        seeds = ", ".join(f"{x:+.2f}" for x in gold["seeds"])
        verdicts = ", ".join(seed["verdict"] for seed in f["seeds"])
        soon = f["gold_change_early"]
        lines.append(
            f"| {NAMES[arm]} | {f['peak_gold']:+.2f} | {soon['mean']:+.2f} ({soon['low']:+.2f} to "
            f"{soon['high']:+.2f}) | {gold['mean']:+.2f} ({gold['low']:+.2f} to "
            f"{gold['high']:+.2f}; {seeds}) | {f['proxy_change']['mean']:+.2f} "
            f"| {f['final_sqrt_kl']:.1f} | {peak(f['fit'])} | {verdicts} |"
        )
    distances = [p["d"] for p in part["arms"]["single"]["at_equal_distance"] if p is not None]
    if distances:
        lines += ["", "Gold's change at equal distance sqrt(KL), on the way there:", ""]
        lines += ["| arm | " + " | ".join(f"{d:g}" for d in distances) + " |"]
        lines += ["|---|" + "--:|" * len(distances)]
        for arm, f in part["arms"].items():
            reached = {p["d"]: p for p in f["at_equal_distance"] if p is not None}
            cells = [
                f"{reached[d]['mean']:+.2f} ({reached[d]['low']:+.2f} to {reached[d]['high']:+.2f})"
                if d in reached
                else "not reached"
                for d in distances
            ]
            lines.append(f"| {NAMES[arm]} | " + " | ".join(cells) + " |")
    return lines


def peak(found: dict[str, Any] | None) -> str:
    """The fitted peak, or that there is none."""
    if found is None:
        return "too few points"
    value, low, high = (found["peak"][key] for key in ("value", "low", "high"))
    return f"{distance(value)} ({distance(low)} to {distance(high)})"


def distance(value: float) -> str:
    return "none" if value > 1e3 else f"{value:.1f}"


def claim_table(claims: list[dict[str, Any]]) -> list[str]:
    """The paper's claims against what came out."""
    lines = [
        "| claim | answer | difference (95%) | per seed |",
        "|---|---|--:|---|",
    ]
    for c in claims:
        allowed = f" (above {c['bar']:+.1f} counts)" if c["bar"] else ""
        seeds = ", ".join(f"{x:+.2f}" for x in c["seeds"])
        lines.append(
            f"| {c['claim']}{allowed} | **{c['answer']}** | {c['mean']:+.2f} ({c['low']:+.2f} to "
            f"{c['high']:+.2f}) | {seeds} |"
        )
    return lines


def example_list(part: dict[str, Any]) -> list[str]:
    """The response with the highest own reward at the end of each arm's first seed."""
    lines = ["The response that each arm's first seed is paid most for at the end:", ""]
    for arm, f in part["arms"].items():
        example = f["seeds"][0]["example"]
        text = f"{example['prompt']}{example['response']}".replace("|", "/").replace("`", "'")
        lines.append(f"- {NAMES[arm]}: `{' '.join(text.split())}`")
    return lines
