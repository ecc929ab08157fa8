"""How the processes hold the models: from the config, or from accelerate's config file.

accelerate passes the settings of its file to each process as environment variables.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from klippo.config.schema import RunConfig
from klippo.errors import PreflightError
from klippo.policy.settings import Sharding
from klippo.ranks import Ranks

RUNS_AS = {
    "none": "a full model in every process",
    "fsdp": "FSDP2",
    "shard_grad_op": "FSDP2 that keeps gathered weights",
}
OF_STAGE: dict[int, Sharding] = {0: "none", 1: "shard_grad_op", 2: "shard_grad_op", 3: "fsdp"}
FSDP_THAT_KEEPS_WEIGHTS = {"false", "shard_grad_op", "2", "hybrid_shard_zero2", "5"}
"""Values of fsdp_reshard_after_forward, or of version 1's fsdp_sharding_strategy."""
FSDP_WITHOUT_SHARDS = {"no_shard", "3"}


def choose_sharding(config: RunConfig, ranks: Ranks) -> Sharding:
    """How the processes hold the models; any config file of accelerate starts a run.

    Raises PreflightError for a DeepSpeed file that accelerate's names and that cannot be read.
    """
    return _choose(config, ranks)[0]


def sharding_note(config: RunConfig, ranks: Ranks) -> str | None:
    """One line if accelerate's config file names something that Klippo runs differently."""
    sharding, requested = _choose(config, ranks)
    if not requested:
        return None
    text = f"accelerate's config file names {requested}; Klippo runs it as {RUNS_AS[sharding]}"
    if _accelerate_has("FSDP_OFFLOAD_PARAMS", "ACCELERATE_DEEPSPEED_OFFLOAD"):
        text += ", without CPU offload"
    if (
        _accelerate_has("FSDP_ACTIVATION_CHECKPOINTING")
        and not config.policy.gradient_checkpointing
    ):
        text += "; for activation checkpointing set policy.gradient_checkpointing=true"
    return text


def _choose(config: RunConfig, ranks: Ranks) -> tuple[Sharding, str]:
    """The sharding, and the name of what accelerate's file wants if that runs differently."""
    if ranks.world_size == 1:
        return "none", ""
    if config.sharding != "auto":
        return config.sharding, ""
    sharding, requested = _deepspeed() or _fsdp() or ("none", "")
    if sharding != "none" and config.policy.quantize_4bit:  # 4-bit weights cannot be sharded
        return "none", requested or "FSDP with 4-bit weights"
    return sharding, requested


def _deepspeed() -> tuple[Sharding, str] | None:
    if not _accelerate_has("ACCELERATE_USE_DEEPSPEED"):
        return None
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        try:
            settings = json.loads(Path(file).read_text(encoding="utf-8"))
            stage = str(settings.get("zero_optimization", {}).get("stage", 0))
        except (OSError, ValueError, AttributeError) as error:
            raise PreflightError(
                f"accelerate's config file has deepspeed_config_file: {file}, which cannot be read "
                f"({error}); correct it, or set `sharding` in Klippo's config"
            ) from error
    sharding = OF_STAGE.get(int(stage) if stage.isdigit() else 2, "fsdp")
    return sharding, f"DeepSpeed ZeRO-{stage}"


def _fsdp() -> tuple[Sharding, str] | None:
    if not _accelerate_has("ACCELERATE_USE_FSDP"):
        return None
    version = os.environ.get("FSDP_VERSION", "2")
    names = ("FSDP_RESHARD_AFTER_FORWARD", "FSDP_SHARDING_STRATEGY")
    values = {os.environ.get(name, "").lower() for name in names}
    sharding: Sharding = "shard_grad_op" if values & FSDP_THAT_KEEPS_WEIGHTS else "fsdp"
    if values & FSDP_WITHOUT_SHARDS:
        sharding = "none"
    ignored = ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")
    runs_differently = version != "2" or sharding == "none" or _accelerate_has(*ignored)
    return sharding, f"FSDP version {version}" if runs_differently else ""


def _accelerate_has(*prefixes: str) -> bool:
    """Whether a variable with one of these prefixes is switched on."""
    off = ("", "false", "0", "no", "off", "n", "f", "none")
    return any(
        value.lower() not in off for name, value in os.environ.items() if name.startswith(prefixes)
    )
