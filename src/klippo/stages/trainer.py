"""PPOTrainer: a whole run from Python, and its single steps for loops of your own."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from klippo.config.load import LoadedConfig, config_from_mapping, to_yaml
from klippo.config.schema import RunConfig
from klippo.data.rows import Data
from klippo.errors import ConfigError, KlippoError, StorageError
from klippo.evaluation.samples import SampleRow, evaluate, summarize
from klippo.policy.saving import save_policy
from klippo.policy.sharding import has_shards, whole
from klippo.ppo import trainer as ppo_trainer
from klippo.ranks import Ranks, explaining_peers
from klippo.rollouts.collate import collate, truncate_after_stop
from klippo.runs.folder import CONFIG_FILE, CRITIC_DIR, MODEL_DIR, RunFolder, write_text
from klippo.runs.memory import peak_memory_gib
from klippo.runs.progress import Progress
from klippo.stages.guard import RunGuard
from klippo.stages.offline import OfflineData
from klippo.stages.out_of_memory import explaining_memory
from klippo.stages.outcome import Outcome, conclude
from klippo.stages.session import Session, open_session
from klippo.stages.started import now, write_started
from klippo.types import Metrics, Prompt, RewardSource, Rollout, Scores

IN_MEMORY = "(given from Python)"


class PPOTrainer:
    """PPO on a policy with any reward.

    `config` is a LoadedConfig, a RunConfig, or a mapping of the same shape. `policy` (a Hugging
    Face causal LM with `tokenizer`, or a name), `reward` (a function of keyword arguments
    `prompts`, `responses`, `token_ids` and the data's columns, or any object with `score`) and
    `prompts` (texts, chat messages or mappings of columns) stand in for what the config names.
    `data` is what `load_rows` gave, where the data was read before.

    Raises ConfigError or PreflightError before anything expensive starts.
    """

    def __init__(
        self,
        config: LoadedConfig | RunConfig | Mapping[str, Any],
        policy: Any | None = None,
        reward: RewardSource | Callable[..., Any] | None = None,
        prompts: Sequence[Any] | None = None,
        *,
        tokenizer: Any | None = None,
        data: Data | None = None,
        overwrite: bool = False,
        quiet: bool = False,
    ) -> None:
        loaded = _loaded(config, policy, reward, prompts)
        self.config = loaded.config
        self.name = loaded.name
        self._origins = loaded.origins
        self._overwrite = overwrite
        self._quiet = quiet
        in_memory = policy is not None and not isinstance(policy, str)
        if in_memory and tokenizer is None:
            raise ConfigError(
                "a policy given as a model needs its tokenizer: PPOTrainer(…, tokenizer=…)"
            )
        self.session: Session = open_session(
            self.config,
            model=policy if in_memory else None,
            tokenizer=tokenizer,
            reward=reward,
            prompts=prompts,
            data=data,
        )

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def train(self) -> Outcome:
        """The whole run: trains, evaluates, writes the run folder, compares before and after."""
        session = self.session
        recorder = RunRecorder(session, self.output_dir, self._overwrite, self._quiet)
        try:
            if session.ranks.is_main:
                write_started(recorder.folder.path, session, self.name, self._origins)
            with recorder.progress, explaining_peers():
                ppo_trainer.train(session.learner, session.source, session.score, recorder)
            with whole(session.policy):
                if session.ranks.is_main:
                    save_model(session, recorder.folder)
            return conclude(
                session, recorder.folder, recorder.console, recorder.guard, recorder.stopped
            )
        except BaseException as error:
            with undisturbed():
                self._rescue(recorder, error)
                with suppress(Exception):  # what went wrong first is what is told
                    session.close_reward()
            raise

    def generate(self, prompts: Sequence[Any]) -> Rollout:
        """Sample one response per prompt from the current policy, for `step`."""
        ready = _ready(prompts) or self.session.prepare(prompts)
        return self.session.answer(list(ready))

    def step(
        self, prompts: Sequence[Any], responses: Sequence[Any], scores: Sequence[float | None]
    ) -> Metrics:
        """One PPO step on responses that you scored yourself.

        prompts: as given to `generate`, or its `rollout.prompts`. responses: token ids of each, as
        in `rollout.response_token_ids()`. scores: one number each; None or NaN leaves a response
        out. The number of responses must be `ppo.batch_size`. Returns the step's metrics.
        """
        ready = list(_ready(prompts) or self.session.prepare(prompts))
        rollout = self._rollout(ready, responses, len(scores))
        reward = torch.tensor([float("nan") if s is None else float(s) for s in scores])
        return self.session.learner.learn(
            self.session.learner.experience(rollout, Scores(reward=reward))
        )

    def save(self, directory: str | Path) -> None:
        """Write `model/` (Hugging Face format, with tokenizer) and `critic/` into a directory.

        With sharding every process must call it, and the first one writes.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        policy = self.session.policy
        with whole(policy):
            if self.session.ranks.is_main or not has_shards(policy):
                save_model(self.session, RunFolder(path))

    def _rollout(self, prompts: list[Prompt], responses: Sequence[Any], num_scores: int) -> Rollout:
        sizes = (len(prompts), len(responses), num_scores)
        expected = self.config.ppo.batch_size // self.session.ranks.world_size
        if any(size != expected for size in sizes):
            raise ConfigError(
                f"step got {sizes[0]} prompts, {sizes[1]} responses and {sizes[2]} scores; "
                f"ppo.batch_size={self.config.ppo.batch_size} needs {expected} of each"
            )
        completions = []
        for i, response in enumerate(responses):
            if isinstance(response, str):
                raise ConfigError(
                    f"responses[{i}] is text; step needs the token ids that were sampled "
                    "(rollout.response_token_ids()): tokenizing text again may give other tokens"
                )
            ids = [int(token) for token in response]
            if not ids:
                raise ConfigError(f"responses[{i}] is empty; a response has at least one token")
            completions.append(truncate_after_stop(ids, self.session.stop_ids))
        return collate(
            prompts,
            completions,
            self.session.tokenizer,
            temperature=self.config.rollout.temperature,
            device=self.session.device,
        )

    def _rescue(self, recorder: RunRecorder, error: BaseException) -> None:
        """After a failure: keep the policy as it is and write down why the run ended."""
        done = self.session.learner.num_steps_done
        if not self.session.ranks.is_main:
            return
        state = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        with self._second_failure(recorder):
            reason = _reason(error, self.session.ranks)
            recorder.folder.write_status(state, reason=reason, num_steps_done=done, ended=now())
        if done == 0:
            return
        if has_shards(self.session.policy):
            recorder.progress.say(
                "The policy is in parts, one per process, and is lost with them: the last one that "
                "was saved is what there is"
            )
            return
        folder = recorder.folder
        if isinstance(error, StorageError):
            folder = RunFolder(Path(tempfile.mkdtemp(prefix="klippo-rescued-")))
        with self._second_failure(recorder):
            save_model(self.session, folder)
            recorder.progress.say(
                f"The policy as it was after {done} steps is in {folder.path / MODEL_DIR}"
            )

    @contextmanager
    def _second_failure(self, recorder: RunRecorder) -> Iterator[None]:
        """What goes wrong while cleaning up must not hide what went wrong first."""
        try:
            yield
        except StorageError as error:
            recorder.progress.say(f"And then: {error}")


def _reason(error: BaseException, ranks: Ranks) -> str:
    text = str(error)
    if isinstance(error, SystemExit) and ranks.world_size > 1:
        return f"ended from outside ({text}), perhaps because another process of the run failed"
    return text if isinstance(error, KlippoError) else f"{type(error).__name__}: {text}"


@contextmanager
def undisturbed() -> Iterator[None]:
    """No Ctrl-C and no SIGTERM inside: a launcher sends them again and again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)


class RunRecorder:
    """The loop's recorder: run folder, metrics, evaluations, the line on the screen."""

    def __init__(self, session: Session, output_dir: Path, overwrite: bool, quiet: bool) -> None:
        self.session = session
        self.is_main = session.ranks.is_main
        self.console = Console(quiet=quiet or not self.is_main)
        self.progress = Progress(
            self.console, session.config.ppo.num_steps, quiet=quiet or not self.is_main
        )
        self._seconds: dict[str, float] = {}
        self.stopped: str | None = None
        """Why diagnostics ended the run early."""
        self._diagnosed = -1
        self.guard: RunGuard | None = None
        if session.config.guard.is_on:
            self.guard = RunGuard(session, self._rows, lambda folder: save_model(session, folder))
        self.folder = RunFolder(output_dir)
        session.ranks.on_main(lambda: self._open_folder(output_dir, overwrite))

    def _open_folder(self, output_dir: Path, overwrite: bool) -> None:
        self.folder = RunFolder.create(output_dir, overwrite=overwrite)
        write_text(output_dir / CONFIG_FILE, to_yaml(self.session.config))
        if self.session.ranks.world_size > 1:
            how = ", each with its part of the weights" if has_shards(self.session.policy) else ""
            self.progress.say(f"{self.session.ranks.world_size} processes{how}")

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
        """Sample the fixed prompts, write eval/step-N.jsonl; True when the guard ends the run.

        Offline: look at the logged responses, write a line of diagnostics.jsonl.
        """
        session = self.session
        if session.offline is not None:
            return self._diagnose(session.offline, step)
        if not session.evaluation_prompts:
            return False
        models: list[nn.Module] = [session.policy.lm, session.reference.lm]
        if self.guard is not None:
            models.append(session.policy.critic)  # it is saved with the policy
        with explaining_memory("evaluate", session), whole(*models):
            return self._evaluate(step)

    def _evaluate(self, step: int) -> bool:
        session = self.session
        own = []
        if session.evaluation_share:
            own = self._rows(session.answer_evaluation(), step)
        rows = [row for part in session.ranks.gather(own) for row in part]
        stop = False
        if self.is_main:
            self._report_evaluation(step, rows)
            stop = self.guard is not None and self.guard.look(step, rows, self.folder)
            if self.guard is not None and self.guard.stopped is not None:
                self.progress.say(f"The guard ends the run: {self.guard.stopped}")
        return session.ranks.gather(stop)[0]

    def _diagnose(self, offline: OfflineData, step: int) -> bool:
        if self._diagnosed == step:
            return False
        self._diagnosed = step
        found = offline.look(self.session.learner, step)
        told = found.metrics
        if self.is_main:
            self.folder.append_diagnostics({"step": step} | told | {"warnings": found.warnings})
            for warning in found.warnings:
                self.progress.say(f"Warning: {warning}")
            self.progress.say(
                f"after {step} steps: KL from the start {told['offline/kl_start_nats']:.2f} nats  "
                f"ratio {told['offline/ratio_p1']:.2f} to {told['offline/ratio_p99']:.2f} (98% of "
                f"tokens)  effective share {told['offline/ess_tokens']:.0%} of tokens"
            )
        self.stopped = self.session.ranks.gather(found.stop)[0]  # one decides for all
        if self.stopped is not None:
            self.progress.say(f"The run ends: {self.stopped}")
        return self.stopped is not None

    def _report_evaluation(self, step: int, rows: list[SampleRow]) -> None:
        self.folder.write_rows(step, rows)
        summary = summarize(rows)
        proxy = summary.get("eval/proxy_mean", float("nan"))
        self.progress.say(
            f"evaluation at step {step}: proxy {proxy:+.3f}  "
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
            session.measure(rollout),
            step=step,
            episodes=step * session.config.ppo.batch_size,
            batch_size=session.config.ppo.micro_batch_size or session.config.ppo.batch_size,
        )

    def log(self, step: int, rollout: Rollout, metrics: Metrics) -> None:
        """One line of metrics.jsonl and of the screen."""
        ranks: Ranks = self.session.ranks
        tokens = float(ranks.all_sum(rollout.tokens.response_mask.sum().double()))
        seconds = sum(self._seconds.values())
        metrics = metrics | {f"time/{name}_s": value for name, value in self._seconds.items()}
        metrics |= self.session.reward_metrics()
        metrics["time/step_s"] = seconds
        metrics["throughput/response_tokens_per_s"] = tokens / seconds
        metrics["memory/peak_gib"] = peak_memory_gib(self.session.device)
        self._seconds = {}
        if self.is_main:
            episodes = (step + 1) * self.session.config.ppo.batch_size
            self.folder.append_metrics({"step": step, "episodes": episodes} | metrics)
            self.progress.step(step, metrics)


def save_model(session: Session, folder: RunFolder) -> None:
    """model/ and critic/, each taking its name only when it is whole."""
    with (
        folder.new_directory(MODEL_DIR) as model_dir,
        folder.new_directory(CRITIC_DIR) as critic_dir,
    ):
        save_policy(session.policy, session.tokenizer, model_dir, critic_dir)


def _ready(prompts: Sequence[Any]) -> list[Prompt] | None:
    """Prompts that are prepared already."""
    ready = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
    return ready if ready and len(ready) == len(prompts) else None


def _loaded(
    config: LoadedConfig | RunConfig | Mapping[str, Any],
    policy: Any | None,
    reward: Any | None,
    prompts: Sequence[Any] | None,
) -> LoadedConfig:
    """The config, with notes in place of what was given as objects."""
    if isinstance(config, LoadedConfig):
        return config
    if isinstance(config, RunConfig):
        return config_from_mapping(config)
    filled = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()
    }
    if policy is not None:
        name = (
            policy if isinstance(policy, str) else getattr(policy, "name_or_path", "") or IN_MEMORY
        )
        filled["policy"] = {"model": name} | filled.get("policy", {})
    if reward is not None:
        filled.setdefault("reward", {"kind": "function", "function": IN_MEMORY})
    if prompts is not None:
        filled["data"] = {"train": IN_MEMORY} | filled.get("data", {})
    return config_from_mapping(filled)
