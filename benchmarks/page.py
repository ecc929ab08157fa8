"""docs/benchmarks.md from benchmarks/results/*.json: no figure on that page is typed by hand.

python benchmarks/page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

TITLES = {
    "trl": "TRL {trl} (its own critic model)",
    "trunk": "Klippo, default (critic on the policy's trunk)",
    "separate": "Klippo, separate critic (like for like)",
}

MEMORY_AIM = 0.15
"""Largest error of a memory estimate that is meant to be."""

INTRODUCTION = """# Benchmarks

Written by `benchmarks/page.py` from the files in `benchmarks/results/`; the figures are not typed \
by hand.

TRL removed PPO in 1.13; 1.12.0 is its last release with it. The arms run in turn, each in a \
process of its own, on the same prompts with the same models' sizes, response lengths, epochs, \
minibatches, optimizer steps and threads, and a KL penalty from a frozen reference. Machines are \
shared and noisy, so seconds depend on what else was running, and the ratio within a round is what \
counts. The first update of each process is left out of medians: memory is still being laid out \
then.
"""

REMARKS = """Seconds are wall-clock medians over updates, processor seconds (all threads, first \
update included) are less disturbed by other work on the machine. Memory is the peak resident size \
of the process, with Python, PyTorch and every model in it.

What differs besides the code: Klippo's default critic shares the policy's trunk; TRL's critic is \
a model of its own, as is that of the last arm. Klippo's reward model reads decoded text through \
its own tokenizer; TRL's reads the policy's token ids. Klippo clips gradients by default, TRL's \
PPO does not. What this does not show: GPUs, models beyond this size, and the quality of what is \
learnt.
"""


def write_page() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(load_results()), encoding="utf-8")


def load_results() -> list[dict[str, Any]]:
    """All results, the PPO workloads first."""
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    return sorted(results, key=lambda result: list(SECTIONS).index(result.get("kind", "ppo")))


def render(results: Sequence[dict[str, Any]]) -> str:
    return "\n".join([INTRODUCTION, *(section(result) for result in results)])


def section(result: dict[str, Any]) -> str:
    """One result file's part of the page."""
    return SECTIONS[result.get("kind", "ppo")](result)


def ensemble_section(result: dict[str, Any]) -> str:
    """Members together against separate calls: what it is, what came out, on which machine."""
    lines = [
        f"## {result['name']}",
        "",
        f"`EnsembleReward.score` of {result['num_members']} random GPT-2 reward models against "
        f"{result['num_members']} times `ClassifierReward.score`, on the same texts of 4 to 40 "
        f"tokens; medians over {result['num_pairs']} interleaved pairs, {result['num_threads']} "
        "threads, no GPU. An ensemble puts the texts together and tokenizes them once; where calls "
        'and not arithmetic take the time ("stacked") the weights of all members also run as one '
        "batched forward, elsewhere one after the other.",
        "",
        "| width x layers | texts | separate, ms | together, ms | ratio | | largest difference |",
        "|---|--:|--:|--:|--:|---|--:|",
    ]
    lines += [
        f"| {c['width']} x {c['layers']} | {c['batch']} | {c['separate_ms']:.1f} "
        f"| {c['ensemble_ms']:.1f} | **{c['ratio']:.2f}** | {'stacked' if c['stacked'] else ''} "
        f"| {c['largest_difference']:.0e} |"
        for c in result["cases"]
    ]
    machine, versions = result["machine"], result["versions"]
    return "\n".join(
        [
            *lines,
            "",
            "The demo's proxies have the shape 64 x 3. What this does not show: a GPU, where calls "
            "weigh more and members always run stacked.",
            "",
            f"Measured {result['date']} with `{result['command']}` on {machine['cores']} "
            f"{machine['architecture']} cores (load average {result['load_average']:.1f}), PyTorch "
            f"{versions['torch']}, transformers {versions['transformers']}.",
            "",
        ]
    )


