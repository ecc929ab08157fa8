"""The notebook runs in a real kernel: the packaged policy, and a judge behind a socket."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from klippo.config.load import load_config
from klippo.data.rows import load_rows
from klippo.evaluation.settings import MIN_PROMPTS
from klippo.lab.judge_scores import find_judge
from tests.judge.fakes import ROOT, lexicon_judge
from tests.judge.servers import serving

NOTEBOOK = ROOT / "examples/llm-judge/llm_judge.ipynb"
KEY = "sk-sentinel-4f1c0b7e92"
NUM_STEPS = 2
COLAB = f"""
class userdata:
    @staticmethod
    def get(name):
        return {{"JUDGE_KEY": "{KEY}"}}[name]
"""


@dataclass(frozen=True, kw_only=True)
class Executed:
    """What is left of an execution."""

    notebook: Any
    folder: Path
    """Where it ran."""
    keys: list[str | None]
    """The Authorization header of every call that the judge got."""

    def outputs(self, name: str) -> list[Any]:
        """What stands below a cell."""
        [cell] = [cell for cell in self.notebook.cells if cell.id == name]
        return cell.outputs

    def told(self, name: str) -> str:
        """What a cell printed, plain or as rich's HTML."""
        return "".join(
            one.text if one.output_type == "stream" else one.data.get("text/plain", "")
            for one in self.outputs(name)
        )

    def shown(self, name: str, kind: str) -> list[str]:
        """What a cell displayed as this media type."""
        data = [one.data for one in self.outputs(name) if "data" in one]
        return [one[kind] for one in data if kind in one]

    def table(self, name: str) -> list[list[str]]:
        """The rows of a cell's table, without its head."""
        [page] = self.shown(name, "text/html")
        rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in page.split("</tr>")]
        return [row for row in rows if row]

    @property
    def run(self) -> Path:
        return self.folder / "runs/trial"


def tagged(notebook: Any, tag: str) -> Any:
    [cell] = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return cell


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    """The notebook with other parameters and without its installation, and nothing else changed."""
    folder = tmp_path_factory.mktemp("notebook")
    secrets = folder / "packages/google/colab"
    secrets.mkdir(parents=True)
    (secrets / "__init__.py").write_text(COLAB)
    keys: list[str | None] = []

    class Recording(lexicon_judge().Handler):  # type: ignore[misc]
        def do_POST(self) -> None:
            keys.append(self.headers["Authorization"])
            super().do_POST()

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    tagged(notebook, "install").source = ""
    with serving() as server:
        server.RequestHandlerClass = Recording
        parameters = {
            "SIZE": "small",
            "PROMPTS": None,
            "NUM_STEPS": NUM_STEPS,
            "OUTPUT_DIR": "runs/trial",
            "PROVIDER": "local",
            "JUDGE": "lexicon",
            "BASE_URL": server.url,
            "API_KEY_ENV": "JUDGE_KEY",
            "USD_PER_MILLION_READ": 0.15,
            "USD_PER_MILLION_WRITTEN": 0.60,
            "MAX_USD": 1.0,
        }
        cell = tagged(notebook, "parameters")
        names: dict[str, Any] = {}
        exec(cell.source, {}, names)
        assert names.keys() == parameters.keys()
        cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        paths = [str(folder / "packages"), os.environ.get("PYTHONPATH", "")]
        client = NotebookClient(
            notebook, timeout=120, resources={"metadata": {"path": str(folder)}}
        )
        client.execute(
            env=os.environ
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
                "IPYTHONDIR": str(folder / "ipython"),
                "OMP_NUM_THREADS": "1",
            }
        )
    return Executed(notebook=notebook, folder=folder, keys=keys)


