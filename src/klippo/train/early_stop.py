"""Early stopping of one run: samples and gold for it, and the best policy so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from klippo.data.sampler import pick
from klippo.errors import ConfigError
from klippo.evaluation.early_stop import EarlyStop
from klippo.evaluation.samples import SampleRow
from klippo.evaluation.settings import MIN_PROMPTS
from klippo.rewards.build import build_reward
from klippo.rewards.resolve import resolve_scores
from klippo.runs.folder import RunFolder
from klippo.train.session import Session
from klippo.types import Prompt, RewardSource, Rollout

BEST_DIR = "best"

Evaluate = Callable[[Rollout, int], list[SampleRow]]
"""Rows of a rollout at a step."""
Save = Callable[[RunFolder], None]


class RunEarlyStop:
    """Looks at a run's evaluations on the first process; the others wait for what it says."""

    def __init__(self, session: Session, evaluate: Evaluate, save: Save) -> None:
        """Raises ConfigError when too few prompts lie outside the evaluation set."""
        self._session = session
        self._evaluate = evaluate
        self._save = save
        settings = session.config.early_stop
        self._early_stop = EarlyStop(settings, session.config.seed)
        self._gold: RewardSource | None = None
        self._prompts: list[Prompt] = []
        self.stopped: str | None = None
        if settings.gold_prompts > 0:
            self._prompts = self._outside_the_evaluation(settings.gold_prompts)

    @property
    def best_step(self) -> int | None:
        """Whose policy `best/` holds."""
        return self._early_stop.best_step

    def look(self, step: int, rows: Sequence[SampleRow], folder: RunFolder) -> bool:
        """True when the run should end; keeps the policy when it is the best so far."""
        decision = self._early_stop.look(step, rows, self._gold_rows(step))
        if decision.is_best:
            best = RunFolder(folder.path / BEST_DIR)
            best.path.mkdir(exist_ok=True)
            self._save(best)
        self.stopped = decision.stop
        return decision.stop is not None

    def state_dict(self) -> dict[str, Any]:
        """What it has seen so far."""
        return self._early_stop.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._early_stop.load_state_dict(state)

    def _gold_rows(self, step: int) -> list[SampleRow]:
        """its own prompts, answered by the policy as it is, with gold scores."""
        if not self._prompts:
            return []
        config = self._session.config
        if self._gold is None:
            assert config.gold is not None
            self._gold = build_reward(
                config.gold,
                device=self._session.device,
                prompt_column=config.data.prompt_columns[0],
            )
        rollout = self._session.sampling().early_stop_responses(self._prompts)
        rows = self._evaluate(rollout, step)
        gold = resolve_scores(self._gold, rollout).reward.tolist()
        return [
            row | {"gold": None if score != score else score}
            for row, score in zip(rows, gold, strict=True)
        ]

    def _outside_the_evaluation(self, number: int) -> list[Prompt]:
        """Prompts that the evaluation does not use, held-out ones first."""
        online = self._session.sampling()
        used = {str(prompt.token_ids) for prompt in online.evaluation_prompts}
        free = [p for p in online.spare_prompts if str(p.token_ids) not in used]
        if len(free) < MIN_PROMPTS:
            raise ConfigError(
                f"early_stop.gold_prompts={number}: only {len(free)} prompts are outside the "
                f"evaluation set, and early stopping needs {MIN_PROMPTS}; lower "
                f"evaluation.num_prompts ({len(online.evaluation_prompts)} now), or add data"
            )
        return pick(free, number, self._session.config.seed)