def ppo_section(result: dict[str, Any]) -> str:
    """One workload: what it is, what came out, on which machine."""
    work, machine, versions = result["workload"], result["machine"], result["versions"]
    vocabulary = result["rounds"][0]["trl"].get("vocabulary")
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            f"GPT-2 shape, {work['num_layers']} layers, width {work['width']}, vocabulary "
            f"{vocabulary:,}, random weights, full fine-tuning, float32; batch "
            f"{work['batch_size']}, response {work['response_length']} tokens, "
            f"{work['num_epochs']} PPO epochs, {work['num_minibatches']} minibatch; reward model "
            f"of the same size; {work['num_threads']} threads.",
            "",
            comparison_table(result),
            "",
            phase_table(result),
            "",
            REMARKS,
            f"The machine's load average before each round was {loads(result)}; threads wait "
            "without spinning (`OMP_WAIT_POLICY=PASSIVE`, in every arm).",
            "",
            f"Measured {result['date']} with `{result['command']}` on {machine['cores']} "
            f"{machine['architecture']} cores ({machine['float32_matmul_gflops']} GFLOP/s in a "
            f"float32 matrix product), Python {versions['python']}, PyTorch {versions['torch']}, "
            f"transformers {versions['transformers']}, Klippo {versions['klippo']} at "
            f"{versions['commit']}.",
            "",
        ]
    )


def comparison_table(result: dict[str, Any]) -> str:
    """One row per arm: medians over the rounds, and ratios to TRL round by round."""
    rounds = result["rounds"]
    lines = [
        "| | s/update | tokens/s | processor s/update | peak memory, GB | times as fast as TRL "
        "(round by round) | the same in processor seconds | peak memory, TRL = 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, title in TITLES.items():
        speed = _ratios(rounds, arm, lambda trl, own: trl["median_s"] / own["median_s"])
        processor = _ratios(
            rounds, arm, lambda trl, own: trl["cpu_s_per_update"] / own["cpu_s_per_update"]
        )
        memory = _ratios(rounds, arm, lambda trl, own: own["peak_rss_gb"] / trl["peak_rss_gb"])
        is_trl = arm == "trl"
        lines.append(
            f"| {title.format(**result['versions'])} "
            f"| {_median(rounds, arm, 'median_s'):.1f} "
            f"| {_median(rounds, arm, 'response_tokens_per_s'):.0f} "
            f"| {_median(rounds, arm, 'cpu_s_per_update'):.1f} "
            f"| {_median(rounds, arm, 'peak_rss_gb'):.2f} "
            f"| {'1' if is_trl else _spread(speed)} "
            f"| {'1' if is_trl else _spread(processor)} "
            f"| {'1' if is_trl else f'{statistics.median(memory):.2f}'} |"
        )
    return "\n".join(lines)


def loads(result: dict[str, Any]) -> str:
    """How busy the machine was, round by round."""
    return ", ".join(f"{done['trl']['load_before']:.1f}" for done in result["rounds"])


def phase_table(result: dict[str, Any]) -> str:
    """Where the seconds go, medians over the rounds."""
    lines = []
    for arm, title in TITLES.items():
        phases = [done[arm]["phase_medians_s"] for done in result["rounds"]]
        parts = ", ".join(
            f"{name} {statistics.median(phase[name] for phase in phases):.1f}" for name in phases[0]
        )
        lines.append(f"- {title.format(**result['versions'])}: {parts} s")
    return "\n".join(["Phases:", "", *lines])


def _ratios(
    rounds: Sequence[dict[str, Any]],
    arm: str,
    ratio: Callable[[dict[str, Any], dict[str, Any]], float],
) -> list[float]:
    return [ratio(done["trl"], done[arm]) for done in rounds]


def _spread(ratios: Sequence[float]) -> str:
    each = ", ".join(f"{x:.2f}" for x in ratios)
    return f"**{statistics.median(ratios):.2f}** ({each})"


def _median(rounds: Sequence[dict[str, Any]], arm: str, key: str) -> float:
    return statistics.median(done[arm][key] for done in rounds)


def judge_section(result: dict[str, Any]) -> str:
    """What a call to a judge costs beside the judge."""

    def each(key: str) -> str:
        return ", ".join(f"{value:.2f}" for value in result[key])

    return "\n".join(
        [
            f"## {result['name']}",
            "",
            f"`JudgeClient` against a server on loopback in a process of its own, "
            f"{result['concurrency']} calls at a time, a cap in USD, every answer and every "
            "reservation synced to disk; three repeats.",
            "",
            "| | measured |",
            "|---|--:|",
            f"| own time per call, a server that answers at once (2,048 calls) | "
            f"{each('overhead_ms')} ms |",
            f"| the same calls again, from the cache | {each('cached_ms')} ms |",
            f"| 256 calls of 200 ms, over the ideal 0.8 s | {each('latency_over_ideal')} |",
            "",
            f"Measured {result['date']} with `{result['command']}` on {result['num_cpus']} cores "
            f"(load average {result['load']}), Python {result['python']}.",
            "",
        ]
    )


def memory_section(result: dict[str, Any]) -> str:
    """Every case's estimate beside its measured peak."""
    off = [case["estimate_gib"] / case["measured_gib"] - 1 for case in result["cases"]]
    beyond = sum(abs(one) > MEMORY_AIM for one in off)
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"| {case['name']} | {case['measured_gib']:.2f} | {case['estimate_gib']:.2f} "
        f"| {f'**{one:+.0%}**' if abs(one) > MEMORY_AIM else f'{one:+.0%}'} | {case['phase']} |"
        for case, one in zip(result["cases"], off, strict=True)
    ]
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            "Peak resident size of a process that runs two PPO steps on the CPU, against what "
            "`klippo train --dry-run` estimates before. W1's shape with one epoch, batch 64 and "
            "response 32 unless the row says otherwise; SmolLM2-135M with batch 16. About "
            f"{result['framework_gib']:.2f} GiB of each are Python, PyTorch and the libraries, "
            "which the estimate takes as it finds them. The last column is the phase in which the "
            "estimate is largest.",
            "",
            "| | measured, GiB | estimated, GiB | off by | phase |",
            "|---|--:|--:|--:|---|",
            *lines,
            "",
            f"{len(off) - beyond} of {len(off)} are within {MEMORY_AIM:.0%}. The share that glibc "
            "keeps back (half of what passes through a phase in blocks below 32 MiB) was chosen "
            "with the rows `full`, `full, micro-batches of 8`, `LoRA` and those of response 128 in "
            "view; the others had no part in it. Not measured: GPUs, 4-bit weights, several "
            "processes.",
            "",
            *([result["note"], ""] if "note" in result else []),
            f"Measured {result['date']} with `{result['command']}` on {machine['cores']} "
            f"{machine['architecture']} cores, PyTorch {versions['torch']}, transformers "
            f"{versions['transformers']}.",
            "",
        ]
    )


