"""Errors that users meet: each names value, rule and remedy, and carries its exit code."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that `word` was probably meant to be."""
    return next(iter(get_close_matches(word, list(choices), n=1, cutoff=cutoff)), None)


class KlippoError(Exception):
    """A problem the user can fix; the command line prints its text alone, without a traceback."""

    exit_code = 1
    check: str | None = None
    """The health check that raised it, if one did."""
    everywhere: bool = False
    """Every process raises it at the same point, so they can still work together."""


class ConfigError(KlippoError):
    """The command line, the config or the data is wrong; said before anything costly starts."""

    exit_code = 2


class PreflightError(KlippoError):
    """The config is well-formed, but this machine, model or folder cannot run it."""

    exit_code = 3


class RewardError(KlippoError):
    """A reward source raised, returned the wrong number of scores, or returned NaN."""

    exit_code = 4


class NotFiniteRewardError(RewardError):
    """A reward source gave a number that is NaN or infinite."""

    check = "reward_not_finite"


class DivergedError(KlippoError):
    """Training left the region where its numbers mean anything."""

    exit_code = 6


class HealthError(DivergedError):
    """A health check whose action is `stop` fired."""

    everywhere = True

    def __init__(self, check: str, text: str) -> None:
        super().__init__(text)
        self.check = check


class StorageError(KlippoError):
    """A file could not be written (disk full, folder read-only); older files stay complete."""

    exit_code = 3


class JudgeError(KlippoError):
    """The judge cannot be used: it refused the key or the model, or what answers is not a judge."""

    exit_code = 4


class BudgetError(KlippoError):
    """The judge's budget of calls, tokens or USD is used up; paid answers are kept."""

    exit_code = 5


class OutOfMemoryError(KlippoError):
    """The device's memory ran out while the run was on; what was written before is complete."""

    exit_code = 3
