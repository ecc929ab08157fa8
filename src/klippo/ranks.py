"""The processes of one run: who we are among them, and what they say to each other."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.text import Text
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous
from torch.nn import Parameter

from klippo.errors import KlippoError, PreflightError

STARTUP = timedelta(minutes=30)
"""Longest that a process waits for the others to start and to load their models."""
TIMEOUT_S = 600.0
"""Longest that a process of a running run waits for another, in seconds, unless the config says."""

BUCKET_BYTES = 25 * 2**20
"""Gradients are copied into messages of about this size (that of PyTorch's DDP, 25 MiB)."""

T = TypeVar("T")


class PeerError(KlippoError):
    """Another process of the run ended, or does not answer; that one knows why."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class _Failure:
    """What other processes learn of an error; not every one can travel."""

    rank: int
    text: str
    exit_code: int
    check: str | None

    @classmethod
    def of(cls, rank: int, error: KlippoError) -> _Failure:
        return cls(rank, str(error), error.exit_code, error.check)

    def error(self) -> PeerError:
        error = PeerError(f"process {self.rank}: {self.text}")
        error.exit_code, error.check = self.exit_code, self.check
        return error


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process by default; several when a launcher (torchrun, accelerate) started them."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, device: torch.device, timeout_s: float = TIMEOUT_S) -> Ranks:
        """Join the process group that the launcher's variables describe, if they do.

        `timeout_s` (seconds) is the longest that this process will wait for another, once both
        run. Raises PreflightError when the variables are incomplete or the processes do not find
        each other.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            _join(device, timedelta(seconds=timeout_s))
        ranks = cls(dist.get_rank(), dist.get_world_size())
        if not ranks.is_main:
            _say_nothing()
        return ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def meet(self, place: str) -> None:
        """Wait until all processes are here, as long as a start may take; `place` is used once."""
        if self.world_size == 1:
            return
        with _together():
            _meet(_get_default_store(), place, self.world_size)

    def all_sum(self, x: Tensor) -> Tensor:
        """x added up over all processes; every process must call it with the same shape."""
        if self.world_size == 1:
            return x
        x = x.clone()
        with _together():
            dist.all_reduce(x)
        return x

    def sum_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Replace every gradient by its sum over all processes, in messages of many weights each.

        One that is missing here counts as zero; one that is missing everywhere stays missing, so
        that the optimizer leaves its weights and their moments alone.
        """
        if self.world_size == 1:
            return
        parameters = list(parameters)
        if not parameters:
            return
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        somewhere = self.all_sum(there.to(parameters[0].device)).tolist()
        gradients = []
        for parameter, number in zip(parameters, somewhere, strict=True):
            if number > 0:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            with _together():
                dist.all_reduce(flat)
            sums = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, total in zip(bucket, sums, strict=True):
                gradient.copy_(total.view_as(gradient))

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

    def everywhere(self, work: Callable[[], T]) -> T:
        """Do this in every process; a KlippoError that ends it in one ends it in all.

        Where it went well they raise PeerError with the first such error's message, exit code and
        health check. Inside, processes may meet in `all_sum_or_fail` alone.
        """
        if self.world_size == 1:
            return work()
        done: list[T] = []
        error: KlippoError | None = None
        try:
            done.append(work())
        except KlippoError as raised:
            if raised.everywhere:
                raise
            error = raised
        self._gather_or_fail(None, error)
        return done[0]

    def all_sum_or_fail(self, x: Tensor) -> Tensor:
        """`all_sum` of a small tensor inside `everywhere`; raises where another process failed."""
        if self.world_size == 1:
            return x
        return torch.stack(self._gather_or_fail(x.cpu())).sum(dim=0).to(x.device)

    def _gather_or_fail(self, item: T, error: KlippoError | None = None) -> list[T]:
        """Every process's item; an error in place of one is raised in all."""
        own = item if error is None else _Failure.of(self.rank, error)
        try:
            found = self.gather(own)
        except PeerError:
            if error is None:
                raise
            raise error from None
        failures = [one for one in found if isinstance(one, _Failure)]
        if failures:
            error = error or failures[0].error()
            error.everywhere = True
            raise error
        return [one for one in found if not isinstance(one, _Failure)]

    def share(self, num: int) -> range:
        """This process's part of `num` things: the parts one after the other are all of them."""
        return range(self.rank * num // self.world_size, (self.rank + 1) * num // self.world_size)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type after the other, in groups of at least `BUCKET_BYTES` but the last."""
    for _, group in groupby(tensors, key=lambda x: x.dtype):
        bucket: list[Tensor] = []
        num_bytes = 0
        for tensor in group:
            bucket.append(tensor)
            num_bytes += tensor.nbytes
            if num_bytes >= BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
        if bucket:
            yield bucket


def _join(device: torch.device, timeout: timedelta) -> None:
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
        store, rank, world_size = next(iter(rendezvous("env://", timeout=STARTUP)))
        _meet(store, "start", world_size)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise PreflightError(
            f"the {os.environ['WORLD_SIZE']} processes do not find each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error})"
        ) from error
    atexit.register(_leave)


def _meet(store: Store, place: str, num: int) -> None:
    """Wait for `num` processes by the store, which has none of the group's impatience."""
    if store.add(f"klippo/{place}/here", 1) == num:
        store.set(f"klippo/{place}/all", "1")
    store.wait([f"klippo/{place}/all"], STARTUP)


def _leave() -> None:
    if dist.is_initialized():
        gc.collect()  # models that hold the group
        dist.destroy_process_group()


def _say_nothing() -> None:
    """Warnings and log lines come from the first process alone."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)


@contextmanager
def explaining_peers() -> Iterator[None]:
    """Raise PeerError for what PyTorch raises where a process that is waited for is gone."""
    try:
        yield
    except RuntimeError as error:
        told = str(error)
        if isinstance(error, dist.DistError) or "gloo" in told.lower() or "NCCL" in told:
            raise _peer_error(error) from error
        raise


@contextmanager
def _together() -> Iterator[None]:
    """Something that all processes do: where one has ended, the others learn it here."""
    try:
        yield
    except RuntimeError as error:
        raise _peer_error(error) from error


def _peer_error(error: RuntimeError) -> PeerError:
    return PeerError(
        "another process of this run ended, or did not answer within peer_timeout_s; its own "
        "message, where there is one, says why, and where there is none, look at its machine and "
        "at the network; then start all processes again, and they go on from the newest "
        f"checkpoint ({str(error).splitlines()[0]})"
    )


def warn(text: str) -> None:
    """A warning on stderr, from the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(Text(f"Warning: {text}", style="yellow"))


def choose_device(name: str) -> torch.device:
    """The device of this process. Raises PreflightError for one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise PreflightError(
            f"device=cuda: PyTorch {torch.__version__} finds no CUDA GPU here; use device=auto"
        )
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)
