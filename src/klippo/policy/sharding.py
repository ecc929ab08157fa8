"""Weights, gradients and optimizer states in parts, one per process: PyTorch's FSDP2.

The forward and backward passes of an update gather the weights of one block at a time. Sampling,
evaluation and saving gather all of them once (`whole`), and then run in each process by itself.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from klippo.errors import PreflightError
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.policy.blocks import decoder_blocks
from klippo.policy.critic import SeparateCritic
from klippo.ranks import Ranks, is_sharded, whole_tensor
from klippo.types import TokenBatch

PASSES = ("hidden", "with_frozen_states", "logprobs", "loss", "exact_kl")
"""Methods of a CausalLM that compute with its weights."""


def shard(policy: ActorCritic, reference: Reference, device: torch.device, ranks: Ranks) -> None:
    """Leave this process its part of every weight, on `device`; every process must call it.

    The weights must be the same everywhere, and may be on the CPU until then: blocks go to the
    device one by one. Optimizers are to be built afterwards. Gradients are sums over all processes.

    Raises PreflightError for a PyTorch that cannot do it.
    """
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


@contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """All weights of these modules in every process, for passes without gradients.

    Every process must come here, and inside each may do what it likes. Without sharding, or where
    the weights are whole already, nothing happens.
    """
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


def has_shards(module: nn.Module) -> bool:
    """Whether each process has only its part of the module."""
    return bool(_roots(module))


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


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Tensors by name, none in parts: sharded ones come to the CPU of the first process.

    They are then those of a single process, so that a checkpoint does not depend on their number.
    The others get tensors of no size for them; every process must call it.
    """

    def gather(x: Tensor) -> Tensor:
        if not is_sharded(x):
            return x
        full = whole_tensor(x.detach())
        return full.cpu() if ranks.is_main else full.new_empty(0, device="cpu")

    return {name: gather(x) for name, x in tensors.items()}


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
