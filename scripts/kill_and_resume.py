"""Kill runs at random moments, let them go on, and compare each with one that was never killed.

    python scripts/kill_and_resume.py --kills 50

A small run is trained once without disturbance. Then runs are started and killed (SIGKILL) after a
random time, and go on, until so many kills have happened; a run may be killed several times. Every
run must end with the same bytes: weights, critic, evaluation samples, and lines of metrics (but for
times, speed and memory). Children are forked from a process that has imported everything, so that a
kill costs a second. Prints one line per run and a table of the phases in which the kills came, and
ends with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
PHASES = ("starting", "generate", "forward", "score", "update", "checkpoint", "evaluate", "between")
NOT_COMPARED = ("time/", "throughput/", "memory/")


def config(folder: Path) -> dict[str, Any]:
    """A run of the packaged policy with everything that has a state of its own."""
    return {
        "output_dir": str(folder),
        "device": "cpu",
        "num_threads": 1,
        "policy": {"model": "demo:policy"},
        "data": {"train": "demo:prompts"},
        "rollout": {"response_length": [4, 12]},
        "reward": {
            "kind": "sum",
            "parts": {
                "sentiment": {
                    "reward": {"kind": "classifier", "model": "demo:proxy"},
                    "normalize": True,
                },
                "length": {"reward": {"kind": "length", "max_tokens": 8}, "weight": 0.1},
            },
        },
        "kl": {"controller": "adaptive", "target": 1.0, "horizon": 200},
        "score": {"normalize": True},
        "ppo": {"num_steps": 6, "batch_size": 8, "minibatch_size": 4, "num_epochs": 2},
        "optimizer": {"learning_rate": 1e-4, "schedule": "cosine"},
        "evaluation": {"num_prompts": 6, "every": 2, "num_shown": 0},
        "checkpoint": {"every": 1, "every_minutes": None},
    }


class Events:
    """What a child does, told by it, seen from outside: phases, and when each began."""

    SIZE = 400

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._num = context.Value("i", 0)
        self._phases = context.Array("i", self.SIZE)
        self._times = context.Array("d", self.SIZE)

    def clear(self) -> None:
        self._num.value = 0
        self.tell("starting")

    def tell(self, phase: str) -> None:
        number = self._num.value
        self._phases[number], self._times[number] = PHASES.index(phase), time.monotonic()
        self._num.value = number + 1

    @property
    def num(self) -> int:
        return int(self._num.value)

    @property
    def phase(self) -> str:
        return PHASES[self._phases[self.num - 1]]

    def durations(self) -> list[tuple[str, float]]:
        """Phase and seconds of everything that was told, once the child has ended."""
        times = [*self._times[: self.num], time.monotonic()]
        return [(PHASES[self._phases[i]], times[i + 1] - times[i]) for i in range(self.num)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import klippo.train.trainer  # noqa: F401, for the children

    events = Events()
    draw = random.Random(arguments.seed)
    kills: Counter[str] = Counter()
    num_runs = num_wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        run(events, whole, None)
        plan = events.durations()
        expected = fingerprint(whole)
        print(f"undisturbed: {sum(s for _, s in plan):.1f} s, {len(expected)} files", flush=True)
        while kills.total() < arguments.kills:
            folder = Path(scratch) / f"run-{num_runs}"
            here: list[str] = []
            while not is_done(folder):
                may_kill = kills.total() < arguments.kills and len(here) < 4
                killed = run(events, folder, a_moment(draw, plan) if may_kill else None)
                if killed is not None:
                    kills[killed] += 1
                    here.append(killed)
            num_runs += 1
            found = fingerprint(folder)
            names = expected.keys() | found.keys()
            wrong = sorted(name for name in names if expected.get(name) != found.get(name))
            num_wrong += bool(wrong)
            told = f"differs: {wrong}" if wrong else "equal"
            print(f"run {num_runs}: {told}; killed in {', '.join(here) or 'nothing'}", flush=True)
    print(json.dumps({"kills": dict(kills), "runs": num_runs, "runs_that_differ": num_wrong}))
    return 1 if num_wrong else 0


def a_moment(draw: random.Random, plan: list[tuple[str, float]]) -> tuple[int, float]:
    """Every phase is as likely as any other: which event of the run, and how long after it."""
    phase = draw.choice(sorted({name for name, _ in plan}))
    event = draw.choice([i for i, (name, _) in enumerate(plan) if name == phase])
    return event, draw.uniform(0, plan[event][1])


def run(events: Events, folder: Path, kill_at: tuple[int, float] | None) -> str | None:
    """Start a run, or go on with it; the phase in which it was killed, if it was."""
    events.clear()
    child = multiprocessing.get_context("fork").Process(target=train, args=(folder, events))
    child.start()
    if kill_at is not None:
        event, seconds = kill_at
        while child.is_alive() and events.num <= event:
            time.sleep(0.0005)
        child.join(seconds)
        if child.is_alive():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            return events.phase
    child.join()
    if child.exitcode != 0:
        sys.exit(f"{folder.name} ended with {child.exitcode} in {events.phase}")
    return None


def is_done(folder: Path) -> bool:
    status = folder / "run_status.json"
    return status.is_file() and json.loads(status.read_text())["state"] == "done"


def train(folder: Path, events: Events) -> None:
    """In the child: one run, telling what it does."""
    from klippo.runs.checkpoints import Checkpoints
    from klippo.train.recorder import RunRecorder
    from klippo.train.trainer import PPOTrainer

    def telling(name: str, function: Any) -> Any:
        def told(*args: Any, **kwargs: Any) -> Any:
            events.tell(name)
            try:
                return function(*args, **kwargs)
            finally:
                events.tell("between")

        return told

    plain = RunRecorder.phase

    @contextmanager
    def telling_phase(self: RunRecorder, name: str) -> Any:
        events.tell(name)
        with plain(self, name):
            yield
        events.tell("between")

    RunRecorder.phase = telling_phase  # type: ignore[method-assign, assignment]
    RunRecorder.evaluate = telling("evaluate", RunRecorder.evaluate)  # type: ignore[method-assign]
    Checkpoints.write = telling("checkpoint", Checkpoints.write)  # type: ignore[method-assign]
    PPOTrainer(config(folder), quiet=True).train()


def fingerprint(folder: Path) -> dict[str, Any]:
    """What must be equal, by file: bytes, or lines of metrics without what no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        "metrics.jsonl": [
            {key: value for key, value in line.items() if not key.startswith(NOT_COMPARED)}
            for line in lines
        ],
        "state": json.loads((folder / "run_status.json").read_text())["state"],
    }
    for pattern in ("model/**/*", "critic/**/*", "eval/*", "config.yaml", "before_after.md"):
        for file in filter(Path.is_file, folder.glob(pattern)):
            content = file.read_bytes()
            found[str(file.relative_to(folder))] = content.replace(str(folder).encode(), b"RUN")
    return found


if __name__ == "__main__":
    sys.exit(main())
