"""How a run ends: done, with gold scores, figures and report; or early, keeping what it can."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from klippo.errors import DivergedError, HealthError, KlippoError, StorageError
from klippo.evaluation.samples import SampleRow
from klippo.evaluation.statistics import PairedComparison
from klippo.lab.gold_eval import add_gold, gold_found, gold_missing
from klippo.policy.sharding import full_weights, is_sharded
from klippo.ranks import PeerError, Ranks, explaining_peers
from klippo.report.series import NOTHING_SAMPLED
from klippo.report.tables import MEASURES, change_table, compare_rows, samples_table
from klippo.report.write import refresh_report, write_figures
from klippo.runs.checkpoints import Checkpoints
from klippo.runs.folder import MODEL_DIR, RunFolder, evaluation_files, read_rows
from klippo.train.early_stop import BEST_DIR
from klippo.train.recorder import RunRecorder, save_model
from klippo.train.resume import resume_command
from klippo.train.session import Online
from klippo.train.started import now


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did."""

    output_dir: Path
    num_steps: int
    before: Sequence[SampleRow] = ()
    after: Sequence[SampleRow] = ()
    compared: Mapping[str, PairedComparison] = field(default_factory=dict)
    """By measure: proxy, gold, kl_exact_nats, length, finished."""
    gold_problem: str | None = None
    """Why gold scores are missing, if they are; the run itself is done."""


def conclude(recorder: RunRecorder) -> Outcome:
    """Score the evaluation samples with gold, write tables and the report, print the summary.

    A problem with gold or with the report costs nothing else: the outcome, run_status.json and the
    screen name it.
    """
    session, folder, console = recorder.session, recorder.folder, recorder.console
    early_stop, num_steps = recorder.early_stop, session.learner.num_steps_done
    if not session.ranks.is_main:
        return Outcome(output_dir=folder.path, num_steps=num_steps)
    details: dict[str, Any] = {"reason": "all steps done", "num_steps_done": num_steps}
    details |= recorder.health.status()
    if early_stop is not None:
        details |= {"best_step": early_stop.best_step, "best_model": f"{BEST_DIR}/{MODEL_DIR}"}
    stopped = recorder.stopped or (early_stop and early_stop.stopped)
    if stopped:
        details["reason"] = f"stopped early: {stopped}"
    details |= {"ended": now(), "before_after": {}}
    outcome = Outcome(output_dir=folder.path, num_steps=num_steps)
    has_samples = session.online is not None and bool(session.online.evaluation_prompts)
    if session.online is not None and has_samples:
        evaluations, gold = _evaluations(recorder, session.online, details)
        before, after = evaluations[0], evaluations[max(evaluations)]
        outcome = Outcome(
            output_dir=folder.path,
            num_steps=num_steps,
            before=before,
            after=after,
            compared=compare_rows(before, after),
            gold_problem=gold.get("reason"),
        )
        if number := session.config.evaluation.num_shown:
            console.print(samples_table(before[:number], after[:number]))
        console.print(change_table(outcome.compared, len(before)).for_terminal())
        console.print(sentence(outcome.compared), soft_wrap=True)
        details["before_after"] = write_figures(folder.path, evaluations)
        details |= {"gold": gold} if gold else {}
    folder.write_status("done", **details)
    views = refresh_report(folder.path, console)
    if has_samples:
        for view in views:
            console.print(Text(f"Verdict: {view.verdict.outcome}. {view.reason}"), soft_wrap=True)
    if session.offline is not None:
        console.print(Text(NOTHING_SAMPLED.replace("RUN", str(folder.path))), soft_wrap=True)
    console.print(f"Run folder: {folder.path}   Model: {folder.path / MODEL_DIR}", soft_wrap=True)
    if early_stop is not None:
        best = folder.path / BEST_DIR / MODEL_DIR
        console.print(f"Best policy: step {early_stop.best_step}, in {best}", soft_wrap=True)
    return outcome


