"""Foreign text and numbers in a form that is safe and easy to read.

Model output is hostile until proven otherwise: it may hold terminal codes, marks that reorder a
line, or megabytes of one letter.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata

MAX_CHARACTERS = 4000
JOINERS = "\u200c\u200d"
"""They belong to words and emoji, and reorder nothing."""
MINUS = "\u2212"


def visible(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Make every character visible that could act: `\\x1b` becomes `⟨U+001B⟩`.

    Line breaks and tabs stay, broken surrogates become U+FFFD, and a remark says where a text
    longer than `limit` was cut.
    """
    text = text.replace("\r\n", "\n")
    shown = "".join(map(_shown, text[:limit]))
    if len(text) > limit:
        shown += f" … (cut: {limit:,} of {len(text):,} characters)"
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


def one_line(text: str) -> str:
    """Foreign text on one line: no control characters, white space folded."""
    kept = (
        " " if ch.isspace() else ch
        for ch in text
        if ch.isspace() or unicodedata.category(ch)[0] != "C"
    )
    return " ".join("".join(kept).split())


def escape_markdown(text: str) -> str:
    """Foreign text as harmless Markdown on one line."""
    text = one_line(text)
    for special in "\\`*_|[]":
        text = text.replace(special, "\\" + special)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """`+0.58` with a proper minus sign; an em dash if the value is unknown."""
    if value is None or math.isnan(value):
        return "—"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.replace("-", "+" if signed else "")
    return text.replace("-", MINUS)


def with_interval(
    value: float, low: float, high: float, digits: int = 2, *, signed: bool = True
) -> str:
    """`+0.58 (+0.41 to +0.75)`."""
    middle, low_end, high_end = (number(x, digits, signed=signed) for x in (value, low, high))
    return f"{middle} ({low_end} to {high_end})"


def with_minus(text: str) -> str:
    """Proper minus signs for the hyphens before numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", MINUS, text)


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


def plain_value(value: object) -> str:
    """A config value as people write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
