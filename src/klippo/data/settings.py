"""Settings of the prompts, of logged responses, and of preferences."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from klippo.errors import ConfigError
from klippo.settings import Count, LengthRange, Settings
from klippo.templates import check_template

Names = Annotated[list[str], Field(min_length=1)]


class SourceSettings(Settings):
    """Rows to train on, and rows that are held out."""

    train: str | Names
    """JSON, JSONL, CSV or Parquet file, a hub data set, or `demo:prompts`; a list is joined."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Rows to train on: a split of a hub data set, or a part of either, as `train[:1000]`."""
    validation: str | None = None
    """File (or split of the hub data set) with held-out rows."""
    validation_size: NonNegativeInt | Annotated[float, Field(ge=0, lt=1)] = 0
    """Without `validation`: how many rows (or which share) to hold out of `train`. Rows with the
    same prompt (without prompts: the same response) stay together, so copies can make it more."""

    @model_validator(mode="after")
    def _one_held_out_source(self) -> Self:
        if self.validation is not None and self.validation_size != 0:
            raise ValueError(
                f"validation={self.validation!r} and validation_size={self.validation_size} both "
                "say where held-out rows come from; remove one of them"
            )
        return self

    @property
    def sources(self) -> list[str]:
        """The names in `train`."""
        return [self.train] if isinstance(self.train, str) else self.train


class DataSettings(SourceSettings):
    prompt_column: str | Names = "prompt"
    """Column with the prompt: text, or a list of chat messages with `format: chat`. Several columns
    are joined by line breaks, empty ones left out."""
    template: str | None = None
    """With `format: text`: the text around the prompt, written out with {prompt} (and any column),
    or `alpaca` or `open-assistant`; rewards still see the prompt alone as {prompt}."""
    format: Literal["text", "chat"] = "text"
    """`text` reads the prompt as it stands, `chat` through the tokenizer's chat template."""
    system_prompt: str | None = None
    """With `format: chat`: a system message before every prompt."""
    cut_tokens: LengthRange | None = None
    """With `format: text`: keep only the first n tokens (a BOS token not counted), n drawn from
    [low, high] for each row (IMDB style: [2, 8])."""
    max_prompt_tokens: PositiveInt | None = None
    """Longest prompt allowed; default: what the context leaves beside the response."""
    overlong: Literal["error", "drop", "keep_end"] = "error"
    """What to do with a longer prompt: stop, leave the row out, or keep its last tokens."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.format == "chat" and self.cut_tokens is not None:
            raise ValueError(
                f"cut_tokens={self.cut_tokens} would cut the chat template; use format: text"
            )
        if self.template is None:
            return self
        if self.format == "chat":
            raise ValueError(
                f"template={self.template!r} and format: chat both put text around the prompt; "
                "remove one of them"
            )
        if self.cut_tokens is not None:
            raise ValueError(
                f"cut_tokens={self.cut_tokens} would cut the end of the template away; remove one "
                "of them"
            )
        try:
            check_template(self.template)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def prompt_columns(self) -> list[str]:
        """The names in `prompt_column`."""
        return [self.prompt_column] if isinstance(self.prompt_column, str) else self.prompt_column


class OfflineSettings(Settings):
    """Learn from responses that exist already, instead of sampling: `data` names their file."""

    response_column: str = "response"
    """Column with the response as text; a list of texts is several responses to the prompt."""
    token_ids_column: str | None = None
    """Column with the response's token ids as they were sampled, the end token included; without
    it the text is tokenized, and the tokenizer's end token put behind it."""
    behavior: Literal["start", "recorded", "unknown"] = "start"
    """Who wrote the responses: the policy that training starts from; one whose log-probs are in
    `logprobs_column`; or nobody knows, and ratios are anchored at the start."""
    logprobs_column: str | None = None
    """With `behavior: recorded`: column with one log-prob per response token, in nats, the end
    token's included."""
    num_passes: Count = 3
    """Passes over the rows; they decide `ppo.num_steps`."""
    baseline: Literal["value", "leave_one_out"] = "value"
    """What a reward is compared with: the critic's value, or the mean reward of the other responses
    to the same prompt, which needs no critic."""
    duplicates: Literal["error", "keep", "drop"] = "error"
    """Rows with the same prompt and response: refuse them, keep them, or keep the first of each."""
    min_ess: float | None = Field(default=None, gt=0, le=1)
    """Stop after a pass at which the effective share of the tokens (Kish) is below this."""
    max_kl: float | None = Field(default=None, gt=0)
    """Stop after a pass at which the KL from the start exceeds this, nats per response."""

    @model_validator(mode="after")
    def _log_probs_are_named(self) -> Self:
        if (self.behavior == "recorded") != (self.logprobs_column is not None):
            raise ValueError(
                f"behavior={self.behavior} and logprobs_column={self.logprobs_column}: recorded "
                "log-probs need both, behavior: recorded and the name of their column"
            )
        return self


class PreferenceSettings(SourceSettings):
    train: str
    """JSON, JSONL, CSV or Parquet file, or a hub data set."""
    validation: str | None = None
    """File (or split of the hub data set) with held-out rows; those that share a prompt with
    training rows (without prompts: a response) are left out, and counted."""
    format: Literal["pairs", "ratings"] = "pairs"
    """A row is a pair of responses, or one response with a rating; ratings become pairs of
    responses to the same prompt, or of any two responses if there are no prompts."""
    prompt_column: str | Names | None = "prompt"
    """Column with the prompt, text or chat messages; several are joined by line breaks. Data
    without a column `prompt` has no prompts; null says so."""
    chosen_column: str = "chosen"
    """With `format: pairs`: the better response, text or chat messages up to it."""
    rejected_column: str = "rejected"
    """With `format: pairs`: the worse response."""
    preference_column: str | None = None
    """With `format: pairs`: if the two columns above are not in order of preference, the column
    with 1 (the first is better) or 2 (the second)."""
    margin_column: str | None = None
    """With `format: pairs`: by how much the chosen response must win, in reward units."""
    response_column: str = "response"
    """With `format: ratings`: the response."""
    rating_column: str = "rating"
    """With `format: ratings`: a number, or a list of single raters' numbers; higher is better."""
    rater: Literal["mean", "one"] = "mean"
    """Of a list of ratings take the mean, or that of one rater drawn by `seed`: human noise."""
    num_pairs: PositiveInt | None = None
    """With `format: ratings`: training pairs to draw; default: every pair of responses to the same
    prompt, or as many as there are responses if there are no prompts."""
    num_validation_pairs: PositiveInt | None = None
    """The same for held-out pairs; default without prompts: each response in one pair."""
    label_noise: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the training pairs that are flipped, the same ones for every member."""
    bagging: bool = False
    """Draw each member's pairs with replacement, by the member's own seed."""
    seed: NonNegativeInt = 0
    """Seed of held-out rows, pairs, raters and label noise, the same for every member."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        ratings = ("response_column", "rating_column", "rater", "num_pairs", "num_validation_pairs")
        pairs = ("chosen_column", "rejected_column", "preference_column", "margin_column")
        other = "ratings" if self.format == "pairs" else "pairs"
        for name in ratings if other == "ratings" else pairs:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}={getattr(self, name)} does nothing with format: {self.format}; "
                    f"remove it, or set format: {other}"
                )
        return self
