"""Sharding by PyTorch's FSDP2: weights are DTensors, and hooks gather them around each pass."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from klippo.errors import PreflightError
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.policy.blocks import decoder_blocks
from klippo.policy.critic import SeparateCritic
from klippo.ranks import Ranks, is_sharded
from klippo.types import TokenBatch

PASSES = ("hidden", "with_frozen_states", "logprobs", "loss", "exact_kl")
"""Methods of a CausalLM that compute with its weights."""


def shard(policy: ActorCritic, reference: Reference, device: torch.device, ranks: Ranks) -> None:
    """What `sharding.shard` says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if not hasattr(FSDPModule, "reset_iter_state"):
        raise PreflightError(
            f"sharding=fsdp needs PyTorch 2.13 or newer, and this is {torch.__version__}"
        )
    # It fears for in-place changes of what a pass returns; nothing here makes any.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    # PyTorch's caches keep the mesh, and the mesh the group, whose threads must not outlive Python.
    atexit.register(mesh._pg_registry.clear)
    models = [policy.lm] if reference.lm is policy.lm else [policy.lm, reference.lm]
    for model in models:
        for block in decoder_blocks(model.model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name in PASSES:
            register_fsdp_forward_method(model, name)
    if isinstance(policy.critic, SeparateCritic):
        for block in decoder_blocks(policy.critic.trunk):
            fully_shard(block, mesh=mesh)
    fully_shard(policy.critic, mesh=mesh)
    for part in _parts(policy, reference.lm):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    _first_pass(policy, reference, device)


@torch.no_grad()
def _first_pass(policy: ActorCritic, reference: Reference, device: torch.device) -> None:
    """From a first pass FSDP learns which modules are the outermost."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    real = torch.ones_like(ids, dtype=torch.bool)
    batch = TokenBatch(prompt_ids=ids, prompt_mask=real, response_ids=ids, response_mask=real)
    policy(batch, 1.0)
    reference.logprobs(batch, 1.0)
    settle(policy, reference.lm)


@contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """What `sharding.whole` says."""
    roots = [
        root for root in _roots(*modules) if any(is_sharded(weight) for weight in root.parameters())
    ]
    parts = _parts(*roots)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part not in roots, recurse=False)
        settle(*roots)


def settle(*modules: nn.Module) -> None:
    """Between passes: each process holds its part alone, and passes so far are forgotten."""
    for root in _roots(*modules):
        root.reset_iter_state()


def has_parts(module: nn.Module) -> bool:
    """Whether each process has only its part of the module."""
    return bool(_roots(module))


def part_like(x: Tensor, target: Tensor) -> Tensor:
    """This process's part of a whole tensor, where it has a part of the target."""
    if not is_sharded(target):
        return x
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    x = x.to(target.device)
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


def _roots(*modules: nn.Module) -> list[Any]:
    """The outermost sharded modules of these, each once."""
    from torch.distributed.fsdp import FSDPModule

    found: list[Any] = []
    for module in modules:
        inner = [module] if isinstance(module, FSDPModule) else _roots(*module.children())
        found += [root for root in inner if root not in found]
    return found


def _parts(*modules: nn.Module) -> list[Any]:
    """All sharded modules of these, outermost first."""
    from torch.distributed.fsdp import FSDPModule

    found = [part for module in modules for part in module.modules()]
    return [part for part in found if isinstance(part, FSDPModule)]
