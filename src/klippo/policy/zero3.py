"""Sharding by DeepSpeed's ZeRO-3: weights are cut flat, and an engine runs passes and AdamW."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import AdamW

from klippo.errors import PreflightError
from klippo.policy.actor_critic import ActorCritic, Reference
from klippo.ranks import Ranks

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,  # says nothing: Klippo cuts batches itself
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 2**24},
    "zero_allow_untested_optimizer": True,  # PyTorch's AdamW with groups that rest
    "communication_data_type": "fp32",
}
"""DeepSpeed's, for weights in float32; gradients travel in messages of 64 MiB."""
MOMENTS = ("exp_avg", "exp_avg_sq")

T = TypeVar("T")


class Models(nn.Module):
    """All that is sharded, under one root, whose forward pass is any work with the models in it."""

    def __init__(self, policy: ActorCritic, reference: Reference) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference.lm

    def heads(self) -> Iterator[nn.Parameter]:
        """Weights that passes use outside of the module that holds them."""
        for lm in (self.policy.lm, self.reference):
            yield from lm.model.get_output_embeddings().parameters()

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return work()


def shard(policy: ActorCritic, reference: Reference, device: torch.device) -> None:
    """What `sharding.shard` says. The optimizer must be an `Engine`."""
    types = {weight.dtype for weights in policy.trainable() for weight in weights}
    if types != {torch.float32}:
        raise PreflightError(
            "sharding=zero3 trains float32 weights alone, and some here are "
            f"{' and '.join(sorted(str(x).removeprefix('torch.') for x in types))}; set "
            "policy.dtype=float32 (policy.autocast=true computes in bfloat16 all the same), "
            "policy.tuning=lora, or sharding=fsdp"
        )
    deepspeed = _library()
    models = Models(policy, reference)
    deepspeed.zero.Init(module=models, config_dict_or_path=CONFIG, mem_efficient_linear=False)
    for module in models.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def has_parts(module: nn.Module) -> bool:
    """Whether each process has only its part of the module."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


@contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """What `sharding.whole` says. No hook runs inside."""
    if not any(has_parts(module) for module in modules):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    weights: list[Any] = [weight for module in modules for weight in module.parameters()]
    away = [weight for weight in weights if weight.ds_status != ZeroParamStatus.AVAILABLE]
    with GatheredParameters(away), _without_hooks(*modules):
        yield


_HOOKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""DeepSpeed's keeper of the hooks of each module under an engine."""


@contextmanager
def _without_hooks(*modules: nn.Module) -> Iterator[None]:
    """Without those that gather and release weights around each module's pass."""
    found = {id(hooks): hooks for module in modules if (hooks := _HOOKS.get(module)) is not None}
    there = [hooks for hooks in found.values() if hooks.forward_hooks]
    for hooks in there:
        for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
            hook.remove()
        hooks.forward_hooks, hooks.backward_hooks = [], []
    try:
        yield
    finally:
        for hooks in there:
            hooks._register_deepspeed_module(hooks.module)


class Engine:
    """Passes, gradients and AdamW over weights that `shard` has cut. Every process calls all."""

    def __init__(
        self,
        policy: ActorCritic,
        reference: Reference,
        adam: RestingAdamW,
        max_grad_norm: float | None,
        ranks: Ranks,
    ) -> None:
        """`adam` is over the policy's trainable parameters, as they are."""
        import deepspeed

        self.models = Models(policy, reference)
        self.adam: AdamW = adam
        self._awake = adam.awake
        self.ranks = ranks
        self._named: dict[str, Any] = {
            name: parameter
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad
        }
        config = CONFIG | {"gradient_clipping": max_grad_norm or 0.0}
        self._engine, *_ = deepspeed.initialize(
            model=self.models, optimizer=adam, config=config, dist_init_required=False
        )
        self._zero: Any = self._engine.optimizer
        for weight in self.models.heads():
            deepspeed.zero.register_external_parameter(self.models, weight)
        for module in self.models.modules():
            _HOOKS[module] = self._zero.parameter_offload
        for parameter in self._named.values():
            flat = self._flat(parameter)
            parameter.register_post_accumulate_grad_hook(lambda _, flat=flat: adam.awake.add(flat))

    def run(self, work: Callable[[], T]) -> T:
        """Passes without gradients."""
        found = []

        def kept() -> Tensor:
            found.append(work())
            return torch.zeros(())

        self.models(kept)
        return found[0]

    def backward(self, work: Callable[[], Tensor]) -> None:
        """Add the gradients of the loss that a pass returns, summed over all processes."""
        loss = self._engine(work)
        self._engine.backward(loss * self.ranks.world_size)  # DeepSpeed takes the mean

    def step(self) -> float:
        """Returns the gradient's norm before clipping; where it is not finite nothing moves."""
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        self.forget()
        return norm

    def forget(self) -> None:
        """Back to no gradients."""
        self._zero.zero_grad()
        self._zero.grad_partitions_flat_buffer.zero_()
        self._awake.clear()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights and AdamW's states by name: all in the first process, nothing in the others."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
        for name, parameter in self._named.items():
            found["weights"][name] = self.ranks.for_main(safe_get_full_fp32_param(parameter))
            state = self.adam.state.get(self._flat(parameter))
            if state is None:
                continue
            found["optimizer"][f"step/{name}"] = state["step"].clone()
            for key in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, key)
                found["optimizer"][f"{key}/{name}"] = self.ranks.for_main(whole)
        return found

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `tensors` gave the first process; every process needs all of it."""
        from deepspeed.utils import safe_set_local_optimizer_state

        self.adam.state.clear()
        for name, parameter in self._named.items():
            parameter.ds_tensor.copy_(self._own(parameter, tensors["weights"][name]))
            step = tensors["optimizer"].get(f"step/{name}")
            if step is None:
                continue
            flat = self._flat(parameter)
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.adam.state.setdefault(flat, {"step": step.clone().to(flat.device)} | zeros)
            for key in MOMENTS:
                value = self._own(parameter, tensors["optimizer"][f"{key}/{name}"])
                safe_set_local_optimizer_state(parameter, value, key)
        self._zero.refresh_fp32_params()
        self._zero._partition_all_parameters()  # weights that are whole by now are the old ones

    def _flat(self, parameter: Any) -> Tensor:
        """The flat tensor with this process's part of the parameter, among others."""
        group, _, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        flat: Tensor = self._zero.fp32_partitioned_groups_flat[group]
        return flat

    def _own(self, parameter: Any, value: Tensor) -> Tensor:
        """This process's part of a whole tensor, flat; the last part is filled up with zeros."""
        size: int = parameter.partition_numel()
        flat = value.flatten()
        flat = pad(flat, (0, size * self.ranks.world_size - len(flat)))
        return flat[size * self.ranks.rank :][:size].to(self.models.policy.device)


class RestingAdamW(AdamW):
    """AdamW that leaves a flat tensor alone, moments and step count too, unless it is awake.

    PyTorch's does so with parameters without a gradient; ZeRO-3 gives all of them one, of zeros.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.awake: set[Tensor] = set()

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for flat in group["params"]:
                if flat not in self.awake:
                    flat.grad = None
        return super().step(closure)


def _library() -> Any:
    """DeepSpeed, quiet, and using the process group that is there."""
    try:
        import deepspeed
    except ImportError as error:
        raise PreflightError(
            "sharding=zero3 needs DeepSpeed: pip install 'klippo[deepspeed]', or take sharding=fsdp"
        ) from error
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated")
    __compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, and is not used here
    deepspeed.init_distributed(auto_mpi_discovery=False)
    return deepspeed
