"""Supervised fine-tuning: what is learnt, what is not, and a folder that PPO starts from."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from klippo.data.files import read_file
from klippo.data.prompts import build_prompts
from klippo.errors import ConfigError
from klippo.hub import load_tokenizer
from klippo.supervised.settings import ExampleSettings, ModelSettings
from klippo.supervised.sft import NOT_LEARNT, build_examples, load_for_sft, nats_per_token
from tests.tolerance import FLOAT64_APPROX

CPU = torch.device("cpu")
ROWS = [
    {"prompt": f"{subject} {verb}", "response": "very good and great"}
    for subject in ("the movie", "a film", "it", "the film", "a movie")
    for verb in ("was", "is")
]


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def examples(gpt2, tmp_path):
    """Examples of given rows with the gpt2 fixture's tokenizer."""

    def built(rows, max_tokens=64, template=None, **settings):
        path = tmp_path / "given.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = load_tokenizer(str(gpt2))
        tokenizer.chat_template = template
        return build_examples(
            read_file(str(path)),
            ExampleSettings(train=str(path), **settings),
            tokenizer,
            max_tokens=max_tokens,
            seed=0,
        )

    return built


@pytest.fixture
def sft(cli, gpt2, rows_file, tmp_path):
    """Run `klippo sft` on the rows: (exit code, stdout, stderr)."""

    def run(*overrides, **sections):
        config = {
            "output_dir": str(tmp_path / "sft"),
            "device": "cpu",
            "model": {"name": str(gpt2)},
            "data": {"train": str(rows_file), "validation_size": 2},
            "training": {"num_epochs": 24, "batch_size": 4, "learning_rate": 1e-2},
        }
        path = tmp_path / "sft.yaml"
        path.write_text(json.dumps(config | sections))
        return cli("sft", path, *overrides)

    return run


def test_only_the_response_and_its_end_are_learnt(examples):
    (example,) = examples([{"prompt": "the movie was", "response": "good"}])
    assert example.input_ids == [2, 4, 6, 8, 0]
    assert example.labels == [NOT_LEARNT] * 3 + [8, 0]


def test_without_a_response_column_all_of_the_text_is_learnt(examples):
    (example,) = examples([{"text": "good film"}], prompt_column="text", response_column=None)
    assert example.labels == example.input_ids == [8, 5, 0]


def test_the_prompt_is_tokenized_as_ppo_reads_it(examples, gpt2):
    template = "I liked {prompt} and"
    rows = [{"prompt": "the movie", "response": "it"}]
    tokenizer = load_tokenizer(str(gpt2))
    settings = ExampleSettings(train="x", template=template)
    (example,) = examples(rows, max_tokens=64, **{"template": None})
    from klippo.data.files import Row

    row = Row(0, rows[0])
    prompt = build_prompts([row], settings, tokenizer, max_prompt_tokens=64, seed=0)[0]
    built = build_examples([row], settings, tokenizer, max_tokens=64, seed=0)
    assert built[0].input_ids[: len(prompt.token_ids)] == prompt.token_ids
    assert built[0].labels[: len(prompt.token_ids)] == [NOT_LEARNT] * len(prompt.token_ids)
    assert len(built[0].input_ids) > len(example.input_ids)


def test_chat_messages_are_learnt_from_the_assistants_last(examples):
    chat = "{% for m in messages %}{{ m['role'] == 'user' and 'I' or 'it' }} {{ m['content'] }} "
    chat += "{% endfor %}{% if add_generation_prompt %}it{% endif %}"
    messages = [{"role": "user", "content": "bad"}, {"role": "assistant", "content": "good"}]
    settings = {"format": "chat", "prompt_column": "messages", "response_column": None}
    (example,) = examples([{"messages": messages}], template=chat, **settings)
    tokens = load_tokenizer_words(example.input_ids)
    assert tokens == ["I", "bad", "it", "good", "</s>"]
    assert example.labels[:3] == [NOT_LEARNT] * 3
    with pytest.raises(ConfigError, match=r"row 0 \(line 1\).*ends with the assistant's"):
        examples([{"messages": messages[:1]}], template=chat, **settings)


