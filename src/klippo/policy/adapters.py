"""LoRA adapters that share one frozen base: adding, choosing, computing and merging them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from klippo.errors import ConfigError, PreflightError
from klippo.hub import LOADING_ERRORS, find_file, not_loaded, resolve
from klippo.policy.settings import CriticSettings, LoraSettings, PolicySettings
from klippo.types import HFModel

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLayer

POLICY = "default"
REFERENCE = "reference"
CRITIC = "critic"
WIDE = (torch.float32, torch.float64)
# peft uses names in transformers that are deprecated.
quiet_peft = partial(warnings.catch_warnings, action="ignore", category=FutureWarning)


class PeftModel(nn.Module):
    """What Klippo uses of peft's model, a base with LoRA layers; a type only."""

    active_adapter: str
    peft_config: Mapping[str, Any]
    get_base_model: Callable[[], HFModel]
    add_adapter: Callable[[str, object], None]
    set_adapter: Callable[[str], None]
    load_adapter: Callable[..., object]
    disable_adapter: Callable[[], AbstractContextManager[None]]
    save_pretrained: Callable[..., None]


def with_adapter(model: HFModel, adapter: str) -> HFModel:
    """The model with the layers of a LoRA adapter (folder, hub or demo: name) in it, frozen.

    Raises PreflightError if the adapter does not fit the model.
    """
    import peft

    try:
        with quiet_peft():
            adapted: PeftModel = peft.PeftModel.from_pretrained(
                model, resolve(adapter), adapter_name=POLICY
            )
    except LOADING_ERRORS as error:
        raise PreflightError(
            f"{adapter}: the adapter cannot be put on {model.name_or_path} ({error}); name the "
            "base that it was trained on"
        ) from error
    return adapted.get_base_model()


def add_adapters(settings: PolicySettings, critic: CriticSettings, model: HFModel) -> PeftModel:
    """The model with the policy's adapter and, as needed, the reference's and the critic's."""
    with quiet_peft():
        if settings.adapter is None:
            peft_model = add_lora(model, settings.lora, "policy.lora")
        else:
            peft_model = _load_adapter(settings, settings.adapter, model)
        if critic.kind == "lora":
            peft_model = add_lora(peft_model, critic.lora, "critic.lora", name=CRITIC)
        peft_model.set_adapter(POLICY)
    return peft_model


def _load_adapter(settings: PolicySettings, name: str, model: HFModel) -> PeftModel:
    """The model with a saved adapter twice: to train, and frozen for the reference."""
    import peft

    if find_file(name, "adapter_config.json") is None:
        raise PreflightError(
            f"policy.adapter={name} has no adapter_config.json; name a folder or a hub repository "
            "that peft's save_pretrained wrote"
        )
    files = ("adapter_model.safetensors", "adapter_model.bin")
    if all(find_file(name, file) is None for file in files):
        raise PreflightError(
            f"policy.adapter={name} has no adapter weights ({' or '.join(files)}); save the "
            "adapter again with save_pretrained"
        )
    path = resolve(name)
    try:
        loaded: PeftModel = peft.PeftModel.from_pretrained(
            model, path, adapter_name=POLICY, is_trainable=True
        )
        loaded.load_adapter(path, adapter_name=REFERENCE, is_trainable=False)
    except LOADING_ERRORS as error:
        text = str(error)
        if "size mismatch" in text or "Target modules" in text:
            raise PreflightError(
                f"policy.adapter={name} is for another base than policy.model={settings.model}: "
                f"its matrices do not fit ({text.strip().splitlines()[-1].strip()}); name the base "
                "that it was trained on"
            ) from error
        raise not_loaded(f"policy.adapter={name}", error) from error
    # The adapter may name a base that is not on this machine, nor on that of who loads the run.
    for config in loaded.peft_config.values():
        config.base_model_name_or_path = model.name_or_path or config.base_model_name_or_path
    return loaded


