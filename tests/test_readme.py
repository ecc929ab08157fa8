"""What the README tells people to type is typed here."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"`(klippo [^`]+)`", README)))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALL = ["ppo.num_steps=1", "evaluation.num_prompts=8", "ppo.batch_size=8"]


def run(arguments: list[str]) -> int:
    from klippo.cli.main import app

    with pytest.raises(SystemExit) as ended:
        app(arguments, prog_name="klippo")
    return int(ended.value.code or 0)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it: a config of their own, and a quickstart that ran."""
    monkeypatch.chdir(tmp_path)
    quickstart = ROOT / "src/klippo/recipes/quickstart.yaml"
    (tmp_path / "run.yaml").write_text(quickstart.read_text())
    pairs = [{"chosen": f"A good film, {n}.", "rejected": f"A dull film, {n}."} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    reward_model = {
        "model": {"name": "demo:policy"},
        "data": {"train": "pairs.jsonl", "validation_size": 8},
        "training": {"num_epochs": 1, "batch_size": 8},
    }
    (tmp_path / "rm.yaml").write_text(json.dumps(reward_model))
    entries = {"defaults": yaml.safe_load(quickstart.read_text()), "mine": {"seed": 1}}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/all.yaml").write_text(yaml.safe_dump(entries))
    assert run(["train", "quickstart", *SMALL]) == 0
    return tmp_path


def test_every_klippo_command_of_the_readme_works(workplace: Path) -> None:
    assert len(COMMANDS) >= 7, COMMANDS
    for command in COMMANDS:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "train":
            arguments = [a for a in arguments if not a.startswith("ppo.num_steps")] + SMALL
            arguments += ["--overwrite"] if "quickstart" in arguments else []
        if "sycophancy-demo" in arguments:
            whole = ["ppo.batch_size=128", "ppo.minibatch_size=128", "offline.num_passes=1"]
            arguments = [a for a in arguments if a not in SMALL] + whole
        if arguments[0] in ("compare", "best-of-n"):
            arguments += ["--num-prompts", "4"]
        assert run(arguments) == 0, command


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert len(PYTHON) == 2
    for block in PYTHON:
        exec(block, names)
    assert "reward/score_mean" in names["metrics"]  # type: ignore[operator]
    assert (tmp_path / "runs/exclaim/run_status.json").is_file()


def test_make_quickstart_trains_the_quickstart_recipe() -> None:
    for target in re.findall(r"^make (\S+)", README, re.MULTILINE):
        planned = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        if target == "quickstart":
            assert "klippo train quickstart" in planned


def test_every_file_that_the_readme_points_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_exit_codes_of_the_readme_are_those_of_the_help() -> None:
    from klippo.cli.ending import EXIT_CODES

    assert " ".join(EXIT_CODES.split()) in " ".join(README.split())
