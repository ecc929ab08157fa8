"""Critics: a head on the policy's trunk, on a LoRA adapter of its own, or on a separate model.

B sequences, T response tokens, D hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from klippo.policy.actor_critic import CausalLM, Critic, trunk_hidden
from klippo.types import HFModel, TokenBatch


def value_head(hidden_size: int, dtype: torch.dtype) -> nn.Linear:
    """A scalar head whose output starts at zero, in float32, or in float64 on a float64 trunk."""
    head = nn.Linear(hidden_size, 1, dtype=torch.promote_types(dtype, torch.float32))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class TrunkCritic(Critic):
    """A head on the policy's trunk; its loss also trains the trunk."""

    reads_policy = True

    def __init__(self, lm: CausalLM) -> None:
        super().__init__()
        self.head = value_head(lm.hidden_size, lm.model.dtype)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        return self.head.parameters()

    def forward(self, batch: TokenBatch, hidden: Tensor, *, after_last: bool) -> Tensor:
        del batch, after_last
        values: Tensor = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)
        return values


class LoraCritic(Critic):
    """A second LoRA adapter on the policy's frozen base, with a head."""

    reads_policy = False

    def __init__(
        self,
        lm: CausalLM,
        active: Callable[[], AbstractContextManager[None]],
        adapter: str,
    ) -> None:
        """`active` makes the adapter named `adapter` the one that `lm` computes with."""
        super().__init__()
        self.head = value_head(lm.hidden_size, lm.model.dtype)
        self._active = active
        self._adapter = adapter
        # Shared with the policy module: kept out of the module tree.
        object.__setattr__(self, "_lm", lm)
        self._lm: CausalLM

    def own_parameters(self) -> Iterator[nn.Parameter]:
        for name, parameter in self._lm.model.named_parameters():
            if f".{self._adapter}." in name:
                yield parameter
        yield from self.head.parameters()

    def forward(self, batch: TokenBatch, hidden: Tensor | None, *, after_last: bool) -> Tensor:
        del hidden
        with self._active():
            own = self._lm.hidden(batch, after_last=after_last)
        values: Tensor = self.head(own.to(self.head.weight.dtype)).squeeze(-1)
        return values


class SeparateCritic(Critic):
    """A model of its own: a trunk and a head, which may be those of a reward model."""

    reads_policy = False

    def __init__(
        self, trunk: HFModel, head: nn.Linear | None = None, *, autocast: bool = False
    ) -> None:
        super().__init__()
        self.trunk = trunk
        width = int(trunk.config.get_text_config().hidden_size)
        self.head = value_head(width, trunk.dtype) if head is None else head
        self.autocast = autocast
        self._takes_positions = "position_ids" in inspect.signature(trunk.forward).parameters

    def own_parameters(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def forward(self, batch: TokenBatch, hidden: Tensor | None, *, after_last: bool) -> Tensor:
        del hidden
        own = trunk_hidden(
            self.trunk, batch, self._takes_positions, after_last=after_last, autocast=self.autocast
        )
        values: Tensor = self.head(own.to(self.head.weight.dtype)).squeeze(-1)
        return values
