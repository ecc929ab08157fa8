"""The judge's transport keeps up; benchmarks/judge_transport.py measures it with less noise."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.judge.helpers import ask_all, question
from tests.judge.server import FaultServer, ok


@pytest.mark.timed
def test_256_calls_of_200_ms_at_64_at_a_time_take_little_more_than_four_rounds(
    tmp_path: Path,
) -> None:
    with FaultServer(otherwise=ok(delay_s=0.2)) as server:
        requests = [question(i) for i in range(256)]
        start = time.perf_counter()
        answers = ask_all(server, requests, cache=tmp_path / "j.sqlite", concurrency=64)
        took_s = time.perf_counter() - start
        assert server.most_in_flight == 64
    assert {answer.cause for answer in answers} == {None}
    assert took_s < 3 * 4 * 0.2  # four rounds, with a server in the same process and other load


@pytest.mark.timed
def test_a_call_costs_milliseconds_at_most(tmp_path: Path) -> None:
    with FaultServer() as server:
        requests = [question(i) for i in range(512)]
        start = time.perf_counter()
        ask_all(server, requests, cache=tmp_path / "j.sqlite", concurrency=64)
        took_s = time.perf_counter() - start
    assert took_s / 512 < 0.012
