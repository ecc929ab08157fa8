"""A classifier scores the text it would have seen in its training, whatever else is in the batch.

The reference is transformers' own forward of one unpadded text, the model loaded anew.
"""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from klippo.errors import ConfigError, PreflightError, RewardError
from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.settings import ClassifierSettings
from tests.tolerance import FLOAT64

from .conftest import CONTEXT, llama, make_rollout

IN_FLOAT64 = pytest.mark.usefixtures("in_float64")

PROMPTS = ["The film ", "A quiet story about ", "I ", "sleep", "The second half "]
RESPONSES = ["was long", "a river and the people who live by it.", "liked it!", "", "made me"]
TEXTS = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
ONE_OUTPUT = ["gpt2", "gpt2 pad=eos", "llama", "roberta one"]


def reward(folder, **settings):
    return ClassifierReward(ClassifierSettings(kind="classifier", model=folder, **settings))


def score(folder, *, prompts=PROMPTS, responses=RESPONSES, metas=None, **settings):
    rollout = make_rollout(responses, prompts=prompts, metas=metas)
    return reward(folder, **settings).score(rollout)


def expected(folder, texts, **tokenizer_options):
    """Logits (N, L) of transformers' own forward, one text at a time, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    model.config.pad_token_id = (
        None  # read the last token: without padding there is nothing to find
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat(
            [
                model(**tokenizer(text, return_tensors="pt", **tokenizer_options)).logits
                for text in texts
            ]
        )


@IN_FLOAT64
@pytest.mark.parametrize("name", ONE_OUTPUT)
def test_scores_are_the_models_own_for_each_text_alone(folders, name):
    scores = score(folders[name])
    torch.testing.assert_close(scores.reward, expected(folders[name], TEXTS)[:, 0], **FLOAT64)
    assert scores.parts["cut"].tolist() == [0.0] * 5


@IN_FLOAT64
@pytest.mark.parametrize("name", ONE_OUTPUT)
def test_scores_do_not_depend_on_the_batch(folders, name):
    whole = score(folders[name], batch_size=64).reward
    for batch_size in (1, 2, 3):
        other = score(folders[name], batch_size=batch_size).reward
        torch.testing.assert_close(other, whole, **FLOAT64)
    backwards = score(folders[name], prompts=PROMPTS[::-1], responses=RESPONSES[::-1]).reward
    torch.testing.assert_close(backwards.flip(0), whole, **FLOAT64)


@IN_FLOAT64
@pytest.mark.parametrize("name", ["gpt2", "gpt2 pad=eos"])
def test_an_eos_token_in_or_behind_the_text_is_read_where_padding_is_eos(folders, name):
    """Transformers' own forward skips a last token that equals the padding token."""
    end = "<|endoftext|>"
    texts = [f"The film{end}was long{end}", f"loud{end}", end, "The music was loud and long"]
    scores = score(folders[name], prompts=[""] * 4, responses=texts)
    reference = expected(folders[name], texts)[:, 0]
    torch.testing.assert_close(scores.reward, reference, **FLOAT64)
    without_end = score(folders[name], prompts=[""], responses=[texts[0].removesuffix(end)])
    assert abs(float(scores.reward[0] - without_end.reward[0])) > 1e-3


@IN_FLOAT64
def test_a_model_with_another_tokenizer_scores_the_text_and_not_the_policys_ids(folders):
    rollout = make_rollout(
        ["was long", "made me"], token_ids=[[5, 6], [7]], prompts=["The film "] * 2
    )
    other = make_rollout(
        ["was long", "made me"], token_ids=[[9], [9, 9]], prompts=["The film "] * 2
    )
    source = reward(folders["llama"])
    reference = expected(folders["llama"], ["The film was long", "The film made me"])[:, 0]
    torch.testing.assert_close(source.score(rollout).reward, reference, **FLOAT64)
    assert source.score(rollout).reward.equal(source.score(other).reward)


