"""Sampling with the adapter folded in: the same policy, and the very same weights afterwards."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from klippo.config.schema import RunConfig
from klippo.policy.adapters import mergeable, merged_adapters
from klippo.policy.settings import CriticSettings
from klippo.train.engines import build_engine, merges_adapters, ready_to_sample
from tests.policy.test_reference import adapter_state, start
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import FAMILIES, LORA, RAGGED, disturb, gpt2, llama, load, make_rollout, prompt

PROMPTS = [prompt(*ids, id=i) for i, (ids, _) in enumerate(RAGGED)]
IDS = torch.tensor([[3, 7, 1, 5, 9, 2]])
NUM_LAYERS = {"gpt2": 2 * 4, "llama": 2 * 7}
"""Linear layers in the blocks."""


def run_config(rollout=None, **policy):
    return RunConfig.model_validate(
        {
            "policy": {"model": "toy", "tuning": "lora"} | policy,
            "data": {"train": "toy"},
            "reward": {"kind": "length", "max_tokens": 9},
            "rollout": {"record_logprobs": True} | (rollout or {}),
        }
    )


def moved(family, tmp_path):
    """A policy with an adapter of its own, one of the reference and one of the critic, trained."""
    loaded, _ = start("adapter", family, tmp_path, CriticSettings(kind="lora", lora=LORA))
    disturb([p for group in loaded.policy.trainable() for p in group], scale=0.2)
    return loaded


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_one_product_gives_the_logits_of_three(family, tmp_path):
    model = moved(family, tmp_path).policy.lm.model
    expected, calls = logits(model), []
    layers = mergeable(model)
    for layer in layers:
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    with merged_adapters(model):
        torch.testing.assert_close(logits(model), expected, **FLOAT64)
    assert (len(layers), len(calls)) == (NUM_LAYERS[family], 0)
    assert torch.equal(logits(model), expected)
    assert len(calls) == len(layers)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_very_weights_come_back(family, fails, tmp_path):
    loaded = moved(family, tmp_path)
    policy, tokens = loaded.policy, make_rollout(RAGGED).tokens

    def everything():
        with torch.no_grad():
            own = policy(tokens, 1.0)
        return [own.logprobs, own.values, loaded.reference.logprobs(tokens, 1.0)]

    tensors, state, said = dict(policy.state_dict()), adapter_state(policy), everything()
    numbers = copy.deepcopy(tensors)
    parameters = list(policy.parameters())
    try:
        with ready_to_sample(run_config(), policy):
            now = policy.parameters()
            replaced = sum(p is not q for p, q in zip(now, parameters, strict=True))
            assert replaced == NUM_LAYERS[family]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert all(p is q for p, q in zip(policy.parameters(), parameters, strict=True))
    assert policy.state_dict().keys() == tensors.keys()
    for name, tensor in policy.state_dict().items():
        assert tensor.data_ptr() == tensors[name].data_ptr()
        assert torch.equal(tensor, numbers[name])
    assert adapter_state(policy) == state
    assert all(torch.equal(a, b) for a, b in zip(everything(), said, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1e-4, 1.0])
def test_merged_sampling_draws_the_same_tokens(family, temperature, tmp_path):
    loaded = moved(family, tmp_path)

    def sample(merge_adapters):
        rollout = {"merge_adapters": merge_adapters, "temperature": temperature}
        config = run_config(rollout | {"generation_batch_size": 2})
        engine = build_engine(config, loaded, frozenset(), PROMPTS)
        return engine.generate(PROMPTS, [6] * 4, [11, 12, 13, 14])

    for merged, plain in zip(sample(True), sample(False), strict=True):
        assert merged.token_ids == plain.token_ids
        assert merged.logprobs == pytest.approx(plain.logprobs, **FLOAT64_APPROX)


def test_adapters_are_merged_once_for_all_batches_of_a_sampling_phase(monkeypatch):
    loaded = load(llama(), tuning="lora")
    config = run_config({"generation_batch_size": 1})
    entered = []

    def around(*arguments):
        entered.append(arguments)
        return ready_to_sample(*arguments)

    monkeypatch.setattr("klippo.train.engines.ready_to_sample", around)
    engine = build_engine(config, loaded, frozenset(), PROMPTS)
    engine.generate(PROMPTS, [3] * 4, [1, 2, 3, 4])
    assert entered == [(config, loaded.policy)]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_embedding_keeps_its_weights():
    model = get_peft_model(
        gpt2(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    embedding = model.get_input_embeddings().weight
    expected, numbers = logits(model), embedding.detach().clone()
    with merged_adapters(model):
        assert torch.equal(embedding, numbers)
        torch.testing.assert_close(logits(model), expected, **FLOAT64)
    assert model.get_output_embeddings().base_layer.weight is embedding


def test_adapters_that_are_no_sum_stay_apart():
    dora = LoraConfig(r=2, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    model = get_peft_model(llama(), dora)
    expected = logits(model)
    assert mergeable(model) == []
    with merged_adapters(model):
        assert torch.equal(logits(model), expected)


def test_bfloat16_would_lose_a_young_adapter():
    """The reason why it is not merged there: the sums round back to the base's weights."""
    model = load(llama().bfloat16(), tuning="lora", dtype="bfloat16").policy.lm.model
    disturb([p for name, p in model.named_parameters() if "lora_B" in name], scale=1e-4)
    assert mergeable(model) == []
    layer = model.model.layers[0].self_attn.q_proj
    weight, step = layer.base_layer.weight, layer.get_delta_weight("default")
    assert bool(step.all())
    rounded = (weight.float() + step).bfloat16()
    assert (rounded == weight).float().mean() > 0.9


@pytest.mark.parametrize(
    ("config", "sharded", "expected"),
    [
        (run_config(), False, True),
        (run_config(), True, False),
        (run_config({"merge_adapters": False}), False, False),
        (run_config({"engine": "vllm"}), False, False),
        (run_config(quantize_4bit=True), False, False),
        (run_config(dtype="bfloat16"), False, False),
        (run_config(autocast=True), False, False),
        (run_config(tuning="full"), False, False),
    ],
)
def test_where_adapters_are_merged(config, sharded, expected):
    assert merges_adapters(config, sharded=sharded) is expected
