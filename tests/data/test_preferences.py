"""Preferences: pairs and ratings, what is held out, noise, and what is refused."""

import json
from collections import Counter

import pytest

from klippo.data.preferences import (
    PreferenceSettings,
    bag,
    flip,
    load_preferences,
    num_flipped,
)
from klippo.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    """Write rows to a file and load them as preferences."""

    def loaded(rows, validation=None, **settings):
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        if validation is not None:
            (tmp_path / "held.jsonl").write_text("\n".join(json.dumps(row) for row in validation))
            settings["validation"] = str(tmp_path / "held.jsonl")
        return load_preferences(PreferenceSettings(train=str(tmp_path / "rows.jsonl"), **settings))

    return loaded


def pairs(num, **columns):
    return [
        {"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}", **columns}
        for i in range(num)
    ]


def rated(num, per_prompt=1):
    return [
        {"prompt": f"p{i // per_prompt}", "response": f"r{i}", "rating": i % per_prompt}
        for i in range(num)
    ]


def test_pairs_are_read_with_prompt_and_margin(load):
    loaded = load([row | {"margin": 0.5} for row in pairs(3)], margin_column="margin")
    assert [p.chosen for p in loaded.train] == ["good 0", "good 1", "good 2"]
    assert loaded.train[1].prompt.text == "p1"
    assert loaded.train[1].margin == 0.5


def test_preference_column_says_which_of_two_is_better(load):
    rows = [
        {"prompt": "p", "output_1": "a", "output_2": "b", "preference": 1},
        {"prompt": "q", "output_1": "a", "output_2": "b", "preference": 2},
    ]
    columns = {"chosen_column": "output_1", "rejected_column": "output_2"}
    loaded = load(rows, preference_column="preference", **columns)
    assert [(p.chosen, p.rejected) for p in loaded.train] == [("a", "b"), ("b", "a")]
    rows[1]["preference"] = 0
    with pytest.raises(ConfigError, match=r"row 1 \(line 2\).*holds 0; 1 says"):
        load(rows, preference_column="preference", **columns)


def test_chat_messages_up_to_the_response_are_its_prompt(load):
    ask = {"role": "user", "content": "Why?"}
    rows = [
        {
            "chosen": [ask, {"role": "assistant", "content": "Because."}],
            "rejected": [ask, {"role": "assistant", "content": "No."}],
        }
    ]
    pair = load(rows).train[0]
    assert (pair.chosen, pair.rejected) == ("Because.", "No.")
    assert pair.prompt.meta["prompt"] == [ask]


def test_several_prompt_columns_are_joined(load):
    rows = [{"instruction": "Add", "input": "1 2", "chosen": "3", "rejected": "4"}]
    assert load(rows, prompt_column=["instruction", "input"]).train[0].prompt.text == "Add\n1 2"


def test_ratings_become_every_pair_of_the_same_prompt(load):
    loaded = load(rated(9, per_prompt=3), format="ratings")
    assert len(loaded.train) == 9
    for pair in loaded.train:
        chosen, rejected = int(pair.chosen[1:]), int(pair.rejected[1:])
        assert chosen // 3 == rejected // 3
        assert chosen % 3 > rejected % 3


def test_ratings_without_prompts_pair_any_two_rows_and_ties_are_counted(load):
    rows = [{"response": f"r{i}", "rating": i % 2} for i in range(20)]
    loaded = load(rows, format="ratings", num_pairs=100)
    assert len({(p.chosen, p.rejected) for p in loaded.train}) == 100
    assert all(int(p.chosen[1:]) % 2 > int(p.rejected[1:]) % 2 for p in loaded.train)
    assert "left out because they tie" in loaded.notes[0]


def test_each_held_out_response_is_in_one_pair_unless_more_are_asked_for(load):
    rows = [{"response": f"r{i}", "rating": i} for i in range(40)]
    held_out = load(rows, format="ratings", validation_size=20).held_out
    assert len(held_out) == 10
    assert len({text for p in held_out for text in (p.chosen, p.rejected)}) == 20
    more = load(rows, format="ratings", validation_size=20, num_validation_pairs=50)
    assert len(more.held_out) == 50


def test_one_rater_is_drawn_per_response_and_the_mean_is_not_noisy(load):
    rows = [{"response": f"r{i}", "rating": [0, 0, 0, 8] if i < 50 else [3]} for i in range(51)]
    by_mean = load(rows, format="ratings", num_pairs=50).train
    assert {p.chosen for p in by_mean} == {"r50"}
    by_one = load(rows, format="ratings", rater="one", num_pairs=50).train
    again = load(rows, format="ratings", rater="one", num_pairs=50).train
    other = load(rows, format="ratings", rater="one", num_pairs=50, seed=1).train
    assert [p.chosen for p in by_one] == [p.chosen for p in again]
    assert {p.chosen for p in by_one} > {"r50"}
    assert [p.chosen for p in by_one] != [p.chosen for p in other]


@pytest.mark.parametrize("size", [4, 0.25])
def test_a_prompt_is_never_on_both_sides(load, size):
    rows = [row | {"prompt": f"p{i // 3}"} for i, row in enumerate(pairs(18))]
    loaded = load(rows, validation_size=size)
    train = {p.prompt.text for p in loaded.train}
    held_out = {p.prompt.text for p in loaded.held_out}
    assert held_out
    assert train
    assert not train & held_out


