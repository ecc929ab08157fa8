"""Run Klippo on random configs: no traceback, no hang, and no folder that is half written.

    python scripts/random_configs.py --configs 1000 --train 50 --seed 0

Every config goes through `klippo train CONFIG --dry-run` in a process of its own, and the first
`--train` of those that it accepts through `klippo train CONFIG` for one step; every fifth is one of
`klippo sft` or `klippo reward-model`, and is checked by `klippo config check`. Checked each time:
the exit code is a documented one and no bug's, nothing looks like a traceback, a refusal names a
setting that was changed, nothing is left behind where nothing should be, and a run's folder is
whole. Prints the number of configs by exit code, then every fault with its config, and ends with 1
where there is one.

`--keep N` runs config N alone and prints what it says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent))

from config_mutations import RandomConfig, random_config, write_files

from klippo.config.load import load_config
from klippo.config.schema import RunConfig, WholeConfig
from klippo.supervised.settings import RewardModelConfig, SFTConfig

LIMIT_S = 60.0
"""A config that takes longer hangs; a run is then interrupted as by Ctrl-C."""
MEMORY = 12 * 2**30
"""Address space of a child, in bytes: a config that asks for the world does not get it."""
FILE = "config.yaml"
DRY_RUN, ONE_STEP = "dry run", "one step"
SCHEMAS: dict[str, type[WholeConfig]] = {
    "train": RunConfig,
    "sft": SFTConfig,
    "reward-model": RewardModelConfig,
}
REFUSED = (2, 3)
CODES = {0: "done", 2: "config", 3: "machine or model", 4: "reward or judge", 5: "budget"}
CODES |= {6: "diverged", 130: "interrupted"}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int | None
    """None: it did not end in time, or was killed."""
    out: str
    err: str
    seconds: float


def run(arguments: list[str], folder: Path, limit_s: float = LIMIT_S) -> Ended:
    """`klippo` in a forked process, in a folder; interrupted, then killed, when time is up."""
    files = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_klippo(arguments, folder, files)
    signals = [signal.SIGINT, signal.SIGKILL]
    code: int | None = None
    deadline = start + limit_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > deadline:
            os.kill(child, signals.pop(0))
            deadline = time.monotonic() + (limit_s if signals else 3600)
        time.sleep(0.005)
    out, err = (file.read_text(errors="replace") for file in files)
    for file in files:
        file.unlink()
    return Ended(
        None if code is not None and code < 0 else code, out, err, time.monotonic() - start
    )


def _be_klippo(arguments: list[str], folder: Path, files: list[Path]) -> None:
    code = 99
    try:
        os.chdir(folder)
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        from klippo.cli.main import app

        app(arguments, prog_name="klippo")
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def faults_of(config: RandomConfig, ended: Ended, *, may_train: bool) -> Iterator[str]:
    """What a command must not do, whatever its config."""
    said = ended.out + ended.err
    if ended.code is None:
        yield f"did not end within {LIMIT_S:g} s"
    elif ended.code not in CODES or (ended.code == 130 and not may_train):
        yield f"exit code {ended.code}"
    if "Traceback (most recent call last)" in said or "bug in Klippo" in said:
        last = [line for line in ended.err.splitlines() if line.strip()]
        yield f"a traceback: {' / '.join(last[-4:])[:400]}"
    if ended.code in REFUSED and not ended.err.strip():
        yield "refused without a word"
    if ended.code == 2 and config.changed and not any(name in said for name in config.changed):
        yield f"the message names none of {', '.join(config.changed)}: {ended.err[:300]}"


def faults_of_folder(folder: Path, before: set[str], ended: Ended) -> Iterator[str]:
    """Nothing where a run was refused; else files that parse, and a status that says how it is."""
    runs = [file.parent for file in folder.rglob("run_status.json")]
    new = sorted(names_in(folder) - before)
    if ended.code in REFUSED and not runs:
        left = [name for name in new if not name.startswith(("runs/judge.sqlite", "__pycache__"))]
        if left:
            yield f"refused, and left {', '.join(left[:5])}"
    for path in runs:
        yield from faults_of_run(path, ended)
    if half := [name for name in new if Path(name).name.startswith(".") and ".lock" not in name]:
        yield f"left half-written {', '.join(half)}"


def faults_of_run(path: Path, ended: Ended) -> Iterator[str]:
    """Of one run's folder."""
    try:
        status = json.loads((path / "run_status.json").read_text())
        expected = {0: ("done",), 130: ("interrupted",)}.get(ended.code or 0, ("failed", "done"))
        if status["state"] not in expected:
            yield f"code {ended.code}, and run_status.json says {status['state']}"
        json.loads((path / "started.json").read_text())
        load_config(path / "config.yaml")
        for file in path.rglob("*.jsonl"):
            for line in file.read_text().splitlines():
                json.loads(line)
        if ended.code == 0 and not list((path / "model").glob("*.safetensors")):
            yield "done, and no model"
    except Exception as error:
        yield f"the run's folder is not whole: {type(error).__name__}: {error}"


