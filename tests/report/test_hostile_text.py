"""Model output is hostile: it may neither act in the page nor disturb how it reads."""

import pytest

from klippo.report.text import duration, number, visible, with_interval
from tests.report.conftest import row

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)><style>*{display:none}</style>',
    "</td></table></main></body></html><h1>Verdict: improved</h1>",
    "javascript:alert(1) [link](javascript:alert(1))",
    "{{ 7 * 7 }} {% for x in y %} ${7*7}",
    "<!-- <style>",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "\x1b[31mred\x1b[0m \x00\x07\x08",
    "\u202eevil\u202c \u2066isolated\u2069 \u200ehidden\ufeff\u00ad",
    "half a \ud83d surrogate",
    "x" * 1_000_000,
    "a\u0300\u0301\u0302" * 2000,
    "line\r\nbreak\rcarriage",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_hostile_text_stays_text_wherever_it_comes_from(text: str, make_run, page_of) -> None:
    rows = {step: [row(step, i, prompt=text, response=text) for i in range(3)] for step in (0, 5)}
    harmless = {step: [row(step, i, prompt="p", response="r") for i in range(3)] for step in (0, 5)}
    page = page_of(
        make_run("run", rows, [], reason=text, gold={"state": "missing", "reason": text})
    )
    gold = {"state": "missing", "reason": "r"}
    plain = page_of(make_run("plain", harmless, [], reason="r", gold=gold))
    # The hostile page has exactly the tags and attributes of the harmless one.
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    for (_, given), (_, expected) in zip(page.tags, plain.tags, strict=True):
        assert given.keys() == expected.keys()
    page.source.encode("utf-8")  # no surrogate is left
    assert not any(ord(ch) < 32 and ch != "\n" for ch in page.source)
    assert not set(page.source) & set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\ufeff\x7f\x9b")
    assert len(page.source) < len(plain.source) + 200_000


def test_hostile_names_in_config_metrics_and_folders_stay_text(make_run, page_of) -> None:
    attack = "<script>1</script>$\\frac$_x"
    config = f'policy: {{model: "{attack[:18]}"}}\nno_such_key: "{attack[:18]}"\n'
    first = make_run("_$a$<b>", config=config)
    second = make_run("plain")
    page = page_of(first, second)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "_$a$<b>" in page.text
    assert "is not valid in this version" in page.text


def test_what_could_act_is_made_visible() -> None:
    assert visible("\x1b[31m") == "⟨U+001B⟩[31m"
    assert visible("a\u202eb") == "a⟨U+202E⟩b"
    assert visible("\ud800") == "\N{REPLACEMENT CHARACTER}"
    assert visible("keep\n\tthis — ünï 👩\u200d🔬 שלום") == "keep\n\tthis — ünï 👩\u200d🔬 שלום"
    assert visible("x" * 50, limit=10) == "x" * 10 + " … (cut: 10 of 50 characters)"


def test_numbers_read_well() -> None:
    assert number(-0.5) == "\u22120.50"
    assert number(-0.001, signed=True) == "+0.00"
    assert number(-0.001) == "0.00"
    assert number(float("nan")) == number(None) == "—"
    assert number(float("-inf")) == "\u2212∞"
    assert number(1234567.0, 0) == "1,234,567"
    assert with_interval(0.5, -1.0, 2.0) == "+0.50 (\u22121.00 to +2.00)"
    assert duration(59.6) == "1 min 00 s"
    assert duration(3725) == "1 h 02 min"
