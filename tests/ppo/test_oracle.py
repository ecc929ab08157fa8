"""On a toy that can be enumerated, PPO finds the optimum that theory gives."""

import itertools

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from klippo.policy.loading import load_policy
from klippo.policy.settings import CriticSettings, PolicySettings
from klippo.ppo.learner import Learner
from klippo.ppo.settings import KLSettings, OptimizerSettings, PPOSettings
from klippo.types import Rollout, Scores, TokenBatch
from tests.toys import NO_TOKENIZER

VOCABULARY, LENGTH, BETA = 3, 3, 0.5
RESPONSES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # (27, 3)


def every_response() -> TokenBatch:
    prompts = torch.zeros(len(RESPONSES), 1, dtype=torch.long)
    return TokenBatch(
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
        response_ids=RESPONSES,
        response_mask=torch.ones_like(RESPONSES, dtype=torch.bool),
    )


def distribution(policy) -> torch.Tensor:
    """Probability of each of the 27 responses, (27,) float64."""
    with torch.no_grad():
        logprobs = policy(every_response(), 1.0).logprobs
    return logprobs.double().sum(1).exp()


def test_ppo_converges_to_the_reference_tilted_by_the_exponential_reward() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=8,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    for weight in model.parameters():
        weight.data *= 3  # a reference that is far from uniform
    loaded = load_policy(
        PolicySettings(model="toy"),
        CriticSettings(),
        torch.device("cpu"),
        model=model,
        tokenizer=NO_TOKENIZER,
    )
    rewards = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(1))
    reference = distribution(loaded.policy)
    optimum = reference * (rewards.double() / BETA).exp()
    optimum /= optimum.sum()
    steps, batch = 200, 256
    learner = Learner(
        loaded.policy,
        loaded.reference,
        ppo=PPOSettings(
            num_steps=steps,
            batch_size=batch,
            num_epochs=2,
            gae_lambda=1.0,
            value_coef=0.5,
            value_clip_range=None,
            whiten_advantages=False,
        ),
        kl=KLSettings(coef=BETA),
        optimizer=OptimizerSettings(learning_rate=5e-3, schedule="cosine"),
    )
    generator = torch.Generator().manual_seed(2)
    start = 0.5 * (distribution(loaded.policy) - optimum).abs().sum()
    for _ in range(steps):
        drawn = torch.multinomial(
            distribution(loaded.policy), batch, replacement=True, generator=generator
        )
        rollout = Rollout(
            prompts=[],
            responses=[],
            tokens=every_response().rows(drawn),
            finished=torch.ones(batch, dtype=torch.bool),
            temperature=1.0,
        )
        learner.learn(learner.experience(rollout, Scores(reward=rewards[drawn])))
    end = 0.5 * (distribution(loaded.policy) - optimum).abs().sum()
    assert start > 0.2, "the toy must not start at its optimum"
    assert end < 0.02
