"""How much of a slow judge's time hides behind sampling.

    python benchmarks/judge_overlap.py [RESULT.json]

sampled   from the start until all responses are scored: each judged as soon as it is finished, over
          all of them judged when the last one is
step      the same for whole steps: sampling, forward passes, scores, one epoch of learning

Arms are interleaved, on the same prompts. The judge is a server in a process of its own; how long
an answer takes is set so that scoring takes about as long as sampling.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from judge_transport import server_of

CONCURRENCY = 8
BATCH = 32
CASES: dict[str, dict[str, Any]] = {
    "10 to 60 tokens, one batch": {"response_length": [10, 60]},
    "10 to 60 tokens, 4 batches": {"response_length": [10, 60], "generation_batch_size": 8},
    "40 tokens each, 4 batches": {"response_length": 40, "generation_batch_size": 8},
    "40 tokens each, one batch": {"response_length": 40},
}


def policy() -> Any:
    """A GPT-2 of 6 layers and width 512 with the demo's tokenizer, random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 256}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=2048, bos_token_id=None, eos_token_id=None, **sizes)
    )


def open_trainer(folder: Path, url: str, case: dict[str, Any]) -> Any:
    """A trainer of this case; never trained as a whole."""
    from transformers import AutoTokenizer

    from klippo import PPOTrainer
    from klippo.hub import resolve

    api = {
        "provider": "local",
        "model": "toy",
        "base_url": url,
        "concurrency": CONCURRENCY,
        "cache": str(folder / "judge.sqlite"),
    }
    reward = {"kind": "judge", "api": api, "probes": False, "score_source": "line"}
    config = {
        "output_dir": str(folder / "run"),
        "data": {"train": "demo:prompts"},
        "reward": reward,
        "rollout": {"stop_at_eos": False} | case,
        "ppo": {"batch_size": BATCH, "num_epochs": 1, "micro_batch_size": 16},
    }
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:policy"))
    return PPOTrainer(config, policy=policy(), tokenizer=tokenizer, quiet=True)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(case: dict[str, Any], repeats: int = 3) -> dict[str, Any]:
    """Seconds of each part, and the ratio of every pair."""
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        with server_of(0.0) as url:  # how long does sampling take?
            session = open_trainer(Path(name) / "first", url, case).session
            sampling_s = min(timed(session.source.next)[0] for _ in range(3))
            session.reward.close()
        delay_s = sampling_s * CONCURRENCY / BATCH
        with server_of(delay_s) as url:
            session = open_trainer(Path(name) / "second", url, case).session

            prompts = session.online.spare_prompts
            asked = [prompts[i % len(prompts)] for i in range(BATCH)]

            def sample(together: bool) -> Any:
                return session.source.next() if together else session.source.answer(asked)

            def sampled(together: bool) -> Any:
                return session.score(sample(together))

            def step(together: bool) -> Any:
                rollout = sample(together)
                if not together:
                    session.score(rollout)  # asked for again below, from the cache
                forward = session.learner.forward(rollout)
                experience = session.learner.experience(rollout, session.score(rollout), forward)
                return session.learner.learn(experience)

            sampled(True), sampled(False), step(True)
            for _ in range(repeats):
                pair: dict[str, float] = {}
                for name, work in (("sampled", sampled), ("step", step)):
                    for arm, together in (("in_sequence", False), ("together", True)):
                        seconds, _ = timed(partial(work, together))
                        pair[f"{name}_{arm}_s"] = round(seconds, 3)
                pairs.append(pair)
    return {
        "delay_s": round(delay_s, 3),
        "pairs": pairs,
        "sampled_ratio": ratio(pairs, "sampled"),
        "step_ratio": ratio(pairs, "step"),
    }


def ratio(pairs: list[dict[str, float]], name: str) -> float:
    """Median over the pairs of the time together over the time in sequence."""
    ratios = [pair[f"{name}_together_s"] / pair[f"{name}_in_sequence_s"] for pair in pairs]
    return round(statistics.median(ratios), 3)


def main() -> None:
    """Measure, print, and write where asked to."""
    cases = {name: measure(case) for name, case in CASES.items()}
    results = {
        "kind": "judge_overlap",
        "name": "Judging while sampling",
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/judge_overlap.py benchmarks/results/judge_overlap.json",
        "batch_size": BATCH,
        "concurrency": CONCURRENCY,
        "cases": cases,
        "num_cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    text = json.dumps(results, indent=2)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
