"""One process at a time trains in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from klippo.errors import ConfigError
from klippo.runs.folder import writing

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLock:
    """Held until `release`, or until the process ends, however it ends."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        """Take the lock of a folder that exists.

        Raises ConfigError where another process has it. Where the file system knows no locks,
        `warn` is told.
        """
        self._path = folder / LOCK_FILE
        self._file = self._open()
        try:
            while not self._take():  # its owner removed it in this moment
                os.close(self._file)
                self._file = self._open()
        except OSError as error:
            owner = os.pread(self._file, 40, 0).decode(errors="replace").strip()
            os.close(self._file)
            self._file = -1
            if error.errno not in _NO_LOCKS:
                raise ConfigError(
                    f"output_dir={folder}: another process ({owner or 'unknown'}) trains there "
                    "now; wait until it ends, end it, or choose another output_dir"
                ) from None
            warn(
                f"{folder}: this file system has no locks ({error.strerror}); make sure that no "
                "other process trains in this folder"
            )
            return
        with writing(self._path):
            os.truncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()}".encode(), 0)

    def release(self) -> None:
        """Let others train here."""
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def _open(self) -> int:
        with writing(self._path):
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _take(self) -> bool:
        """Whether the file that is locked now is the one that has the name. Raises OSError."""
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False
