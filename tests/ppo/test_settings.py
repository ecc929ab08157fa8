"""Sizes of minibatches and micro-batches are upper bounds: a batch size alone works."""

import pytest
from pydantic import ValidationError

from klippo.config.load import load_config, recipe_names
from klippo.ppo.settings import PPOSettings


@pytest.mark.parametrize(
    ("sizes", "minibatch", "micro_batch"),
    [
        ({"batch_size": 16}, 16, 16),
        ({"batch_size": 16, "minibatch_size": 8}, 8, 8),
        ({"batch_size": 8, "minibatch_size": 64}, 8, 8),
        ({"batch_size": 96, "minibatch_size": 64}, 48, 48),
        ({"batch_size": 16, "minibatch_size": 6}, 4, 4),
        ({"batch_size": 16, "minibatch_size": 8, "micro_batch_size": 3}, 8, 3),
        ({"batch_size": 8, "minibatch_size": 64, "micro_batch_size": 32}, 8, 8),
    ],
)
def test_the_largest_divisor_up_to_the_size_is_used(sizes, minibatch, micro_batch):
    settings = PPOSettings(**sizes)
    assert (settings.minibatch, settings.micro_batch) == (minibatch, micro_batch)
    asked = sizes.get("minibatch_size", minibatch)
    assert bool(settings.notes()) is (asked != minibatch)
    for note in settings.notes():
        assert f"ppo.minibatch_size={asked} does not divide" in note
        assert f"learns from {minibatch} responses" in note


def test_a_divisor_far_below_the_size_is_refused():
    with pytest.raises(ValidationError, match="size=8 must divide batch_size=17, or"):
        PPOSettings(batch_size=17, minibatch_size=8)


@pytest.mark.parametrize("name", recipe_names())
def test_a_batch_size_alone_overrides_any_recipe(name):
    config = load_config(name, ["ppo.batch_size=8", "rm_seed=1"]).config
    assert 8 % config.ppo.minibatch == 0
