"""The weights that a model computes with, and how far one model's are from another's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klippo.policy.actor_critic import ActorCritic
from klippo.policy.adapters import is_plain_lora
from klippo.types import HFModel

_BASE = "base_layer."
_COPY = "modules_to_save."


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
        layer_name, is_in_layer, _ = name.rpartition("." + _BASE)
        if is_in_layer:
            layer: Any = model.get_submodule(layer_name)
            if not is_plain_lora(layer):
                raise ValueError(f"the adapter at {layer_name} is not plain LoRA")
            if name.endswith("weight"):
                for adapter in layer.active_adapters:
                    value = value + layer.get_delta_weight(adapter).float()
        yield _plain_name(name), value


def _plain_name(name: str) -> str:
    before, is_copy, after = name.replace(_BASE, "").partition(_COPY)
    return before + after.partition(".")[2] if is_copy else before


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