def names_in(folder: Path) -> set[str]:
    """Everything in a folder, by relative name."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def command(stage: str, *, may_train: bool) -> list[str]:
    """The words behind `klippo`."""
    if stage == "train":
        return ["train", FILE, *(["ppo.num_steps=1", "--yes"] if may_train else ["--dry-run"])]
    return [stage, FILE] if may_train else ["config", "check", FILE, "--stage", stage]


def try_config(config: RandomConfig, stage: str, *, may_train: bool) -> tuple[Ended, list[str]]:
    """One config in a fresh folder: how the command ended, and what is wrong with that."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work"
        folder.mkdir()
        write_files(folder)
        (folder / FILE).write_text(config.text, encoding="utf-8", errors="surrogatepass")
        before = names_in(folder)
        limit_s = 20.0 if may_train else LIMIT_S
        ended = run(command(stage, may_train=may_train), folder, limit_s)
        faults = list(faults_of(config, ended, may_train=may_train))
        faults += faults_of_folder(folder, before, ended)
        if not may_train and list(folder.rglob("run_status.json")):
            faults.append("a dry run wrote a run")
    return ended, faults


def warm_up() -> None:
    """Import what every child needs, once."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaForCausalLM,
    )

    import klippo.cli.main
    import klippo.train.dry_run
    import klippo.train.run  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=int, default=1000)
    parser.add_argument("--train", type=int, default=0, help="How many are trained for one step.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="The number of the first config.")
    parser.add_argument("--keep", type=int, default=None)
    given = parser.parse_args()
    warm_up()
    numbers = (
        range(given.start, given.start + given.configs) if given.keep is None else [given.keep]
    )
    counts: dict[str, Counter[str]] = {DRY_RUN: Counter(), ONE_STEP: Counter()}
    num_faults, num_trained, slowest = 0, 0, 0.0
    start = time.monotonic()
    for number in numbers:
        stage = {3: "sft", 8: "reward-model"}.get(number % 10, "train")
        config = random_config(given.seed * 1_000_003 + number, SCHEMAS[stage])
        for kind in counts:
            may_train = kind == ONE_STEP
            if may_train and (num_trained >= given.train or ended.code != 0):  # noqa: F821
                break
            num_trained += may_train
            ended, faults = try_config(config, stage, may_train=may_train)
            counts[kind][f"{ended.code} ({CODES.get(ended.code or 0, 'fault')})"] += 1
            slowest = max(slowest, ended.seconds)
            num_faults += bool(faults)
            for fault in faults:
                print(f"config {number}, {stage}, {kind}: {fault}", flush=True)
            if given.keep is not None:
                print(config.text, config.changed, ended.out, ended.err, sep="\n")
    for kind, found in counts.items():
        told = ", ".join(f"{code}: {count}" for code, count in sorted(found.items()))
        print(f"{kind}: {found.total()} configs; exit codes {told or 'none'}")
    seconds = time.monotonic() - start
    print(f"{num_faults} with faults; {seconds:.0f} s, the slowest {slowest:.1f} s")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
