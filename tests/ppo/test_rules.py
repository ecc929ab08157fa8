"""docs/rules.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_rule_names_a_test_that_exists():
    text = (ROOT / "docs" / "rules.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    rules = [row for row in rows if not row.startswith("| rule |")]
    named = [re.findall(r"`([a-z_/0-9]+\.py)` `(test_[a-z_0-9]+)` \|$", row) for row in rules]
    assert len(rules) > 30
    for row, tests in zip(rules, named, strict=True):
        assert len(tests) == 1, row
        file, name = tests[0]
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), row
