"""The judge's SQLite file: its answers, and what each account has spent.

answers  key -> the server's body as it came, so that reading it again is free
totals   account -> calls, tokens and money: as billed, or at worst for attempts not yet back

A process locks the byte of a key in a file beside it while it asks that question. The kernel
drops the lock when the process ends, whichever way it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from klippo.errors import PreflightError, StorageError
from klippo.judge.settings import TransportSettings

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

VERSION = 2
BUSY_S = 60.0
"""How long a process waits for another one's write."""
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, cause TEXT, body BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals (
    account TEXT PRIMARY KEY, calls INTEGER NOT NULL, tokens INTEGER NOT NULL,
    nano_usd INTEGER NOT NULL
) WITHOUT ROWID;
DROP TABLE IF EXISTS claims;
DROP TABLE IF EXISTS pending;
PRAGMA user_version = {VERSION};
COMMIT;
"""
OPENING_BYTE = 2**62
"""Locked in the lock file while a process opens the database; keys lock lower bytes."""
TEMPLATE_TOKENS, MESSAGE_TOKENS = 256, 64
"""Allowed for what a server puts around all messages, and around each."""


@dataclass(frozen=True, slots=True)
class Spend:
    """Calls, tokens and money; money in whole nano-USD, so that nothing is rounded away."""

    calls: int = 0
    tokens: int = 0
    nano_usd: int = 0

    def __add__(self, other: Spend) -> Spend:
        return Spend(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Spend) -> Spend:
        return self + other * -1

    def __mul__(self, times: int) -> Spend:
        return Spend(*(times * number for number in astuple(self)))

    def __str__(self) -> str:
        return f"{self.calls} calls, {self.tokens} tokens and {self.nano_usd / 1e9:.4f} USD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A stored answer: a body to read, or the cause why there is nothing to read."""

    body: bytes = b""
    cause: str | None = None


class Meter:
    """What calls cost, by the prices and caps in the settings."""

    def __init__(self, settings: TransportSettings) -> None:
        self.settings = settings
        self._margin = 1.0

    def spend(self, prompt_tokens: int, completion_tokens: int) -> Spend:
        """One call with so many tokens, at the set prices, rounded up."""
        read_price, written_price = self.settings.prices or (0.0, 0.0)
        nano_usd = math.ceil(
            1000 * (prompt_tokens * read_price + completion_tokens * written_price)
        )
        return Spend(1, prompt_tokens + completion_tokens, nano_usd)

    def worst(self, num_bytes: int, num_messages: int, max_tokens: int) -> Spend:
        """The most that a call with such a body costs: no token is shorter than a byte."""
        most = num_bytes + TEMPLATE_TOKENS + MESSAGE_TOKENS * num_messages
        return self.spend(math.ceil(most * self._margin), max_tokens)

    def learn(self, tokens: int, worst: Spend) -> float | None:
        """If a call used more than its worst case, reserve more from now on; by which factor."""
        excess = tokens / worst.tokens
        if excess <= 1:
            return None
        self._margin *= excess
        return excess

    def cap_passed_by(self, total: Spend) -> str | None:
        """The name of a cap that this total passes."""
        settings = self.settings
        nano_usd = None if settings.max_usd is None else math.floor(settings.max_usd * 1e9)
        caps = {
            "max_calls": (total.calls, settings.max_calls),
            "max_tokens_total": (total.tokens, settings.max_tokens_total),
            "max_usd": (total.nano_usd, nano_usd),
        }
        return next((name for name, (n, cap) in caps.items() if cap is not None and n > cap), None)


Outcome = Stored | Spend | None
_Work = Callable[[sqlite3.Connection], Outcome]
_claimed: set[tuple[int, int]] = set()
"""Lock file and byte of every question that this process is asking: a process does not lock
itself out."""


