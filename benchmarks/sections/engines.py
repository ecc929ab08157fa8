"""Both engines side by side."""

from __future__ import annotations

import statistics
from typing import Any

from sections.common import spread


def section(result: dict[str, Any]) -> str:
    """Tokens per second of both engines, and what taking over the weights costs."""
    versions, machine = result["versions"], result["machine"]
    lines = []
    for case in result["cases"]:
        tokens, pairs = case["batch"] * result["response_length"], case["pairs"]
        hf_s = [pair["hf"]["generate_s"] for pair in pairs]
        vllm_s = [pair["vllm"]["generate_s"] for pair in pairs]
        sync_s = [pair["vllm"]["sync_s"] for pair in pairs]
        sampling = [hf / own for hf, own in zip(hf_s, vllm_s, strict=True)]
        whole = [hf / (own + sync) for hf, own, sync in zip(hf_s, vllm_s, sync_s, strict=True)]
        lines.append(
            f"| {case['batch']} | {tokens / statistics.median(hf_s):.0f} "
            f"| {tokens / statistics.median(vllm_s):.0f} | {statistics.median(sync_s):.2f} "
            f"| {spread(sampling)} | {spread(whole)} |"
        )
    loads = [pair["load"] for case in result["cases"] for pair in case["pairs"]]
    low, high = result["prompt_tokens"]
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            "`rollout.engine: vllm` against `hf`, sampling from SmolLM2-135M-Instruct in float32: "
            f"chat prompts of {low} to {high} tokens, responses of {result['response_length']} "
            "tokens each, log-probs kept, batches in turn in one process with "
            f"{threads}. vLLM takes over the policy's weights before every batch; the last column "
            "counts that too.",
            "",
            "| batch | hf, tokens/s | vLLM, tokens/s | taking over weights, s | times as fast "
            "(pair by pair) | with weights taken over |",
            "|--:|--:|--:|--:|---|---|",
            *lines,
            "",
            "Responses of equal length are what the Hugging Face engine does best. What this does "
            "not show: a GPU, and models beyond this size.",
            "",
            f"Measured {result['date']} with `{result['command']}` on {machine['cores']} "
            f"{machine['architecture']} cores (load average {min(loads):.1f} to {max(loads):.1f}), "
            f"PyTorch {versions['torch']}, transformers {versions['transformers']}, vLLM "
            f"{versions['vllm']}.",
            "",
        ]
    )
