"""Answers and the budget's ledger, in one SQLite file that processes share."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from klippo.errors import StorageError
from klippo.judge.database import Spend, add, connect, open_database, total_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What may be spent at most; None is without end."""

    calls: int | None = None
    tokens: int | None = None
    nano_usd: int | None = None

    def passed_by(self, spend: Spend) -> str | None:
        """The name of a cap that this spend would pass."""
        for name in ("calls", "tokens", "nano_usd"):
            cap = getattr(self, name)
            if cap is not None and getattr(spend, name) > cap:
                return name
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An answer: a body to read, or the cause for which there is nothing to read."""

    body: bytes
    cause: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What became of the wish to make an attempt."""

    kind: Literal["stored", "elsewhere", "over_budget", "reserved"]
    stored: Stored | None = None
    reservation: int = 0
    cap: str = ""
    """Which one would be passed."""
    may_fit: bool = False
    """True where what living processes have reserved may turn out to cost less."""
    total: Spend = field(default_factory=Spend)


def cache_key(parts: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Store:
    """The file. One thread writes; what is asked of it meanwhile shares its next transaction."""

    def __init__(self, path: Path | None, account: str = "default") -> None:
        """Open or create the file; None keeps everything in memory.

        Raises PreflightError when the file cannot be opened or is from another version. A corrupt
        file is set aside with a warning.
        """
        self.path = path
        self.account = account
        self.owner = uuid.uuid4().hex
        self._db = open_database(path)
        self._writing = threading.Lock()
        self._reader, self._reading = self._db, self._writing
        if path is not None:
            self._reader, self._reading = connect(str(path)), threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="klippo-judge-store", daemon=True)
        self._writer.start()

    def look_up(self, key: str) -> Stored | None:
        """The stored answer."""
        with self._reading:
            return _look_up(self._reader, key)

    def total(self) -> Spend:
        """What the account has spent, pending reservations at their worst case."""
        with self._reading:
            return total_of(self._reader, self.account)

    def pending(self) -> Spend:
        """The part of it that is pending."""
        with self._reading:
            row = self._reader.execute(
                "SELECT count(*), coalesce(sum(tokens), 0), coalesce(sum(nano_usd), 0) "
                "FROM pending WHERE account = ?",
                (self.account,),
            ).fetchone()
        return Spend(*row)

    async def start(
        self, key: str, worst: Spend, caps: Caps, *, attempt_s: float, patience_s: float
    ) -> Start:
        """Reserve the worst case of one attempt, unless it is needless or too much.

        The attempt is over after `attempt_s`. The key is claimed for `patience_s`, in which no
        other process asks for it.
        """
        now = time.time()

        def work(db: sqlite3.Connection) -> Start:
            stored = _look_up(db, key)
            if stored is not None:
                return Start(kind="stored", stored=stored)
            if _is_claimed(db, key, self.owner):
                return Start(kind="elsewhere")
            total = total_of(db, self.account)
            cap = caps.passed_by(total + worst)
            if cap is not None:
                rest = total - _in_flight(db, self.account)
                may_fit = caps.passed_by(rest + worst) is None
                return Start(kind="over_budget", cap=cap, total=total, may_fit=may_fit)
            add(db, self.account, worst)
            claim = (key, self.owner, os.getpid(), now + patience_s)
            db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", claim)
            reserved = db.execute(
                "INSERT INTO pending (account, tokens, nano_usd, pid, until) "
                "VALUES (?, ?, ?, ?, ?)",
                (self.account, worst.tokens, worst.nano_usd, os.getpid(), now + attempt_s),
            )
            return Start(kind="reserved", reservation=reserved.lastrowid or 0)

        started: Start = await self._ask(work)
        return started

    async def settle(
        self, reservation: int, worst: Spend, actual: Spend, key: str, stored: Stored | None
    ) -> None:
        """Replace a reservation by what was spent, and keep the answer, in one transaction."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM pending WHERE id = ?", (reservation,))
            add(db, self.account, actual - worst)
            if stored is not None:
                row = (key, stored.cause, stored.body)
                db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)

        await self._ask(work)

    async def release(self, key: str) -> None:
        """Give the claim back: another process may ask."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self.owner))

        await self._ask(work)

    def close(self) -> None:
        """Finish what is asked and close the file."""
        if self._writer.is_alive():
            self._jobs.put(None)
            self._writer.join()
            with self._reading, contextlib.suppress(sqlite3.Error):
                self._reader.close()
            self._db.close()

    async def _ask(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        loop = asyncio.get_running_loop()
        job = _Job(work, loop, loop.create_future())
        self._jobs.put(job)
        return await job.future

    def _write(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs, is_last = [first], False
            with contextlib.suppress(queue.Empty):
                while len(jobs) < 256:
                    job = self._jobs.get_nowait()
                    if job is None:
                        is_last = True
                        break
                    jobs.append(job)
            self._commit(jobs)
            if is_last:
                return

    def _commit(self, jobs: list[_Job]) -> None:
        results: list[Any] = []
        problem: StorageError | None = None
        with self._writing:
            try:
                with _transaction(self._db):
                    results = [job.work(self._db) for job in jobs]
            except Exception as error:
                problem = StorageError(
                    f"cannot write {self.path}: {error}; free some space, or choose another cache "
                    "(the answers written before are whole)"
                )
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Any]]] = {}
        for place, job in enumerate(jobs):
            result = None if problem is not None else results[place]
            by_loop.setdefault(job.loop, []).append((job, result))
        for loop, done in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed; nobody waits
                loop.call_soon_threadsafe(_tell, done, problem)


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[sqlite3.Connection], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


def _tell(done: list[tuple[_Job, Any]], problem: StorageError | None) -> None:
    for job, result in done:
        if job.future.done():
            continue
        if problem is not None:
            job.future.set_exception(StorageError(*problem.args))
        else:
            job.future.set_result(result)


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _look_up(db: sqlite3.Connection, key: str) -> Stored | None:
    row = db.execute("SELECT cause, body FROM answers WHERE key = ?", (key,)).fetchone()
    return None if row is None else Stored(cause=row[0], body=row[1])


def _in_flight(db: sqlite3.Connection, account: str) -> Spend:
    """What living processes have reserved and not settled; calls stay spent in any case."""
    rows = db.execute(
        "SELECT pid, sum(tokens), sum(nano_usd) FROM pending "
        "WHERE account = ? AND until > ? GROUP BY pid",
        (account, time.time()),
    ).fetchall()
    return sum((Spend(0, *row[1:]) for row in rows if _is_alive(row[0])), Spend())


def _is_claimed(db: sqlite3.Connection, key: str, owner: str) -> bool:
    """True when another living process asks for this key now."""
    row = db.execute("SELECT owner, pid, until FROM claims WHERE key = ?", (key,)).fetchone()
    if row is None or row[0] == owner or row[2] < time.time():
        return False
    return _is_alive(row[1])


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would end it there; the claim runs out instead
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
