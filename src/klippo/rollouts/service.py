"""What a rollout server does for a run, without HTTP: it holds an engine, renews it and asks it.

The engine works in one thread, that of `RolloutService.work`, as it would in a run.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

from klippo.errors import KlippoError
from klippo.rollouts.opening import Opening, Weights, unpack
from klippo.rollouts.protocol import Asked, completion_line, error_line
from klippo.types import Completion, Engine, Prompt

OpenEngine = Callable[[Opening, Weights], Engine]
"""Makes an engine that has these weights already, and takes them again when it syncs."""

MIB = 2**20


class StaleError(Exception):
    """The run, or its weights, are not those that the server has."""


class ClientGoneError(Exception):
    """Nobody waits for this answer any more."""


class Answer:
    """What a job says, line by line, to the thread that sends it."""

    def __init__(self) -> None:
        self._lines: Queue[dict[str, Any]] = Queue()
        self._gone = threading.Event()

    def tell(self, line: dict[str, Any]) -> None:
        """Say a line. Raises ClientGoneError where nobody listens."""
        if self._gone.is_set():
            raise ClientGoneError
        self._lines.put(line)

    def leave(self) -> None:
        """Nobody listens from now on."""
        self._gone.set()

    def lines(self, heartbeat_s: float) -> Iterator[dict[str, Any] | None]:
        """All lines up to the last; None whenever there was none for `heartbeat_s` seconds."""
        while True:
            try:
                line = self._lines.get(timeout=heartbeat_s)
            except Empty:
                yield None
                continue
            yield line
            if "end" in line or "error" in line:
                return


Job = Callable[[Answer], None]


@dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """A process's claim to the server, as long as its connection lasts."""

    process: str


class RolloutService:
    """One engine for one run at a time."""

    def __init__(self, open_engine: OpenEngine, say: Callable[[str], None]) -> None:
        """`say` is told of runs, weights and failures."""
        self._open_engine = open_engine
        self._say = say
        self._jobs: Queue[tuple[Job, Answer] | None] = Queue()
        self._lock = threading.Lock()
        self._hold: Hold | None = None
        # What follows belongs to the working thread.
        self._run: str | None = None
        self._opening: Opening | None = None
        self._engine: Engine | None = None
        self._digest: str | None = None
        self._body = b""

    @property
    def is_held(self) -> bool:
        return self._hold is not None

    def hold(self, run: str) -> Hold | None:
        """Claim the server for a run's process; None while another process has it."""
        process = run.partition("/")[0]
        with self._lock:
            if self._hold is not None and self._hold.process != process:
                return None
            self._hold = Hold(process)
            return self._hold

    def release(self, hold: Hold) -> None:
        """Give a claim back; one that the run has renewed meanwhile stays."""
        with self._lock:
            if self._hold is hold:
                self._hold = None

    def open(self, run: str, opening: Opening) -> Answer:
        """Turn to a run; the end says which weights are here already."""

        def job(answer: Answer) -> None:
            self._run = run
            if opening != self._opening:
                self._drop_engine()
                self._opening = opening
            self._say(f"A run with a {opening.model_name}")
            answer.tell({"end": {"weights": self._digest}})

        return self._submit(job)

    def renew(self, run: str, digest: str, body: bytes) -> Answer:
        """Take over packed weights; the first make the engine."""

        def job(answer: Answer) -> None:
            opening = self._of(run)
            start = time.perf_counter()
            self._digest = None
            self._body = body
            try:
                if self._engine is None:
                    self._engine = self._open_engine(opening, lambda: unpack(self._body))
                else:
                    self._engine.sync()
            finally:
                self._body = b""
            self._digest = digest
            seconds = time.perf_counter() - start
            self._say(f"Weights {digest[:8]} ({len(body) / MIB:.0f} MiB) in {seconds:.1f} s")
            answer.tell({"end": {}})

        return self._submit(job)

    def generate(self, run: str, asked: Asked) -> Answer:
        """Sample with the weights of a digest; one line per completion, in any order."""

        def job(answer: Answer) -> None:
            self._of(run)
            if self._engine is None or asked.weights != self._digest:
                raise StaleError("the server has other weights")
            prompts = [Prompt(id=i, text="", token_ids=ids) for i, ids in enumerate(asked.prompts)]

            def tell(i: int, completion: Completion) -> None:
                answer.tell(completion_line(i, completion))

            self._engine.generate(prompts, asked.max_lengths, asked.seeds, tell)
            answer.tell({"end": {}})

        return self._submit(job)

    def work(self) -> None:
        """Do jobs one after the other, until `stop`."""
        while (task := self._jobs.get()) is not None:
            job, answer = task
            try:
                job(answer)
            except ClientGoneError:
                self._say("The client has gone; its responses are dropped")
            except Exception as error:
                self._failed(error)
                with suppress(ClientGoneError):
                    answer.tell(error_line(error))

    def stop(self) -> None:
        """End `work` after the jobs that are waiting."""
        self._jobs.put(None)

    def _submit(self, job: Job) -> Answer:
        answer = Answer()
        self._jobs.put((job, answer))
        return answer

    def _of(self, run: str) -> Opening:
        if run != self._run or self._opening is None:
            raise StaleError("the server was started again, or serves another run")
        return self._opening

    def _failed(self, error: Exception) -> None:
        """An engine that failed is not used again: nobody knows what state it is in."""
        if isinstance(error, StaleError):
            return
        if isinstance(error, KlippoError):
            self._say(str(error))
            return
        self._drop_engine()
        self._say(traceback.format_exc())

    def _drop_engine(self) -> None:
        self._engine = None
        self._digest = None
