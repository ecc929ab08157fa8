"""Does a run fit? The estimate for this machine, and a refusal before the start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from klippo.config.schema import RunConfig
from klippo.data.files import Row
from klippo.data.prompts import build_prompts
from klippo.data.rows import Data, train_source
from klippo.errors import KlippoError, PreflightError
from klippo.hub import load_tokenizer, shape_model
from klippo.lengths import room_for_prompts
from klippo.ranks import Ranks, warn
from klippo.rewards.settings import ClassifierSettings, EnsembleSettings, SumSettings
from klippo.runs.memory import GIB, device_memory, framework_bytes, kept_share
from klippo.train.engines import merges_adapters
from klippo.train.launch import choose_sharding
from klippo.train.memory import Machine, MemoryEstimate, estimate_memory

NUM_LONGEST = 64
"""Prompts that are tokenized to find the longest: those with the most characters."""


class NoEstimateError(Exception):
    """The models' shapes cannot be traced; the run may be fine."""


def check_memory(config: RunConfig, data: Data, device: torch.device) -> None:
    """Raise PreflightError where the run needs more memory than there is, or than it may have.

    Where the need cannot be told, or what there is, a warning or nothing.
    """
    budget = memory_budget(config, device)
    if budget is None:
        return
    try:
        estimate = estimate_of(config, data, device)
    except NoEstimateError as error:
        warn(str(error))
        return
    if estimate.peak > budget:
        raise PreflightError(refusal(config, estimate, budget, device))


def memory_budget(config: RunConfig, device: torch.device) -> int | None:
    """Bytes that this process may hold; None where the system does not say."""
    if config.max_memory_gib is not None:
        return round(config.max_memory_gib * GIB)
    there = device_memory(device)
    if there is None or device.type == "cuda":
        return there
    return there // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def refusal(config: RunConfig, estimate: MemoryEstimate, budget: int, device: torch.device) -> str:
    """Need, budget, the components of the fullest phase, and what to change."""
    phase = estimate.peak_phase
    whose = "max_memory_gib allows" if config.max_memory_gib is not None else f"{device} has"
    parts = estimate.biggest(phase, number=len(estimate.phases[phase]))
    lines = [f"  {size / GIB:7.2f} GiB  {name}" for name, size in parts]
    return "\n".join(
        [
            f"the run needs about {estimate.peak / GIB:.2f} GiB in its fullest phase ({phase}), "
            f"and {whose} {budget / GIB:.2f} GiB:",
            *lines,
            f"Change {changes(config, phase)}. This is an estimate: a higher max_memory_gib starts "
            "the run all the same",
        ]
    )


def changes(config: RunConfig, phase: str) -> str:
    """Which settings make a phase smaller, those that change no number first."""
    found = [*_of_phase(config, phase), *_of_weights(config)]
    return "; or ".join(found)


def _of_phase(config: RunConfig, phase: str) -> Iterator[str]:
    ppo, rollout = config.ppo, config.rollout
    if phase in ("generate", "evaluate"):
        size = rollout.generation_batch_size or ppo.batch_size
        if size > 1:
            yield f"rollout.generation_batch_size (below {size})"
    if phase == "generate" and merges_adapters(config, sharded=False):
        yield "rollout.merge_adapters=false"
    if phase in ("score", "load"):
        yield from _of_reward("reward", config.reward)
    if phase == "gold":
        yield from _of_reward("gold", config.gold)
    if phase not in ("generate", "gold", "load"):
        size = ppo.micro_batch_size or ppo.minibatch_size or ppo.batch_size
        if ppo.micro_batch_tokens is not None:
            yield f"ppo.micro_batch_tokens (below {ppo.micro_batch_tokens})"
        elif size > 1:
            yield f"ppo.micro_batch_size (below {size})"
    if phase == "update" and not config.policy.gradient_checkpointing:
        yield "policy.gradient_checkpointing=true"
    yield f"a shorter rollout.response_length ({rollout.response_length} now)"


def _of_reward(name: str, reward: Any) -> Iterator[str]:
    if isinstance(reward, ClassifierSettings | EnsembleSettings):
        if reward.batch_size > 1:
            yield f"{name}.batch_size (below {reward.batch_size})"
        if reward.dtype == "float32":
            yield f"{name}.dtype=bfloat16"
    elif isinstance(reward, SumSettings):
        for key, part in reward.parts.items():
            yield from _of_reward(f"{name}.parts.{key}.reward", part.reward)


def _of_weights(config: RunConfig) -> Iterator[str]:
    if config.policy.tuning == "full":
        yield "policy.tuning=lora or last_layers"
    if config.critic.kind == "separate":
        yield "critic.kind=trunk"
    yield "a smaller model"


def estimate_of(config: RunConfig, data: Data, device: torch.device) -> MemoryEstimate:
    """The estimate for this machine and for the longest prompts of the data.

    Raises ConfigError or PreflightError for what is wrong with data or models, NoEstimateError for
    an architecture whose code needs numbers.
    """
    from transformers import AutoModelForCausalLM

    model = shape_model(
        AutoModelForCausalLM,
        config.policy.model,
        config.policy.revision,
        dtype=getattr(torch, config.policy.dtype),
    )
    rows = [*data[0], *data[1]]
    if config.offline is not None:
        limits = {"response_length": longest_response(config, rows)}
        rollout = config.rollout.model_copy(update=limits)
        config = config.model_copy(update={"rollout": rollout})
    prompt = longest_prompt(config, rows, model)
    return estimate_on(config, model, prompt, device)


def estimate_on(config: RunConfig, model: Any, prompt: int, device: torch.device) -> MemoryEstimate:
    """The estimate of a policy on the meta device, with prompts of at most `prompt` tokens."""
    ranks = Ranks.from_environment(device)
    machine = Machine(
        device=device.type,
        framework=framework_bytes(device),
        kept_share=kept_share(device),
        num_processes=ranks.world_size,
        num_shards=1 if choose_sharding(config, ranks) == "none" else ranks.world_size,
    )
    try:
        return estimate_memory(config, machine, prompt=prompt, model=model)
    except KlippoError:
        raise
    except Exception as error:  # code of models that nobody here has seen
        raise NoEstimateError(
            f"the memory that the run needs cannot be estimated for {type(model).__name__} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error


def longest_response(config: RunConfig, rows: Sequence[Row]) -> int:
    """Tokens of the longest logged response, among those with the most characters."""
    assert config.offline is not None
    column = config.offline.response_column
    values = [row.columns.get(column) for row in rows]
    texts = [str(x) for value in values for x in (value if isinstance(value, list) else [value])]
    longest = sorted(texts, key=len)[-NUM_LONGEST:]
    tokenizer = load_tokenizer(config.policy.model, config.policy.revision)
    return 1 + max(len(tokenizer.encode(text, add_special_tokens=False)) for text in longest)


def longest_prompt(config: RunConfig, rows: Sequence[Row], model: Any) -> int:
    """Tokens of the longest prompt, among those with the most characters."""
    room = room_for_prompts(model, config.rollout.response_length, config.data.max_prompt_tokens)
    columns = config.data.prompt_columns
    longest = sorted(rows, key=lambda row: -len(str(row.prompt(columns))))[:NUM_LONGEST]
    settings = config.data.model_copy(update={"overlong": "keep_end"})
    prompts = build_prompts(
        longest,
        settings,
        load_tokenizer(config.policy.model, config.policy.revision),
        max_prompt_tokens=room,
        seed=config.seed,
        source=train_source(settings),
    )
    return max(len(prompt.token_ids) for prompt in prompts)