class Store:
    """One connection to the file for reading and one for writing; used on one event loop.

    Writes that are asked for while another one is under way share the next transaction.
    """

    def __init__(self, path: Path | None, account: str = "default") -> None:
        """Open or create the file; None keeps everything in memory.

        Raises PreflightError when the file cannot be opened or is from another version. Sets a
        corrupt file aside with a warning.
        """
        self.path = path
        self.account = account
        self._db = _open(path)
        self._reader = self._db if path is None else _connect(path)
        self._lock_file = None if path is None else _lock_file(path.absolute())
        self._jobs: list[tuple[_Work, asyncio.Future[Outcome]]] = []
        self._writing: asyncio.Task[None] | None = None

    def look_up(self, key: str) -> Stored | None:
        """The stored answer."""
        return _look_up(self._reader, key)

    def claim(self, key: str) -> bool:
        """True if nobody else is asking this question now; then nobody may until `release`."""
        if self._lock_file is None:
            return True
        claim = (self._lock_file, int(key[:15], 16))
        if claim in _claimed:
            return False
        try:
            fcntl.lockf(claim[0], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, claim[1])
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:  # no locks on this file system: the worst is a second call
            logger.debug("no lock on %s: %s", self.path, error)
        _claimed.add(claim)
        return True

    def release(self, key: str) -> None:
        """Let others ask."""
        if self._lock_file is not None:
            byte = int(key[:15], 16)
            _claimed.discard((self._lock_file, byte))
            with contextlib.suppress(OSError):
                fcntl.lockf(self._lock_file, fcntl.LOCK_UN, 1, byte)

    async def reserve(self, key: str, worst: Spend, meter: Meter) -> Outcome:
        """Count the worst case of one attempt as spent: None.

        Otherwise nothing is reserved, because there is an answer by now (it is returned), or
        because a cap would be passed (the account's total is returned).
        """

        def work(db: sqlite3.Connection) -> Outcome:
            stored = _look_up(db, key)
            if stored is not None:
                return stored
            total = _total(db, self.account)
            if meter.cap_passed_by(total + worst) is not None:
                return total
            _add(db, self.account, worst)
            return None

        return await self._write(work)

    async def settle(self, excess: Spend, key: str, stored: Stored | None) -> None:
        """Take off what was reserved in excess and keep the answer, in one transaction."""

        def work(db: sqlite3.Connection) -> None:
            _add(db, self.account, excess * -1)
            if stored is not None:
                row = (key, stored.cause, stored.body)
                db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)

        await self._write(work)

    async def flush(self) -> None:
        """Wait for the writes under way."""
        if self._writing is not None:
            await self._writing

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
        self._db.close()

    async def _write(self, work: _Work) -> Outcome:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Outcome] = loop.create_future()
        self._jobs.append((work, done))
        if self._writing is None or self._writing.done():
            self._writing = loop.create_task(self._write_all())
        return await done

    async def _write_all(self) -> None:
        while self._jobs:
            jobs, self._jobs = self._jobs, []
            waiting = [done for _, done in jobs]
            try:
                outcomes = await asyncio.to_thread(self._commit, [work for work, _ in jobs])
            except Exception as error:
                problem = (
                    f"cannot write {self.path}: {error}; free some space, or choose another cache "
                    "(the answers written before are complete)"
                )
                for done in waiting:
                    if not done.done():  # else whoever asked has gone
                        done.set_exception(StorageError(problem))
                continue
            for done, outcome in zip(waiting, outcomes, strict=True):
                if not done.done():
                    done.set_result(outcome)

    def _commit(self, works: list[_Work]) -> list[Outcome]:
        with self._db:  # commits, or rolls back
            self._db.execute("BEGIN IMMEDIATE")
            return [work(self._db) for work in works]


def _look_up(db: sqlite3.Connection, key: str) -> Stored | None:
    row = db.execute("SELECT cause, body FROM answers WHERE key = ?", (key,)).fetchone()
    return None if row is None else Stored(cause=row[0], body=row[1])


