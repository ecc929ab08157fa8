"""The health checks of one run: they write to the log and run_status.json, and may end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from klippo.errors import HealthError, KlippoError
from klippo.ppo.health import Alarm, HealthMonitor
from klippo.runs.folder import RunFolder
from klippo.train.session import Session
from klippo.types import Metrics


class RunHealth:
    """Lives in every process of a run; the first one decides for all."""

    def __init__(self, session: Session, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._monitor = HealthMonitor(session.config.health, session.learner.ppo)
        self._ranks = session.ranks
        self._folder = folder
        self._say = say

    def check_rollout(self, step: int, metrics: Metrics) -> None:
        """Before the update of a step. Raises HealthError if the run should end."""
        self._report(self._monitor.check_rollout(step, metrics))

    def check_update(self, step: int, metrics: Metrics) -> None:
        """After the update of a step. Raises HealthError if the run should end."""
        self._report(self._monitor.check_update(step, metrics))

    def record(self, error: BaseException, step: int) -> None:
        """Remember an error that ended the run in a check's name before the check could see it."""
        if isinstance(error, HealthError):
            return
        if isinstance(error, KlippoError) and error.check is not None:
            self._monitor.record(error.check, step, "stop", str(error))

    def status(self) -> dict[str, Any]:
        """For run_status.json: the checks that have fired so far, by name."""
        fired = self._monitor.fired()
        return {"health": fired} if fired else {}

    def state_dict(self) -> dict[str, Any]:
        return self._monitor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._monitor.load_state_dict(state)

    def _report(self, alarms: list[Alarm]) -> None:
        alarms = self._ranks.gather(alarms)[0]
        news = [alarm for alarm in alarms if alarm.is_new]
        for alarm in news:
            self._say(f"Health check {alarm}")
        if news:
            self._ranks.on_main(lambda: self._folder.write_status("running", **self.status()))
        for alarm in alarms:
            if alarm.stops:
                raise HealthError(alarm.check, f"health check {alarm}")
