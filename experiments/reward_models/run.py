"""Reward-model ensembles from noisy human ratings; writes results.json and docs/reward_models.md.

python experiments/reward_models/run.py [--source FOLDER_OR_TSV] [--work runs/reward_models]

Five members from demo:policy learn from film-review sentences, each rated by one of its raters,
once with these labels and once with a quarter of the pairs flipped. The test sentences are
those that no demo model has seen; the truth there is the mean of about 15 raters, and once more a
single rater. Nothing of the texts is kept here: they are downloaded, or read from --source.
"""

import argparse
import csv
import json
import random
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts/build_demo"))

from corpus import NUM_TEST, Sentence, clean, download, parse  # noqa: E402

from klippo.data.preferences import Pair, load_preferences  # noqa: E402
from klippo.data.settings import PreferenceSettings  # noqa: E402
from klippo.evaluation.pairs import accuracy, ensemble_differences, report_pairs  # noqa: E402
from klippo.report.members import pair_figures  # noqa: E402
from klippo.rewards.classifier import ClassifierReward  # noqa: E402
from klippo.rewards.settings import ClassifierSettings  # noqa: E402

RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs/reward_models.md"
MARKED = re.compile(r"(<!-- reward-model figures -->\n).*?(<!-- end -->)", re.DOTALL)
DEMO_SEED = 0  # of scripts/build_demo.py, so that its test sentences are ours
MAX_WORDS = 20  # shorter sentences: minutes instead of an hour
SEEDS = [1, 2, 3, 4, 5]
NUM_PAIRS, NUM_TEST_PAIRS = 3000, 1500
NOISE = {"clean": 0.0, "25% flipped": 0.25}


def sentences(source: Path | None, work: Path) -> list[Sentence]:
    """All rated sentences, in the source's order."""
    if source is None or source.is_dir():
        return parse(source or download(work / "source"), "movieReviewSnippets")
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [
        Sentence(
            text=clean(row["text"]),
            mean_rating=float(row["mean_rating"]),
            ratings=tuple(int(rating) for rating in row["ratings"].split(",")),
        )
        for row in rows
    ]


def write_tables(movies: list[Sentence], work: Path) -> dict[str, int]:
    """train.jsonl (single ratings), test.jsonl (their mean), test_single.jsonl; their sizes."""
    random.Random(DEMO_SEED).shuffle(movies)
    short = [[s for s in side if len(s.text.split()) <= MAX_WORDS]
             for side in (movies[NUM_TEST:], movies[:NUM_TEST])]  # fmt: skip
    tables = {
        "train": [(s.text, list(s.ratings)) for s in short[0]],
        "test": [(s.text, sum(s.ratings) / len(s.ratings)) for s in short[1]],
        "test_single": [(s.text, list(s.ratings)) for s in short[1]],
    }
    work.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        lines = [json.dumps({"response": text, "rating": rating}) + "\n" for text, rating in rows]
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: len(rows) for name, rows in tables.items()}


def config(work: Path, name: str, noise: float) -> Path:
    """The members' config, as a user would write it."""
    settings = {
        "output_dir": str(work / name.replace("%", "").replace(" ", "_")),
        "seeds": SEEDS,
        "model": {"name": "demo:policy"},
        "data": {
            "train": str(work / "train.jsonl"),
            "validation": str(work / "test.jsonl"),
            "format": "ratings",
            "rater": "one",
            "num_pairs": NUM_PAIRS,
            "num_validation_pairs": NUM_TEST_PAIRS,
            "label_noise": noise,
        },
        "training": {"num_epochs": 1, "batch_size": 32, "learning_rate": 3e-4},
        "reference": {
            "policy": "demo:policy",
            "prompts": "demo:prompts",
            "num_samples": 256,
            "response_length": 24,
        },
    }
    path = work / f"{Path(settings['output_dir']).name}.yaml"
    path.write_text(json.dumps(settings, indent=1))  # JSON is YAML
    return path


def single_rater_pairs(work: Path) -> list[Pair]:
    """Test pairs whose label is that of one rater per sentence."""
    settings = PreferenceSettings(
        train=str(work / "test_single.jsonl"),
        format="ratings",
        rater="one",
        num_pairs=NUM_TEST_PAIRS,
        seed=1,
    )
    return load_preferences(settings).train


