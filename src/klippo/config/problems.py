"""A schema's types by key, and pydantic's errors in the user's words: key, rule and remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, NamedTuple, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from klippo.config.located import KeyPath, Located, Problem, dotted, write_value
from klippo.errors import nearest
from klippo.settings import Settings

Section = type[Settings]

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "model_attributes": "a mapping",
}


class Field(NamedTuple):
    """What a pydantic error is about, in terms of what the user wrote."""

    path: KeyPath
    section: Section | None
    """The settings class that holds the last key."""
    annotation: object
    """The type of the value."""


def members(annotation: object) -> list[object]:
    """The members of a (nested) union without None; any other type alone."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for arg in get_args(annotation) for member in members(arg)]
    return [] if annotation is NoneType else [annotation]


def sections_of(annotation: object) -> list[Section]:
    """The settings classes among `members`."""
    return [m for m in members(annotation) if isinstance(m, type) and issubclass(m, Settings)]


def by_kind(annotation: object) -> dict[str, Section]:
    """`kind` -> settings class, if there are several to choose from; else empty."""
    sections = sections_of(annotation)
    if len(sections) < 2:
        return {}
    return {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}


def child(annotation: object, key: str | int, kind: object = None) -> object:
    """The type of `key`'s value; `object` if the schema does not know the key."""
    kinds = by_kind(annotation)
    for member in [kinds.get(str(kind))] if kinds else members(annotation):
        if get_origin(member) is dict:
            return get_args(member)[1]
        if get_origin(member) in (list, tuple):
            return get_args(member)[0]
        if isinstance(member, type) and issubclass(member, Settings) and key in member.model_fields:
            return member.model_fields[str(key)].annotation
    return object


def find(loc: KeyPath, schema: Section) -> Field:
    """The field of a pydantic `loc`, which also names the union members that it tried."""
    path: KeyPath = ()
    section: Section | None = None
    annotation: object = schema
    for step in loc:
        choices = members(annotation)
        if len(choices) > 1 and str(step).startswith("literal["):
            continue
        if len(choices) > 1:
            lists = [choice for choice in choices if get_origin(choice) in (list, tuple)]
            tried_list = lists[0] if lists and str(step).startswith(("list", "tuple")) else object
            annotation = by_kind(annotation).get(str(step), tried_list)
            continue
        path = (*path, step)
        section = next(iter(sections_of(annotation)), None)
        annotation = child(annotation, step)
    return Field(path, section, annotation)


def all_sections(schema: Section) -> Iterator[tuple[str, Section]]:
    """Every settings class with the name of its section, each reward kind once."""
    seen: set[Section] = set()

    def walk(annotation: object, name: str) -> Iterator[tuple[str, Section]]:
        kinds = by_kind(annotation)
        for kind, section in kinds.items():
            if section not in seen:
                seen.add(section)
                yield f"{name} (kind: {kind})", section
        for section in [] if kinds else sections_of(annotation):
            yield name, section
            for key, field in section.model_fields.items():
                yield from walk(field.annotation, f"{name}.{key}".removeprefix("."))

    return walk(schema, "")


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


def any_of(choices: Iterable[str]) -> str:
    """`a, b or c`."""
    *first, last = choices
    return f"{', '.join(first)} or {last}" if first else last


def choice_rule(word: str, choices: Iterable[str]) -> str:
    """What the word must be, and which choice it resembles."""
    choices = list(choices)
    near = nearest(word, choices)
    return f"must be {any_of(choices)}" + (f"; did you mean {near}?" if near else "")


