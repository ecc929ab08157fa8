"""Bytes that a computation would hold, found by running it on shapes alone.

PyTorch's meta device runs every operation without numbers. What would depend on numbers is taken
for the usual case: masks are True everywhere, and padding is there.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten
Bytes = dict[str, int]
"""What is held at once, by what it is."""


IN_BLOCKS = "in blocks below 32 MiB"
"""Counted beside the kinds: what C libraries take from their heap and not from the system."""
BLOCK = 32 * 2**20


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are born inside and still alive; `at_peak` is the most at once.

    Tensors whose last dimension is `vocabulary` count as logits, everything else as activations.
    """

    def __init__(self, vocabulary: int, known: Iterable[Tensor] = ()) -> None:
        """`known`: tensors that were there before, which an operation may give back."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary = vocabulary
        self._born: dict[int, int] = {_key(tensor): 0 for tensor in known}
        self._num_born = 0
        self._live: Counter[str] = Counter()
        self._peak_born = 0
        self._in_blocks = 0
        self._peak = 0
        self.at_peak: Bytes = {}
        """By kind, and what of them is IN_BLOCKS."""

    @property
    def now(self) -> Bytes:
        """What is alive, as in `at_peak`."""
        return dict(self._live) | {IN_BLOCKS: self._in_blocks}

    def had(self, tensor: Tensor) -> bool:
        """True for a tensor that is alive now and was already there at the peak."""
        return 0 < self._born.get(_key(tensor), 0) <= self._peak_born

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        usual = USUAL.get(func) if args and getattr(args[0], "is_meta", False) else None
        out = func(*args, **kwargs) if usual is None else usual(func, *args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        return out

    def _meet(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._born:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        kind = "logits" if tensor.shape[-1:] == (self._vocabulary,) else "activations"
        self._num_born += 1
        self._born[key] = self._num_born
        self._live[kind] += size
        self._in_blocks += size if size < BLOCK else 0
        weakref.finalize(storage, self._end, key, kind, size)
        if self._live.total() > self._peak:
            self._peak = self._live.total()
            self.at_peak = self.now
            self._peak_born = self._num_born

    def _end(self, key: int, kind: str, size: int) -> None:
        del self._born[key]
        self._live[kind] -= size
        self._in_blocks -= size if size < BLOCK else 0


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _everywhere(indices: Any) -> Any:
    """Indices in which a mask that is True everywhere is written out as numbers."""
    numbers: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            flat = torch.empty(index.numel(), dtype=torch.long, device="meta")
            numbers += [flat] * index.dim()
        else:
            numbers.append(index)
    return numbers


def _indexed(func: Any, tensor: Tensor, indices: Any, *args: Any, **kwargs: Any) -> Any:
    return func(tensor, _everywhere(indices), *args, **kwargs)


def _selected(_: Any, tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.new_empty(mask.numel())


def _spread(_: Any, grad: Tensor, __: Tensor, sizes: list[int]) -> Tensor:
    return grad.new_empty(sizes)


def _a_number(*_: Any) -> int:
    return 0


def _fused_attention(*_: Any, **__: Any) -> int:
    return int(SDPBackend.EFFICIENT_ATTENTION.value)


USUAL: dict[Any, Callable[..., Any]] = {
    ATEN._fused_sdp_choice.default: _fused_attention,
    ATEN._local_scalar_dense.default: _a_number,
    ATEN.index.Tensor: _indexed,
    ATEN.index_put.default: _indexed,
    ATEN.index_put_.default: _indexed,
    ATEN._index_put_impl_.default: _indexed,
    ATEN._unsafe_index_put.default: _indexed,
    ATEN.masked_select.default: _selected,
    ATEN.masked_scatter_backward.default: _spread,
}
"""Operations whose result, or its shape, depends on numbers; and attention, which on shapes alone
would hold (S, S) weights, as it does on no other device."""


def storage_bytes(tensors: Iterable[Tensor], besides: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages behind tensors, each once, without those behind `besides`."""
    known = {_key(tensor) for tensor in besides}
    sizes = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for key, size in sizes.items() if key not in known)
