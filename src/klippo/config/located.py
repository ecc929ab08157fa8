"""YAML whose every value remembers where it was written.

The dialect is YAML 1.2's core schema: `1e-5` is a number, `no`, `12:30` and `2024-01-01` are text.
Tags are refused, and so are keys given twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""Of one document, aliases written out: ten lines of YAML can stand for more than memory holds."""


@dataclass(frozen=True, slots=True)
class Located:
    """A value and its origin; mappings and lists hold Located values in turn."""

    value: Any
    origin: str

    def items(self) -> Iterable[tuple[str | int, Located]]:
        """What a mapping or a list holds, by key or index; of anything else nothing."""
        if isinstance(self.value, dict):
            return self.value.items()
        return enumerate(self.value) if isinstance(self.value, list) else ()

    def walk(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Located]]:
        """This value and everything inside it, with their paths."""
        yield path, self
        for key, item in self.items():
            yield from item.walk((*path, key))

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    def origin_at(self, path: KeyPath) -> str:
        """Where `path` was given, or else the deepest of its parents that was given."""
        node = self
        for key in path:
            items = dict(node.items())
            if key not in items:
                break
            node = items[key]
        return node.origin


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where."""

    origin: str
    text: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.text}"


def dotted(path: KeyPath) -> str:
    """`ppo.clip_range`, `optimizer.betas[1]`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def flatten(value: object, path: KeyPath = ()) -> dict[str, Any]:
    """Dotted key -> value, of everything that is no mapping with something in it."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, item in value.items() for k, v in flatten(item, (*path, key)).items()}
    return {dotted(path): value} if path else {}


def locate(value: object, origin: str) -> Located:
    """A Python value, all of one origin."""
    if isinstance(value, Mapping):
        return Located({str(k): locate(item, origin) for k, item in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Located([locate(item, origin) for item in value], origin)
    return Located(value, origin)


# Scalars of YAML 1.2: type, pattern, first characters, how to read it.
_SCALARS: list[tuple[str, str, str, Callable[[str], object]]] = [
    ("null", r"~|null|Null|NULL|", "~nN\0", lambda _: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    (
        "int",
        r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+",
        "-+0123456789",
        lambda text: int(text, 16) if "x" in text else int(text.replace("_", "")),
    ),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
        lambda text: float(re.sub(r"_|\.(?=[in])", "", text.lower())),
    ),
]
_TAG = "tag:yaml.org,2002:"
_READ = {_TAG + name: read for name, _, _, read in _SCALARS} | {_TAG + "str": str}


class _Loader(yaml.SafeLoader):
    """Knows the scalars above and no others."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would read as something other than text."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Text with line ends and the like in escapes, because YAML folds some of them together."""
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first, _ in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _TAG + _name,
            re.compile(rf"^(?:{_pattern})$"),
            ["" if char == "\0" else char for char in _first],
        )


def read_yaml(text: str, origin: Callable[[int], str]) -> tuple[Located, list[Problem]]:
    """The document and what is wrong with it; `origin` names a line, counted from 1.

    An empty document is an empty mapping. Broken YAML gives an empty mapping and one problem.
    """
    line, broken = 1, None
    reader = _Reader(origin)
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            line = node.start_mark.line + 1
            return reader.read(node, origin(line), (), ()), reader.problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        broken = f"not YAML: {' '.join(filter(None, (error.context, error.problem)))}"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        broken = f"not YAML: character #x{error.character:x} is not allowed"
    except RecursionError:
        broken = f"not YAML: {_TOO_DEEP}"
    except OverflowError:
        broken = f"more than {MAX_VALUES:,} values, aliases written out; write a smaller document"
    return Located({}, origin(line)), [Problem(origin(line), broken)] if broken else []


_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


class _Reader:
    """Turns nodes into Located values, collecting problems on the way."""

    def __init__(self, origin: Callable[[int], str]) -> None:
        self.origin = origin
        self.problems: list[Problem] = []
        self.num_values = 0

    def read(
        self, node: yaml.Node, origin: str, path: KeyPath, parents: tuple[yaml.Node, ...]
    ) -> Located:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise OverflowError
        if node in parents:
            return self._problem(origin, path, "an alias contains itself")
        if len(parents) == MAX_DEPTH:
            return self._problem(origin, path[:1], _TOO_DEEP)
        parents = (*parents, node)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return Located(self._mapping(node, path, parents), origin)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = [
                self.read(item, self._line(item), (*path, index), parents)
                for index, item in enumerate(node.value)
            ]
            return Located(items, origin)
        if isinstance(node, yaml.ScalarNode) and node.tag in _READ:
            try:
                return Located(_READ[node.tag](node.value), origin)
            except ValueError as error:
                return self._problem(origin, path, str(error))
        tag = node.tag.replace(_TAG, "!!")
        return self._problem(origin, path, f"the tag {tag} is not allowed; remove it")

    def _mapping(
        self, node: yaml.MappingNode, path: KeyPath, parents: tuple[yaml.Node, ...]
    ) -> dict[str, Located]:
        items: dict[str, Located] = {}
        for key_node, value_node in node.value:
            key, origin = key_node.value, self._line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(origin, path, "a key must be text")
            elif key in items:
                first = items[key].origin
                self._problem(origin, (*path, key), f"given twice, first at {first}")
            else:
                items[key] = self.read(value_node, origin, (*path, key), parents)
        return items

    def _line(self, node: yaml.Node) -> str:
        return self.origin(node.start_mark.line + 1)

    def _problem(self, origin: str, path: KeyPath, text: str) -> Located:
        self.problems.append(Problem(origin, f"{dotted(path)}: {text}" if path else text))
        return Located(None, origin)


def write_yaml(value: object) -> str:
    """A block of YAML that `read_yaml` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def write_value(value: object, limit: int | None = None) -> str:
    """One value on one line, as it could stand after `key=`; cut after `limit` characters."""
    flow = isinstance(value, dict | list | tuple)
    try:
        text = yaml.dump(
            value, Dumper=_Dumper, default_flow_style=flow, allow_unicode=True, width=10**6
        )
    except yaml.YAMLError:  # a Python object that YAML has no form for
        text = repr(value)
    text = text.removesuffix("...\n").rstrip("\n")
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
