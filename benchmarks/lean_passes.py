"""What it saves to run each model and the LM head once, on W1: both ways in turn, in one process.

    python benchmarks/lean_passes.py --pairs 3

Prints and writes benchmarks/results/lean_passes.json and docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
import workload as shared
from lean_update import make_rollout, timed
from page import RESULTS, write_page
from prepare_smollm import SMOLLM
from workload import W1

from klippo.policy.loading import LoadedPolicy, load_policy
from klippo.policy.settings import CriticSettings, PolicySettings
from klippo.ppo.loss import policy_loss, probability_ratio
from klippo.tensors.head import token_logprobs, token_loss
from klippo.types import Rollout

Work = Callable[[], torch.Tensor]
"""Something to do, which gives a number to compare."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = shared.load_tokenizer(SMOLLM)
    loaded = load_policy(
        PolicySettings(model="W1"),
        CriticSettings(),
        torch.device("cpu"),
        model=shared.build_policy(W1, tokenizer),
        tokenizer=tokenizer,
    )
    rollout = make_rollout(tokenizer, W1)
    cases = {
        "evaluation: log-probs and exact KL": evaluations(loaded, rollout),
        "LM head, loss and gradients": heads(loaded, rollout),
    }
    result = {
        "kind": "lean_passes",
        "name": "Each forward pass once",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/lean_passes.py --pairs {arguments.pairs}",
        "num_pairs": arguments.pairs,
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "cases": [compare(name, *ways, arguments.pairs) for name, ways in cases.items()],
    }
    (RESULTS / "lean_passes.json").write_text(json.dumps(result, indent=1) + "\n")
    write_page()


def compare(name: str, twice: Work, once: Work, pairs: int) -> dict[str, Any]:
    """Processor seconds of the first way over those of the second."""
    ratios, difference = [], 0.0
    for _ in range(pairs):
        expected, _, before = timed(twice)
        found, _, after = timed(once)
        ratios.append(round(before / after, 3))
        difference = max(difference, float((found - expected).abs().max()))
    print(name, ratios, difference, flush=True)
    return {"name": name, "ratios": ratios, "largest_difference": difference}


def evaluations(loaded: LoadedPolicy, rollout: Rollout) -> tuple[Work, Work]:
    policy, reference, tokens = loaded.policy, loaded.reference, rollout.tokens

    @torch.no_grad()
    def twice() -> torch.Tensor:
        logprobs = policy(tokens, 1.0, with_entropy=False).logprobs
        log_ratio = logprobs - reference.logprobs(tokens, 1.0)
        return torch.stack([log_ratio, reference.kl_from(policy.lm, tokens, 1.0)])

    @torch.no_grad()
    def once() -> torch.Tensor:
        logprobs, _, ref_logprobs, kl = reference.compare(
            policy.lm, tokens, 1.0, policy.lm.hidden(tokens)
        )
        return torch.stack([logprobs - ref_logprobs, kl])

    return twice, once


def heads(loaded: LoadedPolicy, rollout: Rollout) -> tuple[Work, Work]:
    lm, ids = loaded.policy.lm, rollout.tokens.response_ids[rollout.tokens.response_mask]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(ids), lm.hidden_size, generator=generator).requires_grad_()
    advantages = torch.randn(len(ids), generator=generator)
    with torch.no_grad():
        old = token_logprobs(lm.head(1.0), hidden, ids, with_entropy=False)[0]

    per_token: dict[str, torch.Tensor] = {"old": old, "advantages": advantages}

    def loss_of(
        logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, **_: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = probability_ratio(logprobs, old)
        loss = policy_loss(ratio, advantages, clip_range=W1.clip_range)[0]
        return loss, logprobs[:, None].detach()

    def gradients(loss: torch.Tensor) -> torch.Tensor:
        head = lm.head(1.0).weight
        return torch.cat(torch.autograd.grad(loss / len(ids), (hidden, head)))

    def twice() -> torch.Tensor:
        logprobs, _ = token_logprobs(lm.head(1.0), hidden, ids, with_entropy=False)
        return gradients(loss_of(logprobs, **per_token)[0].sum())

    def once() -> torch.Tensor:
        loss, _ = token_loss(lm.head(1.0), hidden, ids, loss_of, per_token, with_entropy=False)
        return gradients(loss)

    return twice, once


if __name__ == "__main__":
    main()