def lean_section(result: dict[str, Any]) -> str:
    """What keeping the frozen blocks' output saves, and that nothing else changes."""
    table = []
    for case in result["cases"]:
        of = {key: _spread(case["ratios"][key]) for key in case["ratios"]}
        table.append(
            f"| {case['name']} | {of['update_cpu_s']} | {of['update_s']} | {of['forward_s']} "
            f"| {case['largest_gradient_difference']:.0e} | {case['largest_loss_difference']:.0e} "
            f"| {case['kept_mb']:.1f} |"
        )
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            "The same PPO step (4 epochs, response 32) with the last 2 layers trained, every block "
            "in every pass over frozen blocks run once per rollout batch: ratios of "
            f"{result['num_pairs']} interleaved pairs in one process with {result['num_threads']} "
            "thread, median first. Differences are the largest of any gradient of the first "
            "optimizer step, and of the losses.",
            "",
            "| | update, processor time | update, wall time | forward phase | gradients differ by "
            "| losses differ by | kept, MB |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *table,
            "",
            "W1 has 4 layers of width 256 under a vocabulary of 49,152: nearly all its work is in "
            "the LM head, which reuse does not touch.",
            "",
            _measured(result),
            "",
        ]
    )


def passes_section(result: dict[str, Any]) -> str:
    """What it saves to run models and LM head once."""
    table = [
        f"| {case['name']} | {_spread(case['ratios'])} | {case['largest_difference']:.0e} |"
        for case in result["cases"]
    ]
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            "W1, processor time of the work done twice over that of the work done once; "
            f"{result['num_pairs']} interleaved pairs in one process with {result['num_threads']} "
            "thread, median first. Evaluation ran both trunks and both LM heads for the log-probs "
            "and again for the exact KL. The update computed logits for the log-probs, and again "
            "for the gradients; now a chunk's gradients are formed while its logits are there. The "
            "last column is the largest difference of a log-ratio or KL, and of a gradient.",
            "",
            "| | twice / once | differ by |",
            "|---|--:|--:|",
            *table,
            "",
            _measured(result),
            "",
        ]
    )


