"""The base of every settings class: unknown keys are errors, values are frozen, docs sit under fields."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Settings of one room; defaults live in the room, beside the code that uses them."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
