"""A trial step at full length before the first step: what each phase needs at most.

It samples, scores and learns as the run does, but with objects of its own and a learning rate of 0:
no weight, random number or counter of the run changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from klippo.config.schema import RunConfig
from klippo.errors import PreflightError
from klippo.judge.settings import JudgeSettings
from klippo.lengths import longest
from klippo.policy.sharding import is_sharded
from klippo.ppo.learner import Learner
from klippo.rewards.settings import FunctionSettings, RewardSettings, SumSettings, ensembles
from klippo.rollouts.collate import collate
from klippo.rollouts.hf import HFEngine
from klippo.runs.memory import cuda_context, peak_memory, reset_peak, used_memory
from klippo.train.memory import (
    FRAMEWORK,
    MemoryEstimate,
    cache_bytes,
    generous_bound,
    memory_budget,
    model_weights,
    refusal,
    reward_models,
    reward_weights,
)
from klippo.train.out_of_memory import explaining_memory
from klippo.train.session import Session
from klippo.types import Completion, LoggedResponse, Rollout, Scores

CLEARLY_ENOUGH = 0.5
"""A run whose generous bound is below this share of the memory is not measured."""


def check_memory(session: Session) -> None:
    """Raise PreflightError on every process if the run needs more memory than one of them may use.

    A trial step is measured unless a bound shows that there is clearly enough.
    """
    config, trial = session.config, Trial(session)
    budget = memory_budget(config, session.device)
    if budget is None:
        return

    def refuse(estimate: MemoryEstimate) -> None:
        if problem := refusal(config, estimate, session.device):
            raise PreflightError(problem)

    at_least = trial.estimate({})
    session.ranks.everywhere(lambda: refuse(at_least))
    if any(session.ranks.gather(at_least.peak + trial.bound > CLEARLY_ENOUGH * budget)):
        estimate = trial.measured()
        session.ranks.everywhere(lambda: refuse(estimate))


def phase_rows(config: RunConfig, num_processes: int, num_tokens: int) -> dict[str, int]:
    """Rows of so many tokens that one process computes at once, by phase.

    In the update two micro-batches, or one if a minibatch has no more: gradients add up.
    """
    ppo = config.ppo
    batch, minibatch = ppo.batch_size // num_processes, ppo.minibatch // num_processes
    micro = ppo.micro_batch_size
    if ppo.micro_batch_tokens is not None:
        micro = max(ppo.micro_batch_tokens // num_tokens, 1)
    evaluated = -(-config.evaluation.num_prompts // num_processes)
    measured = [e.reference_size for e in ensembles(config.reward) if e.standardize == "start"]
    most = max(batch, evaluated, config.early_stop.gold_prompts, *measured)
    scored = [model.batch_size for _, model in reward_models(config.reward)]
    return {
        "generate": min(config.rollout.generation_batch_size or most, most),
        "score": min(max(scored, default=0), most),
        "forward": min(micro or batch, batch),
        "update": min(2 * micro if micro else minibatch, minibatch),
    }


def trial_learner(session: Session, rows: int) -> Learner:
    """A learner over the run's models with batches of `rows` per process; steps move nothing."""
    config, size = session.config, rows * session.ranks.world_size
    once = {"num_steps": 1, "num_epochs": 1, "num_critic_warmup_steps": 0}
    rates = {"learning_rate": 0.0, "critic_learning_rate": None}
    return Learner(
        session.policy,
        session.reference,
        ppo=config.ppo.model_copy(update=once | {"batch_size": size, "minibatch_size": size}),
        kl=config.kl,
        score=config.score,
        optimizer=config.optimizer.model_copy(update=rates),
        ranks=session.ranks,
    )


