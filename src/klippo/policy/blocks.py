"""A model's transformer blocks; those that do not train can run once per batch.

B sequences, S tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from klippo.errors import PreflightError
from klippo.types import HFModel


def decoder_blocks(model: HFModel) -> nn.ModuleList:
    """The list of transformer blocks of a causal LM, or of its trunk."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise PreflightError(
        f"{type(model).__name__}: no list of {count} blocks found; use policy.tuning full or lora, "
        "and sharding none"
    )


class FrozenBlocks:
    """The lowest `num_frozen` of a trunk's blocks, which a forward pass can leave out.

    The trunk's own code runs in either case, so that it makes masks and positions as ever; only
    the blocks in its list change, inside a `with`.
    """

    def __init__(self, blocks: nn.ModuleList, num_frozen: int) -> None:
        assert 0 < num_frozen < len(blocks)
        self._blocks = blocks
        self._num_frozen = num_frozen

    @contextmanager
    def alone(self) -> Iterator[StandIn]:
        """Leave the other blocks out; the result's `given` is then the frozen ones' output."""
        stand_ins = [StandIn(block) for block in list(self._blocks)[self._num_frozen :]]
        with self._swapped(self._num_frozen, stand_ins):
            yield stand_ins[0]

    @contextmanager
    def replaced_by(self, states: Tensor) -> Iterator[None]:
        """Leave the frozen blocks out: the first of the others gets `states` (B, S, D)."""
        stand_ins = [StandIn(block, states) for block in list(self._blocks)[: self._num_frozen]]
        with self._swapped(0, stand_ins):
            yield

    @contextmanager
    def _swapped(self, start: int, stand_ins: list[StandIn]) -> Iterator[None]:
        originals = list(self._blocks)[start : start + len(stand_ins)]
        try:
            for i, stand_in in enumerate(stand_ins, start):
                self._blocks[i] = stand_in
            yield
        finally:
            for i, block in enumerate(originals, start):
                self._blocks[i] = block


class StandIn(nn.Module):
    """Replaces a block, with its attributes; returns `states`, or else its input."""

    def __init__(self, block: nn.Module, states: Tensor | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: it has no weights
        self._states = states
        self.given: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        self.given = hidden_states
        return hidden_states if self._states is None else self._states
