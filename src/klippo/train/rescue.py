"""What is kept of a run that ended too early: why it did, what it goes on from, its policy."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from klippo.errors import DivergedError, HealthError, KlippoError, StorageError
from klippo.policy.sharding import full_weights, is_sharded
from klippo.ranks import PeerError, Ranks, explaining_peers
from klippo.report.write import refresh_report
from klippo.runs.checkpoints import Checkpoints
from klippo.runs.folder import MODEL_DIR, RunFolder
from klippo.train.recorder import RunRecorder, save_model
from klippo.train.resume import resume_command
from klippo.train.session import Session
from klippo.train.started import now


def rescue(session: Session, recorder: RunRecorder, error: BaseException) -> None:
    """Write down why the run ended, and keep all that it needs to go on. Every process calls it.

    Processes that end together write what they have together, and none leaves before the first one
    is done, as a launcher then ends the others. Where one ended alone, the first one keeps what it
    has without the others.
    """
    ranks = session.ranks
    is_everywhere = isinstance(error, KlippoError) and error.everywhere
    are_together = ranks.world_size == 1 or is_everywhere
    if ranks.is_main:
        _keep(session, recorder, error, are_together)
    elif are_together:
        _help(session, recorder, error)
    if are_together:
        with suppress(PeerError):
            ranks.gather(None)


def _keep(
    session: Session, recorder: RunRecorder, error: BaseException, are_together: bool
) -> None:
    """In the first process."""
    done, folder = session.learner.num_steps_done, recorder.folder
    state = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
    recorder.health.record(error, done)
    details: dict[str, Any] = {"reason": _reason(error, session.ranks), "num_steps_done": done}
    check = error.check if isinstance(error, KlippoError) else None
    details |= {"stopped_by": check} if check is not None else {}
    details |= recorder.health.status()
    with _second_failure(recorder):
        folder.write_status(state, **details, ended=now())
    if are_together:
        with _second_failure(recorder):
            recorder.keeper.rescue(error)
    checkpoint = recorder.keeper.newest
    if checkpoint is not None:
        details |= {"resume": resume_command(folder.path), "checkpoint_step": checkpoint}
        with _second_failure(recorder):
            folder.write_status(state, **details, ended=now())
    if are_together or not is_sharded(session.policy):
        with _second_failure(recorder), full_weights(session.policy):
            _save_model(session, recorder, error)
    elif checkpoint is not None:
        recorder.progress.say(
            "No model is saved: each process had a shard of the weights. The checkpoint has all; "
            f"with ppo.num_steps={checkpoint} checkpoint.keep_when_done=true the command below "
            "makes a model of it and trains no further."
        )
    if check is not None:
        refresh_report(folder.path, recorder.console)
    if checkpoint is not None:
        recorder.progress.say(f"This goes on after step {checkpoint}: {details['resume']}")


def _help(session: Session, recorder: RunRecorder, error: BaseException) -> None:
    """In the other processes: their part of what `_keep` does together."""
    with _second_failure(recorder):
        recorder.keeper.rescue(error)
    with _second_failure(recorder), full_weights(session.policy):
        pass


def _save_model(session: Session, recorder: RunRecorder, error: BaseException) -> None:
    """The policy's weights are whole."""
    done = session.learner.num_steps_done
    if isinstance(error, HealthError):
        _save_last_good(session, recorder)
    elif done > 0:
        _save_as_it_is(session, recorder, error, done)


def _save_last_good(session: Session, recorder: RunRecorder) -> None:
    """The policy of the newest checkpoint: that in memory is what a health check stopped."""
    checkpoint, _ = Checkpoints(recorder.folder.path).newest()
    if checkpoint is None:
        recorder.progress.say("There is no checkpoint from before, and no model is saved.")
        return
    with _second_failure(recorder):
        session.learner.load_weights(checkpoint.tensors("weights"))
        save_model(session, recorder.folder)
        recorder.progress.say(
            f"The policy as it was after {checkpoint.step} steps, before that, is in "
            f"{recorder.folder.path / MODEL_DIR}"
        )


def _save_as_it_is(
    session: Session, recorder: RunRecorder, error: BaseException, done: int
) -> None:
    folder = recorder.folder
    if isinstance(error, StorageError):
        folder = RunFolder(Path(tempfile.mkdtemp(prefix="klippo-rescued-")))
    with _second_failure(recorder):
        save_model(session, folder)
        recorder.progress.say(
            f"The policy as it was after {done} steps is in {folder.path / MODEL_DIR}"
        )


@contextmanager
def _second_failure(recorder: RunRecorder) -> Iterator[None]:
    """What goes wrong while cleaning up must not hide what went wrong first."""
    try:
        with explaining_peers():
            yield
    except (StorageError, DivergedError, PeerError) as error:
        recorder.progress.say(f"And then: {error}")


def _reason(error: BaseException, ranks: Ranks) -> str:
    text = str(error)
    if isinstance(error, SystemExit) and ranks.world_size > 1:
        return f"ended from outside ({text}), perhaps because another process of the run failed"
    return text if isinstance(error, KlippoError) else f"{type(error).__name__}: {text}"
