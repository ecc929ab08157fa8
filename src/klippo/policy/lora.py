"""LoRA layers that add their product to the base's in place, in one operation.

peft writes the wide product B (A x) out, then its multiple, then the sum, and the backward pass
scales the wide gradient once more.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor


def with_lean_adapters(model: Any) -> Any:
    """The same model, its plain LoRA layers with `_forward`; values differ by rounding.

    Not for weights that processes hold in parts: those are gathered for the modules that are
    called, and B is read here without a call.
    """
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if type(layer) is Linear:
            layer.forward = MethodType(_forward, layer)
    return model


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """W x + scale * B (A x) for one plain active adapter, not in half precision; else peft's."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    is_plain = len(active) == 1 and not (layer.lora_variant or layer.lora_bias[active[0]])
    is_apart = not (layer.disable_adapters or layer.merged or args or kwargs)
    if not (is_plain and is_apart and _is_wide(layer, x)):
        out: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    [name] = active
    tokens = x.flatten(0, -2)  # in place goes for a matrix of its own, not for a view
    low = layer.lora_A[name](layer.lora_dropout[name](tokens))
    total: Tensor = layer.base_layer(tokens)
    total = total.addmm_(low, layer.lora_B[name].weight.T, alpha=layer.scaling[name])
    return total.view(*x.shape[:-1], -1)


def _is_wide(layer: Any, x: Tensor) -> bool:
    is_cast = torch.is_autocast_enabled(x.device.type)
    is_wide = x.dtype in (torch.float32, torch.float64)
    return is_wide and not is_cast and x.dtype == layer.base_layer.weight.dtype
