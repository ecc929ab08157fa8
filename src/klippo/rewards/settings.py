"""Settings of the rewards, one class per `kind`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from klippo.settings import Settings


class ClassifierSettings(Settings):
    """A sequence-classification model: a reward model with one output, or one label of several."""

    kind: Literal["classifier"]
    model: str
    """Folder, hub name, `demo:proxy` or `demo:gold`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    label: str | int | None = None
    """Which output to use, by name or number; needed exactly when the model has several."""
    output: Literal["logit", "logprob", "probability"] = "logit"
    """How to read it. Log-prob (in nats) and probability are the softmax over the model's labels,
    or the sigmoid where it has one output or labels that do not exclude each other."""
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


class FunctionSettings(Settings):
    """A Python function, sync or async: one number, or None for unscored, per response."""

    kind: Literal["function"]
    function: str
    """`package.module:name` or `path/to/file.py:name`; called with `prompts`, `responses`,
    `token_ids` and every column of the data set, as keyword arguments."""


class LengthSettings(Settings):
    """Minus the number of tokens beyond a limit (and below one)."""

    kind: Literal["length"]
    max_tokens: PositiveInt | None = None
    """Each token above costs 1; the end-of-sequence token counts as a token."""
    min_tokens: PositiveInt | None = None
    """Each token missing costs 1."""

    @model_validator(mode="after")
    def _has_a_range(self) -> Self:
        low, high = self.min_tokens, self.max_tokens
        if low is None and high is None:
            raise ValueError("a length reward needs max_tokens, min_tokens or both")
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_tokens={low} is above max_tokens={high}; swap them")
        return self


class RepetitionSettings(Settings):
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
    """Subtract the running mean and divide by the running standard deviation before weighting."""


class SumSettings(Settings):
    """A weighted sum of named parts; every part is logged."""

    kind: Literal["sum"]
    parts: Annotated[dict[str, PartSettings], Field(min_length=1)]
    """Name -> part."""


RewardSettings = Annotated[
    ClassifierSettings | FunctionSettings | LengthSettings | RepetitionSettings | SumSettings,
    Field(discriminator="kind"),
]

PartSettings.model_rebuild()
SumSettings.model_rebuild()
