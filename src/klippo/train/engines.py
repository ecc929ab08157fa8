"""From settings to the engine that samples a run's responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from klippo.config.schema import RunConfig
from klippo.errors import PreflightError
from klippo.lengths import longest
from klippo.policy.actor_critic import ActorCritic
from klippo.policy.adapters import merged_adapters
from klippo.policy.loading import LoadedPolicy
from klippo.policy.sharding import full_weights, is_sharded
from klippo.policy.weights import merged_weights
from klippo.ranks import Ranks
from klippo.rollouts.collate import collate
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.sampling import Sampling
from klippo.rollouts.settings import RolloutSettings
from klippo.rollouts.vllm import open_vllm, require_vllm
from klippo.types import Engine, Prompt

CHECKED_TOKENS = 8
"""Length of the response with which an engine shows that it has the policy's weights."""


def check_engine_settings(rollout: RolloutSettings, device: torch.device, ranks: Ranks) -> None:
    """Raise PreflightError for an engine that this machine, or this launch, cannot run."""
    if rollout.engine != "vllm":
        return
    if ranks.world_size > 1:
        raise PreflightError(
            f"rollout.engine=vllm samples in one process, and this run has {ranks.world_size}; "
            "start one, or use rollout.engine=hf"
        )
    require_vllm(device)


def build_engine(
    config: RunConfig,
    loaded: LoadedPolicy,
    stop_ids: frozenset[int],
    prompts: Sequence[Prompt],
) -> Engine:
    """The engine of the settings; `prompts` are those that it will be asked.

    Raises PreflightError for a policy that the engine cannot sample from.
    """
    rollout, policy = config.rollout, loaded.policy
    if rollout.engine == "hf":
        return HFEngine(
            policy.lm.model,
            stop_ids=stop_ids,
            sampling=Sampling(temperature=rollout.temperature),
            batch_size=rollout.generation_batch_size,
            record_logprobs=rollout.record_logprobs,
            autocast=config.policy.autocast,
            around=partial(ready_to_sample, config, policy),
        )
    length = longest(rollout.response_length)
    engine = open_vllm(
        policy.lm.model,
        partial(merged_weights, policy),
        rollout.vllm,
        policy.device,
        dtype=torch.bfloat16 if config.policy.autocast else policy.lm.model.dtype,
        stop_ids=stop_ids,
        temperature=rollout.temperature,
        max_tokens=max(len(prompt.token_ids) for prompt in prompts) + length,
        batch_size=rollout.generation_batch_size,
        seed=config.seed,
    )
    check_engine(engine, config, loaded, prompts[0], min(length, CHECKED_TOKENS))
    return engine


@contextmanager
def ready_to_sample(config: RunConfig, policy: ActorCritic) -> Iterator[None]:
    """All weights of a policy in this process, its adapter folded in where `merges_adapters`."""
    merges = merges_adapters(config, sharded=is_sharded(policy.lm))
    with full_weights(policy.lm), merged_adapters(policy.lm.model) if merges else nullcontext():
        yield


def merges_adapters(config: RunConfig, *, sharded: bool) -> bool:
    """Whether responses are sampled with the policy's adapter folded into its weights.

    Not where products are in bfloat16: a weight's rounding there is larger than what a young
    adapter adds, and the responses would be those of the start.
    """
    policy, rollout = config.policy, config.rollout
    asked = policy.tuning == "lora" and rollout.engine == "hf" and rollout.merge_adapters
    in_float32 = policy.dtype == "float32" and not policy.autocast and not policy.quantize_4bit
    return asked and in_float32 and not sharded


def check_engine(
    engine: Engine, config: RunConfig, loaded: LoadedPolicy, prompt: Prompt, length: int
) -> None:
    """Check that the engine samples from the policy's distribution.

    Raises PreflightError if its log-probs of one response are not the policy's.
    """
    rollout = collate(
        [prompt],
        engine.generate([prompt], [length], [config.seed]),
        loaded.tokenizer,
        temperature=config.rollout.temperature,
        device=loaded.policy.device,
    )
    with torch.no_grad():
        logprobs = loaded.policy(rollout.tokens, rollout.temperature, with_entropy=False).logprobs
    assert rollout.behavior_logprobs is not None
    difference = (logprobs - rollout.behavior_logprobs)[rollout.tokens.response_mask]
    mismatch = float(difference.abs().mean())
    is_exact = config.policy.dtype == "float32" and not config.policy.autocast
    tolerance = 0.01 if is_exact else 0.2
    if not mismatch <= tolerance:
        raise PreflightError(
            f"rollout.engine={config.rollout.engine} samples from another distribution than this "
            f"{type(loaded.policy.lm.model).__name__}: log-probs of one response differ by "
            f"{mismatch:.3g} nats per token, and {tolerance} is the most; use rollout.engine=hf"
        )
