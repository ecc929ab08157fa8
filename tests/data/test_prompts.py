"""Prompts are what the policy will read: one BOS token at most, cut and limited as asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klippo.data.files import Row
from klippo.data.prompts import build_prompts
from klippo.data.settings import DataSettings
from klippo.errors import ConfigError

from .conftest import make_tokenizer

TEXT = "The film was long and the music was loud."


def build(values, tokenizer, *, limit=1000, seed=0, numbers=None, **settings):
    numbers = range(len(values)) if numbers is None else numbers
    rows = [
        Row(n, {"prompt": v, "label": n}, n + 1, "a.jsonl")
        for n, v in zip(numbers, values, strict=True)
    ]
    return build_prompts(
        rows,
        DataSettings(train="a.jsonl", **settings),
        tokenizer,
        max_prompt_tokens=limit,
        seed=seed,
    )


def test_a_prompt_carries_its_row(plain):
    (prompt,) = build([TEXT], plain, numbers=[7])
    assert prompt.id == 7
    assert prompt.text == TEXT
    assert prompt.token_ids == plain(TEXT)["input_ids"]
    assert prompt.meta == {"prompt": TEXT, "label": 7}


def test_text_gets_the_bos_token_that_its_tokenizer_adds(plain, with_bos):
    assert build([TEXT], with_bos)[0].token_ids == with_bos(TEXT)["input_ids"]
    assert build([TEXT], with_bos)[0].token_ids[0] == with_bos.bos_token_id
    assert plain.bos_token_id not in build([TEXT], plain)[0].token_ids


def test_text_that_begins_with_the_bos_token_gets_no_second_one(plain, with_bos):
    for tokenizer in (plain, with_bos):
        (prompt,) = build(["<s>" + TEXT], tokenizer)
        assert prompt.token_ids == with_bos(TEXT)["input_ids"]
        assert prompt.text == TEXT


def test_a_prompt_does_not_end_with_an_eos_token_that_the_tokenizer_adds():
    tokenizer = make_tokenizer(adds_bos=True, adds_eos=True)
    assert tokenizer(TEXT)["input_ids"][-1] == tokenizer.eos_token_id
    assert build([TEXT], tokenizer)[0].token_ids == tokenizer(TEXT)["input_ids"][:-1]


def test_an_eos_token_inside_a_prompt_stays(plain):
    (prompt,) = build(["<s>Tell me</s>please"], plain)
    assert prompt.token_ids.count(plain.eos_token_id) == 1
    assert prompt.text == "Tell me</s>please"


def test_chat_prompts_are_the_tokenizers_own_rendering(with_chat):
    messages = [
        {"role": "user", "content": "Tell me"},
        {"role": "assistant", "content": "What?"},
        {"role": "user", "content": "About cats"},
    ]
    prompts = build(["Tell me", messages], with_chat, format="chat", system_prompt="Be loud.")
    system = {"role": "system", "content": "Be loud."}
    for prompt, conversation in zip(
        prompts, [[system, messages[0]], [system, *messages]], strict=True
    ):
        expected = with_chat.apply_chat_template(conversation, add_generation_prompt=True)
        assert prompt.token_ids == expected["input_ids"]
        assert prompt.token_ids.count(with_chat.bos_token_id) == 1
        assert prompt.text == with_chat.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False
        )


@pytest.mark.parametrize("name", ["plain", "with_bos"])
def test_a_cut_keeps_the_first_tokens_and_does_not_count_bos(name, request):
    tokenizer = request.getfixturevalue(name)
    prompts = build([TEXT] * 60, tokenizer, cut_tokens=[2, 4])
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    lengths = set()
    for prompt in prompts:
        content = prompt.token_ids[name == "with_bos" :]
        assert content == whole[: len(content)]
        assert prompt.text == tokenizer.decode(content)
        lengths.add(len(content))
    assert lengths == {2, 3, 4}


@given(st.permutations(range(6)), st.integers(0, 5))
def test_a_cut_depends_on_seed_and_row_and_not_on_other_rows(with_bos, order, num_kept):
    texts = [f"{TEXT} {i}" for i in range(6)]
    whole = {p.id: p for p in build(texts, with_bos, cut_tokens=[1, 12], seed=3)}
    some = order[:num_kept]
    again = build([texts[i] for i in some], with_bos, cut_tokens=[1, 12], seed=3, numbers=some)
    assert again == [whole[i] for i in some]


def test_another_seed_cuts_elsewhere(plain):
    cuts = [[len(p.token_ids) for p in build([TEXT] * 20, plain, cut_tokens=[1, 12], seed=s)]
            for s in (0, 1)]  # fmt: skip
    assert cuts[0] != cuts[1]


def test_text_shorter_than_its_cut_stays_whole(with_bos):
    (prompt,) = build(["The"], with_bos, cut_tokens=[50, 50])
    assert prompt.text == "The"
    assert prompt.token_ids == with_bos("The")["input_ids"]


def test_an_overlong_prompt_is_an_error_with_row_tokens_limit_and_remedy(plain):
    tokens = len(plain(TEXT)["input_ids"])
    message = rf"a\.jsonl, row 1 \(line 2\): the prompt has {tokens} tokens, the limit is 5; 2 of 3"
    with pytest.raises(ConfigError, match=message + r".*Set data\.overlong: drop or keep_end"):
        build(["The", TEXT, TEXT], plain, limit=5)


def test_overlong_prompts_are_dropped_and_counted(plain, caplog):
    prompts = build(["The", TEXT, "A"], plain, limit=5, overlong="drop")
    assert [p.id for p in prompts] == [0, 2]
    assert "1 of 3 prompts have more than 5 tokens and were dropped" in caplog.text


def test_dropping_everything_is_an_error(plain):
    with pytest.raises(ConfigError, match="leaves no prompt"):
        build([TEXT], plain, limit=5, overlong="drop")


def test_the_end_of_an_overlong_prompt_is_kept_behind_its_bos_token(plain, with_bos, with_chat):
    whole = plain(TEXT)["input_ids"]
    (prompt,) = build([TEXT], plain, limit=5, overlong="keep_end")
    assert prompt.token_ids == whole[-5:]
    (prompt,) = build([TEXT], with_bos, limit=5, overlong="keep_end")
    assert prompt.token_ids == [with_bos.bos_token_id, *whole[-4:]]
    assert prompt.text == plain.decode(whole[-4:])
    (prompt,) = build([TEXT], with_chat, limit=9, overlong="keep_end", format="chat")
    assert len(prompt.token_ids) == 9
    assert prompt.token_ids[0] == with_chat.bos_token_id


def test_a_prompt_of_exactly_the_limit_is_not_overlong(with_bos):
    ids = with_bos(TEXT)["input_ids"]
    assert build([TEXT], with_bos, limit=len(ids))[0].token_ids == ids


def test_a_missing_column_lists_the_columns_and_the_nearest(plain):
    with pytest.raises(ConfigError, match=r"no column 'prompts'; the columns are prompt, label: d"):
        build([TEXT], plain, prompt_column="prompts")
    with pytest.raises(ConfigError, match=r"set data\.prompt_column to one of them"):
        build([TEXT], plain, prompt_column="xyz")


@pytest.mark.parametrize("empty", ["", " \n\t", None, "<s>", "<s> "])
def test_empty_prompts_are_errors_with_the_first_row_and_their_number(plain, empty):
    with pytest.raises(ConfigError, match=r"a\.jsonl, row 1 \(line 2\): .*is empty .*2 of 3 rows"):
        build([TEXT, empty, empty], plain)


def test_rows_made_by_hand_may_lack_the_column_one_by_one(plain):
    rows = [Row(0, {"prompt": TEXT}), Row(1, {"text": TEXT}, source="mine")]
    settings = DataSettings(train="a.jsonl")
    with pytest.raises(ConfigError, match=r"mine, row 1: .*is empty \(None\)"):
        build_prompts(rows, settings, plain, max_prompt_tokens=99, seed=0)


@pytest.mark.parametrize("empty", ["", None, [], [{"role": "user", "content": " "}]])
def test_empty_chat_prompts_are_errors(with_chat, empty):
    with pytest.raises(ConfigError, match=r"row 0 \(line 1\): .*is empty"):
        build([empty], with_chat, format="chat")


@pytest.mark.parametrize(
    ("value", "settings", "message"),
    [
        (3, {}, "holds int '3' where text is needed; choose another"),
        ([{"role": "user", "content": "x"}], {}, r"for chat messages set data\.format: chat"),
        (3, {"format": "chat"}, "where text or a list of"),
        (["x"], {"format": "chat"}, "where text or a list of"),
        ([{"role": "user", "content": 3}], {"format": "chat"}, "where text or a list of"),
        ([{"role": "assistant", "content": "x"}], {"format": "chat"}, "ends with an assistant"),
        (
            [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}],
            {"format": "chat", "system_prompt": "y"},
            "a system message of its own",
        ),
    ],
)
def test_values_of_the_wrong_kind_are_errors_with_their_row(with_chat, value, settings, message):
    with pytest.raises(ConfigError, match=r"a\.jsonl, row 0 \(line 1\): .*" + message):
        build([value], with_chat, **settings)


def test_chat_needs_a_chat_template(plain):
    with pytest.raises(ConfigError, match=r"needs a tokenizer with a chat template.*format: text"):
        build([TEXT], plain, format="chat")


def test_a_system_prompt_needs_the_chat_format(plain):
    with pytest.raises(ConfigError, match=r"set data\.format: chat"):
        build([TEXT], plain, system_prompt="Be brief.")


def test_a_template_that_refuses_messages_is_reported_with_the_row():
    tokenizer = make_tokenizer(adds_bos=False, chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match=r"row 0 \(line 1\): .*refuses.*roles must alternate"):
        build(["hello"], tokenizer, format="chat")


def columns(rows, tokenizer, *, limit=1000, **settings):
    return build_prompts(
        [Row(n, row, n + 1, "a.jsonl") for n, row in enumerate(rows)],
        DataSettings(train="a.jsonl", **settings),
        tokenizer,
        max_prompt_tokens=limit,
        seed=0,
    )


def test_several_prompt_columns_are_joined_by_line_breaks_and_empty_ones_left_out(plain):
    rows = [{"a": "one", "b": "two"}, {"a": "one", "b": ""}, {"a": None, "b": "two"}]
    prompts = columns(rows, plain, prompt_column=["a", "b"])
    assert [p.text for p in prompts] == ["one\ntwo", "one", "two"]
    assert [p.content for p in prompts] == [None] * 3
    assert prompts[0].meta == rows[0]


def test_several_prompt_columns_make_one_chat_message(with_chat):
    (prompt,) = columns([{"a": "x", "b": "y"}], with_chat, prompt_column=["a", "b"], format="chat")
    messages = [{"role": "user", "content": "x\ny"}]
    assert prompt.text == with_chat.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )


def test_what_is_wrong_with_one_of_several_columns_is_said(plain):
    with pytest.raises(ConfigError, match=r"row 1 \(line 2\): the prompt in columns a, b is empty"):
        columns([{"a": "x", "b": "y"}, {"a": "", "b": None}], plain, prompt_column=["a", "b"])
    with pytest.raises(ConfigError, match=r"row 0 \(line 1\): column 'b' holds int '3' where text"):
        columns([{"a": "x", "b": 3}], plain, prompt_column=["a", "b"])
    with pytest.raises(ConfigError, match="no column 'c'"):
        columns([{"a": "x", "b": "y"}], plain, prompt_column=["a", "c"])


def test_a_template_goes_around_the_prompt_and_rewards_see_it_alone(with_bos):
    row = {"prompt": "cats {and} dogs", "subject": "pets"}
    (prompt,) = columns([row], with_bos, template="{subject}: {prompt}?\n")
    assert prompt.text == "pets: cats {and} dogs?\n"
    assert prompt.content == "cats {and} dogs"
    assert prompt.token_ids == with_bos(prompt.text)["input_ids"]


def test_special_tokens_of_a_template_become_their_ids(plain, with_bos):
    for tokenizer in (plain, with_bos):
        (prompt,) = columns([{"prompt": "Tell me"}], tokenizer, template="open-assistant")
        assert prompt.text == "<|prompter|>Tell me<|endoftext|><|assistant|>"
        ids = prompt.token_ids[tokenizer is with_bos :]
        assert ids == [2, *plain("Tell me")["input_ids"], 4, 3]
        assert prompt.token_ids[: tokenizer is with_bos] == [0] * (tokenizer is with_bos)


def test_a_template_around_a_bos_token_leaves_one_or_none(plain, with_bos):
    expected = with_bos("Q: The film")["input_ids"]
    (prompt,) = columns([{"prompt": "<s>The film"}], with_bos, template="Q: {prompt}")
    assert (prompt.token_ids, prompt.content) == (expected, "The film")
    (prompt,) = columns([{"prompt": "The film"}], with_bos, template="<s>Q: {prompt}")
    assert (prompt.token_ids, prompt.text) == (expected, "Q: The film")
    (prompt,) = columns([{"prompt": "<s>The film"}], plain, template="Q: {prompt}")
    assert plain.bos_token_id not in prompt.token_ids


def test_the_prompt_alone_stays_whole_when_the_end_is_kept(plain):
    (prompt,) = columns(
        [{"prompt": TEXT}], plain, template="Q: {prompt}\nA:", limit=5, overlong="keep_end"
    )
    assert len(prompt.token_ids) == 5
    assert prompt.content == TEXT


def test_alpaca_reads_its_two_columns(plain):
    rows = [
        {"instruction": "Translate.", "input": "Le chat"},
        {"instruction": "Sing.", "input": ""},
    ]
    prompts = columns(rows, plain, template="alpaca", prompt_column=["instruction", "input"])
    assert "### Input:\nLe chat\n\n### Response:" in prompts[0].text
    assert prompts[1].text.endswith("### Instruction:\nSing.\n\n### Response:")
    assert [p.content for p in prompts] == ["Translate.\nLe chat", "Sing."]


def test_a_template_with_an_unknown_column_is_an_error(plain):
    with pytest.raises(ConfigError, match=r"\{subjct\} is no column"):
        columns([{"prompt": "x", "subject": "y"}], plain, template="{subjct} {prompt}")
