"""The command line as people meet it: a real process, its output, its exit code."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from klippo import errors
from klippo.rollouts.vllm import vllm_version

CONFIG = """\
policy: {model: "demo:policy"}
data: {train: "demo:prompts"}
reward: {kind: length, max_tokens: 9}
"""


def run(
    *arguments: str, code: str | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """`klippo ARGUMENTS`, or the same after running `code` in the process."""
    command = [sys.executable, "-m", "klippo", *arguments]
    if code is not None:
        code += "\nfrom klippo.cli.main import main\nmain()"
        command = [sys.executable, "-c", code, *arguments]
    env = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def stage(body: str, name: str = "doctor", module: str = "cli.doctor") -> str:
    """Code that puts a stage of this body in the place of a real one."""
    return (
        "import sys, types, os, signal, time\n"
        "from klippo.errors import *\n"
        f"def {name}(*args, **kwargs):\n    {body}\n"
        f"sys.modules['klippo.{module}'] = types.SimpleNamespace({name}={name})\n"
    )


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def median_seconds(*command: str) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        return time.perf_counter() - start

    return statistics.median(seconds() for _ in range(3))


@pytest.mark.timed
def test_help_answers_in_under_0_7_seconds():
    assert median_seconds("-m", "klippo", "--help") < 0.7


@pytest.mark.timed
def test_import_of_klippo_takes_under_0_5_seconds():
    assert median_seconds("-c", "import klippo") < 0.5


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import klippo.cli.main, sys\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_checking_a_config_imports_no_torch():
    code = "import klippo.config.load, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_help_names_every_command_and_exit_code():
    help_text = run("--help").stdout
    for command in ("train", "generate", "compare", "config", "doctor"):
        assert f"\n  {command} " in help_text
    codes = {cls.exit_code for cls in errors.KlippoError.__subclasses__()} | {0, 1, 130, 143}
    exit_codes = " ".join(help_text.split("Exit codes:")[1].split())
    assert {int(word) for word in exit_codes.replace(";", "").split() if word.isdigit()} == codes


def test_version_is_printed():
    assert run("--version").stdout.startswith("klippo 0.")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return 0", 0),
        ("return None", 0),
        ("return 5", 5),
        ("raise ConfigError('why')", 2),
        ("raise PreflightError('why')", 3),
        ("raise RewardError('why')", 4),
        ("raise DivergedError('why')", 6),
        ("raise KeyboardInterrupt", 130),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130),
    ],
)
def test_the_exit_code_says_how_it_ended(body, code):
    done = run("doctor", code=stage(body))
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if "why" in body:
        assert done.stderr == "why\n"


def test_a_bug_shows_its_traceback_and_asks_for_a_report():
    done = run("doctor", code=stage("raise ZeroDivisionError('oops')"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: oops" in done.stderr
    assert "Please report it" in done.stderr


def test_termination_lets_a_stage_clean_up():
    body = "try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n    finally: print('cleaned')"
    done = run("doctor", code=stage(body))
    assert (done.returncode, done.stdout) == (143, "cleaned\n")


def test_an_error_is_data_that_cannot_speak_to_the_terminal():
    done = run("doctor", code=stage("raise ConfigError('[bold]x[/bold]\\x1b[2J')"), FORCE_COLOR="1")
    assert "[bold]x[/bold]\N{REPLACEMENT CHARACTER}[2J" in done.stderr
    assert "\x1b[31m" in done.stderr


def test_no_color_is_respected():
    done = run("doctor", code=stage("raise ConfigError('x')"), FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b[31m" not in done.stderr


def test_a_closed_pipe_ends_quietly(config):
    command = f"{sys.executable} -m klippo config schema | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train"],
        ["train", "x.yaml", "--nonsense"],
        ["generate", "m", "--num-samples", "0"],
        ["generate", "m", "--file", "/nowhere.txt"],
        ["train", "nowhere.yaml"],
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_train_gets_the_config_and_its_flags(config):
    body = "print(args[0].config.seed, args[0].name, kwargs)"
    done = run("train", config, "seed=4", "--quiet", code=stage(body, "train", "train.run"))
    assert (
        done.stdout == "4 run {'overwrite': False, 'resume': False, 'quiet': True, 'yes': False, "
        "'trust_remote_code': False}\n"
    )


def test_generate_gets_every_prompt(config):
    arguments = ["generate", "m", "--prompt", "a", "--prompt", "b", "--temperature", "0.5"]
    done = run(
        *arguments, code=stage("print(args, kwargs['temperature'])", "generate", "lab.generate")
    )
    assert done.stdout == "('m', ['a', 'b'], None) 0.5\n"


def test_generate_without_a_prompt_leaves_asking_to_the_stage():
    done = run("generate", "m", code=stage("print(args)", "generate", "lab.generate"))
    assert done.stdout == "('m', None, None)\n"


def test_compare_gets_all_models_and_rewards():
    arguments = ["compare", "a", "b", "c=d", "--reward", "demo:gold", "--reward", "x=y.yaml"]
    done = run(*arguments, code=stage("print(args, kwargs['rewards'])", "compare", "lab.compare"))
    assert done.stdout == "('a', ['b', 'c=d']) ['demo:gold', 'x=y.yaml']\n"


def test_config_check_says_ok(config):
    done = run("config", "check", config)
    assert (done.returncode, done.stdout) == (0, "run: ok\n")


def test_config_check_lists_every_problem_and_exits_with_2(config):
    done = run("config", "check", config, "sed=1", "ppo.clip_range=abc")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "command line: ppo.clip_range=abc: must be a number",
        "command line: sed: unknown key; did you mean seed?",
    ]


def test_config_show_prints_yaml_that_loads_to_the_same_config(config, tmp_path):
    """With the origin of each value in a comment."""
    overrides = ['data.system_prompt="it is # odd"', "data.format=chat", "rollout.temperature=0.5"]
    shown = run("config", "show", config, *overrides).stdout
    origins = {line.split("#")[0].strip(): line.rpartition("# ")[2] for line in shown.splitlines()}
    assert origins["seed: 0"] == "default"
    assert origins["max_tokens: 9"] == f"{config}:3"
    assert origins["temperature: 0.5"] == "command line"
    again = tmp_path / "again.yaml"
    again.write_text(shown)

    def values(*source: str) -> dict[str, object]:
        told = json.loads(run("config", "show", *source, "--json").stdout)
        return {key: entry["value"] for key, entry in told.items()}

    assert values(str(again)) == values(config, *overrides)


def test_config_show_as_json_gives_value_and_origin(config):
    shown = json.loads(run("config", "show", config, "--json").stdout)
    assert shown["reward.kind"] == {"value": "length", "origin": f"{config}:3"}
    assert shown["output_dir"] == {"value": "runs/run", "origin": "default"}


def test_config_schema_is_json():
    assert "policy" in json.loads(run("config", "schema").stdout)["required"]


def test_doctor_tells_that_a_key_is_set_and_never_what_it_is():
    for flags in ([], ["--json"]):
        done = run("doctor", *flags, HF_TOKEN="hf_secret", OPENAI_API_KEY="")
        assert "hf_secret" not in done.stdout + done.stderr
        assert done.returncode == 0
    facts = json.loads(done.stdout)
    assert facts["keys"]["HF_TOKEN"] == "set"
    assert facts["keys"]["OPENAI_API_KEY"] == "not set"
    assert facts["packages"]["torch"]
    assert facts["optional packages"]["vllm"] == (vllm_version() or "not installed")
    assert "CUDA devices" in facts["devices"]


def test_doctor_exits_with_3_where_a_package_is_missing(monkeypatch, capsys):
    from klippo.cli import doctor

    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "surely-not-installed"))
    assert doctor.doctor() == 3
    assert "surely-not-installed   MISSING" in capsys.readouterr().out


def test_sigterm_from_outside_ends_with_143(tmp_path):
    code = stage("print('up', flush=True); time.sleep(60)")
    code += "\nfrom klippo.cli.main import main\nmain()"
    process = subprocess.Popen([sys.executable, "-c", code, "doctor"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
