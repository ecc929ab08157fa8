"""What the launcher asks for beside processes: accelerate hands its config file on by variables."""

from __future__ import annotations

import os

from klippo.config.schema import RunConfig
from klippo.errors import PreflightError
from klippo.ranks import Ranks

TRUE = ("true", "1", "yes", "on", "y", "t")


def is_to_shard(config: RunConfig, ranks: Ranks) -> bool:
    """Whether each process is to hold only its part of the weights.

    Raises PreflightError for what accelerate's config file asks and Klippo does not do.
    """
    if ranks.world_size == 1:
        return False
    if config.sharding != "auto":
        return config.sharding == "fsdp"
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise PreflightError(
            "accelerate's config file asks for DeepSpeed, which Klippo does not use; FSDP2 shares "
            "out weights, gradients and optimizer states as ZeRO-3 does: take distributed_type: "
            "FSDP with fsdp_version: 2, or sharding=fsdp with any launcher"
        )
    if not _is_on("ACCELERATE_USE_FSDP"):
        return False
    for name, wanted, setting, remedy in (
        ("FSDP_VERSION", "2", "fsdp_version", "set it to 2"),
        ("FSDP_OFFLOAD_PARAMS", "false", "fsdp_offload_params", "set it to false"),
        ("FSDP_RESHARD_AFTER_FORWARD", "true", "fsdp_reshard_after_forward", "set it to true"),
        (
            "FSDP_ACTIVATION_CHECKPOINTING",
            "false",
            "fsdp_activation_checkpointing",
            "set it to false, and policy.gradient_checkpointing=true",
        ),
    ):
        found = os.environ.get(name, wanted).lower()
        if found != wanted:
            raise PreflightError(
                f"accelerate's config file has {setting}: {found}, which Klippo does not do; "
                f"{remedy}"
            )
    if config.policy.quantize_4bit:
        raise PreflightError(
            "accelerate's config file asks for FSDP, which cannot cut 4-bit weights; set "
            "policy.quantize_4bit=false, or sharding=none"
        )
    return True


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in TRUE