def test_without_prompts_a_response_is_never_on_both_sides(load):
    rows = [
        {"chosen": f"a{i // 2}", "rejected": f"b{i}"} for i in range(20)
    ]  # each chosen text is in two pairs
    loaded = load(rows, validation_size=6)
    sides = [
        {text for p in side for text in (p.chosen, p.rejected)}
        for side in (loaded.train, loaded.held_out)
    ]
    assert not sides[0] & sides[1]


def test_held_out_rows_that_share_a_prompt_with_training_are_left_out_and_counted(load):
    loaded = load(pairs(4), validation=[*pairs(2), *pairs(6)[5:]])
    assert [p.prompt.text for p in loaded.held_out] == ["p5"]
    assert loaded.notes == [
        "2 held-out rows left out because they share a prompt with training rows"
    ]
    with pytest.raises(ConfigError, match=r"held\.jsonl: nothing is left to test on.*all 2 rows"):
        load(pairs(4), validation=pairs(2))


def test_label_noise_turns_round_exactly_its_share_by_the_data_seed(load):
    plain = load(pairs(40)).train
    noisy = load(pairs(40), label_noise=0.25).train
    turned = [p.chosen.startswith("bad") for p in noisy]
    assert sum(turned) == 10 == num_flipped(40, 0.25)
    assert noisy == load(pairs(40), label_noise=0.25).train
    assert [p.chosen.startswith("bad") for p in flip(plain, 0.25, seed=1)] != turned


def test_held_out_pairs_have_no_label_noise(load):
    held_out = load(pairs(40), label_noise=0.5, validation_size=20).held_out
    assert all(p.chosen.startswith("good") for p in held_out)


def test_bagging_is_a_bootstrap_that_differs_by_seed(load):
    train = load(pairs(300)).train
    drawn = bag(train, seed=1)
    counts = Counter(p.chosen for p in drawn)
    assert len(drawn) == 300
    assert all(pair in train for pair in drawn)
    assert 0.58 < len(counts) / 300 < 0.69  # 1 - 1/e = 0.632
    assert bag(train, seed=1) == drawn
    assert bag(train, seed=2) != drawn


BAD_PAIRS = {
    "equal": ({"rejected": "good 1"}, "row 1 (line 2): columns 'chosen' and 'rejected' hold the "),
    "empty": ({"chosen": "  "}, "row 1 (line 2): column 'chosen' holds str '  ' where a response"),
    "missing": (
        {"rejected": None},
        "row 1 (line 2): column 'rejected' holds nothing where a response",
    ),
    "prompt": ({"prompt": ""}, "row 1 (line 2): the prompt in column 'prompt' is empty"),
    "margin": (
        {"margin": "wide"},
        "row 1 (line 2): column 'margin' holds str 'wide' where a number",
    ),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_is_refused_by_row_and_line(load, name):
    change, message = BAD_PAIRS[name]
    rows = pairs(3, margin=1)
    rows[1] |= change
    with pytest.raises(ConfigError) as caught:
        load(rows, margin_column="margin")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (pairs(2), {"chosen_column": "choosen"}, "no column 'choosen'.*did you mean 'chosen'"),
        (rated(2), {"format": "ratings", "rating_column": "stars"}, "set data.rating_column"),
        (
            [{"Prompt": "a", "chosen": "b", "rejected": "c"}],
            {},
            "no column 'prompt', but 'Prompt'; set data.prompt_column: Prompt, or null",
        ),
        (
            [{"response": "a", "rating": "good"}],
            {"format": "ratings"},
            r"row 0 \(line 1\): column 'rating' holds str 'good' where a number or a list",
        ),
        (
            [{"response": "a", "rating": [1, True]}],
            {"format": "ratings"},
            r"column 'rating' holds list '\[1, True\]' where a number",
        ),
        (
            [{"response": f"r{i}", "rating": 1} for i in range(4)],
            {"format": "ratings"},
            "no train pairs can be made of column 'rating': all 6 of them tie",
        ),
        (
            [{"response": f"r{i}", "rating": i} for i in range(4)],
            {"format": "ratings", "num_pairs": 7},
            "num_pairs=7: .* gives 6 train pairs.*use at most 6",
        ),
        (pairs(4), {"validation_size": 4}, "validation_size=4 leaves nothing to train on"),
        (
            [{"response": f"r{i}", "rating": i} for i in range(9)],
            {"format": "ratings", "validation_size": 1},
            "no held-out pairs can be made",
        ),
    ],
)
def test_bad_data_is_refused_with_value_and_remedy(load, rows, settings, message):
    with pytest.raises(ConfigError, match=message):
        load(rows, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_noise": 0.6}, "less than or equal to 0.5"),
        ({"label_noise": -0.1}, "greater than or equal to 0"),
        ({"rater": "one"}, "rater=one does nothing with format: pairs"),
        ({"format": "ratings", "margin_column": "m"}, "margin_column=m does nothing"),
        ({"validation": "x.jsonl", "validation_size": 3}, "both say where held-out rows come"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceSettings(train="rows.jsonl", **settings)
