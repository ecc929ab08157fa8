"""What a person sees while a model is trained: one live line, or plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

MAX_PLAIN_LINES = 8


class TrainingLine:
    """Shows the newest step. Use as a context manager around one training."""

    def __init__(self, console: Console, title: str, *, quiet: bool = False) -> None:
        self._console = console
        self._title = title
        self._quiet = quiet
        self._num_lines = 0
        live = console.is_terminal and not quiet
        self._live = Live(console=console, refresh_per_second=8, transient=False) if live else None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def step(self, step: int, num_steps: int, figures: Mapping[str, float]) -> None:
        """Show that `step` of `num_steps` are done, with TRL's figures."""
        left = self.seconds / step * (num_steps - step)
        line = Text(f"{self._title}: {step_line(step, num_steps, figures, left)}")
        if self._live is not None:
            self._live.update(line)
        elif not self._quiet and (
            step >= (self._num_lines + 1) * num_steps / MAX_PLAIN_LINES or step == num_steps
        ):
            self._num_lines = int(step * MAX_PLAIN_LINES / num_steps)
            self._console.print(line, soft_wrap=True)


def step_line(step: int, num_steps: int, figures: Mapping[str, float], seconds_left: float) -> str:
    """`step 20/94  loss 0.61  accuracy 0.66  left 0:12`; the accuracy is that of pairs."""
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}", f"loss {figures['loss']:.3f}"]
    accuracy = figures.get("accuracy", figures.get("rewards/accuracies"))
    if accuracy is not None:
        parts.append(f"accuracy {accuracy:.2f}")
    minutes, second = divmod(round(seconds_left), 60)
    return "  ".join([*parts, f"left {minutes}:{second:02}"])
