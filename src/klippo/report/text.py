"""Foreign text and numbers in a form that is safe and clear to read.

Model output is hostile until proven otherwise: it may hold terminal codes, marks that reorder a
line, or megabytes of one letter.
"""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

MAX_CHARACTERS = 4000
JOINERS = "\u200c\u200d"
"""They belong to words and emoji, and reorder nothing."""
MINUS = "\u2212"


def visible(text: str, limit: int = MAX_CHARACTERS) -> str:
    """The text with every character that could act made visible: `\\x1b` becomes `⟨U+001B⟩`.

    Line breaks and tabs stay. Broken surrogates become U+FFFD. Longer than `limit` is cut, with a
    remark that says so.
    """
    text = text.replace("\r\n", "\n")
    cut = text[:limit]
    shown = "".join(map(_shown, cut))
    if len(text) > len(cut):
        shown += f" … (cut: {len(cut):,} of {len(text):,} characters)"
    return shown


def _shown(ch: str) -> str:
    if ch in "\n\t":
        return ch
    if ch in "\u2028\u2029\x85":
        return "\n"
    category = unicodedata.category(ch)
    if category == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    if category[0] == "C" and ch not in JOINERS and category != "Co":
        return f"⟨U+{ord(ch):04X}⟩"
    return ch


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """`+0.58` with a proper minus; an em dash for what is not known."""
    if value is None or math.isnan(value):
        return "—"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.replace("-", "+" if signed else "")
    return text.replace("-", MINUS)


def interval(low: float, high: float, digits: int = 2, *, signed: bool = False) -> str:
    """`+0.41 to +0.75`."""
    return f"{number(low, digits, signed=signed)} to {number(high, digits, signed=signed)}"


def share(value: float | None) -> str:
    """`57%`."""
    return "—" if value is None or math.isnan(value) else f"{value:.0%}"


def duration(seconds: float | None) -> str:
    """`2 h 05 min`, `3 min 20 s` or `12 s`."""
    if seconds is None or not math.isfinite(seconds):
        return "—"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute:02} min"
    return f"{minutes} min {second:02} s" if minutes else f"{second} s"


def plain_value(value: Any) -> str:
    """A config value as one writes it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
