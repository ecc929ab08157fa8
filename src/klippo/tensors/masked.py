"""Sums, means and whitening over the tokens that count.

B sequences, T response tokens. A mask is True where the value counts; what stands elsewhere, NaN
included, never enters a result.
"""

from collections.abc import Callable

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes."""


def local(x: Tensor) -> Tensor:
    """The `AllSum` of a single process."""
    return x


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of x where mask is True. Shapes: x and mask alike; result without `dim`, or scalar."""
    kept = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, all_sum: AllSum = local) -> Tensor:
    """Mean of x where mask is True, over all processes; 0 where nothing counts."""
    total_and_count = all_sum(torch.stack([masked_sum(x.double(), mask), mask.sum().double()]))
    return (total_and_count[0] / total_and_count[1].clamp(min=1)).to(x.dtype)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    all_sum: AllSum = local,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the True elements of all processes; 0 elsewhere.

    The variance is the biased one, so that a single element gives 0 and not NaN.
    `shift_mean=False` adds the mean back: only the spread changes.
    """
    mean = masked_mean(x, mask, all_sum)
    variance = masked_mean((x - mean) ** 2, mask, all_sum)
    whitened = (x - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))
