"""Two hosts on one machine: a run over both, and what is left of it when one is cut off.

    python scripts/two_hosts.py [--sharding fsdp|shard_grad_op] [--timeout-s 15]

Two network namespaces with an address each, joined by a veth pair, and torchrun on both sides.
First a short run is to end well; then a long one loses its second host, and the first host must
end by itself, in bounded time and with a message; then the cable is back, and the same command must
go on from the checkpoint. Needs root and `ip` (iproute2); exits with 77 where namespaces are not
permitted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOT_PERMITTED = 77
HOSTS = {"klippo-a": "10.77.0.1", "klippo-b": "10.77.0.2"}
PORT = 29577
START_S = 180.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sharding", default="none", choices=["none", "fsdp", "shard_grad_op"])
    parser.add_argument("--timeout-s", type=float, default=15.0)
    arguments = parser.parse_args()
    try:
        with two_hosts(), tempfile.TemporaryDirectory() as folder:
            options = [f"sharding={arguments.sharding}", f"peer_timeout_s={arguments.timeout_s}"]
            found = {
                "sharding": arguments.sharding,
                "peer_timeout_s": arguments.timeout_s,
                "whole_run": whole_run(Path(folder) / "whole", options),
                "cut_off": cut_off(Path(folder) / "cut", options),
            }
    except (PermissionError, FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"no network namespaces here: {error}", file=sys.stderr)
        return NOT_PERMITTED
    print(json.dumps(found, indent=1))
    cut = found["cut_off"]
    ended_well = found["whole_run"]["codes"] == [0, 0]
    ended_as_told = cut["says_so"] and cut["worker_exit_code_3"]
    return int(not (ended_well and ended_as_told and cut["goes_on"]))


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two namespaces, each with one end of a cable."""
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        first, second = HOSTS
        ip("link", "add", "eth-a", "netns", first, "type", "veth", "peer", "eth-b", "netns", second)
        for name, address in HOSTS.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", device_of(name))
            for device in ("lo", device_of(name)):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def device_of(host: str) -> str:
    return f"eth-{host[-1]}"


def start(folder: Path, options: list[str]) -> list[subprocess.Popen[str]]:
    """The quickstart's run on both hosts, one process each; they share the run's folder."""
    launched = []
    for rank, name in enumerate(HOSTS):
        output = folder / name
        output.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += ["--node_rank", str(rank), "--master_addr", HOSTS["klippo-a"]]
        launcher += ["--master_port", str(PORT), "-m", "klippo", "train", "quickstart"]
        launcher += ["device=cpu", f"output_dir={folder / 'run'}", *options]
        launched.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, *launcher],
                env=os.environ | {"GLOO_SOCKET_IFNAME": device_of(name), "OMP_NUM_THREADS": "1"},
                stdout=(output / "stdout.txt").open("w"),
                stderr=(output / "stderr.txt").open("w"),
                text=True,
            )
        )
    return launched


def whole_run(folder: Path, options: list[str]) -> dict[str, object]:
    """Two steps over both hosts."""
    begun = time.monotonic()
    launched = start(folder, [*options, "ppo.num_steps=2", "evaluation.num_prompts=4"])
    codes = [process.wait(timeout=START_S) for process in launched]
    return {"codes": codes, "seconds": round(time.monotonic() - begun, 1)}


def cut_off(folder: Path, options: list[str]) -> dict[str, object]:
    """A long run whose second host loses its cable after two steps, and finds it again."""
    options = [*options, "evaluation.num_prompts=4", "checkpoint.every=1"]
    launched = start(folder, [*options, "ppo.num_steps=2000"])
    metrics = folder / "run/metrics.jsonl"
    try:
        deadline = time.monotonic() + START_S
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no steps after {START_S:g} s")
            time.sleep(0.2)
        ip("-n", "klippo-b", "link", "set", "eth-b", "down")
        cut = time.monotonic()
        code = launched[0].wait(timeout=START_S)
        seconds = time.monotonic() - cut
    finally:
        for process in launched:
            process.terminate()
    for process in launched:
        process.wait(timeout=START_S)
    told = (folder / "klippo-a/stderr.txt").read_text()
    ip("-n", "klippo-b", "link", "set", "eth-b", "up")
    done = metrics.read_text().count("\n")
    again = start(folder, [*options, f"ppo.num_steps={done + 2}", "--resume"])
    codes = [process.wait(timeout=START_S) for process in again]
    said = (folder / "klippo-a/stdout.txt").read_text()
    going_on = next((line for line in said.splitlines() if "Going on with" in line), "")
    return {
        "launcher_code": code,
        "worker_exit_code_3": "exitcode  : 3" in told,
        "seconds_to_end": round(seconds, 1),
        "says_so": "another process of this run ended, or did not answer" in told,
        "message": next((line for line in told.splitlines() if "another process" in line), ""),
        "steps_done": done,
        "again": going_on.strip(),
        "goes_on": codes == [0, 0] and bool(going_on),
    }


if __name__ == "__main__":
    sys.exit(main())
