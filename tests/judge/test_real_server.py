"""A real chat model behind a real server, SmolLM2-135M-Instruct on vLLM: `make test-vllm`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.judge.fakes import ROOT, script

pytestmark = pytest.mark.vllm

MODEL = ROOT / "build/smollm2-135m-instruct"
TEXTS = [
    "A wonderful, moving film that I loved from start to end.",
    "A terrible, boring mess and a waste of two hours.",
    "The film is set in Paris.",
    "Funny in parts, and far too long.",
    "I would see it again tomorrow.",
    "Nobody in the cinema laughed, not even once.",
    "Its pictures are beautiful, and its story is not there.",
    ":",
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base_url of a server that lives as long as these tests."""
    python = os.environ.get("KLIPPO_VLLM_PYTHON")
    model = Path(os.environ.get("KLIPPO_VLLM_MODEL", MODEL))
    if python is None:
        pytest.skip("KLIPPO_VLLM_PYTHON names no Python with vLLM; `make test-vllm` makes one")
    assert (model / "config.json").is_file(), f"{model}: benchmarks/prepare_smollm.py makes it"
    servers = script("experiments/real_judge/servers.py")
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with servers.vllm(python, model, "smollm2", log) as running:
        yield running


@pytest.fixture
def judge(url: str, tmp_path: Path) -> Path:
    """A judge's YAML file, with an answers' file of its own."""
    api = {"provider": "vllm", "model": "smollm2", "base_url": url}
    path = tmp_path / "judge.yaml"
    path.write_text(json.dumps({"kind": "judge", "api": api | {"cache": f"{tmp_path}/j.sqlite"}}))
    return path


def klippo(*arguments: str | Path) -> str:
    """The output of a command that must end well."""
    command = [sys.executable, "-m", "klippo", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_judge_test_reads_the_logprobs_of_a_real_model(judge: Path) -> None:
    out = klippo("judge", "test", judge)
    assert "log-probs of labels │ yes: the sample gets" in out
    assert "Scores are read from: logprobs" in out
    assert "JSON by a schema    │ yes: the sample gets" in out  # vLLM keeps it to the schema


def test_judge_score_reads_logprobs_and_pays_nothing_twice(judge: Path, tmp_path: Path) -> None:
    rows, scored = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    lines = [json.dumps({"prompt": "How was it?", "response": text}) + "\n" for text in TEXTS]
    rows.write_text("".join(lines))
    command = ("judge", "score", rows, "--reward", judge, "--output", scored, "--overwrite")
    assert "14 calls, 0 cached" in klippo(*command)  # one sample, five probes, eight rows
    first = [json.loads(line) for line in scored.read_text().splitlines()]
    scores = [row["judge_scores"]["score"] for row in first]
    assert all(0 <= score <= 10 for score in scores)
    assert [row["reward"] for row in first] == pytest.approx([score / 5 - 1 for score in scores])
    # Expected scores over labels lie between whole numbers; those of JSON or a line never do.
    assert all(score != round(score) for score in scores)
    assert "0 calls, 14 cached" in klippo(*command)
    assert [json.loads(line) for line in scored.read_text().splitlines()] == first


def test_a_model_that_is_not_there_is_named(judge: Path) -> None:
    command = [sys.executable, "-m", "klippo", "judge", "test", str(judge), "--model", "other"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "no model other there" in done.stderr
