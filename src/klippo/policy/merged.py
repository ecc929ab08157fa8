"""A policy's weights as another program reads them: adapters folded in, checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from klippo.policy.actor_critic import ActorCritic
from klippo.policy.adapters import POLICY


@torch.no_grad()
def merged_weights(policy: ActorCritic) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the causal LM, one after the other; the policy's own stay as they are.

    Under a LoRA adapter a weight is W + alpha / rank * B A, in W's precision. A head that is tied
    to the embedding is not repeated.
    """
    model = policy.lm.model
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        module, inside, own = name.partition(".base_layer.")
        weight = parameter.detach()
        if inside and own == "weight":
            delta = model.get_submodule(module).get_delta_weight(POLICY)
            weight = (weight + delta).to(weight.dtype)
        yield f"{module}.{own}" if inside else name, weight
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
