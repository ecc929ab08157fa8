"""What a run needs of the memory, by component, and whether it fits.

Weights, gradients, AdamW's moments and the key-value cache follow from shapes; what the passes
need beside them is measured by a trial step (`klippo.train.trial`).
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

from klippo.config.schema import RunConfig
from klippo.errors import PreflightError
from klippo.hub import find_file
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.rewards.settings import (
    ClassifierSettings,
    EnsembleSettings,
    RewardSettings,
    SumSettings,
)
from klippo.runs.memory import GIB, cuda_context, device_memory, used_memory
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

    @classmethod
    def of(
        cls,
        config: RunConfig,
        weights: Bytes,
        trained: int,
        phases: Mapping[str, Bytes],
        measured: Mapping[str, int],
    ) -> MemoryEstimate:
        """What every phase holds, its own components, and the rest of what was `measured` in it.

        trained: bytes of the weights that train.
        """
        held = weights | {"optimizer states": ADAM_MOMENTS * trained}
        phases = {phase: held | own for phase, own in phases.items()}
        for phase, peak in measured.items():
            phases[phase] |= {PASSES: max(peak - sum(phases[phase].values()), 0)}
        if config.gold is not None:
            phases["gold"] = held | {"gold": sum(reward_weights(config.gold).values())}
        return cls(phases=phases)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return self.total(self.peak_phase)

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    def biggest(self, phase: str) -> list[tuple[str, int]]:
        """The components of a phase, largest first."""
        listed = sorted(self.phases[phase].items(), key=lambda item: -item[1])
        return [(name, size) for name, size in listed if size > 0]


def check_weights(config: RunConfig, device: torch.device) -> None:
    """Before anything is loaded: raise PreflightError if the weights alone need too much."""
    if problem := refusal(config, stored_estimate(config, device), device):
        raise PreflightError(problem)


def stored_estimate(config: RunConfig, device: torch.device) -> MemoryEstimate:
    """What the run needs at least, by the shapes in the models' safetensors files.

    Models without such files count as nothing, and so do adapters and critics made of the policy.
    """
    settings, critic = config.policy, config.critic.model
    size = 2 if settings.dtype == "bfloat16" else 4
    policy = num_stored(settings.model, settings.revision)
    weights = {
        FRAMEWORK: used_memory(device) + cuda_context(device),
        "policy": round(policy * (BYTES_4BIT if settings.quantize_4bit else size)),
        "critic": 0 if critic is None else 4 * num_stored(critic),
        "reference": policy * size if settings.tuning == "full" else 0,
    }
    trained = weights["critic"] + weights["reference"]
    weights |= reward_weights(config.reward)
    return MemoryEstimate.of(config, weights, trained, {"update": {"gradients": trained}}, {})


def num_stored(name: str, revision: str | None = None) -> int:
    """How many numbers a model's safetensors files have; 0 without such files."""
    number = 0
    try:
        index = find_file(name, "model.safetensors.index.json", revision)
        files = {"model.safetensors"}
        if index is not None:
            files = set(json.loads(index.read_text())["weight_map"].values())
        for file in files:
            if (path := find_file(name, file, revision)) is None:
                return 0
            with safe_open(path, "pt") as tensors:
                keys = tensors.keys()
                number += sum(math.prod(tensors.get_slice(key).get_shape()) for key in keys)
    except (OSError, ValueError, KeyError, SafetensorError):
        return 0  # loading the model will say what is wrong with it
    return number


def reward_models(
    settings: RewardSettings, name: str = "model"
) -> Iterator[tuple[str, ClassifierSettings]]:
    """Every reward model, each member of an ensemble for itself."""
    if isinstance(settings, ClassifierSettings):
        yield name, settings
    elif isinstance(settings, EnsembleSettings):
        members = settings.classifiers()
        yield from ((f"ensemble of {len(members)}", member) for member in members)
    elif isinstance(settings, SumSettings):
        for key, part in settings.parts.items():
            yield from reward_models(part.reward, key)


def reward_weights(settings: RewardSettings) -> Bytes:
    """Bytes of reward models' weights, by their files."""
    sizes: Bytes = {}
    for name, model in reward_models(settings):
        size = num_stored(model.model, model.revision) * (2 if model.dtype == "bfloat16" else 4)
        sizes[f"reward {name}"] = sizes.get(f"reward {name}", 0) + size
    return sizes


def model_weights(policy: ActorCritic, reference: Reference) -> Bytes:
    """Bytes of the loaded policy, critic and reference; shared weights count for the policy."""
    seen: set[int] = set()
    sizes = {}
    modules = {"policy": policy.lm, "critic": policy.critic, "reference": reference.lm}
    for name, module in modules.items():
        tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        sizes[name] = sum(tensor.nbytes for key, tensor in tensors.items() if key not in seen)
        seen |= tensors.keys()
    return sizes


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
    """Bytes that passes over so many tokens, or sampling so many rows, need at most."""
    config = model.config.get_text_config()
    activations = GENEROUS * config.num_hidden_layers * config.hidden_size * num_tokens
    logits = 4 * (CHUNK_ELEMENTS + config.vocab_size * num_sampled)
    return int(4 * (activations + logits))


def memory_budget(config: RunConfig, device: torch.device) -> int | None:
    """Bytes that this process may use; None if the system does not say."""
    if config.max_memory_gib is not None:
        return round(config.max_memory_gib * GIB)
    available = device_memory(device)
    if available is None or device.type == "cuda":
        return available
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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
    samples, learns = phase in ("generate", "evaluate"), phase not in ("generate", "gold")
    generated, tokens = rollout.generation_batch_size or ppo.batch_size, ppo.micro_batch_tokens
    remedies = [
        (samples and generated > 1, f"rollout.generation_batch_size (below {generated})"),
        (
            phase == "generate" and merges_adapters(config, sharded=False),
            "rollout.merge_adapters=false",
        ),
        *(_reward_changes("reward", config.reward) if phase == "score" else ()),
        *(_reward_changes("gold", config.gold) if phase == "gold" else ()),
        (learns and tokens is not None, f"ppo.micro_batch_tokens (below {tokens})"),
        (
            learns and tokens is None and ppo.micro_batch > 1,
            f"ppo.micro_batch_size (below {ppo.micro_batch})",
        ),
        (
            phase == "update" and not config.policy.gradient_checkpointing,
            "policy.gradient_checkpointing=true",
        ),
        (True, f"a shorter rollout.response_length ({rollout.response_length} now)"),
        (config.policy.tuning == "full", "policy.tuning=lora or last_layers"),
        (config.critic.kind == "separate", "critic.kind=trunk"),
        (True, "a smaller model"),
    ]
    return "; or ".join(text for applies, text in remedies if applies)


def _reward_changes(name: str, reward: RewardSettings | None) -> Iterator[tuple[bool, str]]:
    if isinstance(reward, ClassifierSettings | EnsembleSettings):
        yield reward.batch_size > 1, f"{name}.batch_size (below {reward.batch_size})"
        yield reward.dtype == "float32", f"{name}.dtype=bfloat16"
    elif isinstance(reward, SumSettings):
        for key, part in reward.parts.items():
            yield from _reward_changes(f"{name}.parts.{key}.reward", part.reward)
