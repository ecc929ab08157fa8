"""Keeps what a run needs to go on: checkpoints in time, and one more when it ends too early."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klippo.errors import DivergedError
from klippo.runs.checkpoints import Checkpoints
from klippo.runs.rewind import sync_lines
from klippo.stages.interruptions import Interruptions
from klippo.stages.saving import Moment, random_state, take, write
from klippo.stages.session import Session


class Keeper:
    """Of one run, in every process of it.

    The moment before a step is taken at its beginning, but for the tensors. These stand still until
    the update, so that a run which is interrupted while it samples or scores loses nothing.
    """

    def __init__(
        self,
        session: Session,
        run: Path,
        interruptions: Interruptions,
        extra: Callable[[], Mapping[str, Any]],
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
        self.newest: int | None = None
        """The step of the newest checkpoint that this run has written."""

    def at_step(self, step: int) -> None:
        """Take the moment; write it where that is due; end here where a signal came."""
        session = self._session
        with self._interruptions.waiting():
            randoms = random_state(session.device)
            told = session.ranks.gather((self._is_due(step), self._interruptions.pending, randoms))
            self._moment = take(session, self._extra(), [randoms for _, _, randoms in told])
            if session.ranks.world_size == 1:  # what came meanwhile is no other process's business
                told = [(told[0][0], self._interruptions.pending, randoms)]
        signals = [number for _, number, _ in told if number is not None]
        if told[0][0] or signals:
            self.write()
        self._interruptions.raise_pending(signals[0] if signals else None)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """No moment is worth writing down inside."""
        self._moment = None
        with self._interruptions.waiting():
            yield

    def write(self) -> None:
        """Write the moment, unless there is none, or the run began there or has it already.

        Every process must call it.
        """
        moment = self._moment
        if moment is None or moment.step in (self.newest, self._begun_at):
            return
        self._session.ranks.on_main(lambda: sync_lines(self._run))
        write(moment, self._session.learner, self._checkpoints, self._settings.keep)
        self.newest, self._written_at = moment.step, time.monotonic()

    def rescue(self, error: BaseException) -> None:
        """After a failure: the moment before the step that failed, where it can be had.

        Several processes ended wherever they were, so none is written of them.
        """
        if not isinstance(error, DivergedError) and self._session.ranks.world_size == 1:
            self.write()

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
