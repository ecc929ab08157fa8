"""docs/security.md names a test for each promise, and there is one of that name."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_the_page_names_is_there() -> None:
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    files = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_*.py")}
    defined = {name for text in files.values() for name in re.findall(r"def (test_\w+)", text)}
    named = set(re.findall(r"\btest_\w+", page))
    assert len(named) > 20
    assert named <= defined | files.keys()
    promised = set(
        re.findall(r"def (test_\w+)", files["test_foreign_code"] + files["test_secrets"])
    )
    assert promised - named <= {
        "test_a_class_that_is_known_needs_no_code",
        "test_what_was_trusted_once_is_not_trusted_in_the_next_run",
    }
