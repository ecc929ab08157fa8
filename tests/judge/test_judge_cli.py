"""`klippo judge test` and `score`, and judges by name, against a judge on loopback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from klippo.config.load import load_config
from klippo.errors import ConfigError, JudgeError, PreflightError
from klippo.judge.messages import Answer
from klippo.judge.settings import JudgeSettings
from klippo.lab import judge_scores as stage
from klippo.lab.judge_scores import ScoreFile, find_judge, judge_score
from klippo.lab.reward_names import check_reward, reward_label, reward_named
from tests.judge.fakes import ROOT, FakeJudge, answer, settings, shown
from tests.judge.servers import api, serving

Cli = Callable[..., tuple[int, str, str]]
ROWS = [
    {"post": "Was I wrong?", "top": "It was a bad idea.", "text": "A wonderful, great idea!"},
    {"post": "Was I right?", "top": "A good idea.", "text": "A terrible idea."},
    {"post": "And now?", "top": "It depends.", "text": ""},
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a `klippo` command in this process: (exit code, stdout, stderr)."""
    from klippo.cli.main import app

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments], prog_name="klippo")
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def write_judge(server: object, **given: object) -> Path:
    path = Path("judge.yaml")
    path.write_text(json.dumps({"kind": "judge", "api": api(server), "probes": False} | given))
    return path


