"""Runs that lack something, are still being written, or are broken."""

import json
import shutil
from pathlib import Path

import pytest

from klippo.errors import ConfigError
from klippo.report.page import END, START
from klippo.report.reading import read_run
from klippo.report.write import report
from tests.report.conftest import noisy_rows, row


def test_a_run_without_evaluations_says_so(make_run, page_of) -> None:
    text = page_of(make_run(rows={})).text
    assert "not enough data The run evaluated no samples" in text
    assert "There are no evaluated samples" in text
    assert "Ended done" in text


def test_a_run_with_one_evaluation_says_so(make_run, page_of) -> None:
    text = page_of(make_run(rows=noisy_rows([0], gold=float))).text
    assert "There is one evaluation, and a change needs two" in text
    assert "a comparison needs two evaluations" in text
    assert "Response answer 0 of step 0" in text


def test_a_run_without_gold_says_so_and_shows_the_proxy(make_run, page_of) -> None:
    text = page_of(make_run(rows=noisy_rows([0, 10, 20], 32))).text
    assert "not enough data There are no gold scores; klippo gold-eval adds them." in text
    assert "Change (95% interval) In sd of before reward" in text
    assert "Best, median and worst by reward" in text


def test_a_run_without_anything_else_still_has_a_report(make_run, page_of) -> None:
    run = make_run(rows={}, metrics=[], config=None)
    page = page_of(run)
    assert "There is no config.yaml." in page.text
    assert "There are no metrics of PPO steps." in page.text
    assert page.named("img") == []


def test_a_run_that_is_still_written_leaves_the_half_line_out(make_run, page_of) -> None:
    rows = noisy_rows([0, 10], 32)
    run = make_run(rows=rows, state="running", reason="")
    for file in (run / "metrics.jsonl", run / "eval" / "step-10.jsonl"):
        file.write_bytes(file.read_bytes()[:-9])
    text = page_of(run).text
    assert "Ended still being written, or killed without a word" in text
    assert "The last line of metrics.jsonl is not complete yet; it was left out." in text
    assert "The last line of step-10.jsonl is not complete yet; it was left out." in text
    assert "PPO steps 19 of 20" in text


def test_steps_with_different_prompts_compare_the_prompts_that_both_have(make_run, page_of) -> None:
    rows = {0: [row(0, i) for i in range(9)], 10: [row(10, i, proxy=2.0) for i in range(5)]}
    text = page_of(make_run(rows=rows)).text
    assert "reward 0.00 2.00 +2.00" in text


@pytest.mark.parametrize("state", ["done", "failed"])
def test_a_cut_line_is_one_error_with_file_and_line(state: str, make_run) -> None:
    run = make_run(rows=noisy_rows([0, 10], 8), state=state)
    file = run / "eval" / "step-10.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ConfigError, match=rf"{file}, line 8: broken JSON"):
        read_run(run)


def test_a_broken_line_in_the_middle_is_an_error_while_the_run_goes_on(make_run) -> None:
    run = make_run(rows=noisy_rows([0], 8), state="running")
    file = run / "eval" / "step-0.jsonl"
    lines = file.read_text().splitlines()
    lines[3] = lines[3][:20]
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=r"step-0.jsonl, line 4: broken JSON"):
        read_run(run)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"proxy": "high"}, "line 2: proxy='high' is not a number"),
        ({"response": 3}, "line 2: response is not text"),
        ({"proxy": ...}, "line 2: no proxy in this sample"),
    ],
)
def test_a_row_of_another_shape_is_an_error_with_file_and_line(change, told, make_run) -> None:
    rows = [row(0, 0), {k: v for k, v in (row(0, 1) | change).items() if v is not ...}]
    with pytest.raises(ConfigError, match=told):
        read_run(make_run(rows={0: rows}))


def test_scores_that_are_missing_or_not_finite_are_counted_not_used(make_run, page_of) -> None:
    end = [row(10, i, proxy=1.0) for i in range(8)]
    end[0]["proxy"], end[1]["proxy"] = None, float("inf")
    text = page_of(make_run(rows={0: [row(0, i) for i in range(8)], 10: end})).text
    assert "2 of 16 samples have no reward score and count nowhere." in text
    assert "reward 0.00 1.00 +1.00" in text


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        report([tmp_path])


