"""A trial step at full length before the first step: what each phase holds at most.

It samples, scores and learns as the run does, at a learning rate of 0, by objects of its own: no
weight, random number or counter of the run changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from klippo.judge.settings import JudgeSettings
from klippo.ppo.learner import Learner
from klippo.rewards.settings import FunctionSettings, RewardSettings, SumSettings
from klippo.rollouts.collate import collate
from klippo.rollouts.hf import HFEngine
from klippo.runs.memory import CUDA_CONTEXT, peak_memory, reset_peak, used_memory
from klippo.train.memory import MemoryEstimate, Sizes, memory_budget, refuse_if_too_much
from klippo.train.out_of_memory import estimate_session, explaining_memory, longest_sizes
from klippo.train.session import Session
from klippo.types import Completion, Prompt, Rollout, Scores

CLEARLY_ENOUGH = 0.5
"""A run whose generous bound is below this share of the memory is not measured."""


def check_memory(session: Session) -> None:
    """Raise PreflightError on every process if the run needs more memory than one of them may use.

    A trial step is measured unless a bound shows that there is clearly enough.
    """
    config, device = session.config, session.device
    budget = memory_budget(config, device)
    if budget is None:
        return

    def must_measure() -> bool:
        refuse_if_too_much(
            config, estimate_session(session, measured={}), device
        )  # at least this much
        return estimate_session(session).peak > CLEARLY_ENOUGH * budget

    if any(session.ranks.gather(session.ranks.everywhere(must_measure))):
        estimate = measured_estimate(session)
        session.ranks.everywhere(lambda: refuse_if_too_much(config, estimate, device))


def measured_estimate(session: Session) -> MemoryEstimate:
    """The need of every phase, by a trial step. Every process must call it.

    Raises OutOfMemoryError if the memory runs out on the way.
    """
    used = used_memory(session.device)
    measured = _measure(session, longest_sizes(session))
    if session.device.type == "cuda":
        torch.cuda.empty_cache()
    return estimate_session(session, used=used, measured=measured)


def _measure(session: Session, sizes: Sizes) -> dict[str, int]:
    """The peak of each phase in bytes, with AdamW's moments there from the start."""
    device = session.device
    around = CUDA_CONTEXT if device.type == "cuda" else 0
    measured: dict[str, int] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        reset_peak(device)
        with explaining_memory(name, session):
            yield
        measured[name] = peak_memory(device) + around

    learner = trial_learner(session, sizes.update)
    batch = _longest_batches(session, sizes)

    def learn(rollout: Rollout) -> None:
        scores = torch.linspace(-1, 1, len(rollout.prompts))
        learner.learn(learner.experience(rollout, Scores(reward=scores)))

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with explaining_memory("update", session):
            learn(batch(1))  # now AdamW's moments are there
        engine = None if session.online is None else session.online.source.sampler.engine
        if isinstance(engine, HFEngine):
            engine = copy.copy(engine)
            engine.stop_ids = frozenset()
            prompts = batch(sizes.generate).prompts
            with phase("generate"):
                engine.generate(prompts, [sizes.response] * len(prompts), [0] * len(prompts))
        with phase("forward"):
            forward = learner.forward(batch(sizes.forward))
        if sizes.score > 0 and not _asks_others(session.config.reward):
            with phase("score"):
                _score(session, batch(sizes.score))
        del forward
        with phase("update"):
            learn(batch(sizes.update))
    return measured


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


def _longest_batches(session: Session, sizes: Sizes) -> Callable[[int], Rollout]:
    """Batches of so many of the longest prompts and responses, padded as real ones are."""
    offline, online = session.offline, session.online
    if offline is not None:
        one = max(
            offline.train, key=lambda x: len(x.prompt.token_ids) + len(x.completion.token_ids)
        )
        shorter = replace(one, prompt=_shortened(one.prompt))
        source = offline.source(list)
        return lambda rows: source.rollout([one] if rows == 1 else [shorter, *[one] * (rows - 1)])
    assert online is not None
    prompts = [*online.train_prompts, *online.spare_prompts]
    prompt = max(prompts, key=lambda prompt: len(prompt.token_ids))
    completion = Completion(token_ids=[prompt.token_ids[-1]] * sizes.response, finished=False)

    def batch(rows: int) -> Rollout:
        return collate(
            [prompt] if rows == 1 else [_shortened(prompt), *[prompt] * (rows - 1)],
            [completion] * rows,
            session.tokenizer,
            temperature=session.config.rollout.temperature,
            device=session.device,
        )

    return batch


def _shortened(prompt: Prompt) -> Prompt:
    return replace(prompt, token_ids=list(prompt.token_ids)[1:] or prompt.token_ids)


def _score(session: Session, rollout: Rollout) -> None:
    """The reward models' pass; what the reward counts stays as it was."""
    state = {name: dict(part.state_dict()) for name, part in session.states.items()}
    session.reward.score(rollout)
    for name, part in session.states.items():
        part.load_state_dict(state[name])


def _asks_others(reward: RewardSettings) -> bool:
    """Whether scoring would call a judge, or Python code of the user's."""
    if isinstance(reward, SumSettings):
        return any(_asks_others(part.reward) for part in reward.parts.values())
    return isinstance(reward, JudgeSettings | FunctionSettings)