def add_lora(
    model: HFModel | PeftModel,
    settings: LoraSettings,
    key: str,
    *,
    name: str = POLICY,
    task: str = "CAUSAL_LM",
) -> PeftModel:
    """The model with a fresh LoRA adapter; for SEQ_CLS the score head trains in full beside it.

    Raises ConfigError for names in `key`.target_modules that no layer of the model has.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    config = peft.LoraConfig(
        task_type=task,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=settings.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        if isinstance(model, peft.PeftModel):
            adapted: PeftModel = model
            adapted.add_adapter(name, config)
        else:
            adapted = peft.get_peft_model(model, config, adapter_name=name)
    except (ValueError, re.error) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}.target_modules={settings.target_modules} cannot be found in the model "
            f"({reason}); all-linear takes every linear layer"
        ) from error
    return adapted


@contextmanager
def using_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Use another adapter (None: the bare base); restores the active one, also after exceptions.

    peft makes the active adapter the only trainable one. The policy's and the critic's train at
    once, so the trainable flags are restored too.
    """
    active = model.active_adapter
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(name)
            yield
    finally:
        model.set_adapter(active)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def with_lean_adapters(model: HFModel) -> HFModel:
    """The same model, whose LoRA layers add their product to the base's in place; see `_forward`.

    peft writes the wide product B (A x) out, then its multiple, then the sum, and the backward pass
    scales the wide gradient once more. Values differ by rounding.
    """
    for layer in _lora_layers(model):
        layer.forward = MethodType(_forward, layer)
    return model


def _forward(layer: LoraLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """W x + scale * B (A x) for one plain active adapter, not in half precision; else peft's."""
    names = _active(layer)
    is_wide = x.dtype in WIDE and x.dtype == layer.base_layer.weight.dtype
    if (
        not (len(names) == 1 and is_plain_lora(layer) and is_wide)
        or (layer.disable_adapters or layer.merged or args or kwargs)
        or torch.is_autocast_enabled(x.device.type)
    ):
        out: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return out
    [name] = names
    tokens = x.flatten(0, -2)  # adding in place needs a matrix, not a view
    low = layer.lora_A[name](layer.lora_dropout[name](tokens))
    total: Tensor = layer.base_layer(tokens)
    total = total.addmm_(low, layer.lora_B[name].weight.T, alpha=layer.scaling[name])
    return total.view(*x.shape[:-1], -1)


@contextmanager
def merged_adapters(model: HFModel) -> Iterator[None]:
    """Compute with W + scale * B A in place of W and adapter: one product per layer, not three.

    For passes without gradients, under the adapter that is active now. Layers that `mergeable`
    leaves out keep their adapters. The sums stand in a buffer of their own, and the very tensors W
    come back in the end, also after an exception.
    """
    layers = mergeable(model)
    weights = [layer.base_layer.weight for layer in layers]
    try:
        for layer, merged in zip(layers, _sums(layers, weights), strict=True):
            layer.base_layer.weight = nn.Parameter(merged, requires_grad=False)
            layer.merged_adapters.extend(_active(layer))  # peft leaves these products out
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.base_layer.weight = weight
            layer.merged_adapters.clear()


def mergeable(model: HFModel) -> list[LoraLayer]:
    """The model's LoRA layers that are a plain sum W + scale * B A, with W in float32 or float64.

    In bfloat16 the sum would round small steps of the adapter away, and 4-bit weights cannot hold
    it.
    """
    return [
        layer
        for layer in _lora_layers(model)
        if is_plain_lora(layer)
        and _active(layer)
        and not (layer.disable_adapters or layer.merged)
        and layer.base_layer.weight.dtype in WIDE
    ]


def _lora_layers(model: HFModel) -> list[LoraLayer]:
    from peft.tuners.lora import Linear

    return [layer for layer in model.modules() if type(layer) is Linear]


def _active(layer: LoraLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def is_plain_lora(layer: LoraLayer) -> bool:
    """Whether the layer is W x + scale * B (A x), without biases or variants such as DoRA."""
    return not (layer.lora_variant or any(layer.lora_bias.values()))


@torch.no_grad()
def _sums(layers: list[LoraLayer], weights: Sequence[Tensor]) -> list[Tensor]:
    """W + scale * B A of each layer: views of one buffer, which the system gets back at once."""
    if not layers:
        return []
    sizes = [weight.numel() for weight in weights]
    pieces = torch.split(weights[0].new_empty(sum(sizes)), sizes)
    sums = [piece.view_as(w).copy_(w) for piece, w in zip(pieces, weights, strict=True)]
    for layer, total in zip(layers, sums, strict=True):
        out = total.T if layer.fan_in_fan_out else total
        for name in _active(layer):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            out.addmm_(b, a, alpha=layer.scaling[name])
    return sums
