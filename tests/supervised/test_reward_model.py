"""Reward models: what is trained is what is scored, and the seed decides the rest."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from klippo.errors import ConfigError, DivergedError, PreflightError
from klippo.hub import load_tokenizer
from klippo.rewards import stored
from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.reading import Reader
from klippo.rewards.settings import ClassifierSettings
from klippo.rewards.stored import StoredReward
from klippo.supervised.bradley_terry import filler_id, load_classifier, reward_trainer, tokenize
from klippo.supervised.settings import RewardModelConfig, RewardModelSettings
from klippo.supervised.training import Training
from tests.tolerance import FLOAT64, FLOAT64_APPROX
from tests.toys import assert_same_tensors, weights

CPU = torch.device("cpu")


def scorer(folder, **settings):
    return ClassifierReward(ClassifierSettings(kind="classifier", model=str(folder), **settings))


def differences(reward, pairs):
    prompts = [pair.prompt for pair in pairs]
    chosen = reward.score_pairs(prompts, [pair.chosen for pair in pairs]).reward
    return chosen - reward.score_pairs(prompts, [pair.rejected for pair in pairs]).reward


def trainer_for(name, pairs, template="{prompt}{response}", **training):
    """TRL's trainer on these pairs before its first step, and a batch of them all."""
    config = RewardModelConfig(
        model={"name": str(name)}, data={"train": "pairs"}, training=training
    )
    classifier, tokenizer = load_classifier(config.model, 1), load_tokenizer(str(name))
    rows, _ = tokenize(pairs, Reader(str(name), tokenizer, template=template))
    how = Training(settings=config.training, seed=1, device=CPU, report=print)
    trainer = reward_trainer(classifier, tokenizer, rows, config, how)
    return trainer, trainer.data_collator([trainer.train_dataset[i] for i in range(len(pairs))])


@pytest.mark.parametrize("family", ["gpt2", "roberta_trunk"])
def test_separable_pairs_are_learnt(family, train, toy_pairs, request, tmp_path):
    member, steps = train(request.getfixturevalue(family), num_epochs=6)
    member.save(tmp_path / "member")
    assert bool((differences(scorer(tmp_path / "member"), toy_pairs) > 0).all())
    assert [step for step, _, _ in steps] == list(range(1, 19))
    assert steps[0][2]["loss"] == pytest.approx(math.log(2), abs=0.15)


@pytest.fixture(scope="session")
def roberta_trunk(roberta, tmp_path_factory):
    """The roberta fixture without its two-label head."""
    folder = tmp_path_factory.mktemp("trunk")
    model = AutoModelForSequenceClassification.from_pretrained(roberta)
    model.roberta.save_pretrained(folder)
    load_tokenizer(str(roberta)).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("template", ["{prompt}{response}", "{prompt}{response}</s>", "alpaca"])
def test_a_saved_member_scores_as_the_trainer_does(template, gpt2, toy_pairs, tmp_path):
    """gpt2 has no padding token, and with </s> every text ends in the token that pads elsewhere."""
    trainer, batch = trainer_for(gpt2, toy_pairs, template)
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(**batch).logits.squeeze(-1)
    trainer.model.save_pretrained(tmp_path)
    load_tokenizer(str(gpt2)).save_pretrained(tmp_path)
    chosen, rejected = logits.chunk(2)
    found = differences(scorer(tmp_path, template=template), toy_pairs)
    torch.testing.assert_close(found, chosen - rejected, **FLOAT64)


def test_the_filler_ends_no_text_even_where_pad_is_eos(gpt2, toy_pairs):
    trainer, batch = trainer_for(gpt2, toy_pairs, "{prompt}{response}</s>")
    filler = trainer.model.config.pad_token_id
    lengths = batch["attention_mask"].sum(1)
    last = batch["input_ids"][torch.arange(len(lengths)), lengths - 1]
    assert set(last.tolist()) == {0}
    assert filler != 0
    model = load_classifier(RewardModelSettings(name=str(gpt2)), 1)
    model.config.pad_token_id = 0  # pad == eos
    rows = {"chosen_ids": [[5, 0]], "rejected_ids": [[5, 1, 0]]}
    assert filler_id(model, rows) == 1
    model.config.pad_token_id = 7
    assert filler_id(model, rows) == 7


@pytest.mark.parametrize("pad", [None, 0, 5])
def test_the_saved_config_has_the_models_own_pad_token(pad, gpt2, train, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    model.config.pad_token_id = pad
    model.save_pretrained(tmp_path / "start")
    load_tokenizer(str(gpt2)).save_pretrained(tmp_path / "start")
    member, _ = train(tmp_path / "start")
    member.save(tmp_path / "member")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "member").config
    assert (saved.pad_token_id, saved.num_labels, saved.use_cache) == (pad, 1, True)
    assert load_tokenizer(str(tmp_path / "member")).pad_token is None


def test_one_seed_gives_one_model_and_another_seed_another_head_and_order(gpt2, train):
    first, again, other = (train(gpt2, seed, batch_size=40)[0].model for seed in (1, 1, 2))
    assert_same_tensors(weights(first), weights(again), atol=0)
    heads = [
        load_classifier(RewardModelSettings(name=str(gpt2)), seed).score.weight for seed in (1, 2)
    ]
    assert not torch.equal(*heads)
    assert not torch.equal(first.score.weight, other.score.weight)


