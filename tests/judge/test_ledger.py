"""The judge's cache and budget: nothing is paid twice, and no cap is ever passed."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from klippo.errors import BudgetError, PreflightError
from klippo.judge.client import JudgeClient
from klippo.judge.store import Store
from tests.judge.helpers import QUICK, ask_all, question, settings
from tests.judge.server import FaultServer, Hit, Step, encoded, error, ok

PRICES = {"usd_per_million_prompt_tokens": 2.5, "usd_per_million_completion_tokens": 10.0}


def totals(cache: Path, account: str = "default") -> tuple[int, int, int]:
    with sqlite3.connect(cache) as db:
        row = db.execute(
            "SELECT calls, tokens, nano_usd FROM totals WHERE account = ?", (account,)
        ).fetchone()
    return row or (0, 0, 0)


def test_a_second_run_over_the_same_requests_makes_no_call(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"
    requests = [question(i, labels=("A",), schema={"a": 1}, vote=i % 2) for i in range(40)]
    kinds = {
        "1": ok(None, message={"refusal": "no"}),
        "2": ok("Sco", finish="length"),
        "3": ok("Score: 2", logprobs={"A": -0.5}),
    }

    def reply(hit: Hit) -> Step:
        return kinds.get(hit.body["messages"][1]["content"].split()[-1], ok())

    with FaultServer(otherwise=reply) as server:
        first = ask_all(server, requests, cache=cache)
        num_hits = len(server.hits)
        second = ask_all(server, requests, cache=cache)
        assert len(server.hits) == num_hits
    assert all(answer.cached and answer.num_attempts == 0 for answer in second)
    assert [(a.text, a.cause, a.label_logprobs) for a in second] == [
        (a.text, a.cause, a.label_logprobs) for a in first
    ]
    assert {a.cause for a in first} == {None, "refusal", "truncated"}


@pytest.mark.parametrize(
    "changed",
    [
        {"vote": 1},
        {"max_tokens": 17},
        {"temperature": 0.0},
        {"labels": ("A",)},
        {"schema": {"type": "object"}},
        {"messages": ({"role": "user", "content": "other"},)},
    ],
)
def test_another_question_is_another_key(changed: dict[str, Any]) -> None:
    with FaultServer() as server:
        answers = ask_all(server, [question(), question(**changed)], concurrency=1)
        assert len(server.hits) == 2
    assert not any(answer.cached for answer in answers)


@pytest.mark.parametrize("changed", [{"model": "other"}, {"protocol": "anthropic_messages"}])
def test_another_judge_is_another_key(changed: dict[str, Any], tmp_path: Path) -> None:
    with FaultServer() as server:

        async def keys() -> set[str]:
            clients = [JudgeClient(settings(server)), JudgeClient(settings(server, **changed))]
            return {client.key(question()) for client in clients}

        assert len(asyncio.run(keys())) == 2


def test_duplicates_in_flight_share_one_call_and_one_bill() -> None:
    with FaultServer(otherwise=ok(delay_s=0.05)) as server:
        answers = ask_all(server, [question()] * 30, **PRICES)
        assert len(server.hits) == 1
    assert sum(answer.num_attempts for answer in answers) == 1
    assert sum(answer.cost_usd or 0 for answer in answers) == pytest.approx(75e-6)
    assert {answer.text for answer in answers} == {"Score: 7"}


def test_a_call_is_settled_from_usage(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"
    with FaultServer() as server:
        (answer,) = ask_all(server, [question()], cache=cache, max_usd=1.0, **PRICES)
    assert answer.cost_usd == pytest.approx(10 * 2.5e-6 + 5 * 10e-6)
    assert totals(cache) == (1, 15, 75_000)


@pytest.mark.parametrize(
    ("step", "is_worst"),
    [
        (error(500), True),
        (Step(resets=True), True),
        (Step(delay_s=9), True),
        (ok(usage=None), True),
        (encoded({"choices": []}), True),
        (error(429), False),
        (error(400), False),
        (error(503), False),
    ],
)
def test_what_may_have_been_billed_counts_at_its_worst(
    step: Step, is_worst: bool, tmp_path: Path
) -> None:
    cache = tmp_path / "judge.sqlite"
    with FaultServer([step]) as server:
        ask_all(server, [question()], cache=cache, max_attempts=1, timeout_s=0.2, **PRICES)
    calls, tokens, nano_usd = totals(cache)
    assert calls == 1
    assert (tokens > 300, nano_usd > 0) == (is_worst, is_worst)


def test_what_reached_no_server_costs_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"
    with FaultServer() as server:
        url = server.url
    ask_all(url, [question()], cache=cache, **PRICES)
    assert totals(cache) == (0, 0, 0)


@pytest.mark.parametrize("name", ["max_calls", "max_tokens_total", "max_usd"])
def test_the_budget_ends_before_it_is_passed_and_paid_answers_are_kept(
    name: str, tmp_path: Path
) -> None:
    cache = tmp_path / "judge.sqlite"
    caps = {"max_calls": 10, "max_tokens_total": 700, "max_usd": 0.0025}
    requests = [question(i) for i in range(60)]
    with FaultServer() as server:
        with pytest.raises(BudgetError, match=f"would pass {name}=") as caught:
            ask_all(server, requests, cache=cache, concurrency=8, **PRICES, **{name: caps[name]})
        assert caught.value.exit_code == 5
        spent = dict(zip(("max_calls", "max_tokens_total", "max_usd"), totals(cache), strict=True))
        assert spent["max_calls"] == len(server.hits) >= 8
        assert spent[name] <= caps[name] * (1e9 if name == "max_usd" else 1)
        num_hits = len(server.hits)
        answers = ask_all(server, requests, cache=cache)
        assert sum(answer.cached for answer in answers) == num_hits
        assert len(server.hits) == 60


def test_a_reservation_too_large_for_now_waits_for_those_in_flight() -> None:
    with FaultServer(otherwise=ok(delay_s=0.02)) as server:
        requests = [question(i) for i in range(12)]
        answers = ask_all(server, requests, max_tokens_total=1500, concurrency=6)
        assert {answer.cause for answer in answers} == {None}
        assert server.most_in_flight == 2


def test_what_a_dead_or_forgotten_call_reserved_is_not_waited_for(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"

    async def forget(server: FaultServer) -> None:
        client = JudgeClient(settings(server, timeout_s=0.3), cache=cache, timing=QUICK)
        asking = asyncio.ensure_future(client.ask(question()))
        await asyncio.sleep(0.1)
        await client.close(drain_s=0.0)
        await asyncio.gather(asking, return_exceptions=True)

    with FaultServer([Step(delay_s=3)]) as server:
        asyncio.run(forget(server))
        with pytest.raises(BudgetError):
            ask_all(server, [question(1)], cache=cache, max_tokens_total=600)
        assert len(server.hits) == 1


def test_runs_that_share_a_file_share_answers_and_not_the_budget(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"
    with FaultServer() as server:
        ask_all(server, [question(i) for i in range(5)], cache=cache, account="a", max_calls=5)
        with pytest.raises(BudgetError):
            ask_all(server, [question(9)], cache=cache, account="a", max_calls=5)
        requests = [question(i) for i in range(10)]
        ask_all(server, requests, cache=cache, account="b", max_calls=5)
        assert len(server.hits) == 10
    assert (totals(cache, "a")[0], totals(cache, "b")[0]) == (5, 5)


def random_fault(rng: random.Random) -> Step:
    return rng.choice(
        [
            ok(),
            ok(),
            ok(),
            ok(finish="length"),
            ok(""),
            error(500),
            error(429, headers={"Retry-After-Ms": "3"}),
            error(400, "odd"),
            Step(resets=True),
            Step(body=ok().body, cut=15),
            Step(delay_s=1.2),
            ok(delay_s=0.02),
        ]
    )


@pytest.mark.parametrize("seed", range(3))
def test_attempts_add_up_to_the_servers_hits_under_random_faults(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    cache = tmp_path / "judge.sqlite"
    with FaultServer(otherwise=lambda hit: random_fault(rng)) as server:
        requests = [question(i) for i in range(80)]
        answers = ask_all(server, requests, cache=cache, timeout_s=0.8, concurrency=24)
        num_hits = len(server.hits)
    assert sum(answer.num_attempts for answer in answers) == num_hits == totals(cache)[0]
    assert max(answer.num_attempts for answer in answers) <= 6


@pytest.mark.parametrize("damage", ["head", "middle", "cut", "noise"])
def test_a_corrupt_cache_is_set_aside_with_the_sum_at_risk(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "judge.sqlite"
    with FaultServer() as server:
        requests = [question(i) for i in range(60)]
        ask_all(server, requests, cache=cache, max_usd=1.0, **PRICES)
        spent = totals(cache)
        content = bytearray(cache.read_bytes())
        if damage == "head":
            content[:64] = bytes(64)
        elif damage == "middle":
            content[8192:] = bytes(b ^ 0xFF for b in content[8192:])
        elif damage == "cut":
            del content[5000:]
        else:
            content[:] = b"not a database at all, but text" * 200
        cache.write_bytes(content)
        caplog.clear()
        (answer,) = ask_all(server, [question(0)], cache=cache, max_usd=1.0, **PRICES)
        assert answer.cause is None
        assert len(server.hits) == 61
    (warning,) = [record.message for record in caplog.records if "corrupt" in record.message]
    aside = [path for path in tmp_path.iterdir() if ".corrupt-" in path.name]
    assert any(path.read_bytes() == bytes(content) for path in aside)
    if totals(cache)[0] > 1:
        assert "60 calls, 900 tokens and 0.0045 USD" in warning
        assert totals(cache) == (spent[0] + 1, spent[1] + 15, spent[2] + 75_000)
    else:
        assert "what was spent before is unknown" in warning


def test_a_file_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    before = other.read_bytes()
    with pytest.raises(PreflightError, match="something else"):
        Store(other)
    assert other.read_bytes() == before
    with sqlite3.connect(other) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(PreflightError, match="version 99"):
        Store(other)
    with pytest.raises(PreflightError, match="cannot be opened"):
        Store(tmp_path)


CHILD = """
import asyncio, json, sys
from pathlib import Path
from klippo.errors import BudgetError
from tests.judge.helpers import QUICK, question, settings
from klippo.judge.client import JudgeClient
import signal

