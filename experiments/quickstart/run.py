"""The quickstart under several seeds; writes its figures into the README and docs/quickstart.md.

python experiments/quickstart/run.py [--seeds 0 1 2] [--runs runs/seeds]
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from klippo.runs.folder import read_rows

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results.json"
MARKED = re.compile(r"(<!-- quickstart figures -->\n).*?(<!-- end -->)", re.DOTALL)
NUM_EXAMPLES = 10


def train(seed: int, folder: Path) -> dict[str, object]:
    """One run; its figures."""
    start = time.monotonic()
    command = [sys.executable, "-m", "klippo", "train", "quickstart", "--overwrite"]
    subprocess.run([*command, f"seed={seed}", f"output_dir={folder}"], check=True)
    figures = json.loads((folder / "run_status.json").read_text())["before_after"]
    return {"seed": seed, "minutes": (time.monotonic() - start) / 60, "measures": figures}


def table(runs: list[dict]) -> str:
    """One row per seed: means before and after, and the change with its 95% interval."""
    lines = [
        "| seed | reward before → after | change in sd (95% interval) | gold before → after "
        "| change in sd (95% interval) | KL, nats | length | minutes |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        cells = [str(run["seed"])]
        for key in ("proxy", "gold"):
            m = run["measures"][key]
            sd = m["difference"] / m["in_sd"]
            cells.append(f"{m['before']:+.2f} → {m['after']:+.2f}")
            cells.append(f"{m['in_sd']:+.2f} ({m['low'] / sd:+.2f} to {m['high'] / sd:+.2f})")
        length = run["measures"]["length"]
        cells.append(f"{run['measures']['kl_exact_nats']['after']:.1f}")
        cells.append(f"{length['before']:.1f} → {length['after']:.1f}")
        cells.append(f"{run['minutes']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_pages(runs: list[dict], first: Path) -> None:
    """The README's table, and docs/quickstart.md with examples that nobody chose."""
    readme = ROOT / "README.md"
    readme.write_text(MARKED.sub(lambda m: m[1] + table(runs) + m[2], readme.read_text()))
    shutil.copy(first / "report/scores_over_steps.png", ROOT / "docs/quickstart.png")
    before_after = (first / "before_after.md").read_text().split("\n\n")[1].splitlines()
    steps = len(read_rows(first / "metrics.jsonl"))
    page = f"""# The quickstart's figures

Written by `python experiments/quickstart/run.py`; nothing here is typed by hand. {steps} PPO steps,
{runs[0]["measures"]["proxy"]["num"]} fixed prompts, sampled before and after with the same random
numbers. The change is the mean paired difference in standard deviations of single samples before
training. Minutes are wall-clock on 2 shared CPU cores.

{table(runs)}
What this does not show: gold is a small model too and can be fooled; responses got shorter, and
short praise is easy to write; the policy is not fluent, before or after.

The first {NUM_EXAMPLES} prompts of seed {runs[0]["seed"]}, in the data's order:

"""
    (ROOT / "docs/quickstart.md").write_text(
        page + "\n".join(before_after[: NUM_EXAMPLES + 2]) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/seeds")
    options = parser.parse_args()
    runs = [train(seed, options.runs / str(seed)) for seed in options.seeds]
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n")
    write_pages(runs, options.runs / str(options.seeds[0]))


if __name__ == "__main__":
    main()
