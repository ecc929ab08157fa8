"""What docs/judge.md shows is run here."""

import re
from pathlib import Path

import pytest

from klippo.judge.rubric import parse_rubric
from tests.judge.fakes import ROOT

TEXT = (ROOT / "docs/judge.md").read_text()


def test_the_rubric_of_the_docs_is_one() -> None:
    rubric = parse_rubric(re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)[0], "docs")
    assert rubric.placeholders == {"prompt", "response", "criteria"}
    assert "does not know" in rubric.criteria


def test_the_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0], names)
    outcome = names["trainer"].train()
    assert outcome.compared["proxy"].after.mean == pytest.approx(0.4)


def test_every_cause_and_setting_has_its_row() -> None:
    for cause in ("transport", "truncated", "parse", "range", "echo", "logprobs", "label_mass"):
        assert f"`{cause}`" in TEXT