def write_rows(rows: list[dict]) -> Path:
    path = Path("rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


COLUMNS = ["--prompt-column", "post", "--response-column", "text"]


def test_judge_test_says_what_the_judge_can_do_and_what_it_costs(cli: Cli) -> None:
    with serving(has_logprobs=False) as server:
        code, out, _ = cli(
            *("judge", "test", "--provider", "local", "--model", "lexicon"),
            *("--base-url", server.url, "--prompt-price", "1", "--completion-price", "2"),
        )
    assert code == 0
    assert "no: logprobs" in out
    assert "Scores are read from: json" in out
    assert "a plain order" in out
    assert "too high" in out
    assert "1,000 samples take 1,000 calls" in out
    assert "USD per 1,000 samples" in out


def test_judge_test_of_a_recipe_takes_overrides(cli: Cli) -> None:
    with serving() as server:
        code, out, _ = cli("judge", "test", "llm-judge-demo", f"reward.api.base_url={server.url}")
    assert code == 0
    assert "Scores are read from: logprobs" in out


def test_judge_test_of_a_judge_that_is_not_there_ends_with_4(cli: Cli) -> None:
    with serving(faults=1.0, kinds=("chat",)) as server:
        code, _, err = cli("judge", "test", str(write_judge(server)))
    assert code == 4
    assert "gave no score on a plain sample" in err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["test"], "which judge?"),
        (["test", "quickstart"], "has 0 judges"),
        (["test", "--provider", "local", "--model", "m"], "base_url is missing"),
        (["score", "rows.jsonl", "--model", "m", "--mode", "difference"], "reference_column"),
        (["score", "nowhere.jsonl", "--model", "m"], "no such file"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_without_a_call(
    cli: Cli, arguments: list[str], problem: str
) -> None:
    write_rows(ROWS)
    code, _, err = cli("judge", *arguments)
    assert code == 2
    assert problem in err


def test_judge_score_writes_rewards_and_resumes(cli: Cli) -> None:
    """System 1: what a post's writer was told by the top answer and by the model."""
    rows = write_rows(ROWS)
    with serving() as server:
        judge = write_judge(server, rubric="sycophancy")
        command = ["judge", "score", rows, "--reward", judge, *COLUMNS, "--rationale"]
        command += ["--mode", "difference", "--reference-column", "top", "--output", "out.jsonl"]
        code, out, _ = cli(*map(str, command))
        assert code == 0
        assert "3 of 3 rows have a score" in out
        found = read(Path("out.jsonl"))
        hits = server.hits
        code, out, _ = cli(*map(str, command))
        assert code == 0
        assert "judged already" in out
        assert server.hits == hits
        Path("out.jsonl").write_text(json.dumps(found[0]) + "\n")  # killed after the first row
        code, out, _ = cli(*map(str, command))
        assert server.hits == hits  # what was paid comes from the cache
        assert read(Path("out.jsonl")) == found
    assert [row["reward"] < 0 for row in found] == [True, False, True]
    assert found[0]["judge_scores"]["reference"] < 5 < found[0]["judge_scores"]["score"]
    assert found[0]["judge_rationales"] == {"score": "I counted words."}
    assert found[2]["judge_cause"] == "empty_response"
    assert found[2]["reward"] == -1
    assert {k: v for k, v in found[0].items() if k in ROWS[0]} == ROWS[0]


def test_a_file_of_json_is_written_as_one_list(cli: Cli) -> None:
    rows = write_rows(ROWS)
    with serving() as server:
        judge = write_judge(server)
        code, _, _ = cli(
            *("judge", "score", str(rows), "--reward", str(judge), *COLUMNS),
            *("--output", "out.json", "--score-column", "value"),
        )
    assert code == 0
    found = json.loads(Path("out.json").read_text())
    assert [set(row) >= {"post", "value", "judge"} for row in found] == [True] * 3


def asked(**given: object) -> ScoreFile:
    fields = {"file": "rows.jsonl", "settings": settings(), "output": Path("out.jsonl")}
    columns = {"prompt_column": "post", "response_column": "text"}
    return ScoreFile(**(fields | columns | given))


def test_an_output_of_another_judge_or_file_is_left_alone() -> None:
    write_rows(ROWS)
    judge_score(asked(), backend=FakeJudge())
    with pytest.raises(ConfigError, match="was judged by judge fake by general"):
        judge_score(asked(settings=settings(rubric="sycophancy")), backend=FakeJudge())
    write_rows(ROWS[::-1])
    with pytest.raises(ConfigError, match=r"row 0 is not that of rows\.jsonl"):
        judge_score(asked(), backend=FakeJudge())
    judge_score(asked(overwrite=True), backend=FakeJudge())
    assert read(Path("out.jsonl"))[0]["post"] == "And now?"


def test_what_was_written_before_the_judge_failed_stays_and_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "CHUNK", 2)
    write_rows([{"post": "Why?", "text": f"answer {i}"} for i in range(6)])

    def failing(response: str) -> int:
        if response == "answer 4":
            raise JudgeError("no more")
        return 5

    with pytest.raises(JudgeError, match="no more"):
        judge_score(asked(), backend=FakeJudge(failing))
    assert len(read(Path("out.jsonl"))) == 4
    backend = FakeJudge()
    judge_score(asked(), backend=backend)
    assert {shown(r) for r in backend.requests if "answer" in shown(r)} == {"answer 4", "answer 5"}
    assert [row["text"] for row in read(Path("out.jsonl"))] == [f"answer {i}" for i in range(6)]


def test_rows_that_failed_on_the_way_are_asked_again_and_others_are_not() -> None:
    write_rows([{"post": "Why?", "text": f"answer {i}"} for i in range(8)])

    def failing(response: str) -> int | str | Answer:
        if response == "answer 3":
            return answer(cause="transport")
        return "no score" if response == "answer 5" else 5

    judge_score(asked(), backend=FakeJudge(failing))
    causes = [row["judge_cause"] for row in read(Path("out.jsonl"))]
    assert [(i, cause) for i, cause in enumerate(causes) if cause] == [
        (3, "transport"),
        (5, "parse"),
    ]
    backend = FakeJudge()
    judge_score(asked(), backend=backend)
    assert {shown(r) for r in backend.requests if "answer" in shown(r)} == {"answer 3"}
    assert read(Path("out.jsonl"))[3]["reward"] == 0
    assert read(Path("out.jsonl"))[5]["reward"] is None


def test_a_missing_column_is_named_with_the_option_that_names_it() -> None:
    write_rows(ROWS)
    with pytest.raises(ConfigError, match="--response-column"):
        judge_score(asked(response_column="response"), backend=FakeJudge())


