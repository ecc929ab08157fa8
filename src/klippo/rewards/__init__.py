"""Rewards: anything that gives a response a number, with NaN for "could not be scored"."""

from klippo.rewards.classifier import ClassifierReward
from klippo.rewards.combined import Part, SumReward, yardstick
from klippo.rewards.function import FunctionReward
from klippo.rewards.loading import load_function
from klippo.rewards.penalties import LengthPenalty, RepetitionPenalty
from klippo.rewards.resolve import resolve_scores

__all__ = [
    "ClassifierReward",
    "FunctionReward",
    "LengthPenalty",
    "Part",
    "RepetitionPenalty",
    "SumReward",
    "load_function",
    "resolve_scores",
    "yardstick",
]
