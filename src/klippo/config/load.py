"""From a YAML file, a recipe or a mapping, plus overrides, to a config whose origins are known.

Every problem is found before any is reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Generic

from pydantic import ValidationError
from typing_extensions import TypeVar

from klippo.config.located import (
    KeyPath,
    Located,
    Problem,
    dotted,
    locate,
    read_yaml,
    write_value,
    write_yaml,
)
from klippo.config.problems import describe, nearest
from klippo.config.schema import RunConfig, WholeConfig
from klippo.config.walk import by_kind, child
from klippo.errors import ConfigError

COMMAND_LINE = "command line"
DEFAULT = "default"
RECIPES = "klippo.recipes"

C = TypeVar("C", bound=WholeConfig, default=RunConfig)


@dataclass(frozen=True)
class LoadedConfig(Generic[C]):
    """A valid config, and who set what."""

    config: C
    origins: dict[str, str]
    """Dotted key -> `file.yaml:12`, `command line` or `default`, for every value."""
    name: str
    """The file's name without its ending, or the recipe's name."""


def load_config(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    schema: type[C] = RunConfig,  # type: ignore[assignment]
) -> LoadedConfig[C]:
    """The config in a YAML file, or of a packaged recipe, with `key.sub=value` overrides on top.

    Raises ConfigError that lists every problem with its file and line.
    """
    label, text = _read_source(source, schema)
    tree, problems = read_yaml(text, lambda line: f"{label}:{line}")
    return _load(tree, problems, overrides, Path(label).stem, schema)


def config_from_mapping(
    mapping: Mapping[str, Any] | C,
    overrides: Sequence[str] = (),
    *,
    name: str = "run",
    schema: type[C] = RunConfig,  # type: ignore[assignment]
) -> LoadedConfig[C]:
    """The same from Python: a mapping of YAML's shape, or a config of the schema."""
    if isinstance(mapping, schema):
        mapping = mapping.model_dump(exclude_unset=True)
    return _load(locate(mapping, "argument"), [], overrides, name, schema)


def recipe_names(schema: type[WholeConfig] = RunConfig) -> list[str]:
    """The packaged recipes of a schema."""
    folder = resources.files(RECIPES) / schema.recipe_folder
    if not folder.is_dir():
        return []
    return sorted(
        item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")
    )


def to_yaml(config: WholeConfig) -> str:
    """The whole config, defaults included; it loads again to an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def show(loaded: LoadedConfig[C]) -> list[tuple[str, Any, str]]:
    """Key, value and origin of everything, in the schema's order."""
    values = {dotted(path): value for path, value in _flat(loaded.config.model_dump(mode="json"))}
    return [(key, value, loaded.origins[key]) for key, value in values.items()]


def schema(of: type[WholeConfig] = RunConfig) -> dict[str, Any]:
    """The JSON schema of a config file, for editors."""
    return of.model_json_schema()


def _read_source(source: str | Path, schema: type[WholeConfig]) -> tuple[str, str]:
    """What to call the source in messages, and its text."""
    path = Path(source)
    if not path.is_file():
        return _read_recipe(str(source), schema)
    try:
        return str(path), path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text") from None


def _read_recipe(name: str, schema: type[WholeConfig]) -> tuple[str, str]:
    recipes = recipe_names(schema)
    if name in recipes:
        file = resources.files(RECIPES) / schema.recipe_folder / f"{name}.yaml"
        return file.name, file.read_text(encoding="utf-8")
    if Path(name).is_dir():
        raise ConfigError(f"{name}: is a folder, not a config; try {Path(name) / 'config.yaml'}")
    near = nearest(name, recipes)
    raise ConfigError(
        f"{name}: neither a file nor a recipe"
        + (f"; did you mean {near}?" if near else ".")
        + f" Recipes: {', '.join(recipes) or 'none'}"
    )