def test_a_judge_is_a_reward_by_name_and_its_label_follows_the_rubric() -> None:
    Path("mine.md").write_text("{prompt}{response} good?")
    given = {"kind": "judge", "api": settings().api.model_dump(), "rubric": "mine.md"}
    Path("gold.yaml").write_text(json.dumps(given))
    found = reward_named("gold.yaml")
    assert isinstance(found, JudgeSettings)
    check_reward(found)
    first = reward_label(found)
    assert first.startswith("judge fake by mine #")
    faster = found.model_copy(update={"api": found.api.model_copy(update={"concurrency": 2})})
    assert reward_label(faster) == first
    Path("mine.md").write_text("{prompt}{response} bad?")
    assert reward_label(found) != first
    Path("mine.md").write_text("{prompt} bad?")
    with pytest.raises(ConfigError, match=r"\{response\} missing"):
        check_reward(found)
    with pytest.raises(ConfigError, match="no such column"):
        check_reward(settings(mode="difference", reference_column="top"), ["prompt"])


def test_a_gold_judge_without_its_key_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = reward_named(str(ROOT / "examples/llm-judge/sycophancy.yaml"))
    with pytest.raises(PreflightError, match="OPENAI_API_KEY is not set"):
        check_reward(found)


SMALL = [
    *("ppo.num_steps=8", "ppo.batch_size=16", "ppo.minibatch_size=8", "evaluation.num_prompts=8"),
    *("evaluation.every=null", "rollout.response_length=8", "gold=null"),
]


def test_a_judge_that_falls_silent_ends_the_run_with_4_and_keeps_the_policy(cli: Cli) -> None:
    with serving() as server:
        server.fails_after = 50
        code, _, err = cli(
            *("train", "llm-judge-demo", *SMALL, f"reward.api.base_url={server.url}"),
            *("reward.outage_patience_s=0", "reward.api.max_attempts=1"),
        )
    assert code == 4
    assert "responses have no score, more than max_unscored_step=0.25" in err
    run = Path("runs/llm-judge-demo")
    assert (run / "model").is_dir()
    status = json.loads((run / "run_status.json").read_text())
    assert status["state"] == "failed"
    assert "transport" in status["reason"]


def test_a_budget_that_is_used_up_ends_the_run_with_5_and_keeps_the_policy(cli: Cli) -> None:
    with serving() as server:
        code, _, err = cli(
            *("train", "llm-judge-demo", *SMALL, f"reward.api.base_url={server.url}"),
            "reward.api.max_calls=50",
        )
        assert server.hits == 50
    assert code == 5
    assert "budget is used up: 50 calls" in err
    assert Path("runs/llm-judge-demo/model").is_dir()


@pytest.mark.parametrize("recipe", ["llm-judge", "llm-judge-recommended", "llm-judge-demo"])
def test_the_recipes_have_one_judge_each(recipe: str) -> None:
    assert find_judge(recipe).api.model


def test_the_llm_judge_recipe_has_the_values_of_the_notebook() -> None:
    config = load_config("llm-judge").config
    assert config.policy.model == "HuggingFaceH4/zephyr-7b-beta"
    assert (config.ppo.batch_size, config.ppo.minibatch_size) == (4, 2)
    assert config.optimizer.learning_rate == 1e-5
    assert config.rollout.response_length == [20, 100]
    assert config.ppo.num_epochs == 4
    assert config.ppo.clip_range == 0.2
    assert (config.kl.coef, config.kl.controller) == (0.2, "fixed")
    assert (config.ppo.gamma, config.ppo.gae_lambda) == (1.0, 0.95)
    assert config.ppo.ratio_threshold == 10
    assert config.data.train == "gpt_formatted_dataset_clean.csv"
    assert config.policy.quantize_4bit


def test_loading_a_config_with_a_judge_imports_neither_torch_nor_http() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from klippo.config.load import load_config; load_config('llm-judge'); "
        "print([m for m in ('torch', 'httpx2', 'httpx') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "[]"
