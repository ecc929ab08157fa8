"""PPOTrainer: a whole run from Python, and its single steps for loops of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from klippo.config.load import LoadedConfig, config_from_mapping
from klippo.config.schema import RunConfig
from klippo.errors import ConfigError
from klippo.policy.sharding import full_weights, is_sharded
from klippo.ppo import loop
from klippo.ranks import explaining_peers
from klippo.rollouts.collate import collate, truncate_after_stop
from klippo.runs.folder import RunFolder
from klippo.train.ending import Outcome, conclude, rescue
from klippo.train.interruptions import undisturbed
from klippo.train.prepare import Given, prepare
from klippo.train.recorder import RunRecorder, save_model
from klippo.train.session import Session, open_session
from klippo.train.started import write_started
from klippo.train.trial import check_memory
from klippo.types import Metrics, Prompt, RewardSource, Rollout, Scores, Tokenizer

IN_MEMORY = "(given from Python)"


class PPOTrainer:
    """PPO on a policy with any reward.

    `config` is a LoadedConfig, a RunConfig, or a mapping of the same shape. `policy` (a Hugging
    Face causal LM with `tokenizer`, or a name), `reward` (a function of keyword arguments
    `prompts`, `responses`, `token_ids` and the data's columns, or any object with `score`) and
    `prompts` (texts, chat messages or mappings of columns) replace what the config names.

    An unfinished run in the same folder with an equal config is resumed; `resume` allows safe
    changes (docs/resume.md), `overwrite` starts over. `trust_remote_code` is the flag of that name
    (docs/security.md). `confirm_cost` asks on the terminal before a judge that may cost much.

    Raises ConfigError or PreflightError before anything expensive starts.
    """

    def __init__(
        self,
        config: LoadedConfig | RunConfig | Mapping[str, Any],
        policy: Any | None = None,
        reward: RewardSource | Callable[..., Any] | None = None,
        prompts: Sequence[Any] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        overwrite: bool = False,
        resume: bool = False,
        quiet: bool = False,
        trust_remote_code: bool = False,
        confirm_cost: bool = False,
    ) -> None:
        given = Given(
            model=None if isinstance(policy, str) else policy,
            tokenizer=tokenizer,
            reward=reward,
            prompts=prompts,
        )
        self._overwrite, self._resume, self._quiet = overwrite, resume, quiet
        run = prepare(
            _loaded(config, policy, reward, prompts),
            given,
            trust_remote_code=trust_remote_code,
            confirm_cost=confirm_cost,
        )
        self.config = run.config
        self.session: Session = open_session(run)

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def train(self) -> Outcome:
        """The whole run: train, evaluate, write the run folder, compare before and after."""
        session = self.session
        check_memory(session)
        recorder = RunRecorder(
            session, overwrite=self._overwrite, resume=self._resume, quiet=self._quiet
        )
        try:
            if session.ranks.is_main:
                write_started(recorder.folder.path, session, recorder.start)
            with recorder.progress, recorder.interruptions, explaining_peers():
                loop.train(session.learner, session.source, session.score, recorder)
            with full_weights(session.policy):
                if session.ranks.is_main:
                    save_model(session, recorder.folder)
            outcome = conclude(recorder)
            recorder.keeper.done()
        except BaseException as error:
            with undisturbed():
                rescue(recorder, error)
                with suppress(Exception):  # the first error is the one to report
                    session.reward.close()
            raise
        finally:
            recorder.close()
        return outcome

    def generate(self, prompts: Sequence[Any]) -> Rollout:
        """Sample one response per prompt from the current policy, for `step`."""
        return self.session.sampling().source.answer(self._prompts(prompts))

    def step(
        self, prompts: Sequence[Any], responses: Sequence[Any], scores: Sequence[float | None]
    ) -> Metrics:
        """One PPO step on responses that you scored yourself.

        prompts: as given to `generate`, or its `rollout.prompts`. responses: token ids of each, as
        in `rollout.response_token_ids()`. scores: one number each; None or NaN leaves a response
        out. The number of responses must be `ppo.batch_size`. Returns the step's metrics.
        """
        rollout = self._rollout(self._prompts(prompts), responses, len(scores))
        reward = torch.tensor([float("nan") if s is None else float(s) for s in scores])
        learner = self.session.learner
        return learner.learn(learner.experience(rollout, Scores(reward=reward)))

    def save(self, directory: str | Path) -> None:
        """Write `model/` (Hugging Face format, with tokenizer) and `critic/` into a directory.

        With sharding every process must call it, and the first one writes.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        policy = self.session.policy
        with full_weights(policy):
            if self.session.ranks.is_main or not is_sharded(policy):
                save_model(self.session, RunFolder(path))

    def _prompts(self, prompts: Sequence[Any]) -> list[Prompt]:
        ready = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
        if ready and len(ready) == len(prompts):
            return ready
        return self.session.prompts(prompts)

    def _rollout(self, prompts: list[Prompt], responses: Sequence[Any], num_scores: int) -> Rollout:
        session = self.session
        expected = self.config.ppo.batch_size // session.ranks.world_size
        if {len(prompts), len(responses), num_scores} != {expected}:
            raise ConfigError(
                f"step got {len(prompts)} prompts, {len(responses)} responses and {num_scores} "
                f"scores; ppo.batch_size={self.config.ppo.batch_size} needs {expected} of each"
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
            completions.append(truncate_after_stop(ids, session.stop_ids))
        return collate(
            prompts,
            completions,
            session.tokenizer,
            temperature=self.config.rollout.temperature,
            device=session.device,
        )


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