def _load(
    tree: Located, problems: list[Problem], overrides: Sequence[str], name: str, schema: type[C]
) -> LoadedConfig[C]:
    if not isinstance(tree.value, dict):
        what = write_value(tree.plain())
        problems.append(
            Problem(tree.origin, f"a config must be a mapping (key: value), not {what}")
        )
    if not isinstance(tree.value, dict) or (problems and not tree.value):
        raise _error(problems)  # nothing to go on with
    over, override_problems = _parse_overrides(overrides, schema)
    tree = merge(tree, over, schema)
    tree, placeholder_problems = _fill_placeholders(tree, name, schema)
    problems += override_problems + placeholder_problems
    try:
        config = schema.model_validate(tree.plain())
    except ValidationError as error:
        raise _error(problems + describe(error, tree, schema)) from None
    if problems:
        raise _error(problems)
    given = dict(tree.leaves())
    origins = {
        dotted(path): given.get(path, DEFAULT) for path, _ in _flat(config.model_dump(mode="json"))
    }
    return LoadedConfig(config, origins, name)


def _error(problems: list[Problem]) -> ConfigError:
    """All problems, in the order of the file's lines, the command line's last."""

    def place(problem: Problem) -> tuple[bool, int]:
        line = re.search(r":(\d+)$", problem.origin)
        return problem.origin == COMMAND_LINE, int(line[1]) if line else 0

    lines = [str(problem) for problem in sorted(problems, key=place)]
    return ConfigError("\n".join(dict.fromkeys(lines)))


def merge(base: Located, over: Located, annotation: Any) -> Located:
    """`over` on top of `base`: mappings merge, everything else replaces.

    A section whose `kind` changes is replaced, for the keys of one kind mean nothing to another.
    """
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    old, new = base.value.get("kind"), over.value.get("kind")
    if by_kind(annotation) and old and new and old.value != new.value:
        return over
    kind = new or old
    merged = dict(base.value)
    for key, value in over.value.items():
        inner = child(annotation, key, kind.value if kind else None)
        merged[key] = merge(merged[key], value, inner) if key in merged else value
    return Located(merged, base.origin)


def _parse_overrides(
    overrides: Sequence[str], schema: type[WholeConfig]
) -> tuple[Located, list[Problem]]:
    """All overrides as one tree, so that their order only matters for the same key."""
    tree, problems = Located({}, COMMAND_LINE), []
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys):
            problems.append(
                Problem(COMMAND_LINE, f"{override}: needs key=value, as in ppo.num_steps=200")
            )
            continue
        value, broken = read_yaml(text, lambda _: COMMAND_LINE)
        if broken:
            problems += [Problem(p.origin, f"{override}: {p.text}; quotes help") for p in broken]
            continue
        if not text.strip():
            value = Located(None, COMMAND_LINE)
        for part in reversed(keys):
            value = Located({part: value}, COMMAND_LINE)
        tree = merge(tree, value, schema)
    return tree, problems


def _fill_placeholders(
    tree: Located, name: str, schema: type[WholeConfig]
) -> tuple[Located, list[Problem]]:
    """`{seed}` in every text and `{name}` in output_dir; templates keep their own braces."""
    fields = schema.model_fields
    default = Located(fields["output_dir"].default, DEFAULT)
    folder = tree.value.get("output_dir", default)
    seed = tree.value.get("seed", Located(fields["seed"].default, DEFAULT)).plain()
    problems = []
    if isinstance(folder.value, str):
        unknown = set(re.findall(r"\{[^{}]*\}", folder.value)) - {"{name}", "{seed}"}
        problems = [
            Problem(
                folder.origin,
                f"output_dir={folder.value}: nothing fills {brace}; use {{name}} or {{seed}}",
            )
            for brace in sorted(unknown)
        ]
        folder = Located(folder.value.replace("{name}", name), folder.origin)
    return _fill_seed(Located({**tree.value, "output_dir": folder}, tree.origin), seed), problems


def _fill_seed(tree: Located, seed: object) -> Located:
    if isinstance(tree.value, dict):
        return Located({k: _fill_seed(v, seed) for k, v in tree.value.items()}, tree.origin)
    if isinstance(tree.value, list):
        return Located([_fill_seed(item, seed) for item in tree.value], tree.origin)
    if isinstance(tree.value, str):
        return Located(tree.value.replace("{seed}", str(seed)), tree.origin)
    return tree


def _flat(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, (*path, key))
    else:
        yield path, value
