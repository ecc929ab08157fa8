"""The page: well-formed, alone, accessible, and every number from the data."""

import json
import math
import re
import shutil
import subprocess
from itertools import pairwise

import pytest

from tests.report.conftest import CONFIG, metric_lines, noisy_rows, row, write_lines


def paired(step: int, differences, gold=True):
    """Rows whose proxy differs from 0 by known amounts; gold by half of that."""
    values = [
        {"proxy": 1.0 + d, "kl_exact_nats": 0.0 if step == 0 else 4.0}
        | ({"gold": d / 2} if gold else {})
        for d in differences
    ]
    return [row(step, i, **v) for i, v in enumerate(values)]


def test_key_figures_are_the_means_of_the_rows(make_run, page_of) -> None:
    start, end = [-1.0, 0.0, 1.0, 2.0] * 8, [1.0, 3.0, 2.0, 6.0] * 8
    run = make_run(rows={0: paired(0, start), 20: paired(20, end)})
    page = page_of(run)
    text = page.text
    # reward 1.5 -> 4.0, paired differences 2, 3, 1, 4: mean 2.5
    assert "reward 1.50 4.00 +2.50 (+2.09 to +2.91)" in text
    assert "gold 0.25 1.50 +1.25" in text
    assert "KL to the start (nats/response) 0.00 4.00 +4.00 (+4.00 to +4.00)" in text
    assert "ends by itself (share) 100% 100%" in text
    # sd at the start: sqrt(32 / 31 * 1.25) = 1.136; 2.5 / 1.136 = 2.20
    alts = [image["alt"] for image in page.named("img")]
    assert any("reward goes from 0.00 at step 0 to 2.20 sd at step 20" in alt for alt in alts)
    assert any("KL to the start" in alt and "to 4.00 at step 20" in alt for alt in alts)


def test_the_verdict_is_a_word_and_a_colour_and_its_figures(make_run, page_of) -> None:
    run = make_run(rows=noisy_rows(range(0, 21, 5), 128, gold=lambda step: 0.1 * step))
    page = page_of(run)
    classes = [attributes.get("class", "") for attributes in page.named("span")]
    assert "badge improved" in classes
    assert re.search(r"improved Gold changed by \+[12]\.\d\d \(95%: \+", page.text)


def test_over_optimisation_is_named_and_the_law_finds_its_peak(make_run, page_of) -> None:
    def gold(step: int) -> float:
        d = math.sqrt(0.2 * step)
        return d * (1 - 1.5 * math.log(max(d, 1e-9)))

    run = make_run(rows=noisy_rows(range(0, 22, 3), 256, gold=gold))
    text = page_of(run).text
    assert re.search(r"over-optimised Gold fell by 1\.\d\d .* from its peak near step [36]", text)
    peak = re.search(r"gold \S+ \([^)]*\) \S+ \([^)]*\) (\S+) \(([^ ]+) to ([^ ]+)\) inside", text)
    assert peak is not None
    value, low, high = map(float, peak.groups())
    assert low <= value <= high
    assert value == pytest.approx(math.exp(1 / 1.5 - 1), abs=0.1)


def test_what_ran_comes_from_the_run(make_run, page_of) -> None:
    run = make_run(num_steps_done=20, ended="2026-01-02T03:06:05+00:00")
    started = {
        "name": "my-recipe",
        "started": "2026-01-02T03:04:05+00:00",
        "device": "some GPU",
        "num_processes": 2,
        "versions": {"python": "3.99", "torch": "9.8.7"},
        "origins": {"seed": "made.yaml:1", "kl.coef": "command line"},
    }
    (run / "started.json").write_text(json.dumps(started))
    page = page_of(run)
    for told in (
        "Config my-recipe",
        "Policy made-policy (tuning: full)",
        "Reward classifier made-proxy",
        "Gold none",
        "Prompts prompts.jsonl",
        "40 fixed prompts at step 0",
        "PPO steps 20 of 20, 320 episodes",
        "Seed 7",
        "Started 2026-01-02 03:04 UTC",
        "Took 2 min 00 s",
        "Device some GPU, 2 processes",
        "Throughput 1,234 response tokens per second",
        "Ended done: all steps done",
        "python 3.99, torch 9.8.7.",
        "seed 7 made.yaml:1",
    ):
        assert told in page.text


