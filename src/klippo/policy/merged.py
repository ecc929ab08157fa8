"""A policy with its adapters folded in: for other programs, and for sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from klippo.policy.actor_critic import ActorCritic
from klippo.policy.weights import effective_weights


@torch.no_grad()
def merged_weights(policy: ActorCritic) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the causal LM, one after the other; the policy's own stay as they are.

    Those of `effective_weights` (float32), and the buffers that a checkpoint holds. A head that is
    tied to the embedding is not repeated.
    """
    model = policy.lm.model
    yield from effective_weights(model)
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


@contextmanager
def merged_adapters(model: Any) -> Iterator[None]:
    """Compute with W + scale * B A in place of W and adapter: one product per layer, not three.

    For passes without gradients, under the adapter that is active now. Layers that `mergeable`
    leaves out keep their adapters. The sums stand in one buffer of their own, and the very tensors
    W come back in the end, also after an exception.
    """
    layers = mergeable(model)
    bases = [layer.get_base_layer() for layer in layers]
    weights = [base.weight for base in bases]
    try:
        for layer, base, merged in zip(layers, bases, _sums(layers, weights), strict=True):
            base.weight = nn.Parameter(merged, requires_grad=False)
            layer.merged_adapters.extend(_active(layer))  # peft leaves these products out
        yield
    finally:
        for layer, base, weight in zip(layers, bases, weights, strict=True):
            base.weight = weight
            layer.merged_adapters.clear()


def mergeable(model: Any) -> list[Any]:
    """The model's LoRA layers that are a plain sum W + scale * B A, with W in float32 or float64.

    In bfloat16 the sum would round small steps of the adapter away, and 4-bit weights cannot hold
    it.
    """
    from peft.tuners.lora import Linear

    return [layer for layer in model.modules() if type(layer) is Linear and _is_sum(layer)]


def _is_sum(layer: Any) -> bool:
    is_plain = not (layer.lora_variant or any(layer.lora_bias.values()))
    is_active = bool(_active(layer)) and not (layer.disable_adapters or layer.merged)
    is_wide = layer.get_base_layer().weight.dtype in (torch.float32, torch.float64)
    return is_plain and is_active and is_wide


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


@torch.no_grad()
def _sums(layers: list[Any], weights: list[Tensor]) -> list[Tensor]:
    """W + scale * B A of each layer: views of one buffer, which goes back to the system whole."""
    if not layers:
        return []
    sizes = [weight.numel() for weight in weights]
    places = torch.split(weights[0].new_empty(sum(sizes)), sizes)
    sums = [place.view_as(w).copy_(w) for place, w in zip(places, weights, strict=True)]
    for layer, total in zip(layers, sums, strict=True):
        out = total.T if layer.fan_in_fan_out else total
        for name in _active(layer):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            out.addmm_(b, a, alpha=layer.scaling[name])
    return sums
