"""The report says what the judge cost and why responses have no score."""

from tests.report.conftest import metric_lines


def judged(num: int, prefix: str = "judge", **more: float) -> list[dict[str, float]]:
    lines = metric_lines(num)
    for i, line in enumerate(lines):
        line |= {
            f"{prefix}/num_calls": 20.0 * (i + 1),
            f"{prefix}/tokens_read": 2000.0 * (i + 1),
            f"{prefix}/tokens_written": 100.0 * (i + 1),
            f"{prefix}/cached_share": 0.25,
            f"{prefix}/unscored_share": 0.1 * i,
            f"{prefix}/empty_share": 0.0,
            f"{prefix}/cut_share": 0.0,
            f"{prefix}/vote_sd": 0.0,
        } | {f"{prefix}/{key}": value for key, value in more.items()}
    return lines


def test_cost_and_causes_are_there(make_run, page_of):
    lines = judged(3, cost_usd=0.125)
    lines[1]["judge/unscored_refusal"] = 2.0
    lines[2] |= {"judge/unscored_refusal": 1.0, "judge/unscored_transport": 5.0}
    text = page_of(make_run(metrics=lines)).text
    for told in (
        "What the judge did",
        "Calls, with retries 60",
        "Answers from the cache 25%",
        "Tokens read 6,000",
        "Cost 0.1250 USD",
        "Responses without a score 10%",
        "transport 5 no answer after all attempts",
        "refusal 3 the judge would not judge",
    ):
        assert told in text, told
    assert text.index("transport 5") < text.index("refusal 3")  # the commonest first


def test_judges_of_a_sum_are_named_and_an_unknown_price_is_not_a_zero(make_run, page_of):
    text = page_of(make_run(metrics=judged(2, "judge/truth"))).text
    assert "truth" in text
    assert "Cost unknown: the config has no prices" in text
    assert "Why training responses have no score" not in text


def test_a_run_without_a_judge_has_no_such_section(make_run, page_of):
    assert "What the judge did" not in page_of(make_run()).text


def test_every_cause_that_the_code_gives_is_explained():
    import re
    from pathlib import Path

    from klippo.report.sections import REMEDIES

    docs = (Path(__file__).parents[2] / "docs/judge.md").read_text(encoding="utf-8")
    table = docs.split("## What can go wrong")[1].split("\n## ")[0]
    causes = {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([a-z_]+)`", line.split("|")[1])
    }
    assert causes - {"empty_response"} == set(REMEDIES)
