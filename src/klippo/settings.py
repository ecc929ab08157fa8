"""The base of every settings class: unknown keys are errors, values are frozen, docs in place."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt


class Settings(BaseModel):
    """Settings of one room; defaults live in the room, beside the code that uses them.

    Strict: `true` is no number, `"5"` neither, and `1` is not true.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class CodeSettings(Settings):
    """A section that names a model."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model, for classes that transformers does not have;
    the command needs --trust-remote-code as well (docs/security.md)."""
    model_key: ClassVar[str] = "model"
    """The field that names the model."""

    def trusted_models(self) -> list[str]:
        """The models whose code this section allows."""
        name = getattr(self, self.model_key)
        return [name] if self.trust_remote_code and name is not None else []


def _ordered(pair: list[int]) -> list[int]:
    low, high = pair
    if low > high:
        raise ValueError(f"{pair}: [low, high] needs low <= high; try [{high}, {low}]")
    return pair


Count = Annotated[int, Field(ge=1, le=1_000_000)]
"""How many there are of something that a run makes one by one."""


def near_divisors(part: int, whole: int, reach: int = 1000) -> list[int]:
    """Divisors of `whole`, nearest to `part` first; only those within `reach`, or 1 and `whole`."""
    middle = min(part, whole)
    near = range(max(1, middle - reach), min(whole, middle + reach) + 1)
    return sorted((d for d in near if whole % d == 0), key=lambda d: abs(d - part)) or [1, whole]


LengthRange = Annotated[
    list[PositiveInt], Field(min_length=2, max_length=2), AfterValidator(_ordered)
]
"""[low, high], in tokens; a number is drawn uniformly from it, both ends included."""
