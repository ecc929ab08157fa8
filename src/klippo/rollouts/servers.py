"""Sampling on rollout servers, one or several: prompts are split, and dead servers stood in for."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Queue
from typing import TypeVar

import torch

from klippo.errors import ServerError
from klippo.rollouts.opening import Opening, PackedWeights, Weights, pack
from klippo.rollouts.protocol import Asked
from klippo.rollouts.remote import RemoteServer, Timing, UnavailableError
from klippo.types import Completion, OnDone, Prompt

T = TypeVar("T")
PROCESS = uuid.uuid4().hex
"""The name of this process at servers: one that it holds is held for every engine in it."""


class ServersEngine:
    """The responses of `VLLMEngine`, from servers that have a copy of the policy each.

    What a server that dies has not answered is asked again of the others, or of the same when it is
    back: equal seeds give equal responses.
    """

    def __init__(
        self,
        urls: Sequence[str],
        weights: Weights,
        opening: Opening,
        *,
        patience_s: float,
        say: Callable[[str], None],
        timing: Timing | None = None,
    ) -> None:
        """`say` is told of servers that are lost and found; `patience_s` is how long none may
        answer."""
        self._weights = weights
        self._dtype: torch.dtype = getattr(torch, opening.dtype)
        self._patience_s = patience_s
        self._say = say
        self._timing = timing or Timing()
        run = f"{PROCESS}/{uuid.uuid4().hex}"
        self._servers = [RemoteServer(url, opening, run, self._timing) for url in urls]
        self._lost: dict[str, str] = {}
        """Why a server, by its address, was of no use the last time."""
        self._packed = self._pack()

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self._servers]

    def sync(self) -> None:
        """Take the policy's weights; they are sent with the next prompts, where they are new."""
        self._packed = self._pack()

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_lengths: Sequence[int],
        seeds: Sequence[int],
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order; at most `max_lengths[i]` tokens each.

        `seeds[i]` alone decides the random numbers of completion i. `on_done(i, completion)` is
        called for each when it is here. Raises ServerError when no server answers for
        `patience_s`, and PreflightError or ConfigError for what no server can do.
        """
        done: dict[int, Completion] = {}
        pauses = _Pauses(self._patience_s, self._timing)
        while missing := [i for i in range(len(prompts)) if i not in done]:
            number = len(done)
            for i, completion in self._ask(self._ready(), missing, prompts, max_lengths, seeds):
                done[i] = completion
                if on_done is not None:
                    on_done(i, completion)
            if len(done) > number:
                pauses = _Pauses(self._patience_s, self._timing)
            elif not pauses.wait():
                raise ServerError(self._farewell(pauses.number))
        return [done[i] for i in range(len(prompts))]

    def _pack(self) -> PackedWeights:
        return pack(self._weights(), self._dtype)

    def _ready(self) -> list[RemoteServer]:
        """The servers that have the weights now; those that were lost get another chance."""
        for server, said in _at_once(self._servers, lambda server, _: server.prepare(self._packed)):
            if isinstance(said, UnavailableError):
                self._lose(server, said)
            elif self._lost.pop(server.url, None) is not None:
                self._say(f"the rollout server {server.url} is back")
        return [server for server in self._servers if server.url not in self._lost]

    def _ask(
        self,
        servers: Sequence[RemoteServer],
        numbers: Sequence[int],
        prompts: Sequence[Prompt],
        max_lengths: Sequence[int],
        seeds: Sequence[int],
    ) -> Iterator[tuple[int, Completion]]:
        """The completions of these numbers that the servers get done, each with its number."""
        shares = {server: numbers[k :: len(servers)] for k, server in enumerate(servers)}
        stop = threading.Event()

        def work(server: RemoteServer, tell: Callable[[tuple[int, Completion]], None]) -> None:
            share = shares[server]
            asked = Asked(
                weights=self._packed.digest,
                prompts=[prompts[i].token_ids for i in share],
                max_lengths=[max_lengths[i] for i in share],
                seeds=[seeds[i] for i in share],
            )
            server.generate(asked, lambda i, completion: tell((share[i], completion)), stop)

        asking = [server for server in servers if shares[server]]
        try:
            for server, said in _at_once(asking, work):
                if isinstance(said, UnavailableError):
                    self._lose(server, said)
                elif said is not None:
                    yield said
        finally:
            stop.set()

    def _lose(self, server: RemoteServer, error: UnavailableError) -> None:
        if server.url not in self._lost:
            self._say(
                f"the rollout server {server.url} is lost ({error}); asking "
                + ("the others" if len(self._servers) > len(self._lost) + 1 else "again")
            )
        self._lost[server.url] = str(error)

    def _farewell(self, number: int) -> str:
        reasons = "; ".join(f"{url} ({self._lost.get(url, 'no responses')})" for url in self.urls)
        return (
            f"no rollout server answers: {reasons}. They were asked {number} times in "
            f"{self._patience_s:g} s (rollout.vllm.patience_s). Start them again with klippo "
            "serve-rollouts, then the run"
        )


class _Pauses:
    """Pauses between attempts, each longer than the one before, until patience is at its end."""

    def __init__(self, patience_s: float, timing: Timing) -> None:
        self._patience_s = patience_s
        self._timing = timing
        self._end: float | None = None
        self.number = 0

    def wait(self) -> bool:
        """Sleep once; False where the patience since the first pause is at its end."""
        self.number += 1
        if self._end is None:
            self._end = time.monotonic() + self._patience_s
        left = self._end - time.monotonic()
        if left <= 0:
            return False
        pause = self._timing.backoff_s * 2 ** min(self.number - 1, 10)
        time.sleep(min(pause, self._timing.backoff_cap_s, left))
        return True


def _at_once(
    servers: Sequence[RemoteServer],
    work: Callable[[RemoteServer, Callable[[T], None]], None],
) -> Iterator[tuple[RemoteServer, T | UnavailableError | None]]:
    """Work with every server in a thread of its own.

    Yields what the threads tell as it comes, and for each at its end the error that made the server
    unavailable, or None. Other errors are raised here.
    """
    said: Queue[tuple[RemoteServer, T | None, _Ended | None]] = Queue()

    def run(server: RemoteServer) -> None:
        error: Exception | None = None
        try:
            work(server, lambda told: said.put((server, told, None)))
        except Exception as raised:
            error = raised
        said.put((server, None, _Ended(error)))

    for server in servers:
        threading.Thread(target=run, args=(server,), daemon=True).start()
    running = len(servers)
    while running:
        server, told, ended = said.get()
        if ended is None:
            yield server, told
            continue
        running -= 1
        if ended.error is None or isinstance(ended.error, UnavailableError):
            yield server, ended.error
        else:
            raise ended.error


@dataclass(frozen=True, slots=True)
class _Ended:
    error: Exception | None
