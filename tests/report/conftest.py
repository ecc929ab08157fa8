"""Runs made by hand: their folders hold numbers that a test can add up itself."""

import json
import random
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from klippo.report.write import write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A parsed page: its tags with their attributes in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.source = text
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if not {"style", "title"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def row(step: int, number: int, /, **values: object) -> dict[str, object]:
    """One evaluated sample."""
    return {
        "step": step,
        "episodes": 16 * step,
        "prompt_id": number,
        "prompt": f"prompt {number}",
        "response": f"answer {number} of step {step}",
        "response_ids": [1, 2],
        "length": 2,
        "finished": True,
        "proxy": 0.0,
        "kl_k1_nats": 0.0,
        "kl_exact_nats": 0.0,
    } | values


def noisy_rows(
    steps: Iterable[int], num: int = 40, seed: int = 0, gold: Callable[[int], float] | None = None
) -> dict[int, list[dict[str, object]]]:
    """A run whose proxy rises by 0.1 a step and whose gold follows a curve; samples are noisy."""
    rng = random.Random(seed)
    found = {}
    for step in steps:
        found[step] = []
        for prompt in range(num):
            values = {
                "proxy": 0.1 * step + rng.gauss(0, 1),
                "kl_exact_nats": 0.0 if step == 0 else 0.2 * step * rng.uniform(0.8, 1.2),
                "length": rng.randint(3, 20),
            }
            if gold is not None:
                values["gold"] = gold(step) + rng.gauss(0, 1)
            found[step].append(row(step, prompt, **values))
    return found


def metric_lines(num: int) -> list[dict[str, float]]:
    return [
        {
            "step": i,
            "episodes": 16 * (i + 1),
            "kl/sequence_nats": 0.1 * i,
            "reward/score_mean": 0.05 * i,
            "policy/entropy_nats": 3 - 0.01 * i,
            "response/length_tokens": 10.0,
            "policy/clipped_share": 0.1,
            "value/explained_variance": 0.3,
            "time/generate_s": 1.5,
            "time/forward_s": 0.5,
            "time/score_s": 0.25,
            "time/update_s": 2.0,
            "time/step_s": 4.25,
            "throughput/response_tokens_per_s": 1234.0,
            "memory/peak_gib": 0.5,
        }
        for i in range(num)
    ]


CONFIG = """\
seed: 7
output_dir: runs/made
policy:
  model: made-policy
data:
  train: prompts.jsonl
reward:
  kind: classifier
  model: made-proxy
ppo:
  num_steps: 20
"""


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run folder."""

    def make(
        name: str = "made",
        rows: dict[int, list[dict[str, object]]] | None = None,
        metrics: list[dict[str, float]] | None = None,
        config: str | None = CONFIG,
        **status: object,
    ) -> Path:
        run = tmp_path / name
        (run / "eval").mkdir(parents=True)
        told = {"state": "done", "reason": "all steps done"} | status
        (run / "run_status.json").write_text(json.dumps(told))
        if config is not None:
            (run / "config.yaml").write_text(config)
        for step, samples in (noisy_rows([0]) if rows is None else rows).items():
            write_lines(run / "eval" / f"step-{step}.jsonl", samples)
        lines = metric_lines(20) if metrics is None else metrics
        if lines:
            write_lines(run / "metrics.jsonl", lines)
        return run

    return make


def write_lines(path: Path, lines: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[..., Page]:
    """The report of runs, parsed."""

    def page(*runs: Path, **options: object) -> Page:
        file = tmp_path / "page.html" if len(runs) > 1 else runs[0] / "report.html"
        write_report(list(runs), file, **options)
        return Page(file.read_text(encoding="utf-8"))

    return page


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a `klippo` command in this process: (exit code, stdout, stderr)."""
    from klippo.cli.main import app

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments], prog_name="klippo")
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
