"""Real model servers on this machine, for as long as they are needed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PATIENCE_S = 300.0
MAX_LENGTH = 2048
VLLM_ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextlib.contextmanager
def vllm(python: str, model: Path, name: str, log: Path, threads: int = 1) -> Iterator[str]:
    """vLLM in `python`'s environment; yields the base_url. Raises RuntimeError if it fails.

    By its module, because the command `vllm` of the package vllm-cpu looks for one named vllm.
    """
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(MAX_LENGTH), "--max-num-seqs", "16", "--enforce-eager"]
    with _running([*command, "--dtype", "float32"], port, log, threads, VLLM_ON_CPU) as url:
        yield url


@contextlib.contextmanager
def transformers(python: str, model: Path, log: Path, threads: int = 1) -> Iterator[str]:
    """`transformers serve` in `python`'s environment (transformers[serving]); its base_url.

    The model is called by its path there. Raises RuntimeError if it fails.
    """
    port = free_port()
    command = [python, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with _running([*command, "--dtype", "float32"], port, log, threads, {}) as url:
        yield url


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def _running(
    command: list[str], port: int, log: Path, threads: int, variables: dict[str, str]
) -> Iterator[str]:
    environment = os.environ | variables | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # the server's environment is its own
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _end(server)


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"the server did not start; the end of {log}:\n{tail}")


def _end(server: subprocess.Popen[bytes]) -> None:
    """The server, and what it started: they form a group."""
    os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):  # all have gone already
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
