"""Klippo's commands, each in a process of its own and run once, and the judge that they ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
JUDGES = ROOT / "examples/sycophancy"
sys.path.insert(0, str(JUDGES))

import agreement_judge  # noqa: E402 - its folder is on the path only now

MEASURES = ("sycophancy", "helpfulness")


def klippo(*words: str | Path, makes: Path, threads: int = 1) -> None:
    """`klippo WORDS`, unless what it makes is there; its screen and seconds go beside that."""
    if makes.exists():
        return
    log = _beside(makes, ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    # Threads that spin while they wait are slow beside other people's work.
    variables = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "klippo", *map(str, words)]
    print("klippo", *words[:2], "->", makes, flush=True)
    start = time.monotonic()
    with log.open("w") as screen:
        done = subprocess.run(
            command, stdout=screen, stderr=screen, env=os.environ | variables, check=False
        )
    if done.returncode != 0 or not makes.exists():
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}; {log} ends:\n{end}")
    seconds = {"seconds": time.monotonic() - start}
    _beside(makes, ".time.json").write_text(json.dumps(seconds))


def seconds_of(makes: Path) -> float:
    """How long the command took that made this."""
    return float(json.loads(_beside(makes, ".time.json").read_text())["seconds"])


def _beside(makes: Path, suffix: str) -> Path:
    return makes.parent.parent / f"{makes.parent.name}-{makes.stem}{suffix}"


@contextmanager
def judging(folder: Path) -> Iterator[dict[str, Path]]:
    """The judge at a free port; its configs for `--reward`, by measure."""
    server = agreement_judge.lexicon_judge.LexiconServer(judge=agreement_judge.score_question)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    folder.mkdir(parents=True, exist_ok=True)
    configs = {}
    for name in MEASURES:
        text = (JUDGES / f"{name}.yaml").read_text()
        configs[name] = folder / f"{name}.yaml"
        cache = f"  cache: {folder / 'judge.sqlite'}\n"
        configs[name].write_text(text.replace("http://127.0.0.1:8766/v1", server.url) + cache)
    try:
        yield configs
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
