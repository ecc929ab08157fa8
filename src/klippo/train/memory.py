"""What a run needs of the memory, by component, and whether it fits.

Weights, gradients, AdamW's moments and the key-value cache follow from shapes; what the passes
hold beside them is measured (`klippo.train.trial`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from klippo.config.schema import RunConfig
from klippo.errors import PreflightError
from klippo.hub import find_file
from klippo.lengths import longest
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.rewards.settings import (
    ClassifierSettings,
    EnsembleSettings,
    RewardSettings,
    SumSettings,
    ensembles,
)
from klippo.runs.memory import CUDA_CONTEXT, GIB, device_memory, used_memory
from klippo.tensors.head import CHUNK_ELEMENTS
from klippo.train.engines import merges_adapters

Bytes = dict[str, int]
"""Bytes by component."""

FRAMEWORK = "Python, PyTorch and data"
PASSES = "activations, logits and buffers"
ADAM_MOMENTS = 2
"""Numbers that AdamW keeps per trained weight, in the weight's dtype."""
BYTES_4BIT = 0.5
"""Per weight, at least."""
GENEROUS = 64
"""Numbers per token, layer and unit of width that the passes certainly do not exceed: about twice
what attention and an MLP of four times the width keep for the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes by phase and component, at the fullest moment of each phase."""

    phases: Mapping[str, Bytes]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return self.total(self.peak_phase)

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    def biggest(self, phase: str, number: int | None = None) -> list[tuple[str, int]]:
        """The components of a phase, largest first."""
        listed = sorted(self.phases[phase].items(), key=lambda item: -item[1])
        return [(name, size) for name, size in listed if size > 0][:number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Rows that one process computes at once, and their longest prompt and response in tokens."""

    prompt: int
    response: int
    generate: int
    score: int
    forward: int
    update: int
    """Rows of two micro-batches, or of one if a minibatch has no more: gradients add up."""
    batch: int

    @classmethod
    def of(cls, config: RunConfig, num_processes: int, prompt: int, response: int) -> Sizes:
        ppo = config.ppo
        batch = ppo.batch_size // num_processes
        minibatch = ppo.minibatch // num_processes
        micro = ppo.micro_batch_size
        if ppo.micro_batch_tokens is not None:
            micro = max(ppo.micro_batch_tokens // (prompt + response), 1)
        evaluated = -(-config.evaluation.num_prompts // num_processes)
        measured = [e.reference_size for e in ensembles(config.reward) if e.standardize == "start"]
        most = max(batch, evaluated, config.early_stop.gold_prompts, *measured)
        scored = [settings.batch_size for _, settings in reward_models(config.reward)]
        return cls(
            prompt=prompt,
            response=response,
            generate=min(config.rollout.generation_batch_size or most, most),
            score=min(max(scored, default=0), most),
            forward=min(micro or batch, batch),
            update=min(2 * micro if micro else minibatch, minibatch),
            batch=batch,
        )


# Before the models are loaded


def check_weights(config: RunConfig, device: torch.device) -> None:
    """Raise PreflightError if weights, gradients and optimizer states alone are too much."""
    refuse_if_too_much(config, stored_estimate(config, device), device)


def stored_estimate(config: RunConfig, device: torch.device) -> MemoryEstimate:
    """What the run holds at least, by the shapes in the models' safetensors files.

    Models without such files count as nothing, and so do adapters and small heads.
    """
    settings, size = config.policy, _dtype_size(config.policy.dtype)
    sizes = stored_sizes(settings.model, settings.revision)
    policy = sum(sizes.values())
    critic = 0
    if config.critic.kind == "separate":
        of_critic = sizes if config.critic.model is None else stored_sizes(config.critic.model)
        critic = sum(number for name, number in of_critic.items() if "lm_head" not in name)
        critic *= size if config.critic.model is None else 4
    is_full = settings.tuning == "full"
    weights = {
        "policy": round(policy * (BYTES_4BIT if settings.quantize_4bit else size)),
        "critic": critic,
        "reference": policy * size if is_full else 0,
    }
    trained = critic + (policy * size if is_full else 0)
    rewards = reward_weights(config.reward)
    before = {FRAMEWORK: used_memory(device) + (CUDA_CONTEXT if device.type == "cuda" else 0)}
    held = before | weights | rewards | {"optimizer states": ADAM_MOMENTS * trained}
    phases = {"update": held | {"gradients": trained}}
    if config.gold is not None:
        phases["gold"] = held | {"gold": sum(reward_weights(config.gold).values())}
    if stacked := sum(size for name, size in rewards.items() if "ensemble" in name):
        # Members are stacked before the policy is loaded, and exist twice for that moment.
        phases["load"] = before | rewards | {"stacking members": stacked}
    return MemoryEstimate(phases=phases)


def stored_sizes(name: str, revision: str | None = None) -> dict[str, int]:
    """How many numbers each tensor of a model's safetensors files has; empty without such files."""
    index = find_file(name, "model.safetensors.index.json", revision)
    names = {"model.safetensors"}
    sizes: dict[str, int] = {}
    try:
        if index is not None:
            names = set(json.loads(index.read_text())["weight_map"].values())
        for file in names:
            if (path := find_file(name, file, revision)) is None:
                return {}
            with safe_open(path, "pt") as tensors:
                keys = tensors.keys()
                sizes |= {key: math.prod(tensors.get_slice(key).get_shape()) for key in keys}
    except (OSError, ValueError, KeyError, SafetensorError):
        return {}  # loading the model will say what is wrong with it
    return sizes


def reward_models(
    settings: RewardSettings, name: str = "model"
) -> Iterator[tuple[str, ClassifierSettings]]:
    """Every reward model, each member of an ensemble for itself."""
    if isinstance(settings, ClassifierSettings):
        yield name, settings
    elif isinstance(settings, EnsembleSettings):
        for member in settings.classifiers():
            yield f"ensemble of {len(settings.classifiers())}", member
    elif isinstance(settings, SumSettings):
        for key, part in settings.parts.items():
            yield from reward_models(part.reward, key)


def reward_weights(settings: RewardSettings) -> Bytes:
    """Bytes of reward models' weights, by their files."""
    found: Bytes = {}
    for name, model in reward_models(settings):
        numbers = sum(stored_sizes(model.model, model.revision).values())
        key = f"reward {name}"
        found[key] = found.get(key, 0) + numbers * _dtype_size(model.dtype)
    return found


# Once they are loaded


def loaded_estimate(
    config: RunConfig,
    policy: ActorCritic,
    reference: Reference,
    sizes: Sizes,
    *,
    used: int,
    num_shards: int = 1,
    measured: Mapping[str, int] | None = None,
) -> MemoryEstimate:
    """The need of every phase: components by shape, and the rest of what was `measured` in it.

    `used`: bytes in use before the first pass. Phases that were not measured get a generous bound.
    """
    model = policy.lm.model
    weights = model_weights(policy, reference) | reward_weights(config.reward)
    framework = max(used - sum(weights.values()), 0)
    if policy.device.type == "cuda":
        framework += CUDA_CONTEXT
    trained = sum(_bytes(p) for group in policy.trainable() for p in group) // num_shards
    held = {FRAMEWORK: framework} | weights | {"optimizer states": ADAM_MOMENTS * trained}
    tokens = sizes.prompt + sizes.response
    size = 2 if config.policy.autocast else model.dtype.itemsize
    frozen: Bytes = {}
    if policy.lm.frozen is not None:  # their outputs are kept for all rows of the batch
        rows = max(sizes.batch - sizes.update, 0)
        frozen = {"outputs of frozen blocks": rows * tokens * policy.lm.hidden_size * size}
    special: dict[str, Bytes] = {
        "generate": {"key-value cache": cache_bytes(model, sizes.generate, tokens, size)},
        "forward": {},
        "score": {},
        "update": {"gradients": trained},
    }
    if config.offline is not None or config.rollout.engine == "vllm":
        del special["generate"]
    rows = max(sizes.forward, sizes.update, sizes.score)
    bound = generous_bound(model, rows * tokens, sizes.generate)
    phases: dict[str, Bytes] = {}
    for phase, own in special.items():
        counted = held | own
        passes = bound
        if measured is not None:
            passes = max(measured.get(phase, 0) - sum(counted.values()), 0)
        phases[phase] = counted | {PASSES: passes} | ({} if phase == "generate" else frozen)
    if config.gold is not None:
        phases["gold"] = held | {"gold": sum(reward_weights(config.gold).values())}
    return MemoryEstimate(phases=phases)


def model_weights(policy: ActorCritic, reference: Reference) -> Bytes:
    """Weights of policy, critic and reference; shared ones count once, for the policy."""
    seen: set[int] = set()
    found = {}
    modules = {"policy": policy.lm, "critic": policy.critic, "reference": reference.lm}
    for name, module in modules.items():
        tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        found[name] = sum(_bytes(tensor) for key, tensor in tensors.items() if key not in seen)
        seen |= tensors.keys()
    return found


def cache_bytes(model: Any, rows: int, tokens: int, size: int) -> int:
    """Keys and values of every layer, `size` bytes a number; a sliding window holds no more."""
    from transformers import DynamicCache

    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    layers = DynamicCache(config=model.config).layers
    kept = sum(min(getattr(layer, "sliding_window", None) or tokens, tokens) for layer in layers)
    return int(2 * rows * heads * width * size * kept)


def generous_bound(model: Any, num_tokens: int, num_sampled: int) -> int:
    """Bytes that passes over so many tokens, or sampling so many rows, hold at most."""
    config = model.config.get_text_config()
    activations = GENEROUS * config.num_hidden_layers * config.hidden_size * num_tokens
    logits = 4 * (CHUNK_ELEMENTS + config.vocab_size * num_sampled)
    return int(4 * (activations + logits))


def _bytes(tensor: torch.Tensor | nn.Parameter) -> int:
    return tensor.numel() * tensor.element_size()


def _dtype_size(name: str) -> int:
    return 2 if name == "bfloat16" else 4


# Does it fit, and what to change


def memory_budget(config: RunConfig, device: torch.device) -> int | None:
    """Bytes that this process may use; None if the system does not say."""
    if config.max_memory_gib is not None:
        return round(config.max_memory_gib * GIB)
    available = device_memory(device)
    if available is None or device.type == "cuda":
        return available
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def refuse_if_too_much(config: RunConfig, estimate: MemoryEstimate, device: torch.device) -> None:
    """Raise PreflightError if the need is more than the budget."""
    if problem := refusal(config, estimate, device):
        raise PreflightError(problem)


def refusal(config: RunConfig, estimate: MemoryEstimate, device: torch.device) -> str | None:
    """Need, budget, the fullest phase's components and what to change; None if the run fits."""
    budget = memory_budget(config, device)
    if budget is None or estimate.peak <= budget:
        return None
    phase = estimate.peak_phase
    whose = "max_memory_gib allows" if config.max_memory_gib is not None else f"{device} has"
    lines = [f"  {size / GIB:7.2f} GiB  {name}\n" for name, size in estimate.biggest(phase)]
    return (
        f"the run needs about {estimate.peak / GIB:.2f} GiB in its fullest phase ({phase}), and "
        f"{whose} {budget / GIB:.2f} GiB:\n{''.join(lines)}Change {changes(config, phase)}. "
        "This is an estimate: a higher max_memory_gib starts the run all the same"
    )


def changes(config: RunConfig, phase: str) -> str:
    """Which settings make a phase smaller, those that change no number first."""
    ppo, rollout = config.ppo, config.rollout
    remedies: list[str] = []
    if phase in ("generate", "evaluate"):
        size = rollout.generation_batch_size or ppo.batch_size
        if size > 1:
            remedies.append(f"rollout.generation_batch_size (below {size})")
    if phase == "generate" and merges_adapters(config, sharded=False):
        remedies.append("rollout.merge_adapters=false")
    if phase in ("score", "load"):
        remedies += _reward_changes("reward", config.reward)
    if phase == "gold":
        remedies += _reward_changes("gold", config.gold)
    if phase not in ("generate", "gold", "load"):
        size = ppo.micro_batch
        if ppo.micro_batch_tokens is not None:
            remedies.append(f"ppo.micro_batch_tokens (below {ppo.micro_batch_tokens})")
        elif size > 1:
            remedies.append(f"ppo.micro_batch_size (below {size})")
    if phase == "update" and not config.policy.gradient_checkpointing:
        remedies.append("policy.gradient_checkpointing=true")
    if longest(rollout.response_length) > 1:
        remedies.append(f"a shorter rollout.response_length ({rollout.response_length} now)")
    if config.policy.tuning == "full":
        remedies.append("policy.tuning=lora or last_layers")
    if config.critic.kind == "separate":
        remedies.append("critic.kind=trunk")
    return "; or ".join([*remedies, "a smaller model"])


def _reward_changes(name: str, reward: RewardSettings | None) -> Iterator[str]:
    if isinstance(reward, ClassifierSettings | EnsembleSettings):
        if reward.batch_size > 1:
            yield f"{name}.batch_size (below {reward.batch_size})"
        if reward.dtype == "float32":
            yield f"{name}.dtype=bfloat16"
    elif isinstance(reward, SumSettings):
        for key, part in reward.parts.items():
            yield from _reward_changes(f"{name}.parts.{key}.reward", part.reward)