class Trial:
    """One step with the longest prompt and the longest response of a run."""

    def __init__(self, session: Session) -> None:
        self.session = session
        if session.online is not None:
            prompts = [*session.online.train_prompts, *session.online.spare_prompts]
            self.prompt = max(prompts, key=lambda prompt: len(prompt.token_ids))
            num_response = longest(session.config.rollout.response_length)
            ids = [self.prompt.token_ids[-1]] * num_response
            self.completion = Completion(token_ids=ids, finished=False)
        else:
            assert session.offline is not None
            row = max(session.offline.train, key=_num_tokens)
            self.prompt, self.completion = row.prompt, row.completion
        self.num_tokens = len(self.prompt.token_ids) + len(self.completion.token_ids)
        self.rows = phase_rows(session.config, session.ranks.world_size, self.num_tokens)
        self._used = used_memory(session.device)

    @property
    def bound(self) -> int:
        """Bytes that the passes need at most."""
        rows = max(self.rows[phase] for phase in ("forward", "score", "update"))
        model = self.session.policy.lm.model
        return generous_bound(model, rows * self.num_tokens, self.rows["generate"])

    def estimate(self, peaks: Mapping[str, int]) -> MemoryEstimate:
        """Components by shape, and the rest of the measured peaks of phases."""
        session, config, policy = self.session, self.session.config, self.session.policy
        weights = model_weights(policy, session.reference) | reward_weights(config.reward)
        others = max(self._used - sum(weights.values()), 0)
        weights = {FRAMEWORK: others + cuda_context(session.device)} | weights
        trained = sum(p.nbytes for group in policy.trainable() for p in group)
        trained //= session.ranks.world_size if is_sharded(policy) else 1
        model = policy.lm.model
        size = 2 if config.policy.autocast else model.dtype.itemsize
        cache = cache_bytes(model, self.rows["generate"], self.num_tokens, size)
        phases = {
            "generate": {"key-value cache": cache},
            "forward": {},
            "score": {},
            "update": {"gradients": trained},
        }
        if config.offline is not None or config.rollout.engine == "vllm":
            del phases["generate"]
        return MemoryEstimate.of(config, weights, trained, phases, peaks)

    def measured(self) -> MemoryEstimate:
        """The need of every phase, as measured. Every process must call it.

        Raises OutOfMemoryError if the memory runs out on the way.
        """
        session, device, peaks = self.session, self.session.device, dict[str, int]()

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            reset_peak(device)
            with explaining_memory(name, session):
                yield
            peaks[name] = peak_memory(device) + cuda_context(device)

        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._step(phase)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return self.estimate(peaks)

    def _step(self, phase: Callable[[str], AbstractContextManager[None]]) -> None:
        session, rows = self.session, self.rows
        learner = trial_learner(session, rows["update"])

        def learn(rollout: Rollout) -> None:
            scores = torch.linspace(-1, 1, len(rollout))
            learner.learn(learner.experience(rollout, Scores(reward=scores)))

        with phase("update"):
            learn(self._batch(1))  # now AdamW's moments are there
        engine = None if session.online is None else session.online.source.sampler.engine
        if isinstance(engine, HFEngine):
            engine = copy.copy(engine)
            engine.stop_ids = frozenset()
            prompts, most = self._batch(rows["generate"]).prompts, len(self.completion.token_ids)
            with phase("generate"):
                engine.generate(prompts, [most] * len(prompts), [0] * len(prompts))
        with phase("forward"):
            forward = learner.forward(self._batch(rows["forward"]))
        if rows["score"] > 0 and not _asks_others(session.config.reward):
            states = {name: dict(part.state_dict()) for name, part in session.states.items()}
            with phase("score"):
                session.reward.score(self._batch(rows["score"]))
            for name, part in session.states.items():
                part.load_state_dict(states[name])
        del forward
        with phase("update"):
            learn(self._batch(rows["update"]))

    def _batch(self, rows: int) -> Rollout:
        """So many rows, the second one with a shorter prompt: real batches are padded."""
        ids = list(self.prompt.token_ids)
        shorter = replace(self.prompt, token_ids=ids[1:] or ids)
        prompts = [self.prompt, shorter, *[self.prompt] * rows][:rows]
        batch = collate(
            prompts,
            [self.completion] * rows,
            self.session.tokenizer,
            temperature=self.session.config.rollout.temperature,
            device=self.session.device,
        )
        offline = self.session.offline
        return batch if offline is None else replace(batch, behavior=offline.behavior)


def _num_tokens(row: LoggedResponse) -> int:
    return len(row.prompt.token_ids) + len(row.completion.token_ids)


def _asks_others(reward: RewardSettings) -> bool:
    """Whether scoring would call a judge, or Python code of the user's."""
    if isinstance(reward, SumSettings):
        return any(_asks_others(part.reward) for part in reward.parts.values())
    return isinstance(reward, JudgeSettings | FunctionSettings)
