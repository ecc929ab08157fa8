"""Rollout servers for tests: the real HTTP around engines that are quick to start.

`python -m tests.rollouts.serving dice PORT` is one in a process of its own, to be killed; with
`copy` it samples from the policy's weights.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

from klippo.rollouts.hf import HFEngine
from klippo.rollouts.opening import Opening, Weights
from klippo.rollouts.remote import Timing
from klippo.rollouts.sampling import Sampling
from klippo.rollouts.server import RolloutServer
from klippo.rollouts.service import RolloutService
from klippo.train.serve_rollouts import serve
from klippo.types import Completion, OnDone, Prompt

ROOT = Path(__file__).resolve().parents[2]
QUICK = Timing(backoff_s=0.05, backoff_cap_s=0.2)
HOST = "127.0.0.1"


class CopyEngine(HFEngine):
    """Samples as `HFEngine` does, from a copy of the weights."""

    def __init__(self, opening: Opening, weights: Weights) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**opening.config)).eval()
        super().__init__(
            model,
            stop_ids=opening.stop_ids,
            sampling=Sampling(temperature=opening.temperature),
            record_logprobs=True,
            batch_size=1,  # so that responses are done one after the other
        )
        self._weights = weights
        self.sync()

    def sync(self) -> None:
        missing, unexpected = self.model.load_state_dict(dict(self._weights()), strict=False)
        assert unexpected == []
        assert missing in ([], ["lm_head.weight"])  # tied to the embedding


class DiceEngine:
    """Responses that follow from the seed, one after the other; log-probs from the weights."""

    def __init__(self, opening: Opening, weights: Weights) -> None:
        self._weights = weights
        self.pause_s = 0.05
        self.sync()

    def sync(self) -> None:
        self._sum = sum(float(weight.double().sum()) for _, weight in self._weights())

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_lengths: Sequence[int],
        seeds: Sequence[int],
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        done = []
        for i, (length, seed) in enumerate(zip(max_lengths, seeds, strict=True)):
            time.sleep(self.pause_s)
            dice = random.Random(seed)
            ids = [*prompts[i].token_ids, *(dice.randrange(13) for _ in range(length))]
            done.append(Completion(token_ids=ids, finished=True, logprobs=[self._sum] * len(ids)))
            if on_done is not None:
                on_done(i, done[i])
        return done


@contextmanager
def server_here(open_engine=CopyEngine, engine="test", token=None):
    """A server in threads of this process; yields it and what its service said."""
    said: list[str] = []
    service = RolloutService(open_engine, said.append)
    with RolloutServer(HOST, 0, service, engine=engine, token=token, heartbeat_s=0.2) as server:
        threading.Thread(target=service.work, daemon=True).start()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server, said
        finally:
            service.stop()
            server.shutdown()


class Process:
    """A server in a process of its own, always at the same port."""

    def __init__(self, *command: str, port: int = 0, **environment: str) -> None:
        self._command = command
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self.port = port
        self.start()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        """Start it and wait until it listens."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._command, str(self.port)],
            cwd=ROOT, env=self._environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if f"http://{HOST}:" in line:
                self.port = int(line.split(f"http://{HOST}:")[1].split(",")[0])
                return
        raise AssertionError(f"the server ended with {self._process.wait()}")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait until the port is free."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def restart(self) -> None:
        self.kill()
        self.start()


@contextmanager
def server_process(*command: str, **environment: str):
    process = Process(*(command or ("tests.rollouts.serving", "dice")), **environment)
    try:
        yield process
    finally:
        process.kill()


def later(work: Callable[[], None], seconds: float = 0.0) -> threading.Thread:
    """Do something in a thread, after a while."""

    def run() -> None:
        time.sleep(seconds)
        work()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


if __name__ == "__main__":
    chosen = {"dice": DiceEngine, "copy": CopyEngine}[sys.argv[1]]
    serve(chosen, "test", host=HOST, port=int(sys.argv[2]))
