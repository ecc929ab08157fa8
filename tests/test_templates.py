"""Templates give exactly the text that models were trained on."""

import pytest

from klippo.errors import ConfigError
from klippo.templates import check_template, full_text, prompt_text

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nName a river.\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nTranslate.\n\n### Input:\nLe chat\n\n### Response:"
)


def test_open_assistant_ends_prompt_and_response_with_end_of_text():
    text = "<|prompter|>Hi<|endoftext|><|assistant|>"
    assert prompt_text("open-assistant", "Hi", {}) == text
    assert full_text("open-assistant", "Hi", "Hello", {}) == text + "Hello<|endoftext|>"


def test_alpaca_puts_the_response_right_after_its_colon():
    assert prompt_text("alpaca", "Name a river.", {"prompt": "x"}) == ALPACA
    assert full_text("alpaca", "Name a river.", "Elbe", {}) == ALPACA + "Elbe"


def test_alpaca_takes_instruction_and_input_from_their_columns():
    row = {"instruction": "Translate.", "input": "Le chat"}
    assert prompt_text("alpaca", "Translate.\nLe chat", row) == ALPACA_WITH_INPUT
    assert full_text("alpaca", "ignored", "The cat", row) == ALPACA_WITH_INPUT + "The cat"


@pytest.mark.parametrize(
    "row", [{"instruction": "x", "input": ""}, {"instruction": "x", "input": None}, {"input": "x"}]
)
def test_alpaca_without_an_input_takes_the_prompt_as_the_instruction(row):
    assert prompt_text("alpaca", "Name a river.", row) == ALPACA


def test_a_template_takes_prompt_response_and_columns():
    row = {"subject": "law", "num": 3, "empty": None, "long name": "n"}
    template = "{subject}|{num}|{empty}|{long name}|{prompt}|{response}!"
    assert prompt_text(template, "p", row) == "law|3||n|p|"
    assert full_text(template, "p", "r", row) == "law|3||n|p|r!"


def test_a_policy_reads_up_to_the_response_and_all_where_there_is_none():
    assert prompt_text("Q: {prompt}\nA: {response}\n", "why", {}) == "Q: why\nA: "
    assert prompt_text("Q: {prompt}\nA:", "why", {}) == "Q: why\nA:"


def test_braces_in_texts_and_braces_that_name_nothing_stay():
    assert full_text("{prompt} {response}", "{response}", "{prompt}", {}) == "{response} {prompt}"
    assert prompt_text('{"q": {prompt}} {}', "{subject}", {"subject": "x"}) == '{"q": {subject}} {}'


def test_the_prompt_is_the_prompt_also_beside_a_column_of_that_name():
    assert full_text("{prompt}{response}", "p", "r", {"prompt": "x", "response": "y"}) == "pr"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("open_assistant", "did you mean open-assistant"),
        ("Alpaca", "did you mean alpaca"),
        ("vicuna", r"neither alpaca nor open-assistant, nor written out with \{prompt\}$"),
    ],
)
def test_unknown_names_are_errors_with_the_nearest(template, message):
    with pytest.raises(ConfigError, match=message):
        check_template(template)
    with pytest.raises(ConfigError, match=message):
        prompt_text(template, "p", {})


def test_an_unknown_column_is_an_error_with_the_nearest():
    with pytest.raises(ConfigError, match=r"\{promt\} is no column.*did you mean \{prompt\}"):
        prompt_text("{promt}", "p", {})


def test_a_text_for_reward_models_needs_the_response():
    with pytest.raises(ConfigError, match=r"does not contain \{response\}"):
        full_text("{prompt}", "p", "r", {})
