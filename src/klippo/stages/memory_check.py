"""Does a run fit? The estimate as a table, a refusal before the start, and what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from klippo.config.schema import RunConfig
from klippo.data.files import Row
from klippo.data.prompts import build_prompts
from klippo.data.rows import train_source
from klippo.errors import PreflightError
from klippo.hub import load_tokenizer, shape_model
from klippo.ranks import Ranks
from klippo.runs.memory import GIB, device_memory, framework_bytes
from klippo.stages.build import room_for_prompts
from klippo.stages.memory import Machine, MemoryEstimate, estimate_memory

NUM_LONGEST = 64
"""Prompts that are tokenized to find the longest: those with the most characters."""


def estimate_of(
    config: RunConfig, data: tuple[Sequence[Row], Sequence[Row]], device: torch.device
) -> MemoryEstimate:
    """The estimate for this machine and for the longest prompts of the data.

    Raises ConfigError or PreflightError for what is wrong with data or models.
    """
    from transformers import AutoModelForCausalLM

    model = shape_model(
        AutoModelForCausalLM,
        config.policy.model,
        config.policy.revision,
        dtype=getattr(torch, config.policy.dtype),
    )
    prompt = longest_prompt(config, [*data[0], *data[1]], model)
    machine = Machine(
        device=device.type,
        framework=framework_bytes(device),
        num_processes=Ranks.from_environment(device).world_size,
    )
    return estimate_memory(config, machine, prompt=prompt, model=model)


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
