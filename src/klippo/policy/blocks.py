"""Where a Hugging Face model keeps its transformer blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from klippo.errors import PreflightError


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The list of transformer blocks of a Hugging Face causal LM, or of its trunk."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise PreflightError(
        f"{type(model).__name__}: no list of {count} blocks found; use policy.tuning full or lora, "
        "and sharding none"
    )
