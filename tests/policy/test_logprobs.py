"""Log-probs and values of the training forward.

B sequences, P prompt tokens, T response tokens, V vocabulary.
"""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import klippo.tensors.head as head_module
from klippo.errors import PreflightError
from klippo.policy.actor_critic import CausalLM
from klippo.policy.loading import check_head, turn_dropout_off
from klippo.types import TokenBatch
from tests.tolerance import FLOAT64, FLOAT64_APPROX, NoFloat32
from tests.toys import (
    EOS,
    FAMILIES,
    RAGGED,
    VOCABULARY,
    LargestTensor,
    assert_same_tensors,
    dense_logprobs,
    disturb,
    gpt2,
    gradients,
    llama,
    load,
    make_rollout,
)


def policy_with_values(model):
    """A policy whose value head says something."""
    policy = load(model).policy
    disturb(policy.critic.parameters(), scale=1.0)
    return policy


def padded(tokens, left, right, filler):
    """The same rows with more padding, filled with `filler`."""
    size = len(tokens)

    def pad(x, value):
        return torch.cat([x, torch.full((size, right), value, dtype=x.dtype)], 1)

    def pad_left(x, value):
        return torch.cat([torch.full((size, left), value, dtype=x.dtype), x], 1)

    def fill(ids, mask):
        return torch.where(mask, ids, torch.full_like(ids, filler))

    return TokenBatch(
        prompt_ids=pad_left(fill(tokens.prompt_ids, tokens.prompt_mask), filler),
        prompt_mask=pad_left(tokens.prompt_mask, False),
        response_ids=pad(fill(tokens.response_ids, tokens.response_mask), filler),
        response_mask=pad(tokens.response_mask, False),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (0, 4), (3, 2)])
@pytest.mark.parametrize("filler", [EOS, 7])
def test_log_probs_and_values_do_not_depend_on_padding_or_company(family, left, right, filler):
    # the pad token may be EOS, and EOS stands inside a prompt
    policy = policy_with_values(FAMILIES[family]())
    tokens = make_rollout(RAGGED).tokens
    with torch.no_grad():
        together = policy(padded(tokens, left, right, filler), 0.7)
        for i, (_, response) in enumerate(RAGGED):
            alone = policy(tokens.rows(torch.tensor([i])), 0.7)
            for name in ("logprobs", "entropy", "values"):
                ours = getattr(together, name)[i, : len(response)]
                torch.testing.assert_close(ours, getattr(alone, name)[0], **FLOAT64, msg=name)
    assert together.logprobs.shape[1] == tokens.response_mask.shape[1] + right
    for i, (_, response) in enumerate(RAGGED):
        assert not together.logprobs[i, len(response) :].any()
        assert not together.entropy[i, len(response) :].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_log_probs_are_the_models_own_at_the_position_before_each_token(family, temperature):
    # the oracle is one unpadded row through model(...).logits
    model = FAMILIES[family]()
    policy = load(model).policy
    with torch.no_grad():
        output = policy(make_rollout(RAGGED).tokens, temperature)
        for i, (prompt_ids, response_ids) in enumerate(RAGGED):
            logp = dense_logprobs(model, prompt_ids, response_ids, temperature)
            for t, token in enumerate(response_ids):
                assert float(output.logprobs[i, t]) == pytest.approx(
                    float(logp[t, token]), **FLOAT64_APPROX
                )
                entropy = -float((logp[t].exp() * logp[t]).sum())
                assert float(output.entropy[i, t]) == pytest.approx(entropy, **FLOAT64_APPROX)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_the_chunked_head_are_those_of_the_dense_model(family):
    model = FAMILIES[family]()
    policy = load(model).policy
    policy(make_rollout(RAGGED).tokens, 0.8).logprobs.sum().backward()
    ours = gradients(policy.lm.model)
    model.zero_grad()
    sum(
        dense_logprobs(model, prompt_ids, ids, 0.8).gather(1, torch.tensor(ids)[:, None]).sum()
        for prompt_ids, ids in RAGGED
    ).backward()
    assert_same_tensors(ours, gradients(model), **FLOAT64)


def test_logits_of_a_whole_batch_never_exist(monkeypatch):  # through the whole model
    vocabulary, budget = 500, 1000
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", budget)
    loaded = load(gpt2(vocab_size=vocabulary))
    rollout = make_rollout([([3, 7, 1], [2] * 20), ([5], [8] * 12)] * 4)
    with LargestTensor() as seen:
        output = loaded.policy(rollout.tokens, 1.0)
        (output.logprobs + output.entropy + output.values).sum().backward()
        loaded.reference.logprobs(rollout.tokens, 1.0)
        loaded.reference.kl_from(loaded.policy.lm, rollout.tokens, 1.0)
    largest_weight = vocabulary * 16
    activations = 8 * 23 * 64  # the wide layer of the MLP
    assert seen.largest <= max(largest_weight, activations, budget)
    assert seen.largest < 8 * 20 * vocabulary


