"""Weights, gradients and optimizer states in parts, one per process: by FSDP2 or by ZeRO-3.

The forward and backward passes of an update gather the weights of one block at a time. Sampling,
evaluation and saving gather all of them once (`whole`), and then run in each process by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from klippo.policy import fsdp, zero3
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.policy.settings import Sharding
from klippo.ranks import Ranks, is_sharded, whole_tensor


def shard(
    how: Sharding, policy: ActorCritic, reference: Reference, device: torch.device, ranks: Ranks
) -> None:
    """Leave this process its part of every weight, on `device`; every process must call it.

    The weights must be the same everywhere, and may be on the CPU until then: they go to the device
    part by part. Optimizers are to be built afterwards. Gradients are sums over all processes.

    Raises PreflightError where a library that does it is missing or too old.
    """
    match how:
        case "none":
            pass
        case "fsdp":
            fsdp.shard(policy, reference, device, ranks)
        case "zero3":
            zero3.shard(policy, reference, device)


@contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """All weights of these modules in every process, for passes without gradients.

    Every process must come here, and inside each may do what it likes. Without sharding, or where
    the weights are whole already, nothing happens.
    """
    with fsdp.whole(*modules), zero3.whole(*modules):
        yield


def has_shards(module: nn.Module) -> bool:
    """Whether each process has only its part of the module."""
    return fsdp.has_parts(module) or zero3.has_parts(module)


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Names and values as in `state_dict`, which would give this process's parts alone.

    The module's weights must be `whole`.
    """
    found = {name: weight.detach() for name, weight in module.named_parameters()}
    for prefix, part in module.named_modules():
        found |= {
            name: buffer
            for name, buffer in part.named_buffers(prefix, recurse=False)
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set
        }
    return found


def whole_shape(x: Tensor) -> tuple[int, ...]:
    """Of a tensor of which each process may hold a part."""
    return tuple(getattr(x, "ds_shape", x.shape))


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Tensors by name, none in parts: DTensors come to the CPU of the first process.

    They are then those of a single process, so that a checkpoint does not depend on their number.
    The others get tensors of no size for them; every process must call it.
    """
    return {
        name: ranks.for_main(whole_tensor(x.detach())) if is_sharded(x) else x
        for name, x in tensors.items()
    }
