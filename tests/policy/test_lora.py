"""LoRA layers that add in place: peft's numbers, with fewer wide tensors on the way."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klippo.policy.adapters import using_adapter
from klippo.policy.settings import CriticSettings
from tests.policy.test_reference import start
from tests.tolerance import FLOAT64, float32
from tests.toys import (
    FAMILIES,
    LORA,
    RAGGED,
    assert_same_tensors,
    disturb,
    gradients,
    llama,
    load,
    make_rollout,
)


def as_peft(loaded):
    """A copy with peft's own layers."""
    copied = copy.deepcopy(loaded.policy.lm.model)
    for layer in layers_of(copied):
        del layer.forward
    return copied


def layers_of(model):
    return [module for module in model.modules() if "forward" in vars(module)]


def trained(family, tmp_path):
    loaded, _ = start("adapter", family, tmp_path, CriticSettings(kind="lora", lora=LORA))
    disturb([p for group in loaded.policy.trainable() for p in group], scale=0.2)
    return loaded


def one_pass(model):
    """Logits and gradients of a loss that every weight of the adapter has a part in."""
    model.zero_grad()
    logits = model(torch.tensor([[3, 7, 1, 5], [2, 9, 4, 8]])).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_peft(family, tmp_path):
    loaded = trained(family, tmp_path)
    logits, found = one_pass(loaded.policy.lm.model)
    expected_logits, expected = one_pass(as_peft(loaded))
    torch.testing.assert_close(logits, expected_logits, **FLOAT64)
    assert len(found) == 2 * {"gpt2": 8, "llama": 14}[family]
    assert_same_tensors(found, expected, **FLOAT64)


class Products(TorchDispatchMode):
    """Counts multiplications whose result is at least so wide."""

    def __init__(self, width):
        super().__init__()
        self.width, self.number = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mul.Tensor and result.shape[-1] == self.width:
            self.number += 1
        return result


def test_nothing_wide_is_multiplied_by_the_scale():
    model = load(llama().float(), tuning="lora").policy.lm.model
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, 16, requires_grad=True)

    def count():
        with Products(width=24) as products:
            layer(x).sum().backward()
        return products.number

    assert count() == 0
    del layer.forward
    assert count() == 2  # peft's: forward and backward


@torch.no_grad()
def test_a_float32_layer_gives_what_peft_gives_to_rounding():
    model = load(llama().float(), tuning="lora").policy.lm.model
    layer = model.model.layers[0].mlp.up_proj
    disturb(layer.parameters(), scale=0.2)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    ours = layer(x)
    del layer.forward
    # Sums of 16 and of 2 terms, a scale and a sum, here and there.
    weights = layer.base_layer.weight, layer.get_delta_weight("default")
    largest = 16 * float(x.abs().max()) * sum(float(weight.abs().max()) for weight in weights)
    torch.testing.assert_close(ours, layer(x), **float32(2 * (16 + 2 + 2), largest))


@pytest.mark.parametrize("name", [None, "reference", "critic"])
def test_other_adapters_and_none_compute_as_in_peft(name, tmp_path):
    loaded = trained("llama", tmp_path)
    tokens = make_rollout(RAGGED).tokens

    def hidden():
        with torch.no_grad(), using_adapter(loaded.policy.peft_model, name):
            return loaded.policy.lm.hidden(tokens)

    found = hidden()
    for layer in layers_of(loaded.policy.lm.model):
        del layer.forward
    torch.testing.assert_close(found, hidden(), **FLOAT64)


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "two at once"])
def test_what_is_no_single_float32_sum_is_left_to_peft(how, tmp_path):
    loaded = trained("llama", tmp_path)
    model, plain = loaded.policy.lm.model, as_peft(loaded)
    for one in (model, plain):
        for name, parameter in one.named_parameters():
            if how == "bfloat16" and "lora_" not in name:
                parameter.data = parameter.bfloat16()
        for layer in one.modules():
            if how == "two at once" and hasattr(layer, "lora_A"):
                layer.set_adapter(["default", "reference"])
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.no_grad():
        ids = torch.tensor([[3, 7, 1, 5]])
        assert torch.equal(model(ids).logits, plain(ids).logits)