def test_nothing_of_an_execution_is_stored_in_the_notebook() -> None:
    cells = [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    assert len(cells) > 10
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_config_of_either_size_is_valid(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    names: dict[str, Any] = {}
    for name in ("parameters", "rubric", "config"):
        [cell] = [cell for cell in notebook.cells if cell.id == name]
        exec("\n".join(x for x in cell.source.splitlines() if not x.startswith("!")), names)
        if name == "parameters":
            names["SIZE"] = size
    config = load_config("run.yaml").config
    assert config.policy.quantize_4bit == (size == "large")
    rows, _ = load_rows(config.data, config.seed)
    assert len(rows) >= MIN_PROMPTS  # without which there is no verdict
    assert config.evaluation.num_prompts >= MIN_PROMPTS
    assert find_judge("run.yaml:reward").criteria == config.reward.criteria


def test_the_judge_is_tried_alone_and_prefers_the_good_answer(executed: Executed) -> None:
    told = executed.told("judge-test")
    assert "Scores are read from: logprobs" in told
    assert "a fake verdict" in told
    assert "USD per 1,000 samples" in told
    good, bad = executed.table("judge-pair")
    # Five good words (or bad ones) of 13, and tanh(12 * 5 / 16) = 0.9989.
    assert good[1:] == ["1.00", "1.00", "1.00", ""]
    assert bad[1:] == ["-1.00", "-1.00", "-1.00", ""]


def test_the_model_generates_and_the_judge_scores_it_by_each_criterion(executed: Executed) -> None:
    assert "demo:policy on cpu: 32 responses" in executed.told("generate")
    assert "32 of 32 responses have a score" in executed.told("scores")
    rows = executed.table("scores")
    assert len(rows) == 8
    for _, response, *numbers in rows:
        assert response
        reward, liking, language = map(float, numbers)
        assert -1 <= reward <= 1
        assert reward == liking == language  # this judge counts words, whatever it is asked


def test_one_update_says_what_the_notebook_promises(executed: Executed) -> None:
    value = {row[0]: float(row[1]) for row in executed.table("step")}
    assert abs(value["reward/score_mean"]) <= 1
    assert value["reward/scored_share"] == 1
    assert value["kl/sequence_nats"] == pytest.approx(0, abs=1e-2)
    assert value["policy/first_ratio_mean"] == pytest.approx(1, abs=1e-2)
    assert value["policy/update_kl_nats_per_token"] > 0
    assert 0 < value["update/grad_norm"] < 1e3
    assert value["update/num_skipped_minibatches"] == 0
    assert all(row[2] for row in executed.table("step"))


def test_the_dry_run_counts_what_the_run_then_does(executed: Executed) -> None:
    told = executed.told("dry-run")
    steps = [json.loads(line) for line in (executed.run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(NUM_STEPS))
    # 2 steps and 2 evaluations of 32 responses, by two criteria.
    assert re.search(r"responses to learn from +│ +64 ", told)
    planned = re.search(r"reward \(lexicon\): calls +│ +(\d+) ", told)
    assert planned is not None
    assert 256 <= int(planned[1]) <= 272
    assert steps[-1]["judge/num_calls"] <= int(planned[1])
    assert len(executed.keys) > 256


def test_the_run_leaves_a_report_and_a_model_that_loads(executed: Executed) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    status = json.loads((executed.run / "run_status.json").read_text())
    assert status["num_steps_done"] == NUM_STEPS
    assert '<th scope="row">reward</th>' in (executed.run / "report.html").read_text()
    assert "Verdict: " in executed.told("train")
    assert "The same prompts before and after" not in executed.told("train")  # num_shown is 0
    changes = [float(row[-1]) for row in executed.table("samples")]
    assert len(changes) == 10
    assert changes == sorted(changes, reverse=True)
    shown = status["before_after"]["proxy"]["difference"]
    assert f"change {shown:+.3f}" in executed.told("samples")
    [verdict] = executed.shown("samples", "text/markdown")
    assert verdict.startswith("**Verdict: ")
    assert "Gold changed by" in verdict
    assert len(executed.shown("curves", "image/png")) == 1
    assert "runs/trial/report.html" in executed.shown("report", "text/html")[0]
    model = AutoModelForCausalLM.from_pretrained(executed.run / "model")
    tokenizer = AutoTokenizer.from_pretrained(executed.run / "model")
    ids = tokenizer("The film", return_tensors="pt").input_ids
    assert model(ids).logits.shape[:2] == ids.shape


def test_the_key_reaches_the_judge_and_nothing_that_is_stored(executed: Executed) -> None:
    assert set(executed.keys) == {f"Bearer {KEY}"}
    assert executed.told("key") == "JUDGE_KEY is set.\n"
    assert KEY not in nbformat.writes(executed.notebook)
    colab = executed.folder / "packages"
    files = [path for path in executed.folder.rglob("*") if path.is_file()]
    written = [path for path in files if not path.is_relative_to(colab)]
    assert {"config.yaml", "report.html", "judge.sqlite"} <= {path.name for path in written}
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
