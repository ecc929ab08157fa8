"""Response tokens per second: the Hugging Face engine against vLLM, in turn, in one process.

Both sample from SmolLM2-135M in float32, 64 tokens for every response. Needs a Python with vLLM
and Klippo (`make build/vllm/.installed`) and the model (`python benchmarks/prepare_smollm.py`).

    build/vllm/bin/python benchmarks/engines.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "build" / "smollm2-135m-instruct"
RESULT = ROOT / "benchmarks" / "results" / "engines.json"
RESPONSE_LENGTH = 64
TEXTS = (
    "How was the film?",
    "Write a short review of a museum that you liked, and say what could be better.",
    "Name three rivers.",
    "My neighbour plays the drums at night. What do I tell him, without making an enemy of him?",
    "Explain to a child why the sky is blue.",
)


def measure(model: Path, batches: Sequence[int], num_pairs: int, threads: int) -> dict[str, Any]:
    """Seconds of every batch on both engines; the first batch of each is not counted."""
    import torch

    torch.set_num_threads(threads)
    from klippo.policy.loading import load_policy
    from klippo.policy.settings import CriticSettings, PolicySettings
    from klippo.policy.weights import merged_weights
    from klippo.rollouts.hf import HFEngine
    from klippo.rollouts.sampling import Sampling
    from klippo.rollouts.settings import VLLMSettings
    from klippo.rollouts.vllm import open_vllm, vllm_version
    from klippo.types import Prompt

    settings = PolicySettings(model=str(model))
    loaded = load_policy(settings, CriticSettings(), torch.device("cpu"))
    policy = loaded.policy
    rows = [
        loaded.tokenizer.encode(
            str(
                loaded.tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
                )
            ),
            add_special_tokens=False,
        )
        for text in TEXTS
    ]
    engines = {
        "hf": HFEngine(
            policy.lm.model,
            stop_ids=frozenset(),
            sampling=Sampling(temperature=1.0),
            record_logprobs=True,
        ),
        "vllm": open_vllm(
            policy.lm.model,
            partial(merged_weights, policy),
            VLLMSettings(),
            torch.device("cpu"),
            dtype=torch.float32,
            stop_ids=frozenset(),
            temperature=1.0,
            max_tokens=max(map(len, rows)) + RESPONSE_LENGTH,
            batch_size=None,
            seed=0,
        ),
    }
    cases = []
    for size in batches:
        prompts = [Prompt(id=i, text="", token_ids=rows[i % len(rows)]) for i in range(size)]
        pairs = []
        for number in range(num_pairs + 1):
            load = os.getloadavg()[0]
            pair = {name: timed(engine, prompts, number) for name, engine in engines.items()}
            pairs.append(pair | {"load": load})
            print(size, pair, flush=True)
        cases.append({"batch": size, "pairs": pairs[1:]})
    return {
        "kind": "engines",
        "name": "Engines",
        "response_length": RESPONSE_LENGTH,
        "prompt_tokens": [min(map(len, rows)), max(map(len, rows))],
        "threads": threads,
        "cases": cases,
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": {
            "torch": torch.__version__,
            "transformers": __import__("transformers").__version__,
            "vllm": vllm_version(),
        },
    }


def timed(engine: Any, prompts: Sequence[Any], number: int) -> dict[str, float]:
    """Seconds to take over the weights, and to sample a batch of full-length responses."""
    seeds = [1000 * number + i for i in range(len(prompts))]
    sync_s = seconds(engine.sync)
    sample = partial(engine.generate, prompts, [RESPONSE_LENGTH] * len(prompts), seeds)
    return {"sync_s": sync_s, "generate_s": seconds(sample)}


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    result = measure(given.model, given.batches, given.pairs, given.threads)
    options = f"--threads {given.threads} --pairs {given.pairs}"
    result["command"] = f"python benchmarks/engines.py {options}"
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
