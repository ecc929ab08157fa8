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
        self._file: int | None = None
        path = folder / LOCK_FILE
        with writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._file, 40, 0).decode(errors="replace").strip()
            self.release()
            if error.errno in _NO_LOCKS:
                warn(
                    f"{folder}: this file system has no locks ({error.strerror}); make sure that "
                    "no other process trains in this folder"
                )
                return
            raise ConfigError(
                f"output_dir={folder}: another process ({owner or 'unknown'}) trains there now; "
                "wait until it ends, end it, or choose another output_dir"
            ) from None
        with writing(path):
            os.truncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()}".encode(), 0)

    def release(self) -> None:
        """Let others train here."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
