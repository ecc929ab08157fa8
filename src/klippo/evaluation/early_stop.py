"""Stop a run while its policy is still good: at a KL budget, or when gold starts to fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from klippo.evaluation.history import history
from klippo.evaluation.samples import SampleRow
from klippo.evaluation.settings import EarlyStopSettings
from klippo.evaluation.verdict import judge

ALARMS_IN_A_ROW = 2
"""A verdict is asked for at every evaluation; one alarm alone may be the one false one of many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What an evaluation means for the run."""

    is_best: bool  # the policy is the best so far, and worth keeping
    stop: str | None = None  # why the run should end; None lets it continue


class EarlyStop:
    """Looks at every evaluation of a run, in order."""

    def __init__(self, settings: EarlyStopSettings, seed: int = 0) -> None:
        self._settings, self._seed = settings, seed
        self._gold_rows: dict[int, Sequence[SampleRow]] = {}
        self._num_alarms = 0
        self.best_step: int | None = None
        self._best_gold = -np.inf

    def look(
        self, step: int, rows: Sequence[SampleRow], gold_rows: Sequence[SampleRow] = ()
    ) -> Decision:
        """`rows` are the run's evaluation, `gold_rows` its other prompts with gold scores.

        The best policy is that with the highest mean gold, without gold the latest within the
        budget.
        """
        kl, limit = float(np.mean([row["kl_exact_nats"] for row in rows])), self._settings.max_kl
        is_best = within = limit is None or kl <= limit
        stop = None
        if not within:
            stop = f"KL {kl:.2f} nats at step {step} exceeds early_stop.max_kl={limit:g}"
        if gold_rows:
            gold = float(np.mean([row["gold"] for row in gold_rows if row["gold"] is not None]))
            is_best = within and gold > self._best_gold
            self._best_gold = gold if is_best else self._best_gold
            self._gold_rows[step] = gold_rows
            run = history(self._gold_rows)
            verdict = judge(run, self._seed)
            self._num_alarms = self._num_alarms + 1 if verdict.outcome == "over-optimised" else 0
            if self._num_alarms >= ALARMS_IN_A_ROW and stop is None:
                prompts = f"early stopping's {len(run.prompt_ids)} prompts"
                stop = f"over-optimised by {prompts}: {verdict.reason}"
        if is_best:
            self.best_step = step
        return Decision(is_best=is_best, stop=stop)

    def state_dict(self) -> dict[str, Any]:
        """What it has seen so far, as JSON holds it."""
        return {
            "gold_rows": [[step, list(rows)] for step, rows in self._gold_rows.items()],
            "num_alarms": self._num_alarms,
            "best_step": self.best_step,
            "best_gold": float(self._best_gold),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where `state` was taken."""
        self._gold_rows = {int(step): rows for step, rows in state["gold_rows"]}
        self._num_alarms = int(state["num_alarms"])
        self.best_step = state["best_step"]
        self._best_gold = float(state["best_gold"])
