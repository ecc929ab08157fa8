"""Text of others inside a judge's message: cleaned, cut, and fenced as data."""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata

KEPT_CONTROLS = "\n\t"
HIDDEN = re.compile("[\u2065\u115f\u1160\u3164\uffa0\U000e0000-\U000e0fff]")
"""What shows nothing and is no format character by Unicode: fillers, tags, more selectors."""
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")

_WORDS = (
    r"/?s|bos|eos|pad|unk|mask|cls|sep|/?think|/?system|/?user|/?assistant|/?tool_call"
    r"|/?tool_response|/?tools|start_of_turn|end_of_turn|start_of_image|sp_model|"
    r"endoftext|im_start|im_end|begin_of_text|end_of_text|eot_id"
)
_PIPED = re.compile("<[|\uff5c]|[|\uff5c]>")
_ANGLED = re.compile(rf"<({_WORDS})>", re.IGNORECASE)
_SYS = re.compile(r"<<(/?SYS)>>", re.IGNORECASE)
_SQUARE = re.compile(
    r"\[(/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|CLS|SEP|PAD|MASK|UNK))\]",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """The judge's copy of a text: nothing invisible, no control characters, no chat tokens.

    Invisible characters go first, so that none can hide a chat token. What is visible stays
    visible: a token's brackets are replaced by others that look alike.
    """
    text = HIDDEN.sub("", _LINE_ENDS.sub("\n", text))
    text = "".join(map(_visible, text))
    text = _PIPED.sub(lambda m: m[0].replace("<", "\u2039").replace(">", "\u203a"), text)
    text = _SYS.sub("\u2039\u2039\\1\u203a\u203a", text)
    text = _ANGLED.sub("\u2039\\1\u203a", text)
    return _SQUARE.sub("\u27e6\\1\u27e7", text)


def _visible(char: str) -> str:
    if char.isascii():
        is_control = (char < " " and char not in KEPT_CONTROLS) or char == "\x7f"
        return "\N{REPLACEMENT CHARACTER}" if is_control else char
    match unicodedata.category(char):
        case "Cf":  # bidirectional marks, zero width, soft hyphens
            return ""
        case "Cc" | "Cs" | "Co" | "Cn":  # controls, lone surrogates, private, unassigned
            return "\N{REPLACEMENT CHARACTER}"
    return char


def is_blank(text: str) -> bool:
    """True if a reader sees nothing."""
    return not clean(text).strip()


def cut(text: str, max_chars: int) -> tuple[str, bool]:
    """At most so many characters, with a mark that says how many are missing; True if cut."""
    if len(text) <= max_chars:
        return text, False
    return f"{text[:max_chars]}\n[cut here: {len(text) - max_chars} more characters]", True


def fence_for(*texts: str) -> str:
    """Sixteen hex digits that none of the texts contains; the same texts give the same ones.

    Whoever wrote one of the texts cannot know them: they depend on every character of it.
    """
    joined = "\x00".join(texts)
    for number in itertools.count():
        digits = hashlib.sha256(f"{number}\x00{joined}".encode(errors="replace")).hexdigest()[:16]
        if digits not in joined:
            break
    return digits


def fenced(name: str, text: str, fence: str) -> str:
    """The text between two lines that it cannot contain."""
    return f"<<<BEGIN {name} {fence}>>>\n{text}\n<<<END {name} {fence}>>>"
