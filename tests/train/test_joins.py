"""What one room hands to the next, in real runs: temperatures and streams of random numbers."""

import pytest
import torch

from klippo import PPOTrainer
from klippo.config.load import load_config


@pytest.fixture
def trainer(write_config):
    def make(**sections):
        return PPOTrainer(load_config(write_config(**sections)), quiet=True)

    return make


def test_a_run_learns_at_the_temperature_that_it_samples_at(trainer):
    """Recorded, sampled and trained log-probs agree only if all three use 0.7."""
    run = trainer(rollout={"temperature": 0.7, "response_length": 8, "record_logprobs": True})
    rollout = run.session.source.next()
    learner = run.session.learner
    experience = learner.experience(rollout, run.session.score(rollout))
    assert rollout.temperature == 0.7
    assert experience.metrics["engine/logprob_mismatch_nats"] < 1e-4


def test_training_evaluation_and_early_stopping_draw_from_disjoint_streams(trainer, prompts_file):
    run = trainer(
        data={"train": str(prompts_file), "validation_size": 0},
        gold={"kind": "length", "max_tokens": 4},
    )
    session = run.session
    online = session.sampling()
    engine, generate = online.source.sampler.engine, online.source.sampler.engine.generate
    streams = []

    def watched(prompts, limits, seeds, on_done=None):
        streams.append(set(seeds))
        return generate(prompts, limits, seeds, on_done)

    engine.generate = watched
    session.source.next()
    online.evaluation_responses()
    online.early_stop_responses(online.spare_prompts)
    assert len(streams) == 3
    assert all(len(stream) >= 8 for stream in streams)
    assert len(set.union(*streams)) == sum(map(len, streams))


def test_evaluations_draw_the_same_random_numbers_at_every_step(trainer):
    session = trainer().session
    first, second = (session.sampling().evaluation_responses() for _ in range(2))
    assert torch.equal(first.tokens.response_ids, second.tokens.response_ids)
