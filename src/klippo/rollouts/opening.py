"""What an engine beside the run is given: the model's shape and the sampling once, then weights.

Both travel without pickle: JSON, and safetensors under a checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from klippo.rollouts.settings import VLLMSettings
from klippo.settings import Settings

Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""The weights as they are now, by the names that they have in a checkpoint."""

LENGTH_BYTES = 8
"""Of the number, little-endian, before each tensor's file in packed weights."""


class Opening(Settings):
    """All that an engine must know of a run, beside the weights."""

    config: dict[str, Any]
    """The content of the model's config.json, with its class under `architectures`."""
    dtype: str
    """What to compute in, as in `float32`."""
    stop_ids: frozenset[int]
    temperature: float = Field(ge=0)
    max_model_len: PositiveInt
    """Most tokens of a prompt and its response."""
    max_num_seqs: PositiveInt | None
    """Most responses decoded at once; None leaves it to the engine."""
    seed: int
    kv_cache_gib: float
    gpu_memory_utilization: float
    enforce_eager: bool
    sleep: bool

    @classmethod
    def of(
        cls,
        model: Any,
        settings: VLLMSettings,
        *,
        dtype: torch.dtype,
        stop_ids: frozenset[int],
        temperature: float,
        max_tokens: int,
        batch_size: int | None,
        seed: int,
    ) -> Self:
        """For a Hugging Face causal LM.

        `max_tokens` is the longest prompt and response together, where the settings have no
        `max_model_len`.
        """
        return cls(
            config=json.loads(model.config.to_json_string())
            | {"architectures": [type(model).__name__]},
            dtype=str(dtype).removeprefix("torch."),
            stop_ids=stop_ids,
            temperature=temperature,
            max_model_len=settings.max_model_len or max_tokens,
            max_num_seqs=batch_size,
            seed=seed,
            kv_cache_gib=settings.kv_cache_gib,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enforce_eager=settings.enforce_eager,
            sleep=settings.sleep,
        )

    @property
    def model_name(self) -> str:
        """The model's class, as in `LlamaForCausalLM`."""
        return str(self.config["architectures"][0])


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeights:
    """Weights as bytes: for each tensor the length of a safetensors file, and the file."""

    parts: tuple[bytes, ...]
    digest: str
    """SHA-256 of all the bytes, in hexadecimal: equal weights have equal digests."""

    @property
    def num_bytes(self) -> int:
        return sum(len(part) for part in self.parts)


def pack(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> PackedWeights:
    """Weights for a model that computes in `dtype`.

    Matrices are cast to it, as the engine would do; all else, a thousandth of the bytes, stays as
    it is.
    """
    from safetensors.torch import save

    parts: list[bytes] = []
    digest = hashlib.sha256()
    for name, tensor in weights:
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor = tensor.to(dtype)
        file = save({name: tensor.detach().cpu().contiguous()})
        for part in (len(file).to_bytes(LENGTH_BYTES, "little"), file):
            digest.update(part)
            parts.append(part)
    return PackedWeights(parts=tuple(parts), digest=digest.hexdigest())


def unpack(body: bytes) -> Iterator[tuple[str, Tensor]]:
    """The weights that `pack` wrote, one tensor after the other."""
    from safetensors.torch import load

    rest = memoryview(body)
    while rest:
        length = int.from_bytes(rest[:LENGTH_BYTES], "little")
        end = LENGTH_BYTES + length
        yield from load(bytes(rest[LENGTH_BYTES:end])).items()
        rest = rest[end:]