def _total(db: sqlite3.Connection, account: str) -> Spend:
    row = db.execute(
        "SELECT calls, tokens, nano_usd FROM totals WHERE account = ?", (account,)
    ).fetchone()
    return Spend() if row is None else Spend(*row)


def spent_in(path: Path, account: str) -> Spend:
    """What an account has spent by a file, which is only read; nothing if there is no such file.

    Attempts that are not back yet count at their worst case.
    """
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        with contextlib.closing(db):
            return _total(db, account)
    except sqlite3.Error:
        return Spend()


def _add(db: sqlite3.Connection, account: str, spend: Spend) -> None:
    db.execute(
        "INSERT INTO totals VALUES (?, ?, ?, ?) ON CONFLICT (account) DO UPDATE SET "
        "calls = calls + excluded.calls, tokens = tokens + excluded.tokens, "
        "nano_usd = nano_usd + excluded.nano_usd",
        (account, *astuple(spend)),
    )


def _open(path: Path | None) -> sqlite3.Connection:
    if path is None:
        return _check(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opening(path):
            try:
                return _check(path)
            except sqlite3.OperationalError:
                raise  # locked, read-only, no space: the file may be fine
            except sqlite3.DatabaseError as error:
                return _replace(path, error)
    except (OSError, sqlite3.Error) as error:
        raise PreflightError(
            f"the judge's cache {path} cannot be opened ({error}); choose another file with cache"
        ) from None


def _connect(path: Path | None) -> sqlite3.Connection:
    name = ":memory:" if path is None else str(path)
    return sqlite3.connect(
        name, timeout=BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=64
    )


def _check(path: Path | None) -> sqlite3.Connection:
    db = _connect(path)
    try:
        problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, 1, VERSION):
            raise PreflightError(
                f"the judge's cache {path} is of version {version}, and this Klippo reads version "
                f"{VERSION}; choose another file with cache"
            )
        if version == 0 and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise PreflightError(
                f"{path} is a database of something else; choose another file with cache"
            )
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if version != VERSION:
            db.executescript(SCHEMA)
        return db
    except BaseException:
        db.close()
        raise


def _replace(path: Path, problem: sqlite3.DatabaseError) -> sqlite3.Connection:
    """Set a corrupt file aside; its totals move to the new one if they can still be read."""
    totals = _rescued_totals(path)
    aside = path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}")
    while aside.exists():
        aside = aside.with_name(aside.name + "x")
    for end in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(aside.with_name(aside.name + end))
    db = _check(path)
    risk = (
        "what was spent before is unknown and no longer counts: up to a full budget (max_usd, "
        "max_calls, max_tokens_total) may be spent a second time"
    )
    if totals:
        spent = sum(totals.values(), Spend())
        risk = f"{spent} spent before still count, but their answers must be paid again"
    for account, spend in totals.items():
        _add(db, account, spend)
    logger.warning(
        "the judge's cache %s is corrupt (%s); it is set aside as %s and a new one begun. At "
        "risk: %s",
        *(path, problem, aside.name, risk),
    )
    return db


def _rescued_totals(path: Path) -> dict[str, Spend]:
    with contextlib.closing(_connect(path)) as db:
        try:
            rows = db.execute("SELECT account, calls, tokens, nano_usd FROM totals").fetchall()
        except sqlite3.Error:
            return {}
    numbers = [number for row in rows for number in row[1:]]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        return {}
    return {str(account): Spend(*spent) for account, *spent in rows}


@functools.cache
def _lock_file(path: Path) -> int | None:
    """Stays open: closing any descriptor of a file drops all locks that the process has on it."""
    return os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644) if fcntl else None


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    """One process at a time opens the database, checks it and sets it aside."""
    file = _lock_file(path.absolute())
    if file is None:  # SQLite's own locks must do
        yield
        return
    fcntl.lockf(file, fcntl.LOCK_EX, 1, OPENING_BYTE)
    try:
        yield
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, OPENING_BYTE)
