"""The processes of one run: who we are among them, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process by default; several when a launcher (torchrun, accelerate) started them."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, device: torch.device) -> Ranks:
        """Join the process group that the launcher's variables describe, if they do."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_sum(self, x: Tensor) -> Tensor:
        """x added up over all processes; every process must call it with the same shape."""
        if self.world_size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Replace every gradient by its sum over all processes.

        One that is missing here counts as zero; one that is missing everywhere stays missing, so
        that the optimizer leaves its weights and their moments alone.
        """
        if self.world_size == 1:
            return
        parameters = list(parameters)
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        somewhere = self.all_sum(there.to(parameters[0].device)).tolist()
        for parameter, number in zip(parameters, somewhere, strict=True):
            if number == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