url, cache, first, last, more = sys.argv[1:]

async def main():
    client = JudgeClient(settings(url, **json.loads(more)), cache=Path(cache), timing=QUICK)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, client.stop)
    import httpx2  # takes its time
    print("ready", flush=True)

    async def one(i):
        try:
            answer = await client.ask(question(i))
        except BudgetError:
            print("over", flush=True)
            return
        if answer.cause is None:
            print("paid" if not answer.cached else "hit", i, flush=True)
        else:
            print(answer.cause, i, flush=True)

    await asyncio.gather(*(one(i) for i in range(int(first), int(last))))
    await client.close()

asyncio.run(main())
"""


def child(server: FaultServer, cache: Path, rows: Sequence[int], **more: Any) -> Any:
    arguments = [server.url, str(cache), str(rows[0]), str(rows[-1] + 1), json.dumps(more)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def lines(process: Any) -> list[list[str]]:
    output, _ = process.communicate(timeout=60)
    return [line.split() for line in output.splitlines()]


def test_two_processes_racing_for_the_last_cent_stay_under_the_cap(tmp_path: Path) -> None:
    cache, usd = tmp_path / "judge.sqlite", 0.004
    more = PRICES | {"max_usd": usd, "concurrency": 8}
    with FaultServer(otherwise=ok(delay_s=0.005)) as server:
        children = [child(server, cache, range(100 * n, 100 * n + 100), **more) for n in range(2)]
        said = [lines(process) for process in children]
        paid = sum(line[0] == "paid" for output in said for line in output)
        assert paid == len(server.hits)
    calls, _, nano_usd = totals(cache)
    assert calls == paid
    assert 0.5e9 * usd < nano_usd <= usd * 1e9
    assert all(["over"] in output for output in said)


def test_two_processes_with_the_same_questions_pay_once(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"
    with FaultServer(otherwise=ok(delay_s=0.02)) as server:
        children = [child(server, cache, range(60), concurrency=8) for _ in range(2)]
        said = [lines(process) for process in children]
        assert len(server.hits) == 60
    assert sum(line[0] == "paid" for output in said for line in output) == 60
    assert sum(line[0] == "hit" for output in said for line in output) == 60


def kill_and_count(tmp_path: Path, num_kills: int) -> None:
    """Kill clients at random moments: no cap is passed and nothing is paid twice."""
    cache, rng, cap = tmp_path / "judge.sqlite", random.Random(5), 0.2
    more = PRICES | {"concurrency": 8, "max_usd": cap}
    paid: set[str] = set()
    with FaultServer(otherwise=lambda hit: ok(delay_s=rng.uniform(0, 0.03))) as server:
        for _ in range(num_kills):
            process = child(server, cache, range(1500), **more)
            process.stdout.readline()
            first = process.stdout.readline().split()  # however long the start takes
            time.sleep(rng.uniform(0.05, 0.5))
            process.send_signal(signal.SIGKILL)
            said = [first, *lines(process)]
            assert not [line for line in said if line[0] == "paid" and line[1] in paid]
            paid |= {line[1] for line in said if line[0] == "paid" and len(line) == 2}
            calls, _, nano_usd = totals(cache)
            assert nano_usd <= cap * 1e9
            assert calls >= len(server.hits)
        assert totals(cache)[0] <= len(server.hits) + 8 * num_kills
        num_hits = len(server.hits)
        answers = ask_all(server, [question(i) for i in sorted(map(int, paid))], cache=cache)
        assert len(server.hits) == num_hits
    assert len(paid) > num_kills
    assert all(answer.cached for answer in answers)


def test_a_killed_client_has_paid_for_what_it_said_and_what_was_pending(tmp_path: Path) -> None:
    kill_and_count(tmp_path, 3)


@pytest.mark.slow
def test_twenty_kills_pass_no_cap_and_pay_nothing_twice(tmp_path: Path) -> None:
    kill_and_count(tmp_path, 20)


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"
    with FaultServer([Step(delay_s=9)]) as server:
        process = child(server, cache, [0])
        deadline = time.monotonic() + 30
        while not server.hits and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        lines(process)
        (answer,) = ask_all(server, [question(0)], cache=cache)
        assert (answer.cause, len(server.hits)) == (None, 2)
    assert totals(cache)[0] == 2


@pytest.mark.timed
def test_sigterm_issues_nothing_more_and_lets_calls_in_flight_finish(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"
    with FaultServer(otherwise=ok(delay_s=0.3)) as server:
        process = child(server, cache, range(50), concurrency=5)
        process.stdout.readline()
        time.sleep(0.15)
        process.send_signal(signal.SIGTERM)
        said = lines(process)
        assert len(server.hits) == 5
    assert sorted(line[0] for line in said) == ["paid"] * 5 + ["stopped"] * 45
    assert process.returncode == 0


@pytest.mark.timed
def test_what_is_still_in_flight_after_the_drain_counts_as_spent(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"

    async def run(server: FaultServer) -> dict[str, Any]:
        client = JudgeClient(settings(server), cache=cache, timing=QUICK)
        asking = asyncio.ensure_future(client.ask(question()))
        await asyncio.sleep(0.1)
        start = time.monotonic()
        await client.close(drain_s=0.1)
        assert time.monotonic() - start < 0.6
        with pytest.raises(asyncio.CancelledError):
            await asking
        return {}

    with FaultServer([Step(delay_s=3)]) as server:
        asyncio.run(run(server))
    assert totals(cache)[0] == 1


def test_an_asker_who_gives_up_leaves_a_paid_answer_behind(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"

    async def run(server: FaultServer) -> None:
        client = JudgeClient(settings(server), cache=cache, timing=QUICK)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.ask(question()), 0.05)
        await client.close()

    with FaultServer([ok("Score: 9", delay_s=0.2)]) as server:
        asyncio.run(run(server))
        (answer,) = ask_all(server, [question()], cache=cache)
        assert (answer.text, answer.cached, len(server.hits)) == ("Score: 9", True, 1)


def test_a_cache_of_the_first_version_keeps_its_answers_and_totals(tmp_path: Path) -> None:
    cache = tmp_path / "judge.sqlite"
    with FaultServer() as server:
        ask_all(server, [question(0)], cache=cache)
        with sqlite3.connect(cache) as db:
            db.execute("CREATE TABLE claims (key TEXT, owner TEXT, pid INTEGER, until REAL)")
            db.execute("CREATE TABLE pending (id INTEGER, account TEXT, tokens INTEGER)")
            db.execute("PRAGMA user_version = 1")
        (answer,) = ask_all(server, [question(0)], cache=cache)
        assert (answer.cached, len(server.hits)) == (True, 1)
    assert totals(cache)[0] == 1
    with sqlite3.connect(cache) as db:
        names = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
        assert names >= {"answers", "totals"}
        assert not names & {"claims", "pending"}


def test_two_clients_of_one_process_ask_a_question_one_after_the_other(tmp_path: Path) -> None:
    stores = [Store(tmp_path / "judge.sqlite") for _ in range(2)]
    key = "0123456789abcdef"
    assert [store.claim(key) for store in stores] == [True, False]
    stores[0].release(key)
    assert stores[1].claim(key)
    stores[1].release(key)
    for store in stores:
        store.close()
