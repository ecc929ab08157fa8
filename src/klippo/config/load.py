"""From a YAML file, a recipe or a mapping, plus overrides, to a config whose origins are known.

Every problem is found before any is reported.
"""

from __future__ import annotations

import math
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
from klippo.config.merge import COMMAND_LINE, merge, parse_overrides
from klippo.config.placeholders import fill_placeholders, reopened
from klippo.config.problems import describe, nearest
from klippo.config.schema import RunConfig, WholeConfig
from klippo.errors import ConfigError

DEFAULT = "default"
RECIPES = "klippo.recipes"
FLOAT32_MAX = (2 - 2**-23) * 2.0**127

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
        mapping = reopened(mapping.model_dump(exclude_unset=True))
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
    return write_yaml(reopened(config.model_dump(mode="json")))


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
    return str(path), read_text(path)


def read_text(path: Path) -> str:
    """A YAML file's text; ConfigError where there is none to read."""
    try:
        return path.read_text(encoding="utf-8-sig")
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
        raise config_error(problems)  # nothing to go on with
    over, override_problems = parse_overrides(overrides, schema)
    return resolve(merge(tree, over, schema), problems + override_problems, name, schema)


def resolve(
    tree: Located,
    problems: list[Problem],
    name: str,
    schema: type[C],
    sources: Mapping[str, str] | None = None,
) -> LoadedConfig[C]:
    """The config of a merged tree, or a ConfigError with `problems` and all that is wrong in it.

    `sources` names the keys that were written in another spelling: Klippo's key -> theirs.
    """
    tree, placeholder_problems = fill_placeholders(tree, name, schema)
    problems = problems + placeholder_problems
    config: C | None = None
    try:
        config = schema.model_validate(tree.plain())
    except ValidationError as error:
        problems = problems + describe(error, tree, schema)
    told = {problem.text.partition("=")[0] for problem in problems}
    problems += [one for one in _oversized(tree) if one.text.partition("=")[0] not in told]
    if config is None or problems:
        raise config_error(problems, sources)
    given = dict(tree.leaves())
    origins = {
        dotted(path): given.get(path, DEFAULT) for path, _ in _flat(config.model_dump(mode="json"))
    }
    return LoadedConfig(config, origins, name)


def config_error(
    problems: Sequence[Problem], sources: Mapping[str, str] | None = None
) -> ConfigError:
    """All problems, file by file in the order of the lines, the command line's last."""

    def place(problem: Problem) -> tuple[bool, str, int]:
        file, _, line = problem.origin.rpartition(":")
        return problem.origin == COMMAND_LINE, file, int(line) if line.isdigit() else 0

    def text(problem: Problem) -> str:
        source = (sources or {}).get(re.split(r"[=:\[ ]", problem.text)[0])
        return f"{problem} (written as {source})" if source else str(problem)

    lines = [text(problem) for problem in sorted(problems, key=place)]
    return ConfigError("\n".join(dict.fromkeys(lines)))


def _oversized(tree: Located) -> Iterator[Problem]:
    """Numbers that PyTorch does not hold: whole ones in 64 bits, others in float32."""
    for path, item in tree.scalars():
        rule = None
        if isinstance(item.value, int) and not -(2**63) <= item.value < 2**63:
            rule = "must lie within 64 bits"
        elif isinstance(item.value, float) and FLOAT32_MAX < abs(item.value) < math.inf:
            rule = "must lie within float32, below 3.4e+38"
        if rule is not None:
            yield Problem(item.origin, f"{dotted(path)}={write_value(item.value)[:40]}: {rule}")


def _flat(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, (*path, key))
    else:
        yield path, value
