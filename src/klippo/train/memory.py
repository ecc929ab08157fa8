"""How much memory a run will need, by component, from its config and its models' shapes.

Nothing is loaded. The run's own modules are built on the meta device and its own code runs there
once per phase: a sampled token, a scored batch, a batch of experience, a micro-batch's update.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from klippo.config.schema import RunConfig
from klippo.hub import shape_model
from klippo.lengths import longest
from klippo.policy.actor_critic import ActorCritic
from klippo.policy.loading import LoadedPolicy, shape_policy
from klippo.policy.merged import merged_adapters, merged_bytes
from klippo.policy.tracing import IN_BLOCKS, Bytes, storage_bytes
from klippo.rewards.scorers import STACKED_ELEMENTS, load_scorer
from klippo.rewards.settings import (
    ClassifierSettings,
    EnsembleSettings,
    RewardSettings,
    SumSettings,
    ensembles,
)
from klippo.train.engines import merges_adapters
from klippo.train.memory_phases import (
    evaluation_bytes,
    forward_bytes,
    frozen_state_bytes,
    generation_bytes,
    scoring_bytes,
    total_bytes,
    update_bytes,
)

FRAMEWORK = "Python, PyTorch and data"
KEPT = "kept back by the allocator"
LEFT_AFTER_4BIT = 4.127 / 8
"""Bytes per weight in NF4 with double quantization: 4 bits and 0.127 bits of constants (Dettmers et
al. 2023, arXiv 2305.14314)."""
ADAM_STATES = 2
"""Moments per weight, in the weight's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the run would be."""

    device: str = "cpu"
    """`cpu` or `cuda`."""
    framework: int = 0
    """Bytes that are gone before the first model."""
    kept_share: float = 0.0
    """Of what a phase holds in small blocks, the share that the allocator keeps back."""
    num_processes: int = 1
    num_shards: int = 1
    """Processes that share out gradients and optimizer states. Weights count in full: they are
    whole while responses are sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes by phase and component: what is held at the fullest moment of each phase."""

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

    def biggest(self, phase: str, number: int = 3) -> list[tuple[str, int]]:
        """The largest components of a phase, largest first."""
        return sorted(self.phases[phase].items(), key=lambda item: -item[1])[:number]


def estimate_memory(
    config: RunConfig, machine: Machine, *, prompt: int, model: Any | None = None
) -> MemoryEstimate:
    """What a run of one process needs at most, with prompts of at most `prompt` tokens.

    `model`: the policy's model on the meta device, where it was given from Python. Raises what
    loading the models raises for names and settings that do not fit.
    """
    loaded = shape_policy(config.policy, config.critic, copy.deepcopy(model))
    weights = {FRAMEWORK: machine.framework} | policy_weights(config, loaded)
    if config.rollout.engine == "vllm":
        weights |= vllm_bytes(config, loaded, machine)
    rewards = [*scorers(config.reward)]
    for name, scorer, _ in rewards:
        weights[f"reward {name}"] = weights.get(f"reward {name}", 0) + _weights_of(scorer)
    if config.policy.autocast:
        weights["bfloat16 copies of weights"] = _autocast_copies(loaded.policy)
        compute = config.policy.model_copy(update={"dtype": "bfloat16", "autocast": False})
        # What the passes hold is in bfloat16: their shapes are those of a bfloat16 model.
        loaded = shape_policy(compute, config.critic, model and model.bfloat16())
    of_policy, of_critic = loaded.policy.trainable()
    trained = sum(p.numel() * _stored_size(p, config) for p in (*of_policy, *of_critic))
    weights["optimizer states"] = ADAM_STATES * trained // machine.num_shards
    sizes = _Sizes.of(config, machine.num_processes, prompt)
    policy, reference, response = loaded.policy, loaded.reference, sizes.response
    traced = {
        "generate": _generation(config, machine, policy, sizes, prompt),
        "score": _scoring(rewards, sizes.score, prompt, response, machine),
        "forward": forward_bytes(policy, reference, sizes.forward, prompt, response),
        "update": update_bytes(
            policy,
            sizes.update,
            prompt,
            response,
            parts=sizes.parts,
            with_entropy=config.ppo.entropy_coef > 0,
        ),
    }
    traced["update"]["gradients"] //= machine.num_shards
    kept = frozen_state_bytes(policy, config.ppo.batch_size, prompt, response)
    for phase in ("forward", "score", "update"):
        traced[phase] |= kept
    if config.offline is not None or config.rollout.engine == "vllm":
        del traced["generate"]
    if sizes.evaluate > 0:
        traced["evaluate"] = evaluation_bytes(policy, reference, sizes.evaluate, prompt, response)
    phases = {name: weights | _with_kept(found, machine) for name, found in traced.items()}
    if gold := [] if config.gold is None else [*scorers(config.gold)]:
        phases["gold"] = (
            weights
            | {"gold": sum(_weights_of(scorer) for _, scorer, _ in gold)}
            | _with_kept(_scoring(gold, sizes.score, prompt, response, machine), machine)
        )
    if stacked := sum(_weights_of(s) for name, s, _ in rewards if name.startswith("ensemble")):
        # Members are stacked before the policy is there, and are there twice for that moment.
        own = {name: size for name, size in weights.items() if name.startswith("reward")}
        phases["load"] = {FRAMEWORK: machine.framework} | own | {"stacking members": stacked}
    return MemoryEstimate(phases={n: {k: v for k, v in p.items() if v} for n, p in phases.items()})


