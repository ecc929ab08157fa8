"""Keeps what a run needs to go on: checkpoints in time, and one more when it ends too early."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klippo.errors import DivergedError
from klippo.runs.checkpoints import Checkpoint, Checkpoints
from klippo.runs.rewind import sync_lines
from klippo.train.interruptions import Interruptions
from klippo.train.saving import Moment, random_state, take, write
from klippo.train.session import Session


class Keeper:
    """Of one run, in every process of it.

    The moment before a step is taken at its beginning, but for the tensors. These stand still until
    the update, so that a run which is interrupted while it samples or scores loses nothing. Where a
    checkpoint is due it is written just before the update, when the health checks have seen what
    its policy writes.
    """

    def __init__(
        self,
        session: Session,
        run: Path,
        interruptions: Interruptions,
        extra: Callable[[], Mapping[str, Any]],
        begun_from: Checkpoint | None = None,
    ) -> None:
        """`extra` is what else a checkpoint should hold, as JSON."""
        self._session = session
        self._settings = session.config.checkpoint
        self._run = run
        self._checkpoints = Checkpoints(run)
        self._interruptions = interruptions
        self._extra = extra
        self._moment: Moment | None = None
        self._begun_at = session.learner.num_steps_done
        self._written_at = time.monotonic()
        self._due = False
        self.newest: int | None = None if begun_from is None else begun_from.step
        """The step of the newest checkpoint that the run can go on from."""

    def at_step(self, step: int) -> None:
        """Take the moment; end here, with a checkpoint, where a signal came."""
        session = self._session
        with self._interruptions.waiting():
            randoms = random_state(session.device)
            told = session.ranks.gather((self._is_due(step), self._interruptions.pending, randoms))
            self._moment = take(session, self._extra(), [randoms for _, _, randoms in told])
            if session.ranks.world_size == 1:  # what came meanwhile is no other process's business
                told = [(told[0][0], self._interruptions.pending, randoms)]
        signals = [number for _, number, _ in told if number is not None]
        self._due = told[0][0]
        if signals or (self._due and step == session.config.ppo.num_steps):
            self._write_unseen()
        self._interruptions.raise_pending(signals[0] if signals else None)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Write the moment where that is due. No moment is worth writing down inside."""
        with self._interruptions.waiting():
            if self._due:
                self.write()
            self._moment = None
            yield

    def write(self) -> None:
        """Write the moment and remove old checkpoints. Every process must call it."""
        if self._write_unseen():
            self._session.ranks.on_main(lambda: self._checkpoints.prune(self._settings.keep))

    def _write_unseen(self) -> bool:
        """Write the moment, unless there is none, or the run began there or has it already.

        All older ones stay: no health check has seen yet what this policy writes.
        """
        moment = self._moment
        if moment is None or moment.step in (self.newest, self._begun_at):
            return False
        self._session.ranks.on_main(lambda: sync_lines(self._run))
        write(moment, self._session.learner, self._checkpoints)
        self.newest, self._written_at = moment.step, time.monotonic()
        return True

    def set_aside(self, step: int) -> None:
        """The policy of this step is not what the run should go on from. Every process calls it."""
        self._session.ranks.on_main(lambda: self._checkpoints.set_aside(step))
        if self._session.ranks.is_main:
            self.newest = self._checkpoints.newest_step()

    def rescue(self, error: BaseException) -> None:
        """After a failure: the moment before the step that failed. Every process calls it."""
        if not isinstance(error, DivergedError):
            self._write_unseen()

    def done(self) -> None:
        """The run is done: its checkpoints go, or the last one stays. Every process calls it."""
        keeps = self._settings.keep_when_done
        if keeps:
            self.write()
        found = self._checkpoints
        self._session.ranks.on_main(lambda: found.prune(1) if keeps else found.remove())

    def _is_due(self, step: int) -> bool:
        settings = self._settings
        by_steps = settings.every is not None and step % settings.every == 0
        minutes = (time.monotonic() - self._written_at) / 60
        return by_steps or (
            settings.every_minutes is not None and minutes >= settings.every_minutes
        )
