"""Settings of the judge: how to reach it and what it may cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from klippo.errors import ConfigError
from klippo.judge.security import refuse_key_in_url
from klippo.settings import Settings

KEY_FIELDS = ("api_key", "apikey", "api-key", "key", "token", "api_token", "openai_api_key")


VARIABLE = re.compile(r"(?!AKIA)[A-Z_][A-Z0-9_]{0,63}")
"""Looks like OPENAI_API_KEY, and not like a key."""
PRESETS: Mapping[str, tuple[str, str]] = {
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": ("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
    "gemini": ("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
}
"""Defaults of base_url and api_key_env by provider; the others have none."""


class TransportSettings(Settings):
    """Where the judge is, how hard it may be pressed, and what it may cost."""

    model_config = ConfigDict(hide_input_in_errors=True)

    provider: Literal["openai", "anthropic", "gemini", "vllm", "ollama", "local"] = "openai"
    """Sets base_url, protocol and api_key_env; `vllm`, `ollama` and `local` (anything that speaks
    OpenAI's chat format) need base_url."""
    model: str
    """The judge's name, as its server calls it."""
    protocol: Literal["openai_chat", "anthropic_messages"] | None = None
    """Wire format; default: the provider's."""
    base_url: str | None = None
    """Up to, and without, /chat/completions or /messages; most end in /v1. Default: the
    provider's."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself never stands in a
    config. Default: the provider's; none for a server of your own."""
    allow_plain_http: bool = False
    """Send a key over plain http to another machine too; anyone on the way can read it."""
    concurrency: PositiveInt = 16
    """Calls at the same time; halved when the server answers 429, and slowly raised again."""
    timeout_s: PositiveFloat = 60.0
    """For one attempt, from connecting to the last byte."""
    max_attempts: Annotated[int, Field(ge=1, le=6)] = 6
    """Attempts per answer, with growing random pauses between them."""
    usd_per_million_prompt_tokens: float | None = Field(default=None, ge=0)
    """Price of what the judge reads; max_usd needs it."""
    usd_per_million_completion_tokens: float | None = Field(default=None, ge=0)
    """Price of what the judge writes; max_usd needs it."""
    max_calls: PositiveInt | None = None
    """Budget of HTTP calls, retries included, over all processes and restarts of a run."""
    max_tokens_total: PositiveInt | None = None
    """Budget of tokens, read and written."""
    max_usd: PositiveFloat | None = None
    """Budget in USD. Each call reserves its worst case first, so that it is never passed."""
    cache: str | None = None
    """SQLite file with every answer and the budget's ledger; default: runs/judge.sqlite. Runs that
    share the file share answers."""

    @model_validator(mode="before")
    @classmethod
    def _holds_no_key(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        for name in KEY_FIELDS:
            if name in given:
                raise ConfigError(
                    f"judge: {name} holds a key, and a config may not; put the key into an "
                    "environment variable and name that one: api_key_env: OPENAI_API_KEY"
                )
        variable = given.get("api_key_env")
        if variable is not None and not VARIABLE.fullmatch(str(variable)):
            raise ConfigError(
                "judge: api_key_env is not the name of an environment variable (capitals, digits "
                "and _; not shown here, it may be a key); write the name, as in api_key_env: "
                "OPENAI_API_KEY, and the key into that variable"
            )
        refuse_key_in_url(given.get("base_url"))
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        if self.url is None:
            problems.append(
                f"base_url is missing: provider={self.provider} can be anywhere; write for "
                "instance base_url: http://127.0.0.1:8000/v1"
            )
        if self.max_usd is not None and self.prices is None:
            problems.append(
                f"max_usd={self.max_usd} needs prices: set usd_per_million_prompt_tokens and "
                "usd_per_million_completion_tokens (0 for a server of your own)"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def _preset(self) -> tuple[str, str] | tuple[None, None]:
        return PRESETS.get(self.provider, (None, None))

    @property
    def url(self) -> str | None:
        """base_url, or the provider's, without a slash at its end."""
        url = self.base_url or self._preset[0]
        return None if url is None else url.rstrip("/")

    @property
    def wire_format(self) -> Literal["openai_chat", "anthropic_messages"]:
        """protocol, or the provider's."""
        if self.protocol is not None:
            return self.protocol
        return "anthropic_messages" if self.provider == "anthropic" else "openai_chat"

    @property
    def key_variable(self) -> str | None:
        """api_key_env, or the provider's."""
        return self.api_key_env or self._preset[1]

    @property
    def prices(self) -> tuple[float, float] | None:
        """USD per million tokens read and written; None unless both are known."""
        read, written = self.usd_per_million_prompt_tokens, self.usd_per_million_completion_tokens
        return None if read is None or written is None else (read, written)


class CriterionSettings(Settings):
    """One of several criteria, each judged by a call of its own."""

    text: str
    """What stands for {criteria} in the rubric."""
    weight: PositiveFloat = 1.0
    """Its share: the reward is the weighted mean over criteria."""


class JudgeSettings(Settings):
    """A chat model behind an API that scores each response from 0 to 10."""

    kind: Literal["judge"]
    api: TransportSettings
    """Where the judge is, and what it may cost."""
    rubric: str | None = None
    """What the judge is asked: `general`, `sycophancy`, `pairwise` or a file of your own with
    {prompt} and {response}. Default: `general`, with mode pairwise `pairwise`."""
    mode: Literal["absolute", "difference", "pairwise"] = "absolute"
    """The reward between -1 and 1: score / 5 - 1; (score - score of the reference) / 10; or a
    comparison with the reference, asked in both orders."""
    reference_column: str | None = None
    """Column of the data with a reference answer; modes difference and pairwise need it."""
    criteria: Annotated[dict[str, CriterionSettings], Field(min_length=1)] | None = None
    """Name -> criterion, each judged and logged alone. Default: the rubric's own, in one call."""
    votes: PositiveInt = 1
    """Answers per question, averaged; with log-probs one is enough, and one is asked for."""
    temperature: float | None = Field(default=None, ge=0)
    """Sent only where set, because some judges refuse it."""
    score_source: Literal["auto", "logprobs", "json", "line"] = "auto"
    """Where the score is read: the expected score over the log-probs of eleven labels, JSON by a
    schema, or a last line `Score: N`. `auto` takes the first that the judge can, at the start."""
    rationale: bool = False
    """Let the judge say why before it scores (json or line): slower and dearer, often better."""
    max_tokens: PositiveInt | None = None
    """Longest answer; default: 4 with log-probs, 256 otherwise, 600 with a rationale; a cut one
    is asked for once more with four times as many. A judge that thinks first needs thousands."""
    max_response_chars: PositiveInt = 20_000
    """The judge sees so many characters of a response or reference, and a mark where it is cut."""
    on_unscored: Literal["mask", "floor", "value"] = "mask"
    """A response without a score is left out of the update, gets -1, or gets unscored_value."""
    unscored_value: float | None = None
    """With `on_unscored: value`: the reward that it gets."""
    max_unscored_step: float = Field(default=0.25, ge=0, le=1)
    """Above this share of unscored responses in a step (or in the last 32, where a step is
    smaller) the judge is asked again for outage_patience_s; then the run ends."""
    max_unscored_run: float = Field(default=0.05, ge=0, le=1)
    """Above this share of all responses, once there are 200, the run ends."""
    outage_patience_s: float = Field(default=600.0, ge=0)
    """How long a step waits for a judge that cannot be reached."""
    probes: bool = True
    """Before the first score, judge five worthless answers and warn if one is liked."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        if self.mode != "absolute" and self.reference_column is None:
            problems.append(
                f"reference_column is missing: mode={self.mode} compares with a reference answer; "
                "name the data's column that holds it, or use mode: absolute"
            )
        if self.rationale and self.score_source == "logprobs":
            problems.append(
                "rationale=true needs words, and score_source=logprobs reads one token; use "
                "score_source: auto, or leave the rationale out"
            )
        if self.votes > 1 and (self.temperature == 0 or self.score_source == "logprobs"):
            why = "temperature=0" if self.temperature == 0 else "score_source=logprobs"
            problems.append(f"votes={self.votes} would all be the same with {why}; use votes: 1")
        if (self.on_unscored == "value") != (self.unscored_value is not None):
            problems.append(
                f"unscored_value={self.unscored_value} and on_unscored={self.on_unscored}: set "
                "the value with on_unscored: value, and only then"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def rubric_name(self) -> str:
        """rubric, or the mode's own."""
        return self.rubric or ("pairwise" if self.mode == "pairwise" else "general")
