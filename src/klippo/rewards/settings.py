"""Settings of the rewards, one class per `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from klippo.settings import Settings


class ClassifierReward(Settings):
    """A sequence-classification model: a reward model with one output, or one label of several."""

    kind: Literal["classifier"]
    model: str
    """Folder, hub name, `demo:proxy` or `demo:gold`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    label: str | int | None = None
    """Which output to use, by name or number; needed exactly when the model has several."""
    output: Literal["logit", "logprob", "probability"] = "logit"
    """How to read it; log-prob and probability are over the model's labels."""
    reads: Literal["full", "response"] = "full"
    """Score prompt plus response, or the response alone."""
    template: str = "{prompt}{response}"
    """Text given to the model (with `reads: full`); `chat` uses the model's own chat template."""
    batch_size: PositiveInt = 64
    """Texts per forward pass."""
    max_tokens: PositiveInt | None = None
    """Cut longer texts from the left; default: the model's context."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the weights."""


class FunctionReward(Settings):
    """A Python function, sync or async, that returns one number (or None: unscored) per response."""

    kind: Literal["function"]
    function: str
    """`package.module:name` or `path/to/file.py:name`; called with `prompts`, `responses`,
    `token_ids` and every column of the data set, as keyword arguments."""


class LengthReward(Settings):
    """Minus the number of tokens beyond a limit (and below one)."""

    kind: Literal["length"]
    max_tokens: PositiveInt | None = None
    """Each token above costs 1."""
    min_tokens: PositiveInt | None = None
    """Each token missing costs 1."""


class RepetitionReward(Settings):
    """Minus the share of n-grams of the response that occurred before in it, between -1 and 0."""

    kind: Literal["repetition"]
    ngram: PositiveInt = 3
    """Tokens per n-gram."""


class PartSettings(Settings):
    """One summand of `kind: sum`."""

    reward: RewardSettings
    """The reward source."""
    weight: float = 1.0
    """Factor; negative turns a reward into a penalty."""
    normalize: bool = False
    """Divide by the running standard deviation and subtract the running mean before weighting."""


class SumReward(Settings):
    """A weighted sum of named parts; every part is logged."""

    kind: Literal["sum"]
    parts: Annotated[dict[str, PartSettings], Field(min_length=1)]
    """Name -> part."""


RewardSettings = Annotated[
    ClassifierReward | FunctionReward | LengthReward | RepetitionReward | SumReward,
    Field(discriminator="kind"),
]

PartSettings.model_rebuild()
SumReward.model_rebuild()