def test_a_run_named_twice_is_an_error(make_run) -> None:
    run = make_run()
    with pytest.raises(ConfigError, match="given twice"):
        report([run, run.parent / "." / run.name])


def test_a_status_that_is_cut_is_an_error_with_its_file(make_run) -> None:
    run = make_run()
    (run / "run_status.json").write_text('{"state": "do')
    with pytest.raises(ConfigError, match=r"run_status.json: not JSON"):
        report([run])


def test_a_best_of_n_result_of_another_shape_is_an_error(make_run) -> None:
    run = make_run()
    (run / "best_of_n.json").write_text(json.dumps({"ns": [1, 2], "kl_bound": [0.0], "arms": {}}))
    with pytest.raises(ConfigError, match="not a best-of-n result"):
        report([run])


def test_the_command_prints_the_path_and_the_verdict(make_run, cli, tmp_path: Path) -> None:
    run = make_run(rows=noisy_rows([0, 10, 20], 64, gold=lambda step: 0.1 * step))
    code, out, err = cli("report", run)
    assert code == 0, err
    assert "improved. Gold changed by" in out
    assert f"Report: {run / 'report.html'}" in out
    other = make_run("other")
    code, out, _ = cli("report", run, other, "--output", tmp_path / "both.html")
    assert code == 0
    assert "made: improved." in out
    assert "other: not enough data." in out
    assert (tmp_path / "both.html").is_file()
    assert (tmp_path / "both" / "reward_over_steps.svg").is_file()
    assert cli("report", tmp_path)[0] == 2


def test_the_model_card_says_what_the_model_is_and_how_far_to_trust_it(make_run, page_of) -> None:
    run = make_run(rows=noisy_rows([0, 10, 20], 64))
    page_of(run)
    text = (run / "MODEL_CARD.md").read_text()
    for told in (
        "License: *to be filled in",
        "made-policy",
        "classifier made-proxy",
        "**Not enough data.**",
        "| reward |",
        "No second opinion (gold) was asked",
        'AutoModelForCausalLM.from_pretrained("model")',
    ):
        assert told in text


def test_what_a_person_wrote_into_the_card_stays(make_run, page_of) -> None:
    run = make_run()
    page_of(run)
    card = run / "MODEL_CARD.md"
    mine = card.read_text().replace("to be filled in;", "Apache-2.0;") + "\nMy remark.\n"
    card.write_text(mine)
    shutil.rmtree(run / "eval")
    page_of(run)
    text = card.read_text()
    assert "Apache-2.0;" in text
    assert text.endswith("My remark.\n")
    assert "There are no evaluated samples" in text
    card.write_text("All mine.\n")
    page_of(run)
    assert card.read_text() == "All mine.\n"
    assert START in mine
    assert END in mine


def ended(step: int, num: int = 3, **values: object) -> dict[int, list[dict[str, object]]]:
    return {
        0: [row(0, i) for i in range(num)],
        step: [row(step, i, **values) for i in range(num)],
    }


ODD = {
    "one prompt": ended(5, 1, proxy=1.0),
    "no scores": {s: [row(s, 0, proxy=None, kl_exact_nats=None)] for s in (0, 5)},
    "gold at the start only": {0: [row(0, i, gold=1.0) for i in range(20)], 5: [row(5, 1)]},
    "no prompt in common": {0: [row(0, 1)], 5: [row(5, 2)]},
    "negative KL": {s: [row(s, i, kl_exact_nats=-0.1) for i in range(5)] for s in (0, 2, 4, 6)},
    "far apart": ended(5, proxy=1e99),
    "an empty file": {0: [row(0, 1)], 5: []},
    "parts of another kind": ended(5, parts=["variance"]),
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_an_odd_run_still_has_a_report(rows, make_run, page_of) -> None:
    page = page_of(make_run(rows=rows, metrics=[{"step": 0, "episodes": None}]))
    assert "not enough data" in page.text
    assert not {"nan", "inf", "None"} & set(page.text.split())
