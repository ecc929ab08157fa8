"""What the judges among a run's rewards count, over all processes."""

from __future__ import annotations

from klippo.judge.reward import JudgeReward
from klippo.ranks import Ranks
from klippo.rewards.combined import SumReward
from klippo.types import Metrics, RewardSource


def judge_metrics(source: RewardSource) -> Metrics:
    """The metrics of a judge, or of the judges in a sum, there with their part's name.

    Call it once per step: shares are those since the last call.
    """
    if isinstance(source, JudgeReward):
        return source.metrics()
    found: Metrics = {}
    if isinstance(source, SumReward):
        for name, part in source.parts.items():
            for key, value in judge_metrics(part.source).items():
                found[f"judge/{name}/{key.removeprefix('judge/')}"] = value
    return found


def over_processes(metrics: Metrics, ranks: Ranks) -> Metrics:
    """A judge's metrics over all processes: counts, tokens and costs added up, shares averaged.

    Every process judges equally many responses, and every process must call this.
    """
    if not metrics:
        return {}
    own = ranks.gather(metrics)
    names = [name for name in own[0] if not _is_cause(name)]  # a cost that one does not know is out
    found = {name: [one[name] for one in own] for name in names if all(name in o for o in own)}
    causes = sorted({name for one in own for name in one if _is_cause(name)})
    found |= {name: [one.get(name, 0.0) for one in own] for name in causes}
    return {
        name: sum(values) / (len(values) if name.endswith(("_share", "_sd")) else 1)
        for name, values in found.items()
    }


def _is_cause(name: str) -> bool:
    return "/unscored_" in name and not name.endswith("_share")
