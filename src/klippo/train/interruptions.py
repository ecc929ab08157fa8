"""SIGINT and SIGTERM while a run trains: handled at once, or after the current step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAUNCHERS_REPEAT_S = 2.0
"""A launcher repeats a signal that the terminal has already sent to all processes."""


class Interruptions:
    """Use as a context manager around training, in the main thread; elsewhere it does nothing."""

    def __init__(self, say: Callable[[str], None], *, together: bool) -> None:
        """With `together` every signal waits, so that all processes stop at the same step."""
        self._say = say
        self._together = together
        self._waits = together
        self._since = 0.0
        self._handlers: dict[signal.Signals, Any] = {}
        self.pending: int | None = None
        """A signal that waits for the end of the step."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._arrived) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A first signal inside waits for `raise_pending`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = self._together

    def raise_pending(self, number: int | None) -> None:
        """Raise what a signal means, if there was one in this process or another."""
        if number is not None:
            self.pending = None
            raise interruption(number)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._waits:
            raise interruption(number)
        if self.pending is None:
            self.pending, self._since = number, now
            self._say("Stopping after this step; once more stops at once.")
        elif not self._together or now - self._since > LAUNCHERS_REPEAT_S:
            raise interruption(number)


def interruption(number: int) -> BaseException:
    """KeyboardInterrupt for SIGINT; for others SystemExit with the shell's exit code."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No Ctrl-C and no SIGTERM inside: a launcher sends them again and again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = [signal.signal(number, signal.SIG_IGN) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