def ceiling(pairs: list[Pair], work: Path) -> dict:
    """How often the mean rating agrees with the single rater: what no model can be sure to beat."""
    lines = (work / "test.jsonl").read_text(encoding="utf-8").splitlines()
    mean = {row["response"]: row["rating"] for row in map(json.loads, lines)}
    differences = [mean[pair.chosen] - mean[pair.rejected] for pair in pairs]
    return asdict(accuracy(torch.tensor(differences).double().numpy(), [p.units for p in pairs]))


def measure(folders: list[str], sds: list[float], pairs: list[Pair]) -> list[dict]:
    """Figures of each member, and of the ensemble last, on these pairs."""
    units = [pair.units for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    members = []
    for folder in folders:
        reward = ClassifierReward(ClassifierSettings(kind="classifier", model=folder))
        chosen = reward.score_pairs(prompts, [pair.chosen for pair in pairs]).reward
        rejected = reward.score_pairs(prompts, [pair.rejected for pair in pairs]).reward
        members.append((chosen.double() - rejected.double()).tolist())
    together = ensemble_differences(members, sds)
    return [pair_figures(report_pairs(d, units)) for d in (*members, together)]


def train(work: Path, name: str, noise: float) -> dict:
    """One command, and what its summary says."""
    path = config(work, name, noise)
    # Members that are whole already are kept; the command refuses those of other settings or pairs.
    subprocess.run([sys.executable, "-m", "klippo", "reward-model", str(path)], check=True)
    summary = json.loads((work / f"{path.stem}_members.json").read_text())
    folders = [member["folder"] for member in summary["members"]]
    sds = [member["sd"] for member in summary["members"]]
    single = measure(folders, sds, single_rater_pairs(work))
    for member, figures in zip(summary["members"], single, strict=False):
        del member["folder"]
        member["single_rater"] = figures
    summary["ensemble"]["single_rater"] = single[-1]
    return summary


def cell(figures: dict) -> str:
    low, high = figures["accuracy_low"], figures["accuracy_high"]
    return f"{figures['accuracy']:.3f} ({low:.3f} to {high:.3f})"


def table(results: dict) -> str:
    """One row per member and ensemble, both conditions."""
    lines = [
        "| labels | member | accuracy, mean of raters (95%) | log loss | ECE "
        "| accuracy, one rater (95%) | minutes |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, condition in results["conditions"].items():
        rows = [(f"seed {m['seed']}", m, f"{m['minutes']:.1f}") for m in condition["members"]]
        minutes = sum(m["minutes"] for m in condition["members"])
        rows.append(("**ensemble**", condition["ensemble"], f"{minutes:.1f}"))
        for member, figures, took in rows:
            own = figures["held_out"]
            lines.append(
                f"| {name} | {member} | {cell(own)} | {own['log_loss_nats']:.3f} "
                f"| {own['calibration_error']:.3f} | {cell(figures['single_rater'])} | {took} |"
            )
    for name, condition in results["conditions"].items():
        better = condition["ensemble"]["accuracy_gain"]
        lines += [
            "",
            f"{name.capitalize()}: the ensemble's accuracy minus its members' mean is "
            f"{better['mean']:+.3f} (95% interval {better['low']:+.3f} to {better['high']:+.3f}); "
            f"the members' errors correlate at {condition['error_correlation']:.2f}.",
        ]
    best = results["ceiling_single_rater"]
    sizes = results["num_sentences"]
    lines += [
        "",
        f"{sizes['train']} training and {sizes['test']} test sentences of at most {MAX_WORDS} "
        f"words; {NUM_PAIRS} training pairs, {NUM_TEST_PAIRS} test pairs of each kind. Against one "
        f"rater, the mean of all raters itself is right on {best['mean']:.3f} "
        f"({best['low']:.3f} to {best['high']:.3f}) of the pairs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="unpacked archive, or a table id-mean-ratings")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/reward_models")
    parser.add_argument("--table-only", action="store_true", help="write the page from the results")
    arguments = parser.parse_args()
    if not arguments.table_only:
        sizes = write_tables(sentences(arguments.source, arguments.work), arguments.work)
        results = {
            "num_sentences": sizes,
            "ceiling_single_rater": ceiling(single_rater_pairs(arguments.work), arguments.work),
            "conditions": {name: train(arguments.work, name, n) for name, n in NOISE.items()},
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    text = table(json.loads(RESULTS.read_text()))
    PAGE.write_text(MARKED.sub(lambda m: m[1] + text + m[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