def _evaluations(
    recorder: RunRecorder, online: Online, details: Mapping[str, Any]
) -> tuple[dict[int, list[SampleRow]], dict[str, Any]]:
    """Rows by step, with gold scores if a gold reward is configured; what became of gold."""
    session, folder, console = recorder.session, recorder.folder, recorder.console
    files = evaluation_files(folder.path)
    settings = session.config.gold
    if settings is None:
        return {step: read_rows(file) for step, file in files.items()}, {}
    # From here on nothing of the run is lost, not even to a kill.
    unscored = gold_missing(folder.path, "the run ended before it had scored them")
    folder.write_status("done", **details, gold=unscored)
    try:
        evaluations = add_gold(
            files,
            settings,
            console,
            device=session.device,
            prompts=online.evaluation_prompts,
            prompt_column=session.config.data.prompt_columns[0],
        )
        return evaluations, gold_found(settings)
    except (KeyboardInterrupt, SystemExit):
        message = f"The run is done, except gold scores. This adds them: {unscored['command']}"
        console.print(Text(message), soft_wrap=True)
        raise
    except Exception as error:
        known = isinstance(error, KlippoError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        rows = {step: read_rows(file) for step, file in files.items()}
        return rows, gold_missing(folder.path, reason)


def sentence(compared: Mapping[str, PairedComparison]) -> str:
    """What happened to reward and gold, in words that the intervals allow."""
    parts = []
    for key in ("proxy", "gold"):
        if key in compared:
            result = compared[key]
            moved = "no clear change"
            if result.difference.excludes_zero:
                moved = "rose" if result.difference.mean > 0 else "fell"
            size = f" ({result.difference_in_sd:+.2f} sd)" if result.before_sd > 0 else ""
            parts.append(f"{MEASURES[key]}: {moved}{size}")
    return "; ".join(parts) if parts else "Nothing could be compared: no sample was scored."


def rescue(recorder: RunRecorder, error: BaseException) -> None:
    """Write down why the run ended early, and keep what it needs to resume. Every process calls it.

    Processes that fail together write together, and none leaves before the first one is done: a
    launcher would then end the others. If one failed alone, the first one keeps what it has.
    """
    ranks = recorder.session.ranks
    together = ranks.world_size == 1 or (isinstance(error, KlippoError) and error.everywhere)
    if ranks.is_main:
        _keep(recorder, error, together)
    elif together:
        with _second_failure(recorder):
            recorder.keeper.rescue(error)
        with _second_failure(recorder), full_weights(recorder.session.policy):
            pass
    if together:
        with suppress(PeerError):
            ranks.gather(None)


def _keep(recorder: RunRecorder, error: BaseException, together: bool) -> None:
    """In the first process."""
    session, folder, say = recorder.session, recorder.folder, recorder.progress.say
    done = session.learner.num_steps_done
    state = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
    recorder.health.record(error, done)
    details: dict[str, Any] = {"reason": _reason(error, session.ranks), "num_steps_done": done}
    check = error.check if isinstance(error, KlippoError) else None
    details |= {"stopped_by": check} if check is not None else {}
    details |= recorder.health.status()
    with _second_failure(recorder):
        folder.write_status(state, **details, ended=now())
    if together:
        with _second_failure(recorder):
            recorder.keeper.rescue(error)
    checkpoint = recorder.keeper.newest
    if checkpoint is not None:
        details |= {"resume": resume_command(folder.path), "checkpoint_step": checkpoint}
        with _second_failure(recorder):
            folder.write_status(state, **details, ended=now())
    if together or not is_sharded(session.policy):
        with _second_failure(recorder), full_weights(session.policy):
            _save_policy(recorder, error, done)
    elif checkpoint is not None:
        say(
            "No model is saved: each process had a shard of the weights. The checkpoint has all; "
            f"with ppo.num_steps={checkpoint} checkpoint.keep_when_done=true the command below "
            "makes a model of it without further training."
        )
    if check is not None:
        refresh_report(folder.path, recorder.console)
    if checkpoint is not None:
        say(f"To resume after step {checkpoint}: {details['resume']}")


def _save_policy(recorder: RunRecorder, error: BaseException, done: int) -> None:
    """Save the policy as it is; after a failed health check, that of the newest checkpoint."""
    session, folder, say = recorder.session, recorder.folder, recorder.progress.say
    if not isinstance(error, HealthError):
        if done == 0:
            return
        if isinstance(error, StorageError):
            folder = RunFolder(Path(tempfile.mkdtemp(prefix="klippo-rescued-")))
        with _second_failure(recorder):
            save_model(session, folder)
            say(f"The policy as it was after {done} steps is in {folder.path / MODEL_DIR}")
        return
    checkpoint, _ = Checkpoints(folder.path).newest()
    if checkpoint is None:
        say("No checkpoint from before exists, and no model is saved.")
        return
    with _second_failure(recorder):
        session.learner.optimizer.load_weights(checkpoint.tensors("weights"))
        save_model(session, folder)
        say(
            f"The policy as it was after {checkpoint.step} steps, before that, is in "
            f"{folder.path / MODEL_DIR}"
        )


@contextmanager
def _second_failure(recorder: RunRecorder) -> Iterator[None]:
    """Report what fails while cleaning up; it must not hide what failed first."""
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