def _problems_of(tries: list[ErrorDetails], tree: Located, schema: Section) -> list[Problem]:
    """The problems of one key: several errors only if a union tried several types."""
    details = tries[0]
    field = find(details["loc"], schema)
    path, annotation = field.path, field.annotation
    key, origin, value = dotted(path), tree.origin_at(path), details["input"]
    match details["type"]:
        case "extra_forbidden":
            return [Problem(origin, f"{key}: unknown key; {_advice(field, schema)}")]
        case "missing" if isinstance(path[-1], int):  # a pair with one item
            pair = members(find(details["loc"][:-1], schema).annotation)[0]
            rule = f"must have {len(get_args(pair))} items, not {len(value)}"
            text = f"{dotted(path[:-1])}={write_value(value)}: {rule}"
            return [Problem(tree.origin_at(path[:-1]), text)]
        case "missing":
            return [Problem(origin, f"{key}: missing; {_meaning(field)}")]
        case "union_tag_not_found":
            kinds = any_of(by_kind(annotation))
            return [Problem(origin, f"{key}.kind: missing; it must be {kinds}")]
        case "union_tag_invalid":
            origin = tree.origin_at((*path, "kind"))
            rule = choice_rule(str(value["kind"]), by_kind(annotation))
            return [Problem(origin, f"{key}.kind={write_value(value['kind'])}: {rule}")]
        case "value_error":
            return [
                _broken_rule(line, path, annotation, tree)
                for line in str(details["ctx"]["error"]).split("\n")
            ]
    rule = _rules(tries, annotation)
    if value is None:
        return [Problem(origin, f"{key}: empty; {rule}, or leave the key out")]
    return [Problem(origin, f"{key}={write_value(value, limit=80)}: {rule}")]


def _expected(details: ErrorDetails) -> str | None:
    """The type that a value does not have; None if something else is wrong with it."""
    return _EXPECTED.get(re.sub("_(type|parsing|from_float)$", "", details["type"]))


def _rules(tries: list[ErrorDetails], annotation: object) -> str:
    """What the value must be; if a union's member read it as its type, only that one's rule."""
    matched = [details for details in tries if _expected(details) is None]
    rules = dict.fromkeys(_rule(details, annotation) for details in matched or tries)
    if list(rules) == ["must be text"]:
        return "must be text; put it in quotes"
    return " or ".join(rules).replace(" or must be ", " or ")


def _rule(details: ErrorDetails, annotation: object) -> str:
    kind, value = details["type"], details["input"]
    if expected := _expected(details):
        whole = kind == "int_type" and isinstance(value, float) and value.is_integer()
        return f"must be {expected}" + (
            f", written as {value:.0f}" if whole and abs(value) < 2**53 else ""
        )
    if kind == "literal_error":
        choices = [str(c) for m in members(annotation) for c in get_args(m)]
        return choice_rule(str(value), choices)
    if kind in ("too_short", "too_long"):
        bound = "at least {min_length}" if kind == "too_short" else "at most {max_length}"
        rule = "must have " + bound + " items, not {actual_length}"
        return rule.format(**details["ctx"])
    return details["msg"].replace("Input should be", "must be")


def _meaning(field: Field) -> str:
    known = field.section.model_fields.get(str(field.path[-1])) if field.section else None
    meaning = " ".join((known.description or "").split()) if known else ""
    return meaning.split(". ")[0] or "it has no default"


def _broken_rule(line: str, path: KeyPath, annotation: object, tree: Located) -> Problem:
    """A validator's message; if it begins with a key of the section, that key is at fault."""
    key = tuple(re.findall(r"\w+", line.partition("=")[0].partition(" ")[0]))
    if key and any(key[0] in section.model_fields for section in sections_of(annotation)):
        return Problem(tree.origin_at((*path, *key)), dotted((*path, line)))
    return Problem(tree.origin_at(path), f"{dotted(path)}: {line}" if path else line)


def _advice(field: Field, schema: Section) -> str:
    """Where an unknown key belongs, or which known key it resembles."""
    key = str(field.path[-1])
    siblings = list(field.section.model_fields) if field.section else []
    others = [
        (name or "the top level", section)
        for name, section in all_sections(schema)
        if section is not field.section
    ]
    if homes := [name for name, section in others if key in section.model_fields]:
        return f"{key} belongs to {any_of(homes)}"
    if near := nearest(key, siblings):
        return f"did you mean {near}?"
    elsewhere = {name: home for home, section in others for name in section.model_fields}
    if near := nearest(key, elsewhere):
        return f"did you mean {near} of {elsewhere[near]}?"
    return f"known here: {', '.join(siblings)}"
