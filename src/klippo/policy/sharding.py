"""Sharding by PyTorch's FSDP2: each process holds a shard of every weight, gradient and moment.

The passes of an update gather the weights of one block at a time. Sampling, evaluation and saving
gather all of them once (`full_weights`), and then run in each process by itself.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from klippo.errors import PreflightError
from klippo.policy.actor_critic import ActorCritic, Reference, SeparateCritic
from klippo.policy.blocks import decoder_blocks
from klippo.policy.settings import Sharding
from klippo.ranks import Ranks
from klippo.types import TokenBatch

PASSES = ("hidden", "with_frozen_states", "logprobs", "loss", "exact_kl")
"""Methods of a CausalLM that compute with its weights."""


def shard(
    how: Sharding, policy: ActorCritic, reference: Reference, device: torch.device, ranks: Ranks
) -> None:
    """Leave this process its shard of every weight, on `device`; every process must call it.

    The weights must be the same everywhere, and may be on the CPU until then: they go to the device
    shard by shard. Build optimizers afterwards. Gradients are sums over all processes.

    Raises PreflightError if PyTorch is too old.
    """
    if how == "none":
        return
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise PreflightError(
            f"sharding={how} needs PyTorch 2.13 or newer, and this is {torch.__version__}"
        )
    # FSDP warns of in-place changes to what a pass returns; nothing here makes any.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    # PyTorch's caches keep the mesh, and the mesh the group, whose threads must not outlive Python.
    atexit.register(mesh._pg_registry.clear)
    lms = [policy.lm] if reference.lm is policy.lm else [policy.lm, reference.lm]
    blocks = [block for lm in lms for block in decoder_blocks(lm.model)]
    if isinstance(policy.critic, SeparateCritic):
        blocks += decoder_blocks(policy.critic.trunk)
    roots = [*lms, policy.critic]
    for module in (*blocks, *roots):
        fully_shard(module, mesh=mesh)
    for lm in lms:
        for name in PASSES:
            register_fsdp_forward_method(lm, name)
    for module in _sharded_modules(*roots):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
        module.frees_weights = how == "fsdp" and module not in roots
        module.set_reshard_after_forward(module.frees_weights, recurse=False)
    _find_roots(policy, reference, device)


@torch.no_grad()
def _find_roots(policy: ActorCritic, reference: Reference, device: torch.device) -> None:
    """FSDP learns in its first pass which modules are the outermost."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = TokenBatch(prompt_ids=ids, prompt_mask=mask, response_ids=ids, response_mask=mask)
    policy(batch, 1.0)
    reference.logprobs(batch, 1.0)
    free_gathered(policy, reference.lm)


@contextmanager
def full_weights(*modules: nn.Module) -> Iterator[None]:
    """Gather all weights of these modules in every process, for passes without gradients.

    Every process must enter; inside, processes need not do the same. Does nothing for modules that
    are not sharded, or already gathered.
    """
    roots = [
        root
        for root in sharded_roots(*modules)
        if any(isinstance(x, DTensor) for x in root.parameters())
    ]
    sharded = _sharded_modules(*roots)
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module.frees_weights, recurse=False)
        free_gathered(*roots)


def free_gathered(*modules: nn.Module) -> None:
    """After passes without a backward pass: free gathered weights, and forget the passes."""
    for root in sharded_roots(*modules):
        root.reset_iter_state()


def is_sharded(module: nn.Module) -> bool:
    """Whether each process has only a shard of the module's weights."""
    return bool(sharded_roots(module))


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's `state_dict`, inside `full_weights`: PyTorch's own has this process's shards."""
    state = {name: weight.detach() for name, weight in module.named_parameters()}
    for prefix, child in module.named_modules():
        state |= {
            name: buffer
            for name, buffer in child.named_buffers(prefix, recurse=False)
            if name.rpartition(".")[2] not in child._non_persistent_buffers_set
        }
    return state


def full_tensor(x: Tensor) -> Tensor:
    """The full tensor of a shard; every process must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def on_main_cpu(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Full tensors by name, so that a checkpoint does not depend on the number of processes.

    Those of shards come to the CPU of the first process, and the others get empty tensors for them.
    Every process must call it.
    """
    full = {}
    for name, x in tensors.items():
        full[name] = x
        if isinstance(x, DTensor):
            gathered = full_tensor(x.detach())
            full[name] = gathered.cpu() if ranks.is_main else gathered.new_empty(0, device="cpu")
    return full


def shard_like(x: Tensor, target: Tensor) -> Tensor:
    """This process's shard of a full tensor, if the target is a shard."""
    if not isinstance(target, DTensor):
        return x
    return distribute_tensor(
        x.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )


def sharded_roots(*modules: nn.Module) -> list[Any]:
    """The outermost sharded modules of these, each once."""
    roots: list[Any] = []
    for module in modules:
        inner = [module] if isinstance(module, FSDPModule) else sharded_roots(*module.children())
        roots += [root for root in inner if root not in roots]
    return roots


def _sharded_modules(*modules: nn.Module) -> list[Any]:
    """All sharded modules of these, outermost first."""
    return [x for module in modules for x in module.modules() if isinstance(x, FSDPModule)]
