"""Blocks that do not train, run once per batch: afterwards their output stands in for them.

B sequences, S tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class FrozenBlocks:
    """The lowest `num_frozen` of a trunk's blocks, which can be left out of a forward pass.

    The trunk's own code runs in either case, so that masks and positions are the architecture's
    affair; only the blocks in its list change, for the length of a `with`.
    """

    def __init__(self, blocks: nn.ModuleList, num_frozen: int) -> None:
        assert 0 < num_frozen < len(blocks)
        self._blocks = blocks
        self._num_frozen = num_frozen

    @contextmanager
    def alone(self) -> Iterator[StandIn]:
        """Leave the other blocks out; what is yielded has been given the frozen ones' output."""
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
        places = range(start, start + len(stand_ins))
        originals = [self._blocks[i] for i in places]
        try:
            for i, stand_in in zip(places, stand_ins, strict=True):
                self._blocks[i] = stand_in
            yield
        finally:
            for i, block in zip(places, originals, strict=True):
                self._blocks[i] = block


class StandIn(nn.Module):
    """Has a block's place and attributes; gives `states`, or else what it was given itself."""

    def __init__(self, block: nn.Module, states: Tensor | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: nothing here has weights
        self._states = states
        self.given: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.given = hidden_states
        return hidden_states if self._states is None else self._states
