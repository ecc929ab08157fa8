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
from klippo.policy.loading import LoadedPolicy
from klippo.policy.merged import merged_adapters, merged_weights
from klippo.policy.sharding import has_shards, whole
from klippo.ranks import Ranks, warn
from klippo.rollouts.collate import collate
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.opening import Opening
from klippo.rollouts.remote import greet
from klippo.rollouts.sampling import Sampling
from klippo.rollouts.servers import ServersEngine
from klippo.rollouts.settings import RolloutSettings
from klippo.rollouts.vllm import open_vllm, require_vllm
from klippo.types import Engine, Prompt

CHECKED_TOKENS = 8
"""Length of the response with which an engine shows that it has the policy's weights."""


def check_engine_settings(rollout: RolloutSettings, device: torch.device, ranks: Ranks) -> None:
    """Raise PreflightError for an engine that this machine, or this launch, cannot run."""
    if rollout.engine != "vllm":
        return
    num_servers = len(rollout.vllm.servers)
    if 0 < num_servers < ranks.world_size:
        raise PreflightError(
            f"rollout.vllm.servers: {num_servers} for the {ranks.world_size} processes of this "
            "run, each of which needs one of its own; start more, or fewer processes"
        )
    if num_servers > 0:
        greet(own_servers(rollout, ranks))
        return
    if ranks.world_size > 1:
        raise PreflightError(
            f"rollout.engine=vllm samples in one process, and this run has {ranks.world_size}; "
            "start one, use rollout.vllm.servers, or rollout.engine=hf"
        )
    require_vllm(device)


def own_servers(rollout: RolloutSettings, ranks: Ranks) -> tuple[str, ...]:
    """The addresses that this process asks; every other process asks others."""
    return rollout.vllm.servers[ranks.rank :: ranks.world_size]


def build_engine(
    config: RunConfig,
    loaded: LoadedPolicy,
    stop_ids: frozenset[int],
    prompts: Sequence[Prompt],
    ranks: Ranks,
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
    opening = Opening.of(
        policy.lm.model,
        rollout.vllm,
        dtype=torch.bfloat16 if config.policy.autocast else policy.lm.model.dtype,
        stop_ids=stop_ids,
        temperature=rollout.temperature,
        max_tokens=max(len(prompt.token_ids) for prompt in prompts) + length,
        batch_size=rollout.generation_batch_size,
        seed=config.seed,
    )
    weights = partial(merged_weights, policy)
    urls = own_servers(rollout, ranks)
    engine: Engine
    if urls:
        patience_s = rollout.vllm.patience_s
        engine = ServersEngine(urls, weights, opening, patience_s=patience_s, say=warn)
    else:
        engine = open_vllm(opening, weights, policy.device)
    check_engine(engine, config, loaded, prompts[0], min(length, CHECKED_TOKENS), urls)
    return engine


@contextmanager
def ready_to_sample(config: RunConfig, policy: ActorCritic) -> Iterator[None]:
    """All weights of a policy in this process, its adapter folded in where `merges_adapters`."""
    merges = merges_adapters(config, sharded=has_shards(policy.lm))
    with whole(policy.lm), merged_adapters(policy.lm.model) if merges else nullcontext():
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
    engine: Engine,
    config: RunConfig,
    loaded: LoadedPolicy,
    prompt: Prompt,
    length: int,
    urls: Sequence[str] = (),
) -> None:
    """Make sure that the engine, and each of its servers, samples from the policy's distribution.

    Raises PreflightError where its log-probs of one response are not the policy's.
    """
    number = max(len(urls), 1)  # one prompt for each server
    rollout = collate(
        [prompt] * number,
        engine.generate([prompt] * number, [length] * number, [config.seed] * number),
        loaded.tokenizer,
        temperature=config.rollout.temperature,
        device=loaded.policy.device,
    )
    with torch.no_grad():
        own = loaded.policy(rollout.tokens, rollout.temperature, with_entropy=False).logprobs
    assert rollout.behavior_logprobs is not None
    mask = rollout.tokens.response_mask
    difference = (own - rollout.behavior_logprobs).abs().where(mask, 0.0).sum(1) / mask.sum(1)
    is_exact = config.policy.dtype == "float32" and not config.policy.autocast
    tolerance = 0.01 if is_exact else 0.2
    for mismatch, where in zip(difference.tolist(), urls or [""], strict=True):
        if not mismatch <= tolerance:
            name = type(loaded.policy.lm.model).__name__
            raise PreflightError(
                f"rollout.engine={config.rollout.engine} samples {where and f'at {where} '}from "
                f"another distribution than this {name}: log-probs of one response differ by "
                f"{mismatch:.3g} nats per token, and {tolerance} is the most; use "
                "rollout.engine=hf"
            )
