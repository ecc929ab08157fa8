"""From settings to the engine that samples a run's responses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from klippo.config.schema import RunConfig
from klippo.errors import PreflightError
from klippo.policy.loading import LoadedPolicy
from klippo.policy.merged import merged_weights
from klippo.policy.sharding import whole
from klippo.ranks import Ranks
from klippo.rollouts.collate import collate
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.sampling import Sampling
from klippo.rollouts.settings import RolloutSettings
from klippo.rollouts.vllm import open_vllm, require_vllm
from klippo.stages.build import longest
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
    config: RunConfig, loaded: LoadedPolicy, stop_ids: frozenset[int], prompts: Sequence[Prompt]
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
            whole=partial(whole, policy.lm),
        )
    length = longest(rollout.response_length)
    engine = open_vllm(
        policy.lm.model,
        partial(merged_weights, policy),
        rollout.vllm,
        dtype=torch.bfloat16 if config.policy.autocast else policy.lm.model.dtype,
        stop_ids=stop_ids,
        temperature=rollout.temperature,
        max_tokens=max(len(prompt.token_ids) for prompt in prompts) + length,
        batch_size=rollout.generation_batch_size,
        seed=config.seed,
    )
    check_engine(engine, config, loaded, prompts[0], min(length, CHECKED_TOKENS))
    return engine


def check_engine(
    engine: Engine, config: RunConfig, loaded: LoadedPolicy, prompt: Prompt, length: int
) -> None:
    """Make sure that the engine samples from the policy's distribution.

    Raises PreflightError where its log-probs of one response are not the policy's.
    """
    rollout = collate(
        [prompt],
        engine.generate([prompt], [length], [config.seed]),
        loaded.tokenizer,
        temperature=config.rollout.temperature,
        device=loaded.policy.device,
    )
    with torch.no_grad():
        own = loaded.policy(rollout.tokens, rollout.temperature, with_entropy=False).logprobs
    assert rollout.behavior_logprobs is not None
    mismatch = float((own - rollout.behavior_logprobs).abs().mean())
    is_exact = config.policy.dtype == "float32" and not config.policy.autocast
    tolerance = 0.01 if is_exact else 0.2
    if not mismatch <= tolerance:
        name = type(loaded.policy.lm.model).__name__
        raise PreflightError(
            f"rollout.engine={config.rollout.engine} samples from another distribution than this "
            f"{name}: log-probs of one response differ by {mismatch:.3g} nats per token, and "
            f"{tolerance} is the most; use rollout.engine=hf"
        )