def test_a_run_that_went_on_says_after_which_steps_and_with_what(make_run, page_of) -> None:
    lines = [line | {"time/step_s": 4.0} for line in metric_lines(5)]
    run = make_run(ended="2026-01-03T03:04:00+00:00", metrics=lines)
    resumed = [
        {"at": "2026-01-02T05:00:00+00:00", "after_steps": 4, "changed": []},
        {"at": "2026-01-03T03:00:00+00:00", "after_steps": 7, "changed": ["num_threads=2 (was 1)"]},
    ]
    started = {"started": "2026-01-02T03:04:00+00:00", "resumed": resumed}
    (run / "started.json").write_text(json.dumps(started))
    text = page_of(run).text
    assert "Resumed after 4 steps; after 7 steps with num_threads=2 (was 1)" in text
    assert "Took 20 s in PPO steps" in text, "not the day that it stood still"


def test_without_recorded_origins_defaults_are_told_by_the_schema(make_run, page_of) -> None:
    text = page_of(make_run()).text
    assert re.search(r"\bseed 7 recorded", text)
    assert re.search(r"policy\.tuning full default", text)


def test_the_page_is_well_formed_and_its_headings_are_in_order(make_run, page_of) -> None:
    run = make_run(rows=noisy_rows([0, 5, 10, 20], 32, gold=float))
    other = make_run("other", rows=noisy_rows([0, 10], 32))
    for page in (page_of(run), page_of(run, other)):
        assert page.open == []
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        assert page.named("html") == [{"lang": "en"}]
        assert all(len(image["alt"]) > 30 for image in page.named("img"))
        assert all(cell.get("scope") in ("row", "col") for cell in page.named("th"))
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids))


