"""The processes of one run: which one this is, and what they exchange."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.text import Text
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from klippo.errors import KlippoError, PreflightError

STARTUP = timedelta(minutes=30)
"""Longest that a process waits for the others to start and to load their models."""
TIMEOUT_S = 600.0
"""Longest that a process waits for another afterwards, in seconds, unless the config says."""

T = TypeVar("T")


class PeerError(KlippoError):
    """Another process of the run failed or does not answer; its own message says why."""

    exit_code = 3


@contextmanager
def explaining_peers() -> Iterator[None]:
    """Raise PeerError for what PyTorch raises when another process has gone."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or "gloo" in text.lower() or "NCCL" in text):
            raise
        raise PeerError(
            "another process of this run ended, or did not answer within peer_timeout_s; its own "
            "message says why, if there is one, or else look at its machine and at the network; "
            "then start all processes again, and they resume from the newest checkpoint "
            f"({text.splitlines()[0]})"
        ) from error


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process by default; several if a launcher (torchrun, accelerate) started them.

    Every process must call each method that exchanges something.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, device: torch.device, timeout_s: float = TIMEOUT_S) -> Ranks:
        """Join the process group that the launcher's variables describe, if they do.

        `timeout_s` (seconds) is the longest wait for another process once all run. Raises
        PreflightError if variables are missing or the processes cannot reach each other.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            _join(device, timedelta(seconds=timeout_s))
        ranks = cls(dist.get_rank(), dist.get_world_size())
        if not ranks.is_main:  # warnings and log lines come from the first process alone
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
        return ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, num: int) -> range:
        """This process's share of `num` items; the shares in the order of ranks are all of them."""
        return range(self.rank * num // self.world_size, (self.rank + 1) * num // self.world_size)

    @explaining_peers()
    def meet(self, point: str) -> None:
        """Wait for all processes, as long as a start may take; each name is used once."""
        if self.world_size > 1:
            _meet(_get_default_store(), point, self.world_size)

    @explaining_peers()
    def all_sum(self, x: Tensor) -> Tensor:
        """The sum of all processes' x, which have one shape."""
        if self.world_size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return max(self.gather(number))

    @explaining_peers()
    def gather(self, item: T) -> list[T]:
        """Every process's item, in the order of ranks, in every process; items are pickled."""
        if self.world_size == 1:
            return [item]
        items: list[T | None] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return cast(list[T], items)

    def on_main(self, work: Callable[[], object]) -> None:
        """Do this in the first process; if it fails, the others raise PeerError."""
        error: Exception | None = None
        if self.is_main:
            try:
                work()
            except Exception as raised:
                error = raised
        message = self.gather(None if error is None else str(error))[0]
        if error is not None:
            raise error
        if message is not None:
            raise PeerError(f"the first process failed: {message}")

    def everywhere(self, work: Callable[[], T]) -> T:
        """Do this in every process; a KlippoError in one of them ends all.

        The others raise PeerError with the first error's message, exit code and health check.
        Inside, processes may exchange nothing but `all_sum_or_fail`.
        """
        if self.world_size == 1:
            return work()
        results: list[T] = []
        error: KlippoError | None = None
        try:
            results.append(work())
        except KlippoError as raised:
            if raised.everywhere:
                raise
            error = raised
        self.gather_or_fail(None, error)
        return results[0]

    def all_sum_or_fail(self, x: Tensor) -> Tensor:
        """`all_sum` of a small tensor inside `everywhere`; raises if another process failed."""
        if self.world_size == 1:
            return x
        return torch.stack(self.gather_or_fail(x.cpu())).sum(dim=0).to(x.device)

    def gather_or_fail(self, item: T, error: KlippoError | None = None) -> list[T]:
        """Every process's item; an error of one process is raised in all."""
        # Not every error can be pickled.
        failure = None if error is None else (str(error), error.exit_code, error.check)
        try:
            messages = self.gather((item, failure))
        except PeerError as gone:
            raise error or gone from None
        for rank, (_, failed) in enumerate(messages):
            if failed is not None:
                if error is None:
                    error = PeerError(f"process {rank}: {failed[0]}")
                    error.exit_code, error.check = failed[1:]
                error.everywhere = True
                raise error
        return [item for item, _ in messages]


def _join(device: torch.device, timeout: timedelta) -> None:
    """Start the process group; it ends with the process."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise PreflightError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that there are several processes, but "
            f"{', '.join(missing)} is not set; start them with torchrun or accelerate launch, or "
            "unset WORLD_SIZE"
        )
    # Its default arguments would hold the group forever, whose threads then outlive Python.
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
            f"the {os.environ['WORLD_SIZE']} processes cannot reach each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error})"
        ) from error
    atexit.register(_leave)


def _meet(store: Store, point: str, num: int) -> None:
    """Wait for `num` processes at the store, which is not bound by the group's timeout."""
    if store.add(f"klippo/{point}/arrived", 1) == num:
        store.set(f"klippo/{point}/all", "1")
    store.wait([f"klippo/{point}/all"], STARTUP)


def _leave() -> None:
    if dist.is_initialized():
        gc.collect()  # frees models that hold the group
        dist.destroy_process_group()


def warn(text: str) -> None:
    """A warning on stderr, from the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(Text(f"Warning: {text}", style="yellow"))


def choose_device(name: str) -> torch.device:
    """The device of this process. Raises PreflightError if the machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise PreflightError(
            f"device=cuda: PyTorch {torch.__version__} finds no CUDA GPU; use device=auto"
        )
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)
