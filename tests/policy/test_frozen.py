"""Frozen blocks run once per rollout batch, and nothing else changes.

B sequences, T response tokens.
"""

import copy
import warnings

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from klippo.policy.settings import CriticSettings
from klippo.ppo.learner import Learner
from klippo.ppo.settings import KLSettings, OptimizerSettings, PPOSettings
from klippo.types import Scores
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import (
    RAGGED,
    VOCABULARY,
    assert_same_tensors,
    disturb,
    gpt2,
    gradients,
    llama,
    load,
    make_rollout,
)

ROLLOUT = make_rollout(RAGGED, temperature=0.8)
SCORES = Scores(reward=torch.tensor([1.0, -2.0, 0.5, torch.nan]))


def neox(num_layers):
    """A GPT-NeoX (rotary positions on a part of each head, parallel residual)."""
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY, max_position_embeddings=40, hidden_size=16,
            num_hidden_layers=num_layers, intermediate_size=24, num_attention_heads=2,
            rotary_pct=0.5, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
        )
    ).double().eval()  # fmt: skip


FAMILIES = {"gpt2": gpt2, "llama": llama, "neox": neox}


def start(family="gpt2", critic=None, **options):
    """Policy and reference with one trained block of three."""
    model = FAMILIES[family](num_layers=3)
    return load(model, critic=critic, tuning="last_layers", num_unfrozen_layers=1, **options)


def plain(loaded):
    """The same models, with every block in every pass."""
    loaded.policy.lm.frozen = loaded.reference.lm.frozen = None
    return loaded


def count_runs(model, place):
    """A list that grows by one whenever a block runs."""
    runs = []
    model.base_model.get_submodule(place).register_forward_hook(lambda *_: runs.append(1))
    return runs


def learn(loaded, *, ppo=None, kl=None, num_steps=2):
    """Metrics of each step, and the gradients of each optimizer step."""
    learner = Learner(
        loaded.policy,
        loaded.reference,
        ppo=PPOSettings(**({"batch_size": 4, "num_epochs": 3} | (ppo or {}))),
        kl=KLSettings(**(kl or {})),
        optimizer=OptimizerSettings(learning_rate=1e-3, max_grad_norm=None),
    )
    seen = []
    learner.optimizer.adam.register_step_pre_hook(lambda *_: seen.append(gradients(loaded.policy)))
    metrics = [learner.learn(learner.experience(ROLLOUT, SCORES)) for _ in range(num_steps)]
    return metrics, seen


def same(mine, theirs):
    for one, other in zip(mine[0], theirs[0], strict=True):
        assert one == pytest.approx(other, **FLOAT64_APPROX)
    for one, other in zip(mine[1], theirs[1], strict=True):
        assert_same_tensors(one, other, **FLOAT64)


@pytest.mark.parametrize("after_last", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_whole_trunk(family, after_last):
    loaded = start(family)
    disturb(loaded.policy.trainable()[0], scale=0.2)
    for lm in (loaded.policy.lm, loaded.reference.lm):
        known = loaded.policy.lm.with_frozen_states(ROLLOUT.tokens)
        assert known.frozen_states.shape == (4, 5 + 6, 16)
        runs = count_runs(lm.model, "layers.1" if family != "gpt2" else "h.1")
        expected = lm.hidden(ROLLOUT.tokens, after_last=after_last)
        assert len(runs) == 1
        found = lm.hidden(known, after_last=after_last)
        torch.testing.assert_close(found, expected, **FLOAT64)
        assert len(runs) == 1
        assert torch.equal(lm.hidden(ROLLOUT.tokens, after_last=after_last), expected)
        assert len(runs) == 2, "the blocks are back in their places"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ppo": {"micro_batch_size": 1}},
        {"ppo": {"micro_batch_size": 1, "minibatch_size": 2, "bootstrap_truncated": True}},
        {"kl": {"placement": "exact", "coef": 0.3}},
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_learning_is_the_same_as_with_every_block_in_every_pass(family, options):
    same(learn(start(family), **options), learn(plain(start(family)), **options))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_separate_critic_reads_its_own_trunk_as_before(checkpointing):
    critic = CriticSettings(kind="separate")
    options = {"critic": critic, "gradient_checkpointing": checkpointing}
    same(learn(start(**options)), learn(plain(start(**options))))


def test_frozen_blocks_run_once_per_batch_whatever_uses_their_output():
    loaded = start("llama")
    runs = count_runs(loaded.policy.lm.model, "layers.0")
    of_reference = count_runs(loaded.reference.lm.model, "layers.0")
    learn(loaded, num_steps=1)
    assert (len(runs), len(of_reference)) == (1, 0)


def test_without_a_block_below_the_trained_ones_nothing_is_kept():
    loaded = load(gpt2(), tuning="last_layers", num_unfrozen_layers=2)
    assert loaded.policy.lm.frozen is None
    assert loaded.policy.lm.with_frozen_states(ROLLOUT.tokens) is ROLLOUT.tokens
    assert load(gpt2()).policy.lm.frozen is None


class Remembering(torch.nn.Module):
    """A GPT-2 block that leaves its output where another block finds it."""

    def __init__(self, block, memory, reads):
        super().__init__()
        self.block, self.memory, self.reads = block, [memory], reads

    def forward(self, hidden, *args, **kwargs):
        out = self.block(hidden, *args, **kwargs)
        (memory,) = self.memory
        if self.reads:
            return out + memory["below"][:1, :1]
        memory["below"] = out
        return out


def test_a_trunk_that_uses_more_than_its_blocks_hand_on_runs_whole_with_a_warning():
    model, memory = gpt2(num_layers=3), {}
    model.transformer.h[0] = Remembering(model.transformer.h[0], memory, reads=False)
    model.transformer.h[2] = Remembering(model.transformer.h[2], memory, reads=True)
    with pytest.warns(UserWarning, match="frozen layers cannot be run once"):
        loaded = load(model, tuning="last_layers", num_unfrozen_layers=1)
    assert loaded.policy.lm.frozen is None
    assert loaded.reference.lm.frozen is None


def test_an_exception_inside_puts_the_blocks_back():
    loaded = start()
    lm = loaded.policy.lm
    before = list(lm.model.transformer.h)
    known = copy.copy(lm.with_frozen_states(ROLLOUT.tokens))

    def broken(*_, **__):
        raise MemoryError

    lm.model.transformer.h[2].forward = broken
    with pytest.raises(MemoryError):
        lm.hidden(known)
    assert all(one is other for one, other in zip(lm.model.transformer.h, before, strict=True))


def test_the_toys_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for family in FAMILIES:
            assert start(family).policy.lm.frozen is not None
