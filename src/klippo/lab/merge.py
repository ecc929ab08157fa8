"""`klippo merge`: a base and its LoRA adapter as one plain model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.text import Text

from klippo.errors import ConfigError
from klippo.hub import no_progress_bars
from klippo.policy.adapters import POLICY, with_adapter
from klippo.policy.loading import load_causal_lm
from klippo.policy.settings import PolicySettings
from klippo.runs.folder import RunFolder
from klippo.runs.models import Dtype, locate_model, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(source: str, output: Path, *, dtype: Dtype = "float32") -> int:
    """Write W + scale * B A of every adapted layer, and the tokenizer, to a new folder.

    Raises ConfigError for a model without an adapter and for a folder that exists.
    """
    model_source = locate_model(source)
    if model_source.adapter is None:
        raise ConfigError(f"{source}: has no LoRA adapter, so there is nothing to merge")
    if output.exists():
        raise ConfigError(f"{output}: exists already; name a new folder")
    settings = PolicySettings(model=model_source.base, revision=model_source.revision, dtype=dtype)
    model = with_adapter(load_causal_lm(settings, torch.device("cpu")), model_source.adapter)
    merge_layers(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with RunFolder(output.parent).new_directory(output.name) as folder, no_progress_bars():
        model.save_pretrained(folder)
        tokenizer_of(model_source).save_pretrained(folder)
    Console().print(Text(f"{source} as one model: {output}"), soft_wrap=True)
    return 0


def merge_layers(model: PreTrainedModel) -> None:
    """Replace layers that have a LoRA adapter by plain ones."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True, adapter_names=[POLICY])
            model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config  # or it would be saved as an adapter
        model._hf_peft_config_loaded = False
