"""Random configs through the command line, and what they have found before."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from klippo.config.load import config_from_mapping, load_config
from klippo.data.files import read_file
from klippo.errors import ConfigError
from klippo.settings import near_divisors

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "random_configs.py"
RUN = {
    "policy": {"model": "m"},
    "data": {"train": "d"},
    "reward": {"kind": "length", "max_tokens": 3},
}


def run_script(*words: str) -> str:
    """What the script prints; it ends with 1 where a config shows a fault."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False,
        env={"OMP_NUM_THREADS": "1"} | os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 with faults" in f" {done.stdout.splitlines()[-1]}"
    return done.stdout


def test_random_configs_end_as_documented() -> None:
    said = run_script("--configs", "25", "--train", "1", "--seed", "11")
    counts = dict(re.findall(r"(\d+) \([a-z ]+\): (\d+)", said.splitlines()[0]))
    assert sum(map(int, counts.values())) == 25
    assert int(counts["0"]) >= 3
    assert int(counts["2"]) >= 6


@pytest.mark.slow
def test_a_thousand_random_configs_end_as_documented() -> None:
    said = run_script("--configs", "1000", "--train", "60", "--seed", "5")
    assert said.startswith("dry run: 1000 configs")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 3000, "nested deeper than 50 levels"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested deeper than 50 levels"),
        ("a: " + "[" * 80 + "]" * 80, "a: nested deeper than 50 levels"),
        ("seed: " + "9" * 5000, "seed: Exceeds the limit"),
        ("seed: " + "9" * 30, "must lie within 64 bits"),
        ("rollout: {stop_tokens: [3, 0xffffffffffffffffff]}", "rollout.stop_tokens[1]="),
    ],
)
def test_what_no_computer_should_read_is_refused_with_its_place(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"{path}:1: " in str(caught.value)
    assert said in str(caught.value)


def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    ]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    start = time.monotonic()
    with pytest.raises(ConfigError, match="more than 100,000 values, aliases written out"):
        load_config(tmp_path / "a.yaml")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.num_steps=true", "ppo.num_steps=true: must be a whole number"),
        ("kl.coef=true", "kl.coef=true: must be a number"),
        ("seed='3'", "seed='3': must be a whole number"),
        ("ppo.num_steps=1e3", "must be a whole number, written as 1000"),
        ("score.whiten=1", "score.whiten=1: must be true or false"),
        ("policy.autocast='true'", "policy.autocast='true': must be true or false"),
        ("optimizer.betas=[true, 0.5]", "optimizer.betas[0]=true: must be a number"),
        ("rollout.response_length=[1, true]", "rollout.response_length"),
        ("data.validation_size=true", "data.validation_size=true"),
        ("optimizer.betas=[1, 0.9]", "optimizer.betas[0]=1: must be less than 1"),
        ("score.missing_eos_value=-1e300", "missing_eos_value=-1.0e+300: must lie within float32"),
        ("policy.lora.rank=100000", "policy.lora.rank=100000: must be less than or equal to"),
        ("ppo.num_epochs=9223372036854775807", "must be less than or equal to 1000000"),
        ("num_threads=2147483648", "must be less than or equal to 1024"),
        ("max_memory_gib=1e38", "max_memory_gib=1.0e+38: must be less than or equal to 1000000000"),
        (
            "reward={kind: sum, parts: {a: {reward: {kind: column}}}}",
            "reward.parts.a.reward.kind=column: the data's scores",
        ),
    ],
)
def test_a_value_is_of_its_own_type_and_within_its_bounds(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(RUN, [override])
    assert said in str(caught.value)


def test_a_whole_number_is_a_number_and_a_list_a_pair() -> None:
    config = config_from_mapping(
        RUN, ["kl.coef=1", "optimizer.betas=[0, 0.5]", "rollout.stop_tokens=[x, 3]"]
    ).config
    assert (config.kl.coef, config.optimizer.betas) == (1.0, (0.0, 0.5))
    assert config.rollout.stop_tokens == ("x", 3)


def test_divisors_of_huge_sizes_are_found_at_once() -> None:
    start = time.monotonic()
    prime = 999_983
    with pytest.raises(ConfigError, match="minibatch_size=3 must divide batch_size=999983, or"):
        config_from_mapping(RUN, [f"ppo.batch_size={prime}", "ppo.minibatch_size=3"])
    assert time.monotonic() - start < 2
    assert near_divisors(6, 16) == [4, 8, 2, 1, 16]
    assert near_divisors(10**9, 16) == [16, 8, 4, 2, 1]
    assert near_divisors(10**6, 2**61 - 1) == [1, 2**61 - 1]  # a prime: nothing near


@pytest.mark.parametrize("content", ["[" * 100_000, '{"prompt": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_rows_that_cannot_be_read_are_named(tmp_path: Path, content: str, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + content if ending == "jsonl" else content)
    with pytest.raises(ConfigError, match=r"rows.*JSON"):
        read_file(str(path))
