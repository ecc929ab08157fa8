"""Five members of one architecture together, against five separate calls.

    python benchmarks/ensemble_scoring.py            # about two minutes
    python benchmarks/page.py                        # then the page

Each pair of timings scores the same prompts and responses once with `EnsembleReward.score` and once
with five `ClassifierReward.score`, in turn, in one process. Members are random and differ by seed.
Writes benchmarks/results/ensemble.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it

import torch
import transformers

from klippo.demo import demo_path
from klippo.hub import load_tokenizer, no_progress_bars
from klippo.rewards import scorers
from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.ensemble import EnsembleReward
from klippo.rewards.settings import ClassifierSettings, EnsembleSettings
from klippo.types import Prompt

RESULT = Path(__file__).parent / "results" / "ensemble.json"
NUM_MEMBERS = 5
SHAPES = ((16, 2), (32, 2), (64, 3), (128, 4))  # width, layers; 64 x 3 are the demo's proxies
BATCHES = (8, 32, 128)


def save_members(folder: Path, width: int, layers: int) -> list[str]:
    """Random GPT-2 reward models with the demo's tokenizer."""
    tokenizer = load_tokenizer("demo:proxy")
    names = []
    for seed in range(NUM_MEMBERS):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_positions=128, n_embd=width, n_layer=layers, n_head=2,
            num_labels=1, pad_token_id=tokenizer.pad_token_id, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        name = folder / f"width{width}_seed{seed}"
        transformers.GPT2ForSequenceClassification(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
        names.append(str(name))
    return names


def texts(batch: int) -> tuple[list[Prompt], list[str]]:
    """Openings of the demo's prompts, and responses of up to 24 tokens made of other openings."""
    lines = demo_path("prompts").read_text().splitlines()
    words = [json.loads(line)["prompt"] for line in lines]
    prompts = [Prompt(id=i, text=words[i % len(words)], token_ids=[1]) for i in range(batch)]
    responses = [
        " ".join(words[(7 * i + k) % len(words)] for k in range(1 + i % 6)) for i in range(batch)
    ]
    return prompts, responses


def compare(names: list[str], batch: int, num_pairs: int) -> dict[str, Any]:
    """Medians over interleaved pairs, in milliseconds, and the largest difference of scores."""
    alone = [ClassifierReward(ClassifierSettings(kind="classifier", model=name)) for name in names]
    settings = EnsembleSettings(kind="ensemble", members=list(names), standardize="none")
    together = EnsembleReward(settings)
    prompts, responses = texts(batch)
    ids, _ = alone[0].reader.encode(alone[0].reader.texts(prompts, responses))
    separate_ms, ensemble_ms = [], []
    for number in range(num_pairs + 2):
        start = time.perf_counter()
        single = [one.score_pairs(prompts, responses).reward for one in alone]
        middle = time.perf_counter()
        members = together.score_pairs(prompts, responses).members
        end = time.perf_counter()
        if number >= 2:  # the first ones lay out memory
            separate_ms.append(1000 * (middle - start))
            ensemble_ms.append(1000 * (end - middle))
    assert members is not None
    first = sorted(map(len, ids), reverse=True)[: alone[0].settings.batch_size]
    return {
        "batch": batch,
        "tokens": sum(map(len, ids)),
        "stacked": len(first) * first[0] * alone[0].width <= scorers.STACKED_ELEMENTS,
        "separate_ms": statistics.median(separate_ms),
        "ensemble_ms": statistics.median(ensemble_ms),
        "ratio": statistics.median(e / s for e, s in zip(ensemble_ms, separate_ms, strict=True)),
        "largest_difference": float((members - torch.stack(single)).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs per case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = []
    with tempfile.TemporaryDirectory() as folder, no_progress_bars():
        for width, layers in SHAPES:
            names = save_members(Path(folder), width, layers)
            for batch in BATCHES:
                case = {"width": width, "layers": layers} | compare(names, batch, args.pairs)
                cases.append(case)
                print(
                    f"width {width:4d}, {layers} layers, {batch:4d} texts: "
                    f"{case['separate_ms']:7.1f} ms apart, {case['ensemble_ms']:7.1f} together, "
                    f"ratio {case['ratio']:.2f}{' (stacked)' if case['stacked'] else ''}",
                    flush=True,
                )
    result = {
        "kind": "ensemble",
        "name": "Ensembles: five members together",
        "num_members": NUM_MEMBERS,
        "num_pairs": args.pairs,
        "num_threads": args.threads,
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/ensemble_scoring.py",
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cases": cases,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