def load_tokenizer_words(ids):
    from tests.small_models import word_tokenizer

    return word_tokenizer(pad=False).convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS, {"response_column": "respnse"}, "no column 'respnse'.*did you mean 'response'"),
        (
            [{"prompt": "it", "response": ""}],
            {},
            r"row 0 \(line 1\): column 'response' holds str ''",
        ),
        ([{"prompt": "", "response": "it"}], {}, r"row 0 \(line 1\): the prompt in column"),
        (ROWS, {"max_tokens": 4}, r"row 0 \(line 1\): the example has 8 tokens.*limit is 4"),
    ],
)
def test_bad_rows_are_refused_by_place(examples, rows, settings, message):
    limit = settings.pop("max_tokens", 64)
    with pytest.raises(ConfigError, match=message):
        examples(rows, max_tokens=limit, **settings)


def test_examples_that_are_too_long_can_be_left_out(examples):
    rows = [*ROWS[:3], {"prompt": "it", "response": "good"}]
    (kept,) = examples(rows, max_tokens=4, overlong="drop")
    assert kept.input_ids == [14, 8, 0]


def test_cutting_prompts_is_refused():
    with pytest.raises(ValueError, match="learns whole examples: remove it"):
        ExampleSettings(train="x", cut_tokens=[2, 8])


@pytest.mark.usefixtures("in_float64")
def test_held_out_loss_is_that_of_the_models_own_logits(gpt2, examples):
    rows = [*ROWS[:2], {"prompt": "it", "response": "good"}]
    built = examples(rows)
    model = load_for_sft(ModelSettings(name=str(gpt2)), CPU)[0].eval()
    for example, found in zip(built, nats_per_token(model, built, 3), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        learnt = [i for i, label in enumerate(example.labels) if label != NOT_LEARNT]
        nats = [-float(logprobs[i - 1, example.input_ids[i]]) for i in learnt]
        assert found == pytest.approx(sum(nats) / len(nats), **FLOAT64_APPROX)


def test_sft_lowers_the_held_out_loss_and_writes_a_model_that_stops(sft, tmp_path):
    code, out, err = sft()
    assert code == 0, err
    figures = json.loads((tmp_path / "sft/klippo_sft.json").read_text())
    losses = figures["held_out_nats_per_token"]
    assert losses["before"]["mean"] == pytest.approx(math.log(18), abs=0.3)
    assert losses["after"]["mean"] < 0.2
    assert "8 examples, 2 held out" in out
    assert "As a policy: {model:" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    tokenizer = load_tokenizer(str(tmp_path / "sft"))
    ids = tokenizer("the film was", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(written[0, 3:]).split() == ["very", "good", "and", "great", "</s>"]
    assert model.config.pad_token_id is None
    assert tokenizer.pad_token is None


def test_a_lora_folder_is_an_adapter_for_the_policy(sft, cli, gpt2, tmp_path):
    from klippo.policy.loading import load_policy
    from klippo.policy.settings import CriticSettings, PolicySettings

    lora = {"name": str(gpt2), "tuning": "lora", "lora": {"rank": 4, "alpha": 8}}
    code, out, err = sft(model=lora)
    assert code == 0, err
    assert f"adapter: {tmp_path / 'sft'}" in out
    settings = PolicySettings(model=str(gpt2), adapter=str(tmp_path / "sft"), tuning="lora")
    policy = load_policy(settings, CriticSettings(), CPU).policy
    ids = torch.tensor([[2, 5, 6]])
    with torch.no_grad():
        assert int(policy.lm.model(input_ids=ids).logits[0, -1].argmax()) == 17  # "very"


def test_a_folder_that_sft_did_not_write_is_left_alone(sft, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/thesis.tex").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        code, _, err = sft(*flags)
        assert code == 2
        assert "is not a model that klippo sft trained" in err
    assert (tmp_path / "sft/thesis.tex").read_text() == "years of work"


def test_a_finished_folder_is_replaced_only_on_demand(sft):
    quick = "training.num_epochs=1"
    assert sft(quick)[0] == 0
    code, _, err = sft(quick)
    assert code == 2
    assert "--overwrite" in err
    assert sft(quick, "--overwrite", "--quiet")[0] == 0
