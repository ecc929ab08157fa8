"""Settings of the prompts."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from klippo.settings import Settings

LengthRange = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


class DataSettings(Settings):
    train: str
    """JSON, JSONL, CSV or Parquet file, a hub data set, or `demo:prompts`."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set to train on, for instance `train[:1000]`."""
    validation: str | None = None
    """File (or split of the hub data set) with held-out prompts."""
    validation_size: NonNegativeInt | Annotated[float, Field(ge=0, lt=1)] = 0
    """Without `validation`: how many rows (or which share) to hold out of `train`."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of chat messages with `format: chat`."""
    format: Literal["text", "chat"] = "text"
    """`text` reads the prompt as it stands; `chat` puts it through the tokenizer's chat template."""
    system_prompt: str | None = None
    """With `format: chat`: a system message before every prompt."""
    cut_tokens: LengthRange | None = None
    """Keep only the first n tokens, n drawn from [low, high] for each row (IMDB style: [2, 8])."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt allowed; default: what the context leaves beside the response."""
    overlong: Literal["error", "drop", "keep_end"] = "error"
    """What to do with a longer prompt."""
