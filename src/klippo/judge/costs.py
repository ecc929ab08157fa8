"""What a call costs: at worst before it is made, and as billed when it has come back."""

from __future__ import annotations

import math

from klippo.judge.database import Spend
from klippo.judge.settings import TransportSettings
from klippo.judge.store import Caps, Start
from klippo.judge.transport import Exchange, Verdict
from klippo.judge.wire import Usage

TEMPLATE_TOKENS = 256
"""Allowed for what a server puts around the messages, and for each message of them below."""
MESSAGE_TOKENS = 64


class Meter:
    """Prices and caps of one client."""

    def __init__(self, settings: TransportSettings) -> None:
        self.settings = settings
        usd = settings.max_usd
        self.caps = Caps(
            calls=settings.max_calls,
            tokens=settings.max_tokens_total,
            nano_usd=None if usd is None else math.floor(usd * 1e9),
        )
        self._margin = 1.0

    def worst(self, num_bytes: int, num_messages: int, max_tokens: int) -> Spend:
        """Of a call with such a body: no token is shorter than a byte."""
        around = TEMPLATE_TOKENS + MESSAGE_TOKENS * num_messages
        read = math.ceil((num_bytes + around) * self._margin)
        return self.spend(Usage(prompt_tokens=read, completion_tokens=max_tokens))

    def spend(self, usage: Usage) -> Spend:
        """One call with so many tokens, at the set prices, rounded up."""
        read, written = self.settings.prices or (0.0, 0.0)
        nano_usd = 1000 * (usage.prompt_tokens * read + usage.completion_tokens * written)
        tokens = usage.prompt_tokens + usage.completion_tokens
        return Spend(calls=1, tokens=tokens, nano_usd=math.ceil(nano_usd))

    def actual(self, verdict: Verdict, exchange: Exchange, worst: Spend) -> Spend:
        """What an attempt cost; the worst case where that cannot be known."""
        if not exchange.was_sent:
            return Spend()
        if not verdict.is_paid:
            return Spend(calls=1)
        if verdict.reply is not None and verdict.reply.usage is not None:
            return self.spend(verdict.reply.usage)
        return worst

    def learn(self, usage: Usage, worst: Spend) -> float | None:
        """Reserve more from now on where a call used more than its worst case; by how much."""
        excess = (usage.prompt_tokens + usage.completion_tokens) / worst.tokens
        if excess <= 1:
            return None
        self._margin *= excess
        return excess

    def over_budget(self, start: Start, worst: Spend) -> str:
        """The message of a refused reservation."""
        total = start.total
        name = {"calls": "max_calls", "tokens": "max_tokens_total", "nano_usd": "max_usd"}[
            start.cap
        ]
        return (
            f"the judge's budget is used up: {total.calls} calls, {total.tokens} tokens and "
            f"{total.nano_usd / 1e9:.4f} USD are spent or reserved, and the next call (at worst "
            f"{worst.tokens} tokens, {worst.nano_usd / 1e9:.4f} USD) would pass "
            f"{name}={getattr(self.settings, name)}; raise {name} to go on, paid answers are kept"
        )
