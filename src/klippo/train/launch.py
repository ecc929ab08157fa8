"""What the launcher asks for beside processes: accelerate hands its config file on by variables."""

from __future__ import annotations

import os
from collections.abc import Sequence

from klippo.config.schema import RunConfig
from klippo.errors import PreflightError
from klippo.policy.settings import Sharding
from klippo.ranks import Ranks

TRUE = ("true", "1", "yes", "on", "y", "t")

Wanted = Sequence[tuple[str, str, str, str]]
"""(variable, the value that Klippo can do, the setting's name, what to do instead)"""

FSDP: Wanted = (
    ("FSDP_VERSION", "2", "fsdp_version", "set it to 2"),
    ("FSDP_OFFLOAD_PARAMS", "false", "fsdp_offload_params", "set it to false"),
    ("FSDP_RESHARD_AFTER_FORWARD", "true", "fsdp_reshard_after_forward", "set it to true"),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        "false",
        "fsdp_activation_checkpointing",
        "set it to false, and policy.gradient_checkpointing=true",
    ),
)
DEEPSPEED: Wanted = (
    ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none", "deepspeed_config_file", "remove it"),
    ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "zero_stage", "set it to 3"),
    (
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "none",
        "offload_optimizer_device",
        "set it to none",
    ),
    ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none", "offload_param_device", "set it to none"),
)


def choose_sharding(config: RunConfig, ranks: Ranks) -> Sharding:
    """How the processes are to hold the models.

    Raises PreflightError for what accelerate's config file asks and Klippo does not do.
    """
    if ranks.world_size == 1:
        return "none"
    if config.sharding != "auto":
        return config.sharding
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        found: Sharding = "zero3"
        _require(DEEPSPEED)
    elif _is_on("ACCELERATE_USE_FSDP"):
        found = "fsdp"
        _require(FSDP)
    else:
        return "none"
    if config.policy.quantize_4bit:
        raise PreflightError(
            f"accelerate's config file asks for {found}, which cannot cut 4-bit weights; set "
            "policy.quantize_4bit=false, or sharding=none"
        )
    return found


def _require(settings: Wanted) -> None:
    for name, wanted, setting, remedy in settings:
        found = os.environ.get(name, wanted).lower()
        if found != wanted:
            raise PreflightError(
                f"accelerate's config file has {setting}: {found}, which Klippo does not do; "
                f"{remedy}"
            )


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in TRUE