@IN_FLOAT64
def test_text_that_begins_with_the_bos_token_gets_no_second_one(folders):
    plain = score(folders["llama"]).reward
    with_bos = score(folders["llama"], template="<s>{prompt}{response}").reward
    torch.testing.assert_close(with_bos, plain, **FLOAT64)


@IN_FLOAT64
def test_a_template_is_filled_literally_and_once(folders):
    """Braces in a prompt are text, even where they spell a placeholder."""
    template = "<|prompter|>{prompt}<|endoftext|>{response}<|endoftext|>"
    scores = score(
        folders["gpt2"], prompts=["{response}"], responses=["{prompt}"], template=template
    )
    text = "<|prompter|>{response}<|endoftext|>{prompt}<|endoftext|>"
    torch.testing.assert_close(scores.reward, expected(folders["gpt2"], [text])[:, 0], **FLOAT64)


@IN_FLOAT64
def test_the_response_alone_is_scored_when_asked(folders):
    scores = score(folders["roberta one"], reads="response")
    torch.testing.assert_close(
        scores.reward, expected(folders["roberta one"], RESPONSES)[:, 0], **FLOAT64
    )


@IN_FLOAT64
def test_chat_scores_the_models_own_template(folders):
    """The data's column is read, not the policy's rendering of it; cut prompts are read as cut."""
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "B"},
    ]
    scores = score(
        folders["llama chat"],
        template="chat",
        label=1,
        prompts=["<|user|>The film<|end|>", "<u>Hi<a>A<u>B", "The fi", "Sing"],
        responses=["was", "la", "was", "la"],
        metas=[{"prompt": "The film"}, {"prompt": conversation}, {"prompt": "The film"}, {}],
    )
    texts = [
        "<s>[user]The film</s>[assistant]was</s>",
        "<s>[user]Hi</s>[assistant]A</s>[user]B</s>[assistant]la</s>",
        "<s>[user]The fi</s>[assistant]was</s>",
        "<s>[user]Sing</s>[assistant]la</s>",
    ]
    assert scores.parts["cut"].tolist() == [0.0] * 4
    reference = expected(folders["llama chat"], texts, add_special_tokens=False)[:, 1]
    torch.testing.assert_close(scores.reward, reference, **FLOAT64)


@IN_FLOAT64
@pytest.mark.parametrize(
    ("output", "read"),
    [
        ("logit", lambda logits: logits),
        ("logprob", lambda logits: logits.log_softmax(1)),
        ("probability", lambda logits: logits.softmax(1)),
    ],
)
@pytest.mark.parametrize("label", ["POSITIVE", "positive", 1])
def test_a_label_of_several_is_read_as_logit_logprob_or_probability(folders, output, read, label):
    scores = score(folders["roberta"], output=output, label=label)
    reference = read(expected(folders["roberta"], TEXTS))[:, 1]
    torch.testing.assert_close(scores.reward, reference, **FLOAT64)


@IN_FLOAT64
@pytest.mark.parametrize(("name", "label"), [("roberta one", None), ("roberta multi", "rude")])
def test_labels_that_do_not_exclude_each_other_are_read_through_a_sigmoid(folders, name, label):
    logits = expected(folders[name], TEXTS)[:, 0 if label is None else 1]
    logprob = score(folders[name], output="logprob", label=label).reward
    probability = score(folders[name], output="probability", label=label).reward
    torch.testing.assert_close(probability, logits.sigmoid(), **FLOAT64)
    torch.testing.assert_close(logprob, logits.sigmoid().log(), **FLOAT64)


