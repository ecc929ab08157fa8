"""How a command ends: its exit code, and what a person reads when it went wrong."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import NoReturn, ParamSpec

import typer

from klippo.errors import ConfigError, KlippoError, OutOfMemoryError

BUG, INTERRUPTED, TERMINATED, PIPE_CLOSED = 1, 130, 143, 141
PATIENCE_S = 5.0  # seconds
EXIT_CODES = (
    "Exit codes: 0 done; 1 a bug in Klippo; 2 usage, config or data; 3 this machine, model or "
    "folder cannot do it; 4 reward or judge; 5 the judge's budget; 6 training diverged; "
    "130 interrupted; 143 terminated."
)

P = ParamSpec("P")


def ending(command: Callable[P, int | None]) -> Callable[P, None]:
    """The command, ending the process with the code that it returns or that its error carries."""

    @wraps(command)
    def ended(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            code = _run(command, *args, **kwargs)
        except KlippoError as error:
            if _is_first() or not error.everywhere:
                complain(str(error))
            code = error.exit_code
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            if _is_first():
                complain("Interrupted.")
            code = INTERRUPTED
        except BrokenPipeError:  # the reader of our output has gone, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = PIPE_CLOSED
        except Exception:
            sys.stderr.write(plain(traceback.format_exc()))
            complain(
                "This is a bug in Klippo. Please report it with the lines above and the output of "
                "`klippo doctor --json`."
            )
            code = BUG
        raise SystemExit(code or 0)

    return ended


def _run(command: Callable[P, int | None], *args: P.args, **kwargs: P.kwargs) -> int | None:
    """The command, whose error each process but the first keeps back for a while.

    What goes wrong in every process of a run is said once: the first process ends with its message,
    and the launcher ends the others before they have one.
    """
    try:
        code = command(*args, **kwargs)
        sys.stdout.flush()
    except Exception as error:
        if not _is_first():
            time.sleep(PATIENCE_S)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"{str(error.filename)[:60]}…: too long for the name of a file; shorten it"
            ) from error
        if isinstance(error, MemoryError | RuntimeError):
            _explain_memory(error)
        raise
    return code


def _explain_memory(error: Exception) -> None:
    """Raise OutOfMemoryError where that is what happened, before a run could say in which phase."""
    from klippo.train.out_of_memory import is_out_of_memory

    if is_out_of_memory(error):
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutOfMemoryError(
            f"the memory ran out ({told}); klippo train --dry-run says what a run needs, and "
            "docs/memory.md what makes it smaller"
        ) from error


def _is_first() -> bool:
    """Whether this is the first (or only) process of the run, by the launcher's variable."""
    return os.environ.get("RANK", "0") == "0"


def complain(text: str) -> None:
    """A message on stderr, red in a terminal that wants colour."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text(plain(text), style="red"))


def plain(text: str) -> str:
    """Text without control characters, which could move the cursor or hide what is said."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)
