"""What PPO estimates from sampled tokens: means, advantages, KL divergence, moments, repetition.

B sequences, T response tokens. A mask is True if the value counts; other values, NaN included,
never enter a result.
"""

import math
from collections.abc import Callable, Mapping

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
    """Mean of x where mask is True, over all processes; 0 if nothing counts."""
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


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    value_after: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: advantages and returns, both (B, T) and 0 in the padding.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lambda * A_{t+1}
        R_t     = A_t + V_t

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16. Time t: the policy emits token t in state t and
    gets reward t. rewards, values, mask: (B, T), real tokens first; V after the last real token is
    `value_after` (B,), 0 by default.
    """
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    values = torch.where(mask, values, torch.zeros_like(values))
    next_value = rewards.new_zeros(len(rewards)) if value_after is None else value_after
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(real, advantage, advantages[:, t])
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
    return advantages, advantages + values


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(pi || ref) at the sampled token, as log pi - log ref: unbiased, may be negative; nats.

    k1, k2 and k3 are those of J. Schulman, "Approximating KL divergence" (2020). Any shape.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2: biased value, but its expected gradient is the KL's own."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi): unbiased, never negative; for logging only."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


class RunningMoments:
    """Mean and standard deviation of everything seen so far, over all processes.

    Chan et al. 1979.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self._sum_of_squares = 0.0  # of deviations from the mean

    @property
    def sd(self) -> float:
        """Unbiased standard deviation; 1 before two numbers were seen, or when all were equal."""
        if self.count < 2 or self._sum_of_squares <= 0:
            return 1.0
        return math.sqrt(self._sum_of_squares / (self.count - 1))

    def update(self, values: Tensor, all_sum: AllSum = local) -> None:
        """Take in values (n,), all of them finite; n may be 0 on some processes."""
        values = values.detach().double().flatten()
        count, total = all_sum(torch.stack([torch.ones_like(values).sum(), values.sum()])).tolist()
        if count == 0:
            return
        mean = total / count
        squares = float(all_sum(((values - mean) ** 2).sum()))
        delta = mean - self.mean
        seen = self.count + count
        self.mean += delta * count / seen
        self._sum_of_squares += squares + delta**2 * self.count * count / seen
        self.count = seen

    def standardize(self, values: Tensor) -> Tensor:
        """(values - mean) / sd, in the values' dtype; taken in float64, for close values."""
        return ((values.double() - self.mean) / self.sd).to(values.dtype)

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "sum_of_squares": self._sum_of_squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.count = state["count"]
        self.mean = state["mean"]
        self._sum_of_squares = state["sum_of_squares"]


def repeated_share(ids: Tensor, mask: Tensor, ngram: int) -> Tensor:
    """Share of a response's n-grams that occurred in it before, (B,) float32 from 0 to below 1.

        1 - (different n-grams) / (n-grams)

    which is seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319), section 4. ids: (B, T) int64;
    mask: (B, T) bool, real tokens first. A response shorter than one n-gram gets 0.
    """
    width = ids.shape[1] - ngram + 1
    if width < 1:
        return torch.zeros(len(ids), device=ids.device)
    names = ids[:, :width]  # one number per n-gram, equal for equal ones
    for offset in range(1, ngram):
        pairs = names * (ids.max() + 1) + ids[:, offset : offset + width]
        names = torch.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)
    complete = mask[:, ngram - 1 :]
    all_different = -1 - torch.arange(width, device=ids.device)
    ordered = torch.where(complete, names, all_different).sort(1).values
    num_repeated = (ordered[:, 1:] == ordered[:, :-1]).sum(1)
    return num_repeated / complete.sum(1).clamp(min=1)
