"""AdamW over a policy and its critic, whose weights may be sharded over the processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from klippo.errors import ConfigError
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.policy.sharding import (
    full_tensor,
    is_sharded,
    on_main_cpu,
    shard_like,
    sharded_roots,
)
from klippo.ppo.settings import OptimizerSettings
from klippo.ranks import Ranks

Tensors = Mapping[str, Mapping[str, Tensor]]
"""What training changes, by name: `weights`, and `optimizer`, AdamW's state of each."""


class _AnyPass(nn.Module):
    """Computes any function of these weights: DDP has to see the call of a module."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        super().__init__()
        # A critic's warm-up leaves weights without gradients, so DDP has to look for unused ones;
        # it warns on stderr if it finds none.
        self.weights = nn.ParameterList([*weights, nn.Parameter(torch.zeros(()))])

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return work()


class Optimizer:
    """AdamW, with the passes that need the weights. Every process must make the same calls."""

    def __init__(
        self, policy: ActorCritic, reference: Reference, settings: OptimizerSettings, ranks: Ranks
    ) -> None:
        of_policy, of_critic = policy.trainable()
        critic_rate = settings.critic_learning_rate or settings.learning_rate
        groups: list[dict[str, Any]] = [
            {"params": of_policy, "lr": settings.learning_rate},
            {"params": of_critic, "lr": critic_rate},
        ]
        self.adam = AdamW(
            [group for group in groups if group["params"]],
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._parameters = of_policy + of_critic
        self._sharded = sharded_roots(policy, reference.lm)
        self._max_grad_norm = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
        self._ranks = ranks
        self._ddp = None
        if ranks.world_size > 1 and not is_sharded(policy):
            self._ddp = DistributedDataParallel(
                _AnyPass(self._parameters),
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
            )
        self._policy = policy
        self._named = {name: p for name, p in policy.named_parameters() if p.requires_grad}

    def free_gathered(self) -> None:
        """Called after passes without gradients: drop the weights that they gathered."""
        for root in self._sharded:
            root.reset_iter_state()

    def backward(self, passes: Sequence[Callable[[], Tensor]]) -> None:
        """Add up the gradients of the losses that these passes return in all processes.

        At least one pass; with shards every process needs the same number of them.
        """
        for number, work in enumerate(passes, 1):
            if self._ddp is None:
                work().backward()  # type: ignore[no-untyped-call]
                continue
            with self._ddp.no_sync() if number < len(passes) else nullcontext():
                loss = self._ddp(work) * self._ranks.world_size  # DDP takes the mean
                loss.backward()

    def step(self) -> float:
        """Move the weights by the gradients, and forget these.

        Returns the gradient's norm before clipping; if it is not finite nothing moves.
        """
        total = clip_grad_norm_(self._parameters, self._max_grad_norm)
        norm = float(full_tensor(total) if self._sharded else total)
        if math.isfinite(norm):
            self.adam.step()
        self.forget()
        return norm

    def forget(self) -> None:
        """Drop the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def tensors(self) -> Tensors:
        """What training has changed, without copies. Every process must call it.

        With shards the first process gets full tensors, and the others empty ones.
        """
        states = {
            f"{key}/{name}": value
            for name, parameter in self._named.items()
            for key, value in self.adam.state.get(parameter, {}).items()
        }
        return {
            "weights": on_main_cpu(self._named, self._ranks),
            "optimizer": on_main_cpu(states, self._ranks),
        }

    @torch.no_grad()
    def load_tensors(self, tensors: Tensors) -> None:
        """Take over what `tensors` gave the first process; every process needs all of it.

        Raises ConfigError if they are another model's.
        """
        require_same_shapes(self._named, tensors["weights"])
        for name, parameter in self._named.items():
            parameter.copy_(shard_like(tensors["weights"][name], parameter))
        self.adam.state.clear()
        for key, value in tensors["optimizer"].items():
            field, _, name = key.partition("/")
            parameter = self._named[name]
            if value.shape == parameter.shape:  # a moment, and no count of steps
                value = shard_like(value, parameter)
            self.adam.state[parameter][field] = value.to(parameter.device)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The same for the weights alone, in this process, inside `full_weights`."""
        # The gathered parameters are other tensors than the shards in `_named`.
        full = {name: p for name, p in self._policy.named_parameters() if name in self._named}
        require_same_shapes(full, weights)
        for name, parameter in full.items():
            parameter.copy_(weights[name])


def build_schedule(
    optimizer: torch.optim.Optimizer,
    settings: OptimizerSettings,
    num_steps: int,
    num_steps_done: int = 0,
) -> LambdaLR:
    """Linear warm-up, then constant, linear or cosine decay, counted in PPO steps."""
    warmup, end = settings.num_warmup_steps, settings.num_decay_steps or num_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if settings.schedule == "constant":
            return 1.0
        progress = min((step - warmup) / max(end - warmup, 1), 1.0)
        remaining = 1 - progress
        if settings.schedule == "cosine":
            remaining = 0.5 * (1 + math.cos(math.pi * progress))
        return settings.final_fraction + (1 - settings.final_fraction) * remaining

    return LambdaLR(optimizer, factor, last_epoch=num_steps_done - 1)


def require_same_shapes(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Raise ConfigError if tensors of a checkpoint are not those of this policy and critic."""
    for name in sorted(expected.keys() | stored.keys()):
        there, here = (
            f"shape {tuple(tensors[name].shape)}" if name in tensors else "no such weight"
            for tensors in (stored, expected)
        )
        if there != here:
            raise ConfigError(
                f"the checkpoint is of another model: {name} has {there} there and {here} in this "
                "policy and critic; resume with the model that the run began with"
            )
