"""What a run and a rollout server agree on: headers, the token, lines of an answer.

Every answer of status 200 to a POST is lines of JSON, the last with `end` or `error`. Empty lines
between them say that the server is alive. The connection closes behind the last.
"""

from __future__ import annotations

import os
import re
from typing import Any

from pydantic import Field

from klippo.errors import ConfigError, KlippoError, PreflightError
from klippo.settings import Settings
from klippo.types import Completion

PROTOCOL = "1"
"""Both sides must have the same: raised with every change of what is sent."""
VERSION, RUN, DIGEST = "Klippo-Protocol", "Klippo-Run", "Klippo-Weights"
"""Headers: which protocol, for which run, and the digest of the weights in the body."""
TOKEN_VARIABLE = "KLIPPO_ROLLOUT_TOKEN"
"""The environment variable that holds the same token where a server and where a run starts."""
HEARTBEAT_S = 5.0
"""Between two signs of life of a server that works, in seconds."""
KINDS: dict[str, type[KlippoError]] = {"config": ConfigError, "preflight": PreflightError}
"""Errors that no other attempt mends, by the names that they have in an answer."""


class Asked(Settings):
    """The body of /generate."""

    weights: str
    """Digest of those that are to answer."""
    prompts: list[list[int]]
    """Token ids."""
    max_lengths: list[int] = Field(min_length=1)
    seeds: list[int]


def read_token() -> str | None:
    """The token in the environment; None where there is none.

    Raises PreflightError for one that cannot be sent in a header.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token and re.fullmatch(r"[\x21-\x7e]+", token) is None:
        raise PreflightError(
            f"the environment variable {TOKEN_VARIABLE} holds spaces or other characters that no "
            "token has; set it again"
        )
    return token or None


def bearer(token: str) -> str:
    """The value of the Authorization header."""
    return f"Bearer {token}"


def error_line(error: Exception) -> dict[str, Any]:
    """The last line of an answer that failed."""
    kinds = [name for name, kind in KINDS.items() if isinstance(error, kind)]
    text = str(error) if isinstance(error, KlippoError) else f"{type(error).__name__}: {error}"
    return {"error": text, "kind": kinds[0] if kinds else "failed"}


def completion_line(i: int, completion: Completion) -> dict[str, Any]:
    """The line that carries completion i."""
    return {
        "i": i,
        "token_ids": completion.token_ids,
        "finished": completion.finished,
        "logprobs": completion.logprobs,
    }


def read_completion(line: dict[str, Any]) -> tuple[int, Completion]:
    """The inverse of `completion_line`."""
    return line["i"], Completion(
        token_ids=line["token_ids"], finished=line["finished"], logprobs=line["logprobs"]
    )
