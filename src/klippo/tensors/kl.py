"""KL divergence between policy and reference: estimators at the sampled token, and its control.

Estimators: J. Schulman, "Approximating KL divergence" (2020). All in nats.
"""

from dataclasses import dataclass

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log ref: unbiased, may be negative. Any shape."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2: biased value, but its expected gradient is the KL's own."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi): unbiased, never negative; for logging only."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


@dataclass(slots=True)
class KLController:
    """beta, and how it follows the KL that was measured.

    Fixed, or adaptive after Ziegler et al. 2019 (arXiv 1909.08593), section 2.2:

        e = clip(KL / target - 1, -0.2, 0.2);   beta *= 1 + e * n / horizon
    """

    coef: float
    """beta, reward units per nat."""
    target: float | None = None
    """Nats per sequence; None keeps beta fixed."""
    horizon: float = 10_000.0
    """Episodes."""

    def update(self, sequence_kl: float, num_episodes: int) -> None:
        """Take in the mean KL per sequence (nats) of num_episodes sequences."""
        if self.target is None:
            return
        error = min(max(sequence_kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_episodes / self.horizon
