"""The stage behind `klippo serve-rollouts`: vLLM for runs in other processes and machines."""

from __future__ import annotations

import ipaddress
import threading
import time
from functools import partial

from klippo.errors import ConfigError, PreflightError
from klippo.ranks import choose_device
from klippo.rollouts.protocol import TOKEN_VARIABLE, read_token
from klippo.rollouts.server import RolloutServer
from klippo.rollouts.service import OpenEngine, RolloutService
from klippo.rollouts.vllm import open_vllm, require_vllm, vllm_version


def serve_rollouts(*, host: str, port: int, device: str) -> int:
    """Serve until the process is told to end.

    Raises PreflightError where vLLM is missing, the address is taken, or a token is.
    """
    chosen = choose_device(device)
    require_vllm(chosen)
    engine = f"vLLM {vllm_version()} on {chosen.type}"
    serve(partial(open_vllm, device=chosen), engine, host=host, port=port)
    return 0


def serve(open_engine: OpenEngine, engine: str, *, host: str, port: int) -> None:
    """Read requests in threads, and let the engine work in this one."""
    token = read_token()
    if token is None and not _is_loopback(host):
        raise PreflightError(
            f"--host {host} lets other machines in, and no token keeps strangers out; set the "
            f"environment variable {TOKEN_VARIABLE} here and where the run starts, to a long "
            "random word"
        )
    service = RolloutService(open_engine, _say)
    try:
        server = RolloutServer(host, port, service, engine=engine, token=token)
    except OSError as error:
        raise PreflightError(
            f"--host {host} --port {port}: the address cannot be used ({error.strerror}); choose "
            "another port"
        ) from error
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        secret = "with the token" if token else "without a token"
        _say(f"{engine}, at {server.url}, {secret}; Ctrl-C ends it")
        service.work()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ConfigError(
            f"--host {host} is no address; use 127.0.0.1, or an address of this machine"
        ) from None


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)