def test_values_are_read_where_the_token_is_emitted_and_one_further():
    model = gpt2()
    policy = policy_with_values(model)
    head = policy.critic.head
    tokens = make_rollout(RAGGED).tokens
    with torch.no_grad():
        values = policy(tokens, 1.0, after_last=True).values
        assert values.shape == (len(RAGGED), tokens.response_mask.shape[1] + 1)
        torch.testing.assert_close(values[:, :-1], policy(tokens, 1.0).values, **FLOAT64)
        for i, (prompt_ids, response_ids) in enumerate(RAGGED):
            states = model.transformer(input_ids=torch.tensor([prompt_ids + response_ids]))[0][0]
            expected = head(states[len(prompt_ids) - 1 :]).squeeze(1)
            torch.testing.assert_close(values[i, : len(expected)], expected, **FLOAT64)


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "initializer_range": 0.4,
}
WIDE = SMALL | {"intermediate_size": 24, "num_key_value_heads": 2}
UNUSUAL_HEADS = {
    "gpt2": gpt2,
    "llama": llama,
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**WIDE, head_dim=8, final_logit_softcapping=2.0, sliding_window=4)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**WIDE, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**WIDE, logits_scaling=4.0)),
}


@pytest.mark.parametrize("architecture", UNUSUAL_HEADS)
def test_scaled_and_capped_logits_are_understood(architecture):
    torch.manual_seed(0)
    model = UNUSUAL_HEADS[architecture]().double().eval()
    policy = load(model).policy
    tokens = make_rollout(RAGGED).tokens
    with torch.no_grad(), NoFloat32():
        logprobs = policy(tokens, 0.7).logprobs
        for i, (prompt_ids, ids) in enumerate(RAGGED):
            expected = dense_logprobs(model, prompt_ids, ids, 0.7)
            expected = expected.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
            torch.testing.assert_close(logprobs[i, : len(ids)], expected, **FLOAT64)


@pytest.mark.parametrize("change", ["shift one token", "square", "mixture"])
def test_an_architecture_with_other_logits_is_refused(change):
    model = gpt2()
    forward = model.forward

    def other(*args, **kwargs):
        output = forward(*args, **kwargs)
        if change == "shift one token":
            output.logits[..., 3] += 1.0
        elif change == "square":
            output.logits = output.logits * output.logits.abs()
        else:
            output.logits = (output.logits.softmax(-1) + 0.1).log()
        return output

    model.forward = other
    with pytest.raises(PreflightError, match="GPT2LMHeadModel computes its logits in a way"):
        check_head(CausalLM(model))
    model.forward = forward
    check_head(CausalLM(model))


DROPOUTS = {
    "gpt2": lambda: gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
    "llama": lambda: llama(attention_dropout=0.1),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**WIDE, head_dim=8, attention_dropout=0.1)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24,
            num_hidden_layers=2, num_attention_heads=2, dropout=0.1, attention_dropout=0.1,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SMALL, intermediate_size=24, attention_dropout=0.1, hidden_dropout=0.1)
    ),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2,
            attention_types=[[["global"], 2]], attention_dropout=0.1, resid_dropout=0.1,
            embed_dropout=0.1,
        )
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(**SMALL, attention_dropout=0.1, hidden_dropout=0.1)
    ),
    "opt_layerdrop": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24,
            num_hidden_layers=2, num_attention_heads=2, dropout=0.0, layerdrop=0.3,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", DROPOUTS)
def test_two_forwards_in_training_mode_are_identical(architecture):
    torch.manual_seed(0)
    model = DROPOUTS[architecture]()
    before = model.config.to_dict()
    turn_dropout_off(model)
    model.train()
    ids = torch.tensor([[1, 5, 2, 9, 3, 7, 4, 4]])
    with torch.no_grad():
        first, *others = [model(input_ids=ids).logits for _ in range(6)]
        model.eval()
        still = model(input_ids=ids).logits
    for logits in [*others, still]:
        assert torch.equal(first, logits)
    assert model.config.to_dict() == before, "the config that gets saved stays the user's"


def test_a_loaded_policy_and_its_adapters_have_no_dropout(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.5, target_modules="all-linear")
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    policy = load(llama(attention_dropout=0.1), tuning="lora", adapter=str(tmp_path)).policy
    policy.train()
    tokens = make_rollout(RAGGED).tokens
    disturb(policy.trainable()[0])
    assert torch.equal(policy(tokens, 1.0).logprobs, policy(tokens, 1.0).logprobs)
