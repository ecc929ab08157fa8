"""A run's checkpoints: when they are written, what they hold, and how a run continues from one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from klippo.errors import ConfigError, DivergedError
from klippo.runs.checkpoints import Checkpoint, Checkpoints
from klippo.runs.rewind import sync_lines
from klippo.train.interruptions import Interruptions
from klippo.train.session import Session
from klippo.train.started import versions

REMEDY = {
    "data": "give the data that the run began with",
    "model": "give the model that the run began with (the same revision)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """All state of a run between two steps except its tensors, which only the update changes."""

    step: int
    state: dict[str, Any]


class Keeper:
    """Writes the checkpoints of a run; lives in every process of it.

    The moment before a step is taken at its beginning, without the tensors. These stay as they are
    until the update, so a run that is interrupted while it samples or scores loses nothing. A due
    checkpoint is written just before the update, when the health checks have seen what its policy
    writes.
    """

    def __init__(
        self,
        session: Session,
        run: Path,
        interruptions: Interruptions,
        extra: Callable[[], Mapping[str, Any]],
        resumed_from: Checkpoint | None = None,
    ) -> None:
        """`extra` gives what else a checkpoint holds, as JSON."""
        self._session = session
        self._settings = session.config.checkpoint
        self._run = run
        self._checkpoints = Checkpoints(run)
        self._interruptions = interruptions
        self._extra = extra
        self._moment: Moment | None = None
        self._first_step = session.learner.num_steps_done
        self._written_at = time.monotonic()
        self._is_due = False
        self.newest: int | None = None if resumed_from is None else resumed_from.step
        """The step of the newest checkpoint from which the run can resume."""

    def before_step(self, step: int) -> None:
        """Take the moment; stop here, with a checkpoint, if a signal arrived."""
        session, interruptions = self._session, self._interruptions
        with interruptions.waiting():
            randoms = random_state(session.device)
            seen = session.ranks.gather((self._due(step), interruptions.pending, randoms))
            self._moment = take(session, self._extra(), [randoms for _, _, randoms in seen])
            pending = [number for _, number, _ in seen]
            if session.ranks.world_size == 1:  # a signal may have arrived meanwhile
                pending = [interruptions.pending]
        signals = [number for number in pending if number is not None]
        self._is_due = seen[0][0]
        if signals or (self._is_due and step == session.learner.ppo.num_steps):
            self._write_unchecked()
        interruptions.raise_pending(signals[0] if signals else None)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Write the checkpoint if it is due; inside, weights change and no moment is worth one."""
        with self._interruptions.waiting():
            if self._is_due:
                self.write()
            self._moment = None
            yield

    def write(self) -> None:
        """Write the moment and remove old checkpoints. Every process must call it."""
        if self._write_unchecked():
            self._session.ranks.on_main(lambda: self._checkpoints.prune(self._settings.keep))

    def _write_unchecked(self) -> bool:
        """Write the moment, if there is one that no checkpoint holds yet.

        Older checkpoints stay: no health check has seen yet what this policy writes. Raises
        DivergedError for a weight that is not finite; then nothing is written.
        """
        moment, learner = self._moment, self._session.learner
        if moment is None or moment.step in (self.newest, self._first_step):
            return False
        self._session.ranks.on_main(lambda: sync_lines(self._run))
        tensors = learner.optimizer.tensors()

        def write() -> None:
            for name, weight in tensors["weights"].items():
                if not bool(weight.isfinite().all()):
                    raise DivergedError(
                        f"{name} is not finite after {moment.step} steps; no checkpoint of that "
                        "was written, and older ones stay; lower optimizer.learning_rate"
                    )
            self._checkpoints.write(moment.step, tensors, moment.state)

        self._session.ranks.on_main(write)
        self.newest, self._written_at = moment.step, time.monotonic()
        return True

    def set_aside(self, step: int) -> None:
        """The policy of this step must not be resumed from. Every process calls it."""
        self._session.ranks.on_main(lambda: self._checkpoints.set_aside(step))
        if self._session.ranks.is_main:
            self.newest = self._checkpoints.newest_step()

    def rescue(self, error: BaseException) -> None:
        """After a failure: write the moment before the step that failed. Every process calls it."""
        if not isinstance(error, DivergedError):
            self._write_unchecked()

    def done(self) -> None:
        """The run is done: remove its checkpoints, or keep the last. Every process calls it."""
        keeps = self._settings.keep_when_done
        if keeps:
            self.write()
        checkpoints = self._checkpoints
        self._session.ranks.on_main(lambda: checkpoints.prune(1) if keeps else checkpoints.remove())

    def _due(self, step: int) -> bool:
        settings = self._settings
        minutes = (time.monotonic() - self._written_at) / 60
        return (settings.every is not None and step % settings.every == 0) or (
            settings.every_minutes is not None and minutes >= settings.every_minutes
        )


def take(session: Session, extra: Mapping[str, Any], randoms: list[dict[str, Any]]) -> Moment:
    """The moment before the next step; `randoms` are the random states of every process."""
    return Moment(
        step=session.learner.num_steps_done,
        state={
            "learner": session.learner.state_dict(),
            "parts": {name: part.state_dict() for name, part in session.states.items()},
            "random": randoms,
            "fingerprints": dict(session.fingerprints),
            "num_processes": session.ranks.world_size,
            "versions": versions(),
        }
        | dict(extra),
    )


def restore(session: Session, checkpoint: Checkpoint) -> list[str]:
    """Put a session that was just opened where the checkpoint was taken.

    Returns what may make its numbers differ. Raises ConfigError for another model or other data.
    """
    state = checkpoint.state
    for what, then in state["fingerprints"].items():
        now = session.fingerprints[what]
        if now != then:
            raise ConfigError(
                f"{checkpoint.path} was written with another {what} (fingerprint {then}, now "
                f"{now}); {REMEDY[what]}, or choose another output_dir"
            )
    session.learner.optimizer.load_tensors(
        {name: checkpoint.tensors(name) for name in state["files"]}
    )
    session.learner.load_state_dict(state["learner"])
    for name, part in session.states.items():
        part.load_state_dict(state["parts"][name])
    notes = []
    ranks = session.ranks
    if state["num_processes"] == ranks.world_size:
        set_random_state(state["random"][ranks.rank], session.device)
    else:
        notes.append(
            f"{ranks.world_size} processes resume what {state['num_processes']} began: sums are "
            "added in another order"
        )
    changed = [
        f"{name} {old} -> {versions().get(name)}"
        for name, old in state["versions"].items()
        if versions().get(name) != old
    ]
    if changed:
        notes.append(f"other versions than at the checkpoint: {', '.join(changed)}")
    return notes


def random_state(device: torch.device) -> dict[str, Any]:
    """Of the generators that a reward or a library may use; the run's own have their own seeds."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators where `random_state` was taken."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
