"""What a person sees during long work: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from klippo.types import Metrics


class LiveLine:
    """One live line in a terminal, about `num_lines` plain ones elsewhere; a context manager."""

    def __init__(
        self, console: Console, *, num_lines: int, num_done: int = 0, quiet: bool = False
    ) -> None:
        self._console, self._num_lines, self._quiet = console, num_lines, quiet
        self._num_at_start = num_done
        self._last = 0
        self._started = time.monotonic()
        live = console.is_terminal and not quiet
        self._live = Live(console=console, refresh_per_second=8, transient=False) if live else None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def seconds_left(self, num_done: int, num_total: int) -> float:
        """At the speed so far."""
        return self.seconds / (num_done - self._num_at_start) * (num_total - num_done)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._console.print(Text(text), soft_wrap=True)

    def show(self, text: str, num_done: int, num_total: int) -> None:
        """The newest state of the work."""
        part = num_done * self._num_lines // num_total
        if self._live is not None:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"))
        elif part != self._last:
            self.say(text)
        self._last = part


class Progress(LiveLine):
    """Shows the newest step of a PPO run."""

    def __init__(self, console: Console, num_steps: int, *, quiet: bool = False) -> None:
        super().__init__(console, num_lines=60, quiet=quiet)
        self._num_steps = num_steps
        self._num_shown = 0

    def step(self, step: int, metrics: Metrics) -> None:
        """Show step (counted from 0) with its metrics."""
        self._num_shown += 1
        left = self.seconds / self._num_shown * (self._num_steps - step - 1)
        self.show(step_line(step + 1, self._num_steps, metrics, left), step + 1, self._num_steps)


def step_line(step: int, num_steps: int, metrics: Metrics, seconds_left: float) -> str:
    """One line about one step; a phase's seconds stand behind its name."""
    phases = "  ".join(
        f"{key.removeprefix('time/').removesuffix('_s')} {value:.1f}"
        for key, value in metrics.items()
        if key.startswith("time/") and key != "time/step_s"
    )
    parts = [
        f"step {step:>{len(str(num_steps))}}/{num_steps}",
        f"KL {metrics.get('kl/sequence_nats', 0):.2f}",
        f"entropy {metrics.get('policy/entropy_nats', 0):.2f}",
        f"length {metrics.get('response/length_tokens', 0):.1f}",
        f"{metrics.get('throughput/response_tokens_per_s', 0):,.0f} tok/s",
        f"{metrics.get('time/step_s', 0):.1f} s ({phases})",
    ]
    if "reward/score_mean" in metrics:
        parts.insert(1, f"reward {metrics['reward/score_mean']:+.3f}")
    scored = metrics.get("reward/scored_share", 1.0)
    if scored < 1:
        parts.append(f"unscored {1 - scored:.0%}")
    if "judge/cached_share" in metrics:
        parts.append(f"judge cached {metrics['judge/cached_share']:.0%}")
    if "judge/cost_usd" in metrics:
        parts.append(f"{metrics['judge/cost_usd']:.2f} USD")
    skipped = metrics.get("update/num_skipped_minibatches", 0)
    if skipped:
        parts.append(f"skipped {skipped:.0f}")
    parts.append(f"left {clock(seconds_left)}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """4:05, or 1:04:05."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
