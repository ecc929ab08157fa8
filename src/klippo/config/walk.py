"""Ways through a schema's types: which settings class or value belongs to a key path."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, NamedTuple, Union, get_args, get_origin

from klippo.config.located import KeyPath
from klippo.settings import Settings

Section = type[Settings]


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
