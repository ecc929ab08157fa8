"""Batches are shuffled epochs, the same on every number of ranks, and resume exactly."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klippo.data.sampler import PromptSampler
from klippo.errors import ConfigError
from klippo.types import Prompt


def make_prompts(num):
    return [Prompt(id=i, text=str(i), token_ids=[i]) for i in range(num)]


def draw(sampler, num_batches):
    return [[p.id for p in sampler.next()] for _ in range(num_batches)]


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 9))
def test_each_epoch_sees_every_prompt_exactly_once(num_prompts, batch_size, seed):
    sampler = PromptSampler(make_prompts(num_prompts), batch_size, seed)
    ids = [i for batch in draw(sampler, 2 * num_prompts) for i in batch]
    assert len(ids) == 2 * num_prompts * batch_size
    for epoch in range(2 * batch_size):
        chunk = ids[epoch * num_prompts : (epoch + 1) * num_prompts]
        assert Counter(chunk) == Counter(range(num_prompts))
    assert sampler.epoch == 2 * batch_size


def test_epochs_and_seeds_have_orders_of_their_own():
    prompts = make_prompts(30)
    first, second = draw(PromptSampler(prompts, 30, 0), 2)
    assert first != second
    assert first != sorted(first)
    assert [first, second] == draw(PromptSampler(prompts, 30, 0), 2)
    assert first != draw(PromptSampler(prompts, 30, 1), 1)[0]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
def test_ranks_together_draw_the_batch_of_a_single_process(num_prompts, share, world, seed):
    prompts, size = make_prompts(num_prompts), share * world
    whole = draw(PromptSampler(prompts, size, seed), 5)
    ranks = [
        draw(PromptSampler(prompts, size, seed, rank=r, world_size=world), 5) for r in range(world)
    ]
    assert whole == [[i for rank in ranks for i in rank[step]] for step in range(5)]


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 9))
def test_a_resumed_sampler_goes_on_exactly(num_prompts, batch_size, num_before):
    prompts = make_prompts(num_prompts)
    sampler = PromptSampler(prompts, batch_size, 5)
    draw(sampler, num_before)
    resumed = PromptSampler(prompts, batch_size, 5)
    resumed.load_state_dict(sampler.state_dict())
    assert draw(resumed, 6) == draw(sampler, 6)


def test_state_of_other_prompts_or_another_seed_is_refused():
    state = PromptSampler(make_prompts(4), 2, 0).state_dict()
    with pytest.raises(ConfigError, match="num_prompts=4, this run has num_prompts=5"):
        PromptSampler(make_prompts(5), 2, 0).load_state_dict(state)
    with pytest.raises(ConfigError, match="seed=0, this run has seed=1"):
        PromptSampler(make_prompts(4), 2, 1).load_state_dict(state)


def test_batches_that_cannot_be_drawn_are_refused():
    with pytest.raises(ConfigError, match="there are no prompts"):
        PromptSampler([], 2, 0)
    with pytest.raises(ConfigError, match=r"batch_size=7 must be a positive multiple.* 2; try 8"):
        PromptSampler(make_prompts(4), 7, 0, world_size=2)
