"""Settings of the rewards, one class per `kind`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from klippo.judge.settings import JudgeSettings
from klippo.settings import CodeSettings, Count, Settings


class ReadingSettings(CodeSettings):
    """How a classification or reward model is read."""

    label: str | int | None = None
    """Which output to use, by name or number; needed exactly when the model has several."""
    output: Literal["logit", "logprob", "probability"] = "logit"
    """How to read it. Log-prob (in nats) and probability are the softmax over the model's labels,
    or the sigmoid if it has one output or labels that do not exclude each other."""
    reads: Literal["full", "response"] = "full"
    """Score prompt plus response, or the response alone."""
    template: str | None = None
    """Text given to the model (with `reads: full`): written out with {prompt} and {response}, or
    `chat` (the model's own chat template), `alpaca` or `open-assistant`. Default: the one that was
    stored with the model or belongs to its class, else {prompt}{response}."""
    batch_size: PositiveInt = 64
    """Texts per forward pass."""
    max_tokens: PositiveInt | None = None
    """Cut longer texts from the left; default: the model's context."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the weights."""


class MemberSettings(ReadingSettings):
    """One member of an ensemble, if it is read in another way than the others."""

    model: str
    """Folder, hub name, `demo:proxy` or `demo:gold`; `{seed}` is filled by `rm_seed` (of a single
    model) or `seeds` (of an ensemble's members)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""


class ClassifierSettings(MemberSettings):
    """A sequence-classification model: a reward model with one output, or one label of several."""

    kind: Literal["classifier"]


class MomentsSettings(Settings):
    """Mean and standard deviation of every member on one shared set of responses."""

    mean: list[float]
    """One number per member, in the order of the members."""
    sd: list[PositiveFloat]
    """One number per member."""


class EnsembleSettings(ReadingSettings):
    """Several reward models that differ by seed, combined conservatively (Coste et al. 2023)."""

    kind: Literal["ensemble"]
    members: Annotated[list[str | MemberSettings], Field(min_length=1)]
    """Models by name, or mappings with `model` and what is read differently there. A name with
    `{seed}` stands for one member per entry of `seeds`."""
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    """Fill `{seed}` in the members' names."""
    objective: Literal["mean", "WCO", "UWO", "soft_min", "median", "mean_minus_sd"] = "mean"
    """How K scores become one: their mean, their minimum (WCO), mean - lambda * variance (UWO), a
    smooth minimum, their median, or mean - k * standard deviation."""
    uwo_weight: float | None = Field(default=None, ge=0)
    """lambda of UWO, which needs it; 0 is the mean."""
    sd_weight: float | None = Field(default=None, ge=0)
    """k of mean_minus_sd, which needs it."""
    ddof: Literal[0, 1] = 0
    """Variance and standard deviation divide by K - ddof: 0 as in the paper, 1 as in its code."""
    temperature: PositiveFloat = 1.0
    """Of soft_min, in units of the score: towards 0 it becomes the minimum, far up the mean."""
    standardize: Literal["stored", "start", "none"] = "stored"
    """Give every member mean 0 and standard deviation 1 on one shared set of responses: by the
    moments stored with each model, by moments measured on the starting policy when the run
    begins, or not at all."""
    reference_size: Count = 256
    """With `standardize: start`: how many responses of the starting policy."""
    moments: MomentsSettings | None = None
    """What `standardize: start` measured; a run writes it into its own config.yaml."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problems := [*self._problems()]:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if self.objective == "UWO" and self.uwo_weight is None:
            yield (
                "uwo_weight is missing: objective=UWO is mean - uwo_weight * variance; try 0.1 or "
                "0.5, or objective=mean"
            )
        if self.objective == "mean_minus_sd" and self.sd_weight is None:
            yield (
                "sd_weight is missing: objective=mean_minus_sd is mean - sd_weight * standard "
                "deviation; try 1.0, or objective=mean"
            )
        names = (m if isinstance(m, str) else m.model for m in self.members)
        open_names = [name for name in names if "{seed}" in name]
        if open_names and self.seeds is None:
            yield (
                f"members={open_names[0]}: nothing fills {{seed}}; add seeds, as in "
                "seeds: [1, 2, 3, 4, 5]"
            )
        if self.seeds is not None and not open_names:
            yield f"seeds={self.seeds}: no member's name contains {{seed}}; remove seeds"
        expanded = [one.model for one in self.classifiers()]
        twice = sorted({name for name in expanded if expanded.count(name) > 1})
        if twice:
            yield f"members: {twice[0]} is there twice; each member must be another model"
        if self.ddof == 1 and len(expanded) == 1:
            yield "ddof=1 needs at least 2 members, and there is 1; use ddof=0"
        if self.moments is not None:
            for name in ("mean", "sd"):
                if len(getattr(self.moments, name)) != len(expanded):
                    yield f"moments.{name} must have one number per member, {len(expanded)}"

    @property
    def weights(self) -> dict[str, Any]:
        """What `combine` takes besides the objective."""
        return {
            "uwo_weight": self.uwo_weight or 0.0,
            "sd_weight": self.sd_weight or 0.0,
            "ddof": self.ddof,
            "temperature": self.temperature,
        }

    def classifiers(self) -> list[ClassifierSettings]:
        """One reading of each member: its own settings over those of the ensemble."""
        shared = {name: getattr(self, name) for name in ReadingSettings.model_fields}
        readings = []
        for member in self.members:
            if isinstance(member, str):
                member = MemberSettings(model=member)
            own = member.model_dump(exclude_unset=True)
            is_pattern = self.seeds and "{seed}" in member.model
            for seed in (self.seeds or ()) if is_pattern else [0]:
                model = member.model.replace("{seed}", str(seed)) if is_pattern else member.model
                readings.append(
                    ClassifierSettings(**shared | own | {"kind": "classifier", "model": model})
                )
        return readings

    def trusted_models(self) -> list[str]:
        """Those of the members that allow their code."""
        return [one.model for one in self.classifiers() if one.trust_remote_code]


class FunctionSettings(Settings):
    """A Python function, sync or async: one number, or None for unscored, per response."""

    kind: Literal["function"]
    function: str
    """`package.module:name` or `path/to/file.py:name`; called with `prompts`, `responses`,
    `token_ids` and every column of the data set, as keyword arguments."""


class ColumnSettings(Settings):
    """A number that stands in the data: the reward of responses that exist already."""

    kind: Literal["column"]
    column: str = "reward"
    """Its column."""


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

    @model_validator(mode="after")
    def _has_no_columns(self) -> Self:
        for name, part in self.parts.items():
            if isinstance(part.reward, ColumnSettings):
                raise ValueError(
                    f"parts.{name}.reward.kind=column: the data's scores of responses that exist "
                    "already are a reward of their own, for offline runs; use another kind here"
                )
        return self


RewardSettings = Annotated[
    ClassifierSettings
    | ColumnSettings
    | EnsembleSettings
    | FunctionSettings
    | JudgeSettings
    | LengthSettings
    | RepetitionSettings
    | SumSettings,
    Field(discriminator="kind"),
]

PartSettings.model_rebuild()
SumSettings.model_rebuild()


def leaves(settings: RewardSettings | None) -> Iterator[RewardSettings]:
    """Every reward in these settings that is no sum."""
    if isinstance(settings, SumSettings):
        for term in settings.parts.values():
            yield from leaves(term.reward)
    elif settings is not None:
        yield settings


def ensembles(settings: RewardSettings | None) -> Iterator[EnsembleSettings]:
    """Every ensemble in a reward's settings."""
    return (one for one in leaves(settings) if isinstance(one, EnsembleSettings))
