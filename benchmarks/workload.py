"""One workload for every arm: the same prompts, sizes and models, whoever runs them."""

from __future__ import annotations

import json
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

SUBJECTS = (
    "dog cat king queen robot ship war love murder wedding river mountain city farm school judge"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """GPT-2 shape; the reward model, and a separate critic, are of the policy's size."""

    num_layers: int = 4
    width: int = 256
    num_heads: int = 4
    context: int = 256
    batch_size: int = 64
    response_length: int = 32
    num_epochs: int = 4
    num_minibatches: int = 1
    learning_rate: float = 1e-5
    kl_coef: float = 0.05
    value_coef: float = 0.1
    clip_range: float = 0.2
    gae_lambda: float = 0.95
    num_threads: int = 2
    seed: int = 0

    @property
    def tokens_per_update(self) -> int:
        return self.batch_size * self.response_length

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


W1 = Workload()


def prompts() -> list[str]:
    """512 prompts of about ten tokens."""
    words = SUBJECTS.split() * 32
    return [f"The movie number {i} about a {word} was" for i, word in enumerate(words)]


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, with a pad token that is not the end-of-sequence token.

    TRL finds padding by its token id, so the two must differ there.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def gpt2_config(workload: Workload, tokenizer: Any) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=workload.context,
        n_embd=workload.width,
        n_layer=workload.num_layers,
        n_head=workload.num_heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )


def build_policy(workload: Workload, tokenizer: Any) -> Any:
    """Random weights, the same for every arm."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(workload.seed)
    return GPT2LMHeadModel(gpt2_config(workload, tokenizer))


def build_scorer(workload: Workload, tokenizer: Any, *, seed: int) -> Any:
    """A reward or value model of the policy's size with random weights."""
    from transformers import GPT2ForSequenceClassification

    torch.manual_seed(workload.seed + seed)
    return GPT2ForSequenceClassification(gpt2_config(workload, tokenizer))


def num_parameters(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def report(
    arm: str,
    workload: Workload,
    seconds: Sequence[float],
    phases: Mapping[str, Sequence[float]],
    *,
    vocabulary: int,
    **facts: Any,
) -> dict[str, Any]:
    """The arm's result; medians leave the first update out, where memory is still being laid."""
    median = statistics.median(seconds[1:] or seconds)
    return {
        "arm": arm,
        "vocabulary": vocabulary,
        "seconds": [round(x, 3) for x in seconds],
        "median_s": round(median, 3),
        "response_tokens_per_s": round(workload.tokens_per_update / median, 1),
        "peak_rss_gb": round(peak_rss_gb(), 3),
        "phase_medians_s": {
            name: round(statistics.median(values[1:] or values), 3)
            for name, values in phases.items()
        },
        **facts,
    }


def peak_rss_gb() -> float:
    """The most memory (10^9 bytes) that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def print_result(result: Mapping[str, Any]) -> None:
    print(json.dumps(result), flush=True)