def floor_section(result: dict[str, Any]) -> str:
    """The update phase against the matrix products that it cannot do without."""
    table = [
        f"| {case['name']} | {case['gflop']:.0f} | {case['gflops_per_s']:.1f} "
        f"| {case['floor_s']:.2f} | {case['update_cpu_s']:.2f} | {_spread(case['ratios'])} "
        f"| {_spread(case['wall_ratios'])} |"
        for case in result["cases"]
    ]
    parts = [
        f"- {case['name']}: "
        + ", ".join(f"{name} {share:.0%}" for name, share in case["profile"].items())
        for case in result["cases"]
    ]
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            "One epoch of the update (full fine-tuning, 1 minibatch, critic on the trunk) over its "
            "floor: the floating-point operations of the model's matrix products, forward and "
            "backward, at the rate of products of the model's own shapes, measured around each "
            f"update in the same process. {result['num_rounds']} rounds, {result['num_threads']} "
            "thread; processor seconds unless it says otherwise. Attention's own products "
            "(queries with keys) are in the floor, everything that is no matrix product is not.",
            "",
            "| | GFLOP | GFLOP/s | floor, s | update, s | update / floor | the same in wall time |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *table,
            "",
            "Where the processor time of an epoch goes (`torch.profiler`, time of the operation "
            "itself):",
            "",
            *parts,
            "",
            _measured(result),
            "",
        ]
    )


def _measured(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"Measured {result['date']} with `{result['command']}` on {machine['cores']} "
        f"{machine['architecture']} cores (load average {result['load_average']:.1f}), PyTorch "
        f"{versions['torch']}, transformers {versions['transformers']}."
    )


def overlap_section(result: dict[str, Any]) -> str:
    """What judging while sampling saves."""
    table = [
        f"| {name} | {case['delay_s']:.2f} s | {case['sampled_ratio']:.2f} | "
        f"{case['step_ratio']:.2f} |"
        for name, case in result["cases"].items()
    ]
    num_pairs = len(next(iter(result["cases"].values()))["pairs"])
    return "\n".join(
        [
            f"## {result['name']}",
            "",
            f"A judge behind a server, {result['concurrency']} answers at a time, "
            f"{result['batch_size']} responses of a small GPT-2 a step; an answer takes so long "
            "that scoring takes about as long as sampling. The time with every response judged as "
            "soon as it is finished, over the time with all judged when the last one is: medians "
            f"of {num_pairs} interleaved pairs. A whole step is sampling, forward passes, scores "
            "and one epoch of learning.",
            "",
            "| responses | an answer takes | sampling and scoring | whole step |",
            "|---|--:|--:|--:|",
            *table,
            "",
            "Responses that all end at the same moment leave only the forward passes to overlap "
            "with; a smaller `rollout.generation_batch_size` lets the judge begin earlier.",
            "",
            f"Measured {result['date']} with `{result['command']}` on {result['num_cpus']} cores "
            f"(load average {result['load']}), Python {result['python']}, PyTorch "
            f"{result['torch']}.",
            "",
        ]
    )


def engines_section(result: dict[str, Any]) -> str:
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
            f"| {_spread(sampling)} | {_spread(whole)} |"
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


SECTIONS = {
    "ppo": ppo_section,
    "update_floor": floor_section,
    "lean_update": lean_section,
    "lean_passes": passes_section,
    "ensemble": ensemble_section,
    "judge": judge_section,
    "judge_overlap": overlap_section,
    "memory": memory_section,
    "engines": engines_section,
}

if __name__ == "__main__":
    write_page()
