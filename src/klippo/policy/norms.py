"""RMSNorm that keeps its input and one number per token for the backward pass, and no more.

transformers spells the formula out, and its backward pass then keeps the normalized states as well:
as much again as the input, twice in every block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from klippo.types import HFModel


def with_lean_norms(model: HFModel) -> HFModel:
    """The same model with a LeanRMSNorm in place of each norm whose code is that of Llama's.

    Mistral, Qwen and many others have it word for word. Weights stay the same parameters under the
    same names, and values differ by rounding.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if _is_llamas(child):
                norm: Any = child
                setattr(module, name, LeanRMSNorm(norm.weight, norm.variance_epsilon))
    return model


class LeanRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _RMSNorm.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.variance_epsilon
        )
        return out


def _is_llamas(module: nn.Module) -> bool:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = type(module).forward.__code__, LlamaRMSNorm.forward.__code__
    return (ours.co_code, ours.co_names) == (theirs.co_code, theirs.co_names)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps), n = r x and h = weight * dL/dy, in float32 or float64:

    dL/dx = r (h - n mean(h n))          dL/dweight = sum over tokens of n dL/dy
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        states = _wide(x)
        scale = torch.rsqrt(states.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (states * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, states = _wide(grads[0]), _wide(x) * scale
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad * states).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        share = (grad * states).mean(-1, keepdim=True)
        return grad.sub_(states.mul_(share)).mul_(scale).to(x.dtype), of_weight, None
