"""Names stay names, folders of others stay whole, and what a model wrote stays text."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from klippo.config.load import load_config
from klippo.errors import ConfigError
from klippo.hub import resolve
from klippo.judge.rubric import load_rubric
from klippo.lab.arms import reward_key
from klippo.rewards.settings import ClassifierSettings

ATTACK = '<script>document.title="taken"</script><img src=x onerror=alert(1)>'
CLIMBING = ["../secret", "../../etc/passwd", "/etc/passwd", "policy/../../secret", "..\\secret"]


@pytest.mark.parametrize("name", CLIMBING)
def test_packaged_names_do_not_climb(name: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(f"demo:{name}")
    if not Path(name).is_file():  # a path to a file is a file that the user named
        with pytest.raises(ConfigError, match="neither a file nor a recipe"):
            load_config(name)
        with pytest.raises(ConfigError, match="no such file, nor a packaged rubric"):
            load_rubric(name)


@pytest.mark.parametrize("name", [*CLIMBING, "a\x00b", "\u202e", "x" * 200, "..", "."])
def test_a_models_name_makes_one_file_name(name: str) -> None:
    key = reward_key(ClassifierSettings(kind="classifier", model=name))
    assert Path(key).name == key
    assert key not in (".", "..")
    assert len(key) < 100
    assert "\x00" not in key


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"train": "x" * 5000}},
        {"policy": {"model": "x" * 5000}},
        {"reward": {"kind": "classifier", "model": "x" * 300}},
        {"reward": {"kind": "function", "function": "x" * 300 + ".py:f"}},
        {"output_dir": "x" * 5000},
        {"policy": {"model": "demo:policy", "tuning": "lora", "adapter": "-xxx"}},
        {"reward": {"kind": "ensemble", "members": [" xxx"], "standardize": "stored"}},
    ],
    ids=["data", "policy", "reward", "function", "output_dir", "adapter", "member"],
)
def test_a_name_that_no_file_can_have_is_an_error_and_no_bug(cli, write_config, change) -> None:
    code, _, err = cli("train", write_config(**change))
    assert code in (2, 3), err
    assert "xxx" in err


def test_overwriting_follows_no_link_out_of_its_place(cli, write_config, tmp_path: Path) -> None:
    assert cli("train", write_config(), "ppo.num_steps=1")[0] == 0
    (tmp_path / "run").rename(tmp_path / "somewhere-else")
    (tmp_path / "run").symlink_to(tmp_path / "somewhere-else")
    before = sorted(path.name for path in (tmp_path / "somewhere-else").rglob("*"))
    code, _, err = cli("train", write_config(), "ppo.num_steps=1", "--overwrite")
    assert code == 2
    assert "is a link to" in err
    assert sorted(path.name for path in (tmp_path / "somewhere-else").rglob("*")) == before


def test_a_link_inside_a_run_is_removed_and_not_followed(cli, write_config, tmp_path) -> None:
    assert cli("train", write_config(), "ppo.num_steps=1")[0] == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    (tmp_path / "run/eval-link").symlink_to(precious)
    assert cli("train", write_config(), "ppo.num_steps=1", "--overwrite")[0] == 0
    assert (precious / "thesis.tex").read_text() == "years of work"


def test_columns_and_ids_of_the_data_name_no_files(cli, write_config, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"the movie {word}", "id": "../../escaped", "prompt_id": "/tmp/escaped"}
        for word in ("was", "is", "good", "bad")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = set(tmp_path.rglob("*"))
    data = {"train": str(tmp_path / "rows.jsonl")}
    assert cli("train", write_config(data=data), "ppo.num_steps=1")[0] == 0
    new = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "run") for path in new - {tmp_path / "small.yaml"})
    assert not [path for path in new if "escaped" in path.name]


class Tags(HTMLParser):
    """The tags of a page, and the attributes that could act."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.acting: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.acting += [name for name, _ in attributes if name.startswith("on")]


def test_a_response_with_a_script_is_inert_in_the_report_of_a_real_run(
    cli, write_config, tmp_path: Path
) -> None:
    """The prompt is the attack: it stands before the response in every table."""
    rows = [{"prompt": f"{ATTACK} the movie {i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl")}
    assert cli("train", write_config(data=data), "ppo.num_steps=1")[0] == 0
    run = tmp_path / "run"
    for file in (run / "eval").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        attacked = [row | {"response": ATTACK + row["response"]} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in attacked))
    assert cli("report", run)[0] == 0
    text = (run / "report.html").read_text()
    page = Tags(text)
    assert "script" not in page.tags
    assert page.acting == []
    assert "&lt;script&gt;" in text
    assert 'http-equiv="Content-Security-Policy"' in text