def policy_weights(config: RunConfig, loaded: LoadedPolicy) -> Bytes:
    """Weights of policy, critic and reference; what they share counts once, for the policy."""
    policy, critic = [*_tensors(loaded.policy.lm)], [*_tensors(loaded.policy.critic)]
    saved = _saved_by_4bit(loaded.policy) if config.policy.quantize_4bit else 0
    return {
        "policy": storage_bytes(policy) - saved,
        "critic": storage_bytes(critic, policy),
        "reference": storage_bytes(_tensors(loaded.reference.lm), policy),
    }


def vllm_bytes(config: RunConfig, loaded: LoadedPolicy, machine: Machine) -> Bytes:
    """vLLM's copy of the merged weights and, on the CPU, its key-value cache.

    What else it takes of `gpu_memory_utilization` is what is free, and vLLM asks for it itself.
    """
    parameters = loaded.policy.lm.model.named_parameters()
    numbers = sum(weight.numel() for name, weight in parameters if ".lora_" not in name)
    size = 2 if config.policy.autocast or config.policy.dtype == "bfloat16" else 4
    cache = round(config.rollout.vllm.kv_cache_gib * 2**30) if machine.device == "cpu" else 0
    return {"vLLM's weights": size * numbers, "vLLM's key-value cache": cache}


def _generation(
    config: RunConfig, machine: Machine, policy: ActorCritic, sizes: _Sizes, prompt: int
) -> Bytes:
    """Sampling, with the weights into which the adapter is folded for it."""
    model = policy.lm.model
    merges = merges_adapters(config, sharded=machine.num_shards > 1)
    merged = {"merged weights": merged_bytes(model)} if merges else {}
    with merged_adapters(model) if merges else nullcontext():
        return merged | generation_bytes(policy, sizes.generate, prompt, sizes.response)


def scorers(
    settings: RewardSettings, name: str = ""
) -> Iterator[tuple[str, nn.Module, ClassifierSettings]]:
    """Every reward model on the meta device, each member of an ensemble for itself."""
    if isinstance(settings, ClassifierSettings):
        yield name or "model", _scorer(settings), settings
    elif isinstance(settings, EnsembleSettings):
        members = settings.classifiers()
        for one in members:
            yield f"ensemble of {len(members)}{name and ' ' + name}", _scorer(one), one
    elif isinstance(settings, SumSettings):
        for part, of_part in settings.parts.items():
            yield from scorers(of_part.reward, part)


def _scorer(settings: ClassifierSettings) -> nn.Module:
    return load_scorer(settings.model, settings.revision, settings.dtype, load=shape_model).module


