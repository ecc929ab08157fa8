"""Running mean and standard deviation of a stream of numbers (Chan et al. 1979)."""

import math

import torch
from torch import Tensor

from klippo.tensors.masked import AllSum, local


class RunningMoments:
    """Mean and standard deviation of everything seen so far, over all processes."""

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
        count, total = all_sum(
            torch.stack(
                [
                    torch.tensor(float(len(values)), dtype=torch.float64, device=values.device),
                    values.sum(),
                ]
            )
        ).tolist()
        if count == 0:
            return
        mean = total / count
        squares = float(all_sum(((values - mean) ** 2).sum()))
        delta = mean - self.mean
        whole = self.count + count
        self.mean += delta * count / whole
        self._sum_of_squares += squares + delta**2 * self.count * count / whole
        self.count = whole

    def standardize(self, values: Tensor) -> Tensor:
        """(values - mean) / sd, in the values' dtype; taken in float64, for close values."""
        return ((values.double() - self.mean) / self.sd).to(values.dtype)

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "sum_of_squares": self._sum_of_squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count = state["count"]
        self.mean = state["mean"]
        self._sum_of_squares = state["sum_of_squares"]
