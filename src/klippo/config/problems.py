"""A pydantic error in the user's words: where, which key and value, the rule, the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from klippo.config.located import KeyPath, Located, Problem, dotted, write_value
from klippo.config.walk import Section, all_sections, by_kind, find, members, sections_of

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def describe(error: ValidationError, tree: Located, schema: Section) -> list[Problem]:
    """One problem per key; the tries of a union become one."""
    unions: dict[KeyPath, list[ErrorDetails]] = {}
    problems: list[Problem] = []
    for details in error.errors(include_url=False):
        path = find(details["loc"], schema).path
        if path != details["loc"] and details["type"] != "extra_forbidden":
            unions.setdefault(path, []).append(details)
        else:
            problems += _problems_of([details], tree, schema)
    for path, tries in unions.items():
        inside = any(len(other) > len(path) and other[: len(path)] == path for other in unions)
        if not inside:
            problems += _problems_of(tries, tree, schema)
    return problems


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be."""
    return next(iter(get_close_matches(word, list(choices), n=1)), None)


def _problems_of(tries: list[ErrorDetails], tree: Located, schema: Section) -> list[Problem]:
    """The problems at one path: several errors only where a union tried several types."""
    details = tries[0]
    path, section, annotation = find(details["loc"], schema)
    key, origin, value = dotted(path), tree.origin_at(path), details["input"]
    match details["type"]:
        case "extra_forbidden":
            return [Problem(origin, f"{key}: unknown key; {_advice(path, section, schema)}")]
        case "missing" if isinstance(path[-1], int):  # a pair with one item
            path, annotation = path[:-1], find(details["loc"][:-1], schema).annotation
            num_items = len(members(annotation)[0].__args__)
            rule = f"must have {num_items} items, not {len(value)}"
            return [Problem(tree.origin_at(path), f"{dotted(path)}={write_value(value)}: {rule}")]
        case "missing":
            return [Problem(origin, f"{key}: missing; {_meaning(section, path)}")]
        case "union_tag_not_found":
            kinds = _any_of(by_kind(annotation))
            return [Problem(origin, f"{key}.kind: missing; it must be {kinds}")]
        case "union_tag_invalid":
            origin = tree.origin_at((*path, "kind"))
            rule = _choice_rule(str(value["kind"]), by_kind(annotation))
            return [Problem(origin, f"{key}.kind={write_value(value['kind'])}: {rule}")]
        case "value_error":
            return [
                _broken_rule(line, path, annotation, tree)
                for line in str(details["ctx"]["error"]).split("\n")
            ]
    rule = _rules(tries, annotation)
    if value is None:
        return [Problem(origin, f"{key}: empty; {rule}, or leave the key out")]
    return [Problem(origin, f"{key}={_short(write_value(value))}: {rule}")]


def _rules(tries: list[ErrorDetails], annotation: Any) -> str:
    """What the value must be; where a union's member read it as its type, only that one's rule."""
    matched = [details for details in tries if details["type"] not in _EXPECTED]
    rules = dict.fromkeys(_rule(details, annotation) for details in matched or tries)
    if list(rules) == ["must be text"]:
        return "must be text; put it in quotes"
    return " or ".join(rules).replace(" or must be ", " or ")


def _rule(details: ErrorDetails, annotation: Any) -> str:
    kind, value = details["type"], details["input"]
    if (
        kind == "int_type"
        and isinstance(value, float)
        and value.is_integer()
        and abs(value) < 2**53
    ):
        return f"must be a whole number, written as {value:.0f}"
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}"
    if kind == "literal_error":
        choices = [str(c) for m in members(annotation) for c in getattr(m, "__args__", ())]
        return _choice_rule(str(value), choices)
    if kind in ("too_short", "too_long"):
        bound = "at least {min_length}" if kind == "too_short" else "at most {max_length}"
        rule = "must have " + bound + " items, not {actual_length}"
        return rule.format(**details["ctx"])
    return details["msg"].replace("Input should be", "must be")


def _choice_rule(word: str, choices: Iterable[str]) -> str:
    near = nearest(word, choices)
    return f"must be {_any_of(choices)}" + (f"; did you mean {near}?" if near else "")


def _any_of(choices: Iterable[str]) -> str:
    *first, last = choices
    return f"{', '.join(first)} or {last}" if first else last


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _meaning(section: Section | None, path: KeyPath) -> str:
    field = section.model_fields.get(str(path[-1])) if section else None
    meaning = " ".join((field.description or "").split()) if field else ""
    return meaning.split(". ")[0] or "it has no default"


def _broken_rule(line: str, path: KeyPath, annotation: Any, tree: Located) -> Problem:
    """A validator's message; if it begins with a key of the section, that key is at fault."""
    key = tuple(re.findall(r"\w+", line.partition("=")[0].partition(" ")[0]))
    if key and any(key[0] in section.model_fields for section in sections_of(annotation)):
        return Problem(tree.origin_at((*path, *key)), dotted((*path, line)))
    return Problem(tree.origin_at(path), f"{dotted(path)}: {line}" if path else line)


def _advice(path: KeyPath, section: Section | None, schema: Section) -> str:
    """Where an unknown key belongs, or which known key it resembles."""
    key = str(path[-1])
    own = list(section.model_fields) if section else []
    others = [(name, other) for name, other in all_sections(schema) if other is not section]
    homes = [name or "the top level" for name, other in others if key in other.model_fields]
    if homes:
        return f"{key} belongs to {_any_of(homes)}"
    if near := nearest(key, own):
        return f"did you mean {near}?"
    elsewhere = {name: home for home, other in others for name in other.model_fields}
    if near := nearest(key, elsewhere):
        home = elsewhere[near]
        return f"did you mean {near} of {home or 'the top level'}?"
    return f"known here: {', '.join(own)}"
