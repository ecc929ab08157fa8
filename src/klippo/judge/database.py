"""The judge's SQLite file: its tables, opening it, and setting a corrupt one aside.

answers  key -> the server's body as it came, so that reading it again is free
claims   keys that a process is asking for now, so that no other asks too
pending  reservations of attempts that have not come back; those of a killed process stay
totals   per account, what is spent: settled attempts as billed, pending ones at their worst case
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from klippo.errors import PreflightError

logger = logging.getLogger(__name__)

VERSION = 1
BUSY_S = 60.0
"""How long one process waits for the write of another."""
SCHEMA = f"""
CREATE TABLE answers (key TEXT PRIMARY KEY, cause TEXT, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE claims (
    key TEXT PRIMARY KEY, owner TEXT NOT NULL, pid INTEGER NOT NULL, until REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE pending (
    id INTEGER PRIMARY KEY, account TEXT NOT NULL, tokens INTEGER NOT NULL,
    nano_usd INTEGER NOT NULL, pid INTEGER NOT NULL, until REAL NOT NULL
);
CREATE TABLE totals (
    account TEXT PRIMARY KEY, calls INTEGER NOT NULL, tokens INTEGER NOT NULL,
    nano_usd INTEGER NOT NULL
) WITHOUT ROWID;
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True, slots=True)
class Spend:
    """Calls, tokens and money; money in whole nano-USD, so that nothing is rounded away."""

    calls: int = 0
    tokens: int = 0
    nano_usd: int = 0

    def __add__(self, other: Spend) -> Spend:
        return Spend(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Spend) -> Spend:
        return Spend(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


def spent_in(path: Path, account: str) -> Spend:
    """What an account has spent by a file's ledger; nothing where there is no such file.

    The file is read alone, and neither made nor mended.
    """
    if not path.is_file():
        return Spend()
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        ) as db:
            return total_of(db, account)
    except sqlite3.Error:
        return Spend()


def total_of(db: sqlite3.Connection, account: str) -> Spend:
    """What the account has spent, pending reservations at their worst case."""
    row = db.execute(
        "SELECT calls, tokens, nano_usd FROM totals WHERE account = ?", (account,)
    ).fetchone()
    return Spend() if row is None else Spend(*row)


def open_database(path: Path | None) -> sqlite3.Connection:
    """A connection in autocommit mode; None is a database in memory.

    Raises PreflightError when the file cannot be opened or is something else. A corrupt file is set
    aside with a warning.
    """
    if path is None:
        return _prepare(connect(":memory:"), path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            try:
                return _check(path)
            except sqlite3.OperationalError:
                raise  # locked, read-only, no space: the file may be whole
            except sqlite3.DatabaseError as error:
                return _replace(path, error)
    except (OSError, sqlite3.Error) as error:
        raise PreflightError(
            f"the judge's cache {path} cannot be opened ({error}); choose another file with cache"
        ) from None


def connect(path: str) -> sqlite3.Connection:
    """A connection in autocommit mode, to a file that is there and whole."""
    return sqlite3.connect(
        path, timeout=BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=64
    )


def _check(path: Path) -> sqlite3.Connection:
    db = connect(str(path))
    try:
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        return _prepare(db, path)
    except BaseException:
        db.close()
        raise


def _prepare(db: sqlite3.Connection, path: Path | None) -> sqlite3.Connection:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, VERSION):
        raise PreflightError(
            f"the judge's cache {path} is of version {version}, and this Klippo reads version "
            f"{VERSION}; choose another file with cache"
        )
    is_new = version == 0
    if is_new and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise PreflightError(
            f"{path} is a database of something else; choose another file with cache"
        )
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    if is_new:
        db.executescript("BEGIN IMMEDIATE;" + SCHEMA + "COMMIT;")
    return db


def _replace(path: Path, problem: sqlite3.DatabaseError) -> sqlite3.Connection:
    """Set a corrupt file aside; the totals move to the new one where they can still be read."""
    totals = _rescued_totals(path)
    aside = path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%d-%H%M%S')}")
    while aside.exists():
        aside = aside.with_name(aside.name + "x")
    for end in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + end).rename(aside.with_name(aside.name + end))
    db = _check(path)
    if totals:
        spent = sum((spend for _, spend in totals), Spend())
        risk = (
            f"{spent.calls} calls, {spent.tokens} tokens and {spent.nano_usd / 1e9:.4f} USD spent "
            "before still count, but their answers must be paid again"
        )
    else:
        risk = (
            "what was spent before is unknown and no longer counts: up to a whole budget (max_usd, "
            "max_calls, max_tokens_total) may be spent a second time"
        )
    for account, spend in totals:
        add(db, account, spend)
    logger.warning(
        "the judge's cache %s is corrupt (%s); it is set aside as %s and a new one begun. At "
        "risk: %s",
        *(path, problem, aside.name, risk),
    )
    return db


def _rescued_totals(path: Path) -> list[tuple[str, Spend]]:
    with contextlib.closing(connect(str(path))) as db:
        try:
            rows = db.execute("SELECT account, calls, tokens, nano_usd FROM totals").fetchall()
        except sqlite3.Error:
            return []
    numbers = [n for row in rows for n in row[1:]]
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        return []
    return [(str(row[0]), Spend(*row[1:])) for row in rows]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time opens, checks and sets aside."""
    try:
        import fcntl
    except ImportError:  # Windows: SQLite's own locks must do
        yield
        return
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add(db: sqlite3.Connection, account: str, spend: Spend) -> None:
    """Add to an account's total, or take off."""
    db.execute(
        "INSERT INTO totals VALUES (?, ?, ?, ?) ON CONFLICT (account) DO UPDATE SET "
        "calls = calls + excluded.calls, tokens = tokens + excluded.tokens, "
        "nano_usd = nano_usd + excluded.nano_usd",
        (account, *astuple(spend)),
    )
