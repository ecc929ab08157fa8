"""What the loop reports to: run folder, metrics, evaluations, checkpoints, the screen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from klippo.config.load import to_yaml
from klippo.errors import HealthError
from klippo.evaluation.samples import SampleRow, evaluate, summarize
from klippo.policy.sharding import full_weights, is_sharded
from klippo.policy.weights import save_policy
from klippo.ppo.update import parts_of
from klippo.ranks import warn
from klippo.runs.folder import (
    CONFIG_FILE,
    CRITIC_DIR,
    METRICS_FILE,
    MODEL_DIR,
    RunFolder,
    write_text,
)
from klippo.runs.lock import RunLock
from klippo.runs.memory import peak_memory_gib
from klippo.runs.progress import Progress
from klippo.runs.rewind import rewind
from klippo.train.checkpointing import Keeper, restore
from klippo.train.early_stop import RunEarlyStop
from klippo.train.health import RunHealth
from klippo.train.interruptions import Interruptions
from klippo.train.launch import sharding_note
from klippo.train.offline import OfflineData
from klippo.train.out_of_memory import explaining_memory
from klippo.train.resume import Start, find_start
from klippo.train.session import Online, Session
from klippo.types import Metrics, Rollout


class RunRecorder:
    """Implements `ppo.loop.Recorder` for a run with a folder."""

    def __init__(
        self,
        session: Session,
        *,
        overwrite: bool = False,
        resume: bool = False,
        quiet: bool = False,
    ) -> None:
        """Open the run's folder, and put the session where its newest checkpoint was taken.

        Raises ConfigError if the folder may not be used.
        """
        self.session = session
        self.is_main = session.ranks.is_main
        self.console = Console(quiet=quiet or not self.is_main)
        self.progress = Progress(
            self.console, session.learner.ppo.num_steps, quiet=quiet or not self.is_main
        )
        self._seconds: dict[str, float] = {}
        self.stopped: str | None = None
        """Why diagnostics ended an offline run early."""
        self._diagnosed = -1
        self.early_stop: RunEarlyStop | None = None
        if session.config.early_stop.is_on:
            self.early_stop = RunEarlyStop(
                session, self._rows, lambda folder: save_model(session, folder)
            )
        self.folder = RunFolder(Path(session.config.output_dir))
        self.health = RunHealth(session, self.folder, self.progress.say)
        self._lock: RunLock | None = None
        self.start = Start()
        try:
            session.ranks.on_main(lambda: self._open_folder(overwrite, resume))
            self.start = session.ranks.gather(self.start)[0]
            self._restore()
        except BaseException:
            self.close()
            raise
        self.interruptions = Interruptions(self.progress.say, together=session.ranks.world_size > 1)
        self.keeper = Keeper(
            session, self.folder.path, self.interruptions, self._state, self.start.checkpoint
        )

    def _open_folder(self, overwrite: bool, resume: bool) -> None:
        path = self.folder.path
        if path.is_dir() and any(path.iterdir()):  # a running run must not lose it
            self._lock = RunLock(path, warn)
        self.start = find_start(path, self.session.config, overwrite=overwrite, resume=resume)
        if self.start.checkpoint is None:
            self.close()
            RunFolder.create(path, overwrite=overwrite or self.start.is_resumed)
            self._lock = RunLock(path, warn)

    def _restore(self) -> None:
        """Put the session and the folder where the run ended; nothing is lost if that fails."""
        start, session, folder = self.start, self.session, self.folder
        notes = [f"{problem}; an older checkpoint is used" for problem in start.problems]
        if start.checkpoint is not None:
            notes += restore(session, start.checkpoint)
            self.health.load_state_dict(start.checkpoint.state["health"])
            if self.early_stop is not None:
                self.early_stop.load_state_dict(start.checkpoint.state["early_stop"])
        if not self.is_main:
            return
        done, number = session.learner.num_steps_done, session.learner.ppo.num_steps
        if start.checkpoint is not None:
            lost = rewind(folder.path, done)
            if lost:
                notes.append(
                    f"{folder.path / METRICS_FILE} has lost the lines of {len(lost)} steps "
                    f"({lost[0]} to {lost[-1]}); training resumes exactly, without them"
                )
            folder.write_status("running", **self.health.status())
        for note in notes:
            warn(note)
        write_text(folder.path / CONFIG_FILE, to_yaml(session.resolved))
        if session.ranks.world_size > 1:
            how = ", each with a shard of the weights" if is_sharded(session.policy) else ""
            self.progress.say(f"{session.ranks.world_size} processes{how}")
            if (sharding := sharding_note(session.config, session.ranks)) is not None:
                self.progress.say(sharding)
        if start.is_resumed:
            changed = f", with {', '.join(start.changed)}" if start.changed else ""
            self.progress.say(f"Resuming {folder.path} after {done} of {number} steps{changed}")

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds of the recorder."""
        state = {"health": self.health.state_dict()}
        if self.early_stop is not None:
            state["early_stop"] = self.early_stop.state_dict()
        return state

    def close(self) -> None:
        """Let another process use the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def before_step(self, step: int) -> None:
        self.keeper.before_step(step)

    def updating(self) -> AbstractContextManager[None]:
        return self.keeper.updating()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to this step's `time/{name}_s`."""
        start = time.perf_counter()
        with explaining_memory(name, self.session):
            yield
        if self.session.device.type == "cuda":
            torch.cuda.synchronize(self.session.device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def is_eval_step(self, step: int) -> bool:
        if self.session.offline is not None:
            return step in self.session.offline.pass_ends
        every = self.session.config.evaluation.every
        return step == 0 or (every is not None and step % every == 0)

    def evaluate(self, step: int) -> bool:
        """Sample the fixed prompts and write eval/step-N.jsonl; True if the run should end.

        Offline: diagnose the logged responses and write a line of diagnostics.jsonl.
        """
        session = self.session
        if session.offline is not None:
            return self._diagnose(session.offline, step)
        online = session.sampling()
        if not online.evaluation_prompts:
            return False
        models: list[nn.Module] = [session.policy.lm, session.reference.lm]
        if self.early_stop is not None:
            models.append(session.policy.critic)  # it is saved with the policy
        with explaining_memory("evaluate", session), full_weights(*models):
            return self._evaluate(online, step)

    def _evaluate(self, online: Online, step: int) -> bool:
        ranks = self.session.ranks

        def share() -> list[SampleRow]:
            responses = online.evaluation_responses() if online.evaluation_share else None
            return [] if responses is None else self._rows(responses, step)

        rows = [row for rows in ranks.gather(ranks.everywhere(share)) for row in rows]
        stop = False
        if self.is_main:
            self._report_evaluation(step, rows)
            if self.early_stop is not None and self.early_stop.look(step, rows, self.folder):
                stop = True
                self.progress.say(f"The run stops early: {self.early_stop.stopped}")
        return ranks.gather(stop)[0]

    def _diagnose(self, offline: OfflineData, step: int) -> bool:
        if self._diagnosed == step:
            return False
        self._diagnosed = step
        diagnosis = offline.look(self.session.learner, step)
        metrics = diagnosis.metrics
        if self.is_main:
            self.folder.append_diagnostics(
                {"step": step} | metrics | {"warnings": diagnosis.warnings}
            )
            for warning in diagnosis.warnings:
                self.progress.say(f"Warning: {warning}")
            self.progress.say(
                f"after {step} steps: KL from the start {metrics['offline/kl_start_nats']:.2f} "
                f"nats  ratio {metrics['offline/ratio_p1']:.2f} to "
                f"{metrics['offline/ratio_p99']:.2f} (98% of tokens)  effective share "
                f"{metrics['offline/ess_tokens']:.0%} of tokens"
            )
        self.stopped = self.session.ranks.gather(diagnosis.stop)[0]  # one decides for all
        if self.stopped is not None:
            self.progress.say(f"The run ends: {self.stopped}")
        return self.stopped is not None

    def _report_evaluation(self, step: int, rows: list[SampleRow]) -> None:
        self.folder.write_rows(step, rows)
        summary = summarize(rows)
        reward = summary.get("eval/proxy_mean", float("nan"))
        self.progress.say(
            f"evaluation at step {step}: reward {reward:+.3f}  "
            f"KL {summary['eval/kl_exact_nats']:.2f} nats  "
            f"length {summary['eval/length_tokens']:.1f}  ({len(rows)} prompts)"
        )

    def _rows(self, rollout: Rollout, step: int) -> list[SampleRow]:
        """Rows of responses that this process sampled."""
        session = self.session
        return evaluate(
            session.policy,
            session.reference,
            rollout,
            session.reward.score_fixed(rollout),
            step=step,
            episodes=step * session.learner.ppo.batch_size,
            parts=self._micro_batches(rollout),
        )

    def _micro_batches(self, rollout: Rollout) -> list[Tensor]:
        """An evaluation may have more prompts than a batch: at most a batch passes together."""
        ppo = self.session.learner.ppo
        if ppo.micro_batch_size is None and ppo.micro_batch_tokens is None:
            ppo = ppo.model_copy(update={"micro_batch_size": ppo.batch_size})
        return parts_of(ppo, rollout.tokens)

    def check_rollout(self, step: int, metrics: Metrics) -> None:
        """Check the health of a rollout; if that ends the run, its line is written first.

        The run must not resume from the policy that wrote it.
        """
        try:
            self.health.check_rollout(step, metrics)
        except HealthError:
            self.session.ranks.on_main(
                lambda: self.folder.append_metrics(self._counts(step) | metrics)
            )
            self.keeper.set_aside(step)
            raise

    def _counts(self, step: int) -> Metrics:
        return {"step": step, "episodes": (step + 1) * self.session.learner.ppo.batch_size}

    def log(self, step: int, rollout: Rollout, metrics: Metrics) -> None:
        """Write a line to metrics.jsonl and to the screen; then check the update's health."""
        session = self.session
        tokens = float(session.ranks.all_sum(rollout.tokens.response_mask.sum().double()))
        seconds = sum(self._seconds.values())
        metrics = metrics | {f"time/{name}_s": value for name, value in self._seconds.items()}
        metrics |= session.reward.metrics()
        metrics["time/step_s"] = seconds
        metrics["throughput/response_tokens_per_s"] = tokens / seconds
        metrics["memory/peak_gib"] = peak_memory_gib(session.device)
        self._seconds = {}
        if self.is_main:
            self.folder.append_metrics(self._counts(step) | metrics)
            self.progress.step(step, metrics)
        self.health.check_update(step, metrics)


def save_model(session: Session, folder: RunFolder) -> None:
    """Write model/ and critic/; each gets its name when it is complete."""
    with (
        folder.new_directory(MODEL_DIR) as model_dir,
        folder.new_directory(CRITIC_DIR) as critic_dir,
    ):
        save_policy(session.policy, session.tokenizer, model_dir, critic_dir)
