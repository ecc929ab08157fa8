"""The weights that a model computes with, how far two models' are apart, and writing them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klippo.hub import no_progress_bars
from klippo.policy.actor_critic import ActorCritic, LoraCritic, SeparateCritic
from klippo.policy.adapters import CRITIC, POLICY, is_plain_lora
from klippo.policy.sharding import full_state
from klippo.types import HFModel, Tokenizer

VALUE_HEAD_FILE = "value_head.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChange:
    """How far the weights of one model are from those of another."""

    relative: float
    """|W_after - W_before| / |W_before|, the L2 norm over all weights at once."""
    num_changed: int
    """Tensors that are not equal bit by bit."""
    num_tensors: int


@torch.no_grad()
def effective_weights(model: HFModel) -> Iterator[tuple[str, Tensor]]:
    """Name and value (float32) of each weight; with LoRA layers, W + scale * B A.

    Names are those of the model without an adapter. Raises ValueError for adapters that are more
    than such a sum (DoRA, biases in the adapter).
    """
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".original_module." in name:
            continue
        value = parameter.float()
        layer_name, is_in_layer, _ = name.rpartition(".base_layer.")
        if is_in_layer:
            layer: Any = model.get_submodule(layer_name)
            if not is_plain_lora(layer):
                raise ValueError(f"the adapter at {layer_name} is not plain LoRA")
            if name.endswith("weight"):
                for adapter in layer.active_adapters:
                    value = value + layer.get_delta_weight(adapter).float()
        # peft names a copy `modules_to_save.<adapter>`.
        yield re.sub(r"base_layer\.|modules_to_save\.[^.]*\.", "", name), value


@torch.no_grad()
def merged_weights(policy: ActorCritic) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the causal LM with its adapter merged, one after the other.

    Those of `effective_weights` (float32), and the buffers that a checkpoint holds; a head that is
    tied to the embedding is not repeated. The policy's own weights stay as they are.
    """
    model = policy.lm.model
    yield from effective_weights(model)
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


@torch.no_grad()
def weight_change(before: HFModel, after: HFModel) -> WeightChange:
    """Compare two models tensor by tensor.

    Raises ValueError, with the reason, for models whose weights do not have the same names and
    shapes.
    """
    moved = total = 0.0
    num_changed = num_tensors = 0
    pairs = itertools.zip_longest(effective_weights(before), effective_weights(after))
    for old, new in pairs:
        if old is None or new is None or old[0] != new[0] or old[1].shape != new[1].shape:
            raise ValueError("the architectures differ")
        difference = new[1] - old[1]
        moved += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        total += float(torch.linalg.vector_norm(old[1], dtype=torch.float64)) ** 2
        num_changed += bool(difference.any())
        num_tensors += 1
    return WeightChange(
        relative=(moved / total) ** 0.5, num_changed=num_changed, num_tensors=num_tensors
    )


def save_model(policy: ActorCritic, tokenizer: Tokenizer, model_dir: Path) -> None:
    """Model (or adapter) and tokenizer; inside `full_weights`, as `save_policy`."""
    with no_progress_bars():
        if policy.peft_model is None:
            weights = full_state(policy.lm.model)
            policy.lm.model.save_pretrained(model_dir, state_dict=weights)
        else:
            _save_adapter(policy, POLICY, model_dir)
        tokenizer.save_pretrained(model_dir)


def save_policy(
    policy: ActorCritic, tokenizer: Tokenizer, model_dir: Path, critic_dir: Path
) -> None:
    """model_dir: as `save_model`; critic_dir: value head, and the critic's trunk or adapter."""
    from safetensors.torch import save_file

    save_model(policy, tokenizer, model_dir)
    critic = policy.critic
    critic_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(critic, SeparateCritic):
        with no_progress_bars():
            critic.trunk.save_pretrained(critic_dir, state_dict=full_state(critic.trunk))
        stands_on = "this folder's model"
    elif isinstance(critic, LoraCritic):
        _save_adapter(policy, CRITIC, critic_dir)
        stands_on = "the policy's base with this folder's adapter"
    else:
        stands_on = "the policy's trunk"
    head = full_state(critic.head)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in head.items()},
        critic_dir / VALUE_HEAD_FILE,
    )
    note = {"reads": "last hidden state before each response token", "stands_on": stands_on}
    (critic_dir / "critic.json").write_text(json.dumps(note, indent=2) + "\n")


def _save_adapter(policy: ActorCritic, name: str, folder: Path) -> None:
    assert policy.peft_model is not None
    weights = full_state(policy.peft_model)
    policy.peft_model.save_pretrained(folder, selected_adapters=[name], state_dict=weights)
