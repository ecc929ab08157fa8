"""Reward functions that tests load by name."""

NOT_CALLABLE = 3


def length(responses):
    return [len(r) for r in responses]


class Scorer:
    @staticmethod
    def half(responses):
        return [0.5 for _ in responses]
