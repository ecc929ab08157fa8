"""Rows come from files as they stand there, and errors say where a file is wrong."""

import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from klippo.data.files import Row, source_of
from klippo.data.rows import hold_out, load_rows
from klippo.data.settings import DataSettings
from klippo.errors import ConfigError

ROWS = [{"prompt": "one", "label": 1}, {"prompt": "two", "label": 2}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(name, seed=0, **settings):
    return load_rows(DataSettings(train=name, **settings), seed)


def columns(rows):
    return [dict(row.columns) for row in rows]


def as_json(path):
    return write(path / "a.json", json.dumps(ROWS))


def as_lines_named_json(path):
    return write(path / "a.json", "\n".join(json.dumps(r) for r in ROWS))


def as_jsonl(path):
    return write(path / "a.jsonl", "\n".join(json.dumps(r) for r in ROWS) + "\n")


def as_csv(path):
    return write(path / "a.csv", "prompt,label\none,1\ntwo,2\n")


def as_parquet(path):
    datasets.Dataset.from_list(ROWS).to_parquet(path / "a.parquet")
    return str(path / "a.parquet")


@pytest.mark.parametrize(
    "make", [as_json, as_lines_named_json, as_jsonl, as_csv, as_parquet], ids=lambda f: f.__name__
)
def test_every_format_gives_the_same_rows(tmp_path, make):
    train, validation = load(make(tmp_path))
    assert columns(train) == ROWS
    assert [row.number for row in train] == [0, 1]
    assert validation == []


def test_rows_know_their_lines_also_past_blank_lines_and_quoted_newlines(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", '{"prompt": "one"}\n\n{"prompt": "two"}\n')
    csv = write(tmp_path / "a.csv", 'prompt,label\n"one\nmore",1\n\ntwo,2\n')
    assert [row.line for row in load(jsonl)[0]] == [1, 3]
    assert [row.line for row in load(csv)[0]] == [2, 5]
    assert str(load(csv)[0][1]) == f"{csv}, row 1 (line 5)"


def test_text_stays_text(tmp_path):
    """Neither a date in JSON nor the words NA and None in CSV turn into something else."""
    jsonl = write(tmp_path / "a.jsonl", '{"prompt": "2020-01-01"}\n{"prompt": "2021-01-01"}')
    csv = write(tmp_path / "a.csv", "prompt,label\nNA,1\nNone,\n")
    assert columns(load(jsonl)[0]) == [{"prompt": "2020-01-01"}, {"prompt": "2021-01-01"}]
    assert [row["prompt"] for row in columns(load(csv)[0])] == ["NA", "None"]
    assert columns(load(csv)[0])[1]["label"] is None


def test_a_column_that_some_rows_leave_out_is_none_there(tmp_path):
    name = write(tmp_path / "a.json", '[{"prompt": "a"}, {"prompt": "b", "label": 3}]')
    assert columns(load(name)[0])[0] == {"prompt": "a", "label": None}


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    name = write(tmp_path / "a.csv", "\ufeffprompt\nhello\n")
    assert columns(load(name)[0]) == [{"prompt": "hello"}]


def test_a_split_takes_part_of_a_file_and_keeps_row_numbers(tmp_path):
    name = write(tmp_path / "a.jsonl", "\n".join(f'{{"prompt": "p{i}"}}' for i in range(10)))
    assert [row.number for row in load(name, split="train[2:4]")[0]] == [2, 3]
    assert len(load(name, split="train[:50%]")[0]) == 5


def test_validation_comes_from_a_second_file(tmp_path):
    second = write(tmp_path / "b.jsonl", '{"prompt": "held"}')
    train, validation = load(as_json(tmp_path), validation=second)
    assert columns(train) == ROWS
    assert columns(validation) == [{"prompt": "held"}]
    assert source_of(validation) == second


def test_a_hub_data_set_gives_its_splits(monkeypatch):
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = DataSettings(train="owner/imdb", subset="plain", validation="test[:2]")
    train, validation = load_rows(settings, 0)
    assert columns(train) == columns(validation) == ROWS
    assert asked == [("owner/imdb", "plain", "train"), ("owner/imdb", "plain", "test[:2]")]
    assert str(validation[1]) == "owner/imdb (test[:2]), row 1"


@given(st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=30), st.integers(0, 99))
def test_held_out_rows_are_disjoint_in_prompts_and_depend_on_the_seed_alone(prompts, seed):
    rows = [Row(i, {"prompt": p}) for i, p in enumerate(prompts)]
    settings = DataSettings(train="x.json", validation_size=1)
    if len(set(prompts)) == 1:
        with pytest.raises(ConfigError, match="leaves nothing to train on"):
            hold_out(rows, settings, seed)
        return
    train, held = hold_out(rows, settings, seed)
    assert sorted(r.number for r in train + held) == list(range(len(rows)))
    assert not {r.columns["prompt"] for r in train} & {r.columns["prompt"] for r in held}
    assert (train, held) == hold_out(rows, settings, seed)


@pytest.mark.parametrize(("size", "expected"), [(3, 3), (0.25, 5), (0.001, 1)])
def test_held_out_size_is_a_count_or_a_share(size, expected):
    rows = [Row(i, {"prompt": str(i)}) for i in range(20)]
    settings = DataSettings(train="x.json", validation_size=size)
    train, held = hold_out(rows, settings, 1)
    assert (len(train), len(held)) == (20 - expected, expected)
    assert hold_out(rows, settings, 2)[1] != held


def test_a_missing_file_names_the_nearest_one(tmp_path):
    as_json(tmp_path)
    with pytest.raises(ConfigError, match=r"aa\.json: there is no such file; did you mean .*a\.js"):
        load(str(tmp_path / "aa.json"))
    with pytest.raises(ConfigError, match="nor is there a folder"):
        load(str(tmp_path / "nowhere" / "a.json"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "hello", r"unknown file ending '\.txt'; rows are read from \.json, \.jsonl"),
        ("a.json", '[{"prompt": "a"},\n{"prompt" "b"}]', r"line 2, column 11: broken JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl, line 2, column \d+: broken JSON"),
        ("a.json", '{"prompt": ["a"]}', "one object with the keys prompt; a list of objects"),
        ("a.json", "3", "holds int '3'; a list of objects"),
        ("a.json", '["a"]', "row 0: str 'a' where an object is needed"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]', "line 2: list"),
        ("a.csv", "prompt,label\na,1\nb,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("a.parquet", "nonsense", "cannot be read as parquet"),
        ("a.json", "", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "prompt,label\n", "has no rows"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(write(tmp_path / name, text))
    assert name in str(error.value)


def test_a_parquet_file_without_rows_is_an_error(tmp_path):
    datasets.Dataset.from_dict({"prompt": []}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="has no rows"):
        load(str(tmp_path / "a.parquet"))


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load(str(tmp_path / "a.jsonl"))


def test_settings_that_do_not_fit_the_source_are_refused(tmp_path, monkeypatch):
    name = as_json(tmp_path)
    with pytest.raises(ConfigError, match="is a file and has no subsets"):
        load(name, subset="plain")
    with pytest.raises(ConfigError, match="whose only split is `train`"):
        load(name, split="test")
    with pytest.raises(ConfigError, match="selects none of the 2 rows"):
        load(name, split="train[5:]")
    with pytest.raises(ConfigError, match="a file, which has no other splits"):
        load(name, validation="test")
    with pytest.raises(ConfigError, match=r"validation_size=2 leaves nothing to train on"):
        load(name, validation_size=2)

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError, match=r"owner/none: neither a file nor a data set.*no route"):
        load("owner/none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": "b.json", "validation_size": 3}, "remove one of them"),
        ({"cut_tokens": [8, 2]}, r"try \[2, 8\]"),
        ({"cut_tokens": [2, 8], "format": "chat"}, "use format: text"),
        ({"template": "alpaca", "format": "chat"}, "both put text around the prompt"),
        ({"template": "alpaca", "cut_tokens": [2, 8]}, "cut the end of the template away"),
        ({"template": "alpacca"}, "did you mean alpaca"),
        ({"prompt_column": []}, "at least 1 item"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DataSettings(train="a.json", **settings)


@pytest.fixture
def two_files(tmp_path):
    first = write(tmp_path / "a.jsonl", '{"prompt": "one"}\n\n{"prompt": "two"}\n')
    second = write(tmp_path / "b.csv", "prompt,label\nthree,3\n,4\n")
    return [first, second]


def test_several_sources_follow_one_another_with_all_columns(two_files):
    rows, _ = load(two_files)
    assert columns(rows) == [
        {"prompt": "one", "label": None},
        {"prompt": "two", "label": None},
        {"prompt": "three", "label": 3},
        {"prompt": None, "label": 4},
    ]
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert source_of(rows) == ", ".join(two_files)


def test_a_row_of_several_sources_is_named_by_its_own_file(two_files):
    rows, _ = load(two_files)
    assert str(rows[1]) == f"{two_files[0]}, row 1 (line 3)"
    assert str(rows[3]) == f"{two_files[1]}, row 1 (line 3)"


def test_a_split_is_taken_of_each_source_and_numbers_stay_unique(two_files):
    rows, _ = load([*two_files, two_files[0]], split="train[1:]")
    assert [row.columns["prompt"] for row in rows] == ["two", None, "two"]
    assert [row.number for row in rows] == [1, 3, 5]
    assert str(rows[2]) == f"{two_files[0]}, row 1 (line 3)"


def test_one_source_of_several_can_be_wrong(two_files):
    with pytest.raises(ConfigError, match=r"c\.jsonl: there is no such file"):
        load([*two_files, "c.jsonl"])
    with pytest.raises(ConfigError, match=r"train='.*a\.jsonl' is a file, which has no other"):
        load(two_files, validation="test")


def test_rows_with_the_same_joined_prompt_are_held_out_together():
    pairs = [("x", "y"), ("x", ""), ("", "x"), ("x", "y"), ("y", "z")]
    rows = [Row(i, {"a": a, "b": b}) for i, (a, b) in enumerate(pairs)]
    settings = DataSettings(train="x.json", prompt_column=["a", "b"], validation_size=1)
    for seed in range(8):
        train, held = hold_out(rows, settings, seed)
        sides = [{row.number for row in side} for side in (train, held)]
        assert all({0, 3} <= side or not {0, 3} & side for side in sides)
        assert all({1, 2} <= side or not {1, 2} & side for side in sides)


def test_a_folder_named_like_a_partition_adds_no_column_to_a_parquet_file(tmp_path):
    (tmp_path / "lang=en").mkdir()
    assert columns(load(as_parquet(tmp_path / "lang=en"))[0]) == ROWS


def test_a_long_csv_column_of_numbers_and_words_stays_text(tmp_path):
    cells = [str(i) for i in range(300_000)] + ["word"]
    rows, _ = load(write(tmp_path / "a.csv", "prompt\n" + "\n".join(cells) + "\n"))
    assert [row.columns["prompt"] for row in rows] == cells
