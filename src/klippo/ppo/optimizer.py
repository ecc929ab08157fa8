"""What the update asks of gradients and weights, wherever they are: whole or in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from klippo.policy import zero3
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.policy.fsdp import part_like, settle
from klippo.policy.sharding import gathered
from klippo.ppo.settings import OptimizerSettings
from klippo.ranks import Ranks, whole_tensor

T = TypeVar("T")
Tensors = Mapping[str, Mapping[str, Tensor]]
"""What training changes, by name: `weights`, and `optimizer`, AdamW's state of each."""


class Optimizer(Protocol):
    """AdamW over a policy and its critic, with the passes that need their weights.

    Every process of the run must make the same calls.
    """

    adam: AdamW
    """Its groups have the learning rates."""

    def run(self, work: Callable[[], T]) -> T:
        """Passes without gradients."""

    def backward(self, work: Callable[[], Tensor]) -> None:
        """Add this process's gradients of the loss that a pass returns."""

    def step(self) -> float:
        """Move the weights by the sum of all processes' gradients, and forget these.

        Returns the gradient's norm before clipping; where it is not finite nothing moves.
        """

    def forget(self) -> None:
        """Back to no gradients."""

    def tensors(self) -> Tensors:
        """Whole ones; where each process has a part, the first gets all and the others nothing."""

    def load_tensors(self, tensors: Tensors) -> None:
        """Take over what `tensors` gave the first process; every process needs all of it."""


def build_optimizer(
    policy: ActorCritic, reference: Reference, settings: OptimizerSettings, ranks: Ranks
) -> Optimizer:
    """The one that fits how the policy is held."""
    of_policy, of_critic = policy.trainable()
    critic_rate = settings.critic_learning_rate or settings.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": of_policy, "lr": settings.learning_rate},
        {"params": of_critic, "lr": critic_rate},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "fused": True,
    }
    if zero3.has_parts(policy):
        resting = zero3.RestingAdamW(groups, **options)
        return zero3.Engine(policy, reference, resting, settings.max_grad_norm, ranks)
    adam = AdamW(groups, **options)
    return PlainOptimizer(policy, reference, adam, settings.max_grad_norm, ranks)


class PlainOptimizer:
    """PyTorch's AdamW; of FSDP2's weights it moves this process's parts."""

    def __init__(
        self,
        policy: ActorCritic,
        reference: Reference,
        adam: AdamW,
        max_grad_norm: float | None,
        ranks: Ranks,
    ) -> None:
        self.adam = adam
        self._models = (policy, reference.lm)
        self._max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self._ranks = ranks
        self._named = {name: p for name, p in policy.named_parameters() if p.requires_grad}

    def run(self, work: Callable[[], T]) -> T:
        found = work()
        settle(*self._models)
        return found

    def backward(self, work: Callable[[], Tensor]) -> None:
        work().backward()  # type: ignore[no-untyped-call]

    def step(self) -> float:
        parameters = [p for group in self.adam.param_groups for p in group["params"]]
        self._ranks.sum_gradients(parameters)
        norm = float(whole_tensor(clip_grad_norm_(parameters, self._max_grad_norm)))
        if math.isfinite(norm):
            self.adam.step()
        self.forget()
        return norm

    def forget(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    def tensors(self) -> Tensors:
        states = {
            f"{key}/{name}": value
            for name, parameter in self._named.items()
            for key, value in self.adam.state.get(parameter, {}).items()
        }
        return {
            "weights": gathered(self._named, self._ranks),
            "optimizer": gathered(states, self._ranks),
        }

    @torch.no_grad()
    def load_tensors(self, tensors: Tensors) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(part_like(tensors["weights"][name], parameter))
        self.adam.state.clear()
        for key, value in tensors["optimizer"].items():
            field, _, name = key.partition("/")
            parameter = self._named[name]
            if value.shape == parameter.shape:  # a moment, and no count of steps
                value = part_like(value, parameter)
            self.adam.state[parameter][field] = value.to(parameter.device)