@IN_FLOAT64
@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta one"])
def test_long_texts_are_cut_from_the_left_and_counted(folders, name):
    """The response is kept whole, and so are special tokens at both ends."""
    folder = folders[name]
    prompt, response = "x" * 3 * CONTEXT, "The music was loud."
    scores = score(folder, prompts=[prompt, "A "], responses=[response, response])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt + response)["input_ids"]
    num_before = {"gpt2": 0, "llama": 1, "roberta one": 1}[name]
    kept = ids[:num_before] + ids[num_before - CONTEXT :]
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    with torch.no_grad():
        reference = model(torch.tensor([kept])).logits[0, 0]
    torch.testing.assert_close(scores.reward[0], reference, **FLOAT64)
    assert scores.parts["cut"].tolist() == [1.0, 0.0]
    shorter = score(folder, prompts=[prompt], responses=["The film was loud"], max_tokens=3)
    assert bool(shorter.reward.isfinite().all())


def test_an_empty_text_is_unscored(folders):
    scores = score(folders["gpt2"], prompts=["", ""], responses=["", "loud"])
    assert scores.reward.isnan().tolist() == [True, False]


def test_the_model_is_frozen_and_without_dropout(folders):
    source = reward(folders["gpt2"])
    assert not source.scorer.training
    assert not any(p.requires_grad for p in source.scorer.parameters())
    rollout = make_rollout(RESPONSES, prompts=PROMPTS)
    scores = source.score(rollout).reward
    assert scores.equal(source.score(rollout).reward)
    assert not scores.requires_grad
    assert scores.dtype == torch.float32


def test_bfloat16_weights_score_in_float32(folders):
    scores = score(folders["gpt2"], dtype="bfloat16")
    assert scores.reward.dtype == torch.float32
    torch.testing.assert_close(scores.reward, score(folders["gpt2"]).reward, atol=0.3, rtol=0.1)


def test_a_model_with_several_outputs_needs_a_label(folders):
    with pytest.raises(ConfigError, match=r"2 outputs \(0 NEGATIVE, 1 POSITIVE\); set label"):
        reward(folders["roberta"])


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("roberta", "positiv", "has the outputs 0 NEGATIVE, 1 POSITIVE; did you mean POSITIVE?"),
        ("roberta", 2, "label=2: .* has the outputs 0 NEGATIVE"),
        ("roberta", -1, "label=-1"),
        ("gpt2", "positive", "has the outputs 0 LABEL_0; choose one of them"),
    ],
)
def test_an_unknown_label_lists_the_labels(folders, name, label, message):
    with pytest.raises(ConfigError, match=message):
        reward(folders[name], label=label)


def test_more_tokens_than_the_context_are_refused(folders):
    with pytest.raises(ConfigError, match=f"max_tokens=61.*reads at most {CONTEXT} tokens"):
        reward(folders["roberta one"], max_tokens=CONTEXT + 1)


def test_templates_that_cannot_work_are_refused(folders):
    with pytest.raises(ConfigError, match=r"does not contain \{response\}"):
        reward(folders["gpt2"], template="{prompt}")
    with pytest.raises(PreflightError, match="needs a tokenizer with a chat template"):
        reward(folders["gpt2"], template="chat")


def test_a_folder_without_tokenizer_is_refused(tmp_path, folders):
    for name in ("gpt2", "llama", "roberta"):
        model = AutoModelForSequenceClassification.from_pretrained(folders[name])
        model.save_pretrained(tmp_path / name)
        with pytest.raises(PreflightError, match=r"tokenizer.*save the model"):
            reward(str(tmp_path / name), label=0)


def test_a_language_model_without_a_trained_head_is_refused(tmp_path, folders):
    config = GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=2, num_labels=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["gpt2"]).save_pretrained(tmp_path)
    with pytest.raises(PreflightError, match=r"lacks weights \(score.weight\), which would be"):
        reward(str(tmp_path))


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(PreflightError, match="cannot be loaded"):
        reward(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="demo:nothing does not exist"):
        reward("demo:nothing")


def test_a_score_that_is_not_finite_is_an_error(tmp_path):
    folder = llama(tmp_path)
    source = reward(folder)
    source.scorer.head.weight.fill_(float("inf"))
    with pytest.raises(RewardError, match=r"not finite for 'The film was long'.*float32"):
        source.score(make_rollout(["was long"], prompts=["The film "]))
