"""How often the verdict is wrong, and how small a fall it sees: simulated runs with a known truth.

    python experiments/overoptimization/error_rates.py

Writes the table in docs/laboratory.md. A run has 8 evaluations of the same prompts. A prompt's
scores share an effect of the prompt (sd 1); every score has noise of its own (sd 1).
"""

import re
from pathlib import Path

import numpy as np

from klippo.evaluation.history import History
from klippo.evaluation.verdict import judge

PAGE = Path(__file__).resolve().parents[2] / "docs/laboratory.md"
MARKED = re.compile(r"(<!-- error rates -->\n).*?(<!-- end -->)", re.DOTALL)
NUM_RUNS = 200
NUM_PROMPTS = (64, 128, 256)
TIME = np.linspace(0, 1, 8)
SHAPES = {
    "gold and proxy are the same score, rising": (TIME, None),
    "gold and proxy are the same score, flat": (0 * TIME, None),
    "gold flat, proxy rises": (0 * TIME, 2 * TIME),
    "gold rises and stays, proxy rises": (np.minimum(2 * TIME, 0.6), 2 * TIME),
}
FALLS = (0.1, 0.2, 0.3, 0.5)


def simulate(rng: np.random.Generator, gold: np.ndarray, proxy: np.ndarray | None, num: int) -> str:
    """The verdict on one run."""
    shape = (len(TIME), num)
    golds = gold[:, None] + rng.normal(size=num) + rng.normal(size=shape)
    proxies = golds
    if proxy is not None:
        proxies = proxy[:, None] + rng.normal(size=num) + rng.normal(size=shape)
    run = History(
        steps=list(range(len(TIME))),
        prompt_ids=list(range(num)),
        proxy=proxies,
        kl=np.zeros(shape),
        gold=golds,
    )
    return judge(run).outcome


def share(gold: np.ndarray, proxy: np.ndarray | None, num: int) -> str:
    """Share of runs that are called over-optimised."""
    found = [
        simulate(np.random.default_rng(i), gold, proxy, num) == "over-optimised"
        for i in range(NUM_RUNS)
    ]
    return f"{np.mean(found):.1%}"


def fall(size: float) -> np.ndarray:
    """Up to 0.5 in the middle, then down by `size`."""
    peak = 4
    up = np.linspace(0, 0.5, peak + 1)
    return np.concatenate([up, 0.5 - np.linspace(0, size, len(TIME) - peak)[1:]])


def main() -> None:
    head = "| truth | " + " | ".join(f"{num} prompts" for num in NUM_PROMPTS) + " |"
    lines = [head, "|---|" + "--:|" * len(NUM_PROMPTS)]
    for name, (gold, proxy) in SHAPES.items():
        cells = [share(gold, proxy, num) for num in NUM_PROMPTS]
        lines.append(f"| {name} (a false alarm) | " + " | ".join(cells) + " |")
    for size in FALLS:
        cells = [share(fall(size), 2 * TIME, num) for num in NUM_PROMPTS]
        lines.append(
            f"| gold falls by {size} from its peak, proxy rises | " + " | ".join(cells) + " |"
        )
    table = "\n".join(lines) + "\n"
    PAGE.write_text(MARKED.sub(lambda m: m[1] + table + m[2], PAGE.read_text()))
    print(table)


if __name__ == "__main__":
    main()