def test_nothing_is_fetched_and_nothing_runs(make_run, page_of) -> None:
    run = make_run(rows=noisy_rows([0, 5, 10, 20], 32, gold=float))
    page = page_of(run)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "a", "svg"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("style", "href") for name in attributes)
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.named("img"))
    policy = next(m["content"] for m in page.named("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_plots_stand_beside_the_page_as_png_and_svg(make_run, page_of) -> None:
    run = make_run(rows=noisy_rows([0, 5, 10, 20], 32, gold=float))
    page = page_of(run)
    plots = sorted(path.name for path in (run / "report").iterdir())
    assert len(plots) == 2 * len(page.named("img"))
    for name in ("scores_over_steps", "scores_over_distance", "kl_exact", "entropy", "phases"):
        assert f"{name}.png" in plots
        assert f"{name}.svg" in plots
    assert all((run / "report" / name).stat().st_size > 1000 for name in plots)


def test_the_same_run_gives_the_same_page(make_run, page_of) -> None:
    run = make_run(rows=noisy_rows([0, 5, 10, 20], 32, gold=float))
    assert page_of(run).source == page_of(run).source


def test_samples_are_shown_side_by_side_and_ranked_by_gold(make_run, page_of) -> None:
    ends = [row(20, i, gold=float(i), response=f"end {i}") for i in range(21)]
    run = make_run(rows={0: [row(0, i, gold=0.0) for i in range(21)], 20: ends})
    text = page_of(run).text
    assert "The first 10 evaluated prompts" in text
    ranked = text[text.index("Best, median and worst by gold") :]
    assert [int(n) for n in re.findall(r"After end (\d+)", ranked)] == [20, 10, 0]
    assert "Before answer 20 of step 0" in ranked


def test_several_runs_are_compared(make_run, page_of) -> None:
    first = make_run("first", rows=noisy_rows([0, 5, 10, 20], 64, 1, gold=lambda s: 0.1 * s))
    second = make_run(
        "second",
        rows=noisy_rows([0, 10, 20], 64, 2),
        config=CONFIG.replace("seed: 7", "seed: 8") + "kl:\n  coef: 0.5\n",
    )
    page = page_of(first, second)
    assert "2 runs compared" in page.text
    assert "first : improved." in page.text
    assert "second : not enough data. There are no gold scores" in page.text
    assert "seed 7 8" in page.text
    assert "kl.coef 0.05 0.5" in page.text
    assert "policy.model made-policy made-policy" not in page.text
    assert len(page.named("img")) >= 10
    reward = next(
        i["alt"]
        for i in page.named("img")
        if "reward: change in sd of the start over PPO steps" in i["alt"]
    )
    assert "first goes" in reward
    assert "second goes" in reward


def test_runs_of_the_same_name_are_told_apart_by_their_folders(make_run, page_of) -> None:
    page = page_of(make_run("a/run"), make_run("b/run"))
    assert "a/run" in page.text
    assert "b/run" in page.text


def test_the_disagreement_of_an_ensemble_is_drawn(make_run, page_of) -> None:
    rows = noisy_rows([0, 10], 20)
    for samples in rows.values():
        for sample in samples:
            sample |= {"members": [0.0, 1.0], "parts": {"variance": 0.25}}
    metrics = metric_lines(3)
    for line in metrics:
        line |= {"ensemble/member1_lowest_share": 0.75, "ensemble/member2_lowest_share": 0.25}
    page = page_of(make_run(rows=rows, metrics=metrics))
    alts = [image["alt"] for image in page.named("img")]
    assert any("variance over members" in alt and "0.25 at step 10" in alt for alt in alts)
    assert any("member1 goes from 0.75" in alt and "member2 goes from 0.25" in alt for alt in alts)


def test_best_of_n_stands_beside_ppo_with_its_caveats(make_run, page_of, tmp_path) -> None:
    points = [{"mean": m, "low": m - 0.1, "high": m + 0.1} for m in (0.0, 0.4, 0.625)]
    unknown = [{"mean": 0.5, "low": None, "high": None}] * 3
    result = {
        "ns": [1, 2, 4],
        "kl_bound": [0.0, 0.193, 0.636],
        "arms": {"single": {"proxy": points, "gold": points}, "mean": {"gold": unknown}},
        "num_samples": 4,
        "num_prompts": 9,
        "policy": "some-policy",
    }
    run = make_run(rows=noisy_rows([0, 5, 10, 20], 32, gold=float))
    (run / "best_of_n.json").write_text(json.dumps(result))
    page = page_of(run)
    assert "from 4 samples of 9 prompts, drawn from some-policy" in page.text
    assert "not comparable with PPO" not in page.text
    assert "are not comparable on KL alone" in page.text
    assert "upper bound" in page.text
    alts = [image["alt"] for image in page.named("img")]
    assert any("single ends at +0.62, mean ends at +0.50" in alt for alt in alts)
    elsewhere = tmp_path / "elsewhere.json"
    (run / "best_of_n.json").rename(elsewhere)
    assert "Beside best-of-n" not in page_of(run).text
    assert "Beside best-of-n" in page_of(run, best_of_n=elsewhere).text


CHROMIUM = shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_asks_for_nothing_else_and_runs_nothing(make_run, page_of, tmp_path) -> None:
    attack = '<script>document.title="owned"</script><img src="http://127.0.0.1:9/x" onerror="1">'
    rows = {
        step: [row(step, i, response=attack, prompt=attack) for i in range(4)] for step in (0, 9)
    }
    run = make_run(rows=rows)
    page_of(run)
    log = tmp_path / "net.json"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"]
    done = subprocess.run(
        [*command, (run / "report.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "<title>made: Klippo report</title>" in done.stdout
    assert "&lt;script&gt;" in done.stdout
    assert "127.0.0.1:9" not in log.read_text()


def test_a_file_of_lines_can_hold_what_other_readers_take_for_line_ends(make_run, page_of) -> None:
    run = make_run(rows={})
    odd = "one\u2028two\u0085three\x0cfour"
    lines = [row(0, i, response=odd) for i in range(3)]
    write_lines(run / "eval" / "step-0.jsonl", lines)
    raw = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (run / "eval" / "step-0.jsonl").write_text(raw, encoding="utf-8")
    assert "one two three⟨U+000C⟩four" in page_of(run).text