def _scoring(
    rewards: list[tuple[str, nn.Module, ClassifierSettings]],
    rows: int,
    prompt: int,
    response: int,
    machine: Machine,
) -> Bytes:
    """The largest reward model's pass; members that run stacked hold what all of them hold."""
    found: dict[str, Bytes] = {}
    for name, scorer, settings in rewards:
        length = response if settings.reads == "response" else prompt + response
        config = _config_of(scorer)
        context = getattr(config, "max_position_embeddings", length)
        length = max(min(length, context, settings.max_tokens or length), 1)
        own = scoring_bytes(scorer, min(settings.batch_size, rows), length)
        elements = min(settings.batch_size, rows) * length * int(getattr(config, "hidden_size", 1))
        if name.startswith("ensemble") and (
            machine.device == "cuda" or elements <= STACKED_ELEMENTS
        ):
            before = found.get(name, {})
            found[name] = {kind: before.get(kind, 0) + size for kind, size in own.items()}
        else:
            found[name] = max(found.get(name, {}), own, key=total_bytes)
    return max(found.values(), key=total_bytes, default={})


def _with_kept(passing: Bytes, machine: Machine) -> Bytes:
    kinds = {kind: size for kind, size in passing.items() if kind != IN_BLOCKS}
    return kinds | {KEPT: round(machine.kept_share * passing.get(IN_BLOCKS, 0))}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Rows that are computed at once, in one process."""

    response: int
    generate: int
    score: int
    forward: int
    update: int
    parts: int
    """Micro-batches per optimizer step."""
    evaluate: int

    @classmethod
    def of(cls, config: RunConfig, num_processes: int, prompt: int) -> _Sizes:
        ppo, response = config.ppo, longest(config.rollout.response_length)
        batch = ppo.batch_size // num_processes
        minibatch = (ppo.minibatch_size or ppo.batch_size) // num_processes
        micro = ppo.micro_batch_size
        if ppo.micro_batch_tokens is not None:  # rounded up: shorter rows leave less of it unused
            micro = -(-ppo.micro_batch_tokens // (prompt + response))
        update = min(micro or minibatch, minibatch)
        evaluated = -(-config.evaluation.num_prompts // num_processes)
        if config.offline is not None:
            evaluated = max(config.evaluation.num_prompts, batch)  # diagnostics, in every process
        measured = [e.reference_size for e in ensembles(config.reward) if e.standardize == "start"]
        most = max(batch, evaluated, config.early_stop.gold_prompts, *measured)
        return cls(
            response=response,
            generate=min(config.rollout.generation_batch_size or most, most),
            score=most,
            forward=min(micro or batch, batch),
            update=update,
            parts=-(-minibatch // update),
            evaluate=min(micro or ppo.batch_size, evaluated),
        )


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _weights_of(module: nn.Module) -> int:
    return storage_bytes(_tensors(module))


def _config_of(scorer: nn.Module) -> Any:
    holder: Any = getattr(scorer, "trunk", None) or scorer.model
    return holder.config.get_text_config()


def _matrices(policy: ActorCritic) -> dict[str, nn.Parameter]:
    """The weights of products and embeddings."""
    return {n: p for n, p in policy.lm.model.named_parameters() if p.dim() > 1}


def _autocast_copies(policy: ActorCritic) -> int:
    return sum(2 * p.numel() for p in _matrices(policy).values() if p.dtype == torch.float32)


def _saved_by_4bit(policy: ActorCritic) -> int:
    """Bytes that 4-bit storage saves: of the frozen blocks, not of embeddings and LM head."""
    apart = (policy.lm.model.get_input_embeddings(), policy.lm.model.get_output_embeddings())
    whole = {id(module.weight) for module in apart}
    frozen = [p for p in _matrices(policy).values() if not p.requires_grad and id(p) not in whole]
    return round(sum(p.numel() * (p.element_size() - LEFT_AFTER_4BIT) for p in frozen))


def _stored_size(parameter: nn.Parameter, config: RunConfig) -> int:
    """Bytes per number as it is stored, where the shapes are those of the autocast passes."""
    is_cast = config.policy.autocast and parameter.dtype == torch.bfloat16
    return 4 if is_cast and config.policy.dtype == "float32" else parameter.element_size()
