"""The base of every settings class: unknown keys are errors, values are frozen, docs in place."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt


class Settings(BaseModel):
    """Settings of one room; defaults live in the room, beside the code that uses them."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


def _ordered(pair: list[int]) -> list[int]:
    low, high = pair
    if low > high:
        raise ValueError(f"{pair}: [low, high] needs low <= high; try [{high}, {low}]")
    return pair


LengthRange = Annotated[
    list[PositiveInt], Field(min_length=2, max_length=2), AfterValidator(_ordered)
]
"""[low, high], in tokens; a number is drawn uniformly from it, both ends included."""
