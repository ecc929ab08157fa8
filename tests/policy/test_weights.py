"""How far weights moved, with and without LoRA adapters."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from klippo.errors import PreflightError
from klippo.policy.adapters import with_adapter
from klippo.policy.weights import effective_weights, weight_change
from tests.tolerance import float32, float32_approx
from tests.toys import disturb, gpt2, llama


def adapter(folder: Path, model, **options) -> Path:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules="all-linear",
        init_lora_weights=False, fan_in_fan_out=True, **options,
    )  # fmt: skip
    torch.manual_seed(9)
    get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    return folder


def test_a_model_has_not_moved_from_itself() -> None:
    change = weight_change(gpt2(), gpt2())
    assert (change.relative, change.num_changed) == (0, 0)
    assert change.num_tensors == len(list(gpt2().parameters()))


def test_one_tensor_that_moved_is_found_with_its_size() -> None:
    after = gpt2()
    with torch.no_grad():
        after.transformer.h[0].mlp.c_fc.bias += 0.5  # 64 entries: |difference| = 0.5 * 8 = 4
    total = sum(float(p.detach().double().square().sum()) for p in gpt2().parameters()) ** 0.5
    change = weight_change(gpt2(), after)
    assert change.num_changed == 1
    assert change.relative == pytest.approx(4 / total, **float32_approx(3))


def test_an_adapter_counts_as_the_weights_that_it_makes(tmp_path: Path) -> None:
    adapted = with_adapter(gpt2().float(), str(adapter(tmp_path, gpt2())))
    merged = copy.deepcopy(adapted)
    for module in list(merged.modules()):
        if hasattr(module, "merge"):
            module.merge()
    expected = {
        name.replace(".base_layer", ""): value
        for name, value in merged.named_parameters()
        if "lora_" not in name
    }
    found = dict(effective_weights(adapted))
    assert found.keys() == expected.keys() == dict(gpt2().named_parameters()).keys()
    for name, value in found.items():
        largest = float(value.abs().max())
        # Sums of 2 products, scaled and added, here and in peft.
        torch.testing.assert_close(value, expected[name], **float32(2 * 4, largest), msg=name)
    assert weight_change(gpt2(), adapted).num_changed == 8  # four linear layers in two blocks


def test_other_architectures_and_other_adapters_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architectures differ"):
        weight_change(gpt2(), llama())
    with pytest.raises(ValueError, match="architectures differ"):
        weight_change(gpt2(), gpt2(num_layers=1))
    dora = with_adapter(gpt2(), str(adapter(tmp_path, gpt2(), use_dora=True)))
    with pytest.raises(ValueError, match="not plain LoRA"):
        weight_change(gpt2(), dora)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path, gpt2())
    with pytest.raises(PreflightError, match="name the base"):
        with_adapter(llama(), str(folder))


def test_only_the_changed_weights_of_a_disturbed_model_count() -> None:
    after = gpt2()
    disturb(after.transformer.h[1].parameters())
    assert weight_change(gpt2(), after).num_changed == len(
        list(after.transformer.h[1].parameters())
    )
