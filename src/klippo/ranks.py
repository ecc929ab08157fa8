"""The processes of one run: who we are among them, and what they say to each other."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from klippo.errors import KlippoError, PreflightError

TIMEOUT = timedelta(minutes=30)
"""Longest that a process waits for the others to start, or to come to the same place."""

T = TypeVar("T")


class PeerError(KlippoError):
    """Another process of the run ended, or does not answer; that one knows why."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process by default; several when a launcher (torchrun, accelerate) started them."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, device: torch.device) -> Ranks:
        """Join the process group that the launcher's variables describe, if they do.

        Raises PreflightError when they are incomplete or the processes do not find each other.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            _join(device)
        ranks = cls(dist.get_rank(), dist.get_world_size())
        if not ranks.is_main:
            _say_nothing()
        return ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_sum(self, x: Tensor) -> Tensor:
        """x added up over all processes; every process must call it with the same shape."""
        if self.world_size == 1:
            return x
        x = x.clone()
        with _together():
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
            with _together():
                dist.all_reduce(parameter.grad)

    def gather(self, item: T) -> list[T]:
        """Every process's item, by rank, on every process; items are pickled."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        with _together():
            dist.all_gather_object(items, item)
        return items

    def on_main(self, work: Callable[[], object]) -> None:
        """Let the first process do this; where it fails there, the others raise PeerError."""
        error: Exception | None = None
        if self.is_main:
            try:
                work()
            except Exception as raised:
                error = raised
        said = self.gather(None if error is None else str(error))[0]  # not every error can travel
        if error is not None:
            raise error
        if said is not None:
            raise PeerError(f"the first process failed: {said}")

    def share(self, num: int) -> range:
        """This process's part of `num` things: the parts one after the other are all of them."""
        return range(self.rank * num // self.world_size, (self.rank + 1) * num // self.world_size)


def _join(device: torch.device) -> None:
    """Start the process group; it ends with the process."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise PreflightError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that there are several processes, but "
            f"{', '.join(missing)} is not set; start them with torchrun or accelerate launch, or "
            "unset WORLD_SIZE"
        )
    # Its default arguments would hold the group for ever, whose threads then outlive Python.
    import torch.distributed.nn.functional

    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    elif "OMP_NUM_THREADS" not in os.environ:
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, torch.get_num_threads() // num_local))
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise PreflightError(
            f"the {os.environ['WORLD_SIZE']} processes do not find each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error})"
        ) from error
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _say_nothing() -> None:
    """Warnings and log lines come from the first process alone."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)


@contextmanager
def _together() -> Iterator[None]:
    """Something that all processes do: where one has ended, the others learn it here."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(
            "another process of this run ended or does not answer; its own message, where there "
            f"is one, says why ({str(error).splitlines()[0]})"
        ) from error