def test_the_order_of_the_pairs_follows_the_seed(gpt2, train, monkeypatch):
    """With the same head, members still differ by what comes first."""
    from klippo.supervised import bradley_terry

    real = load_classifier
    monkeypatch.setattr(bradley_terry, "load_classifier", lambda settings, _: real(settings, 1))
    losses = [[s[2]["loss"] for s in train(gpt2, seed, learning_rate=1e-9)[1]] for seed in (1, 2)]
    assert losses[0] != losses[1]


@pytest.mark.usefixtures("in_float64")
def test_the_loss_is_bradley_terry_with_margin_and_centring(gpt2, toy_pairs):
    """One pair with scores 1.5 and 0.2, margin 0.5: -log sigmoid(0.8) + 0.01 * 1.7^2."""
    from dataclasses import replace
    from types import SimpleNamespace

    pairs = [replace(toy_pairs[0], margin=0.5)]
    trainer, batch = trainer_for(gpt2, pairs, center_coef=0.01)
    outputs = SimpleNamespace(logits=torch.tensor([[1.5], [0.2]]))

    class Fixed(torch.nn.Module):
        def forward(self, **inputs):
            return outputs

    loss = trainer.compute_loss(Fixed(), batch)
    expected = math.log1p(math.exp(-0.8)) + 0.01 * 1.7**2
    assert float(loss) == pytest.approx(expected, **FLOAT64_APPROX)


def test_pairs_without_a_margin_beside_pairs_with_one_have_margin_0(gpt2, toy_pairs):
    from dataclasses import replace

    rows, _ = tokenize(
        [replace(toy_pairs[0], margin=2.0), toy_pairs[1]],
        Reader("gpt2", load_tokenizer(str(gpt2))),
    )
    assert rows["margin"] == [2.0, 0.0]


def test_margins_go_through_training_of_both_families(gpt2, roberta_trunk, toy_pairs, train):
    from dataclasses import replace

    pairs = [replace(pair, margin=0.5) for pair in toy_pairs]
    for start in (gpt2, roberta_trunk):
        _, steps = train(start, pairs=pairs[:8])
        _, without = train(start, pairs=toy_pairs[:8])
        assert steps[0][2]["loss"] > without[0][2]["loss"] + 0.2  # about sigmoid(0) * 0.5


@pytest.mark.usefixtures("in_float64")
def test_micro_batches_change_no_numbers(gpt2, train):
    whole, parts = (
        [figures["loss"] for _, _, figures in train(gpt2, batch_size=8, **micro)[1]]
        for micro in ({}, {"micro_batch_size": 2})
    )
    assert len(whole) == 5
    assert parts == pytest.approx(whole, **FLOAT64_APPROX)


def test_lora_is_merged_so_that_the_member_is_a_plain_classifier(gpt2, train, toy_pairs, tmp_path):
    lora = {"tuning": "lora", "lora": {"rank": 4, "alpha": 8}}
    member, _ = train(gpt2, model=lora, num_epochs=6)
    member.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert bool((differences(scorer(tmp_path), toy_pairs) > 0).all())
    start = load_classifier(RewardModelSettings(name=str(gpt2)), 1)
    assert not torch.equal(loaded.score.weight, start.score.weight)


@pytest.mark.usefixtures("in_float64")
def test_an_sft_adapter_is_merged_before_training(gpt2, adapter):
    from peft import PeftModel

    settings = RewardModelSettings(name=str(gpt2), adapter=str(adapter))
    model = load_classifier(settings, 1)
    causal = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), adapter).eval()
    ids = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        expected = causal(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        found = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected, **FLOAT64)
    with pytest.raises(PreflightError, match=r"is a LoRA adapter.*as model.adapter"):
        load_classifier(RewardModelSettings(name=str(adapter)), 1)


def test_a_reward_model_keeps_its_head_when_it_is_trained_on(gpt2, train, tmp_path):
    member, _ = train(gpt2)
    member.save(tmp_path)
    model = load_classifier(RewardModelSettings(name=str(tmp_path)), 2)
    assert torch.equal(model.score.weight, member.model.score.weight)


def test_a_classifier_with_two_outputs_is_refused(roberta):
    with pytest.raises(PreflightError, match="is a classifier with 2 outputs; a reward model has"):
        load_classifier(RewardModelSettings(name=str(roberta)), 1)


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(PreflightError, match="nothing: the model cannot be loaded"):
        load_classifier(RewardModelSettings(name=str(tmp_path / "nothing")), 1)


def test_a_template_without_the_response_is_refused(gpt2, train):
    with pytest.raises(ConfigError, match="does not contain"):
        train(gpt2, template="{prompt}")


def test_a_loss_that_is_not_finite_ends_training(gpt2, train, monkeypatch):
    from klippo.supervised import bradley_terry

    model = load_classifier(RewardModelSettings(name=str(gpt2)), 1)
    model.score.weight.data.fill_(float("nan"))
    monkeypatch.setattr(bradley_terry, "load_classifier", lambda *_: model)
    with pytest.raises(DivergedError, match="the loss is nan at step 1"):
        train(gpt2)


@pytest.mark.usefixtures("in_float64")
def test_the_stored_template_is_the_one_that_scores(gpt2, train, toy_pairs, tmp_path):
    template = "{prompt} and {response}"
    member, _ = train(gpt2, template=template)
    member.save(tmp_path)
    explicit = differences(scorer(tmp_path, template=template), toy_pairs)
    stored.write(tmp_path, StoredReward(template=template, seed=1))
    torch.testing.assert_close(differences(scorer(tmp_path), toy_pairs), explicit, **FLOAT64)
