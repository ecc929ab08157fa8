"""From a YAML file, a recipe or a mapping, plus overrides, to a config whose origins are known.

Every problem is collected before any is reported.
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
    flatten,
    locate,
    read_yaml,
    write_value,
    write_yaml,
)
from klippo.config.problems import Section, by_kind, child, describe
from klippo.config.schema import RunConfig, WholeConfig
from klippo.errors import ConfigError, nearest

DEFAULT = "default"
COMMAND_LINE = "command line"
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
    path = Path(source)
    label, text = (
        (str(path), read_text(path)) if path.is_file() else _read_recipe(str(source), schema)
    )
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
        mapping = _reopened(mapping.model_dump(exclude_unset=True))
    return _load(locate(mapping, "argument"), [], overrides, name, schema)


def recipe_names(schema: type[WholeConfig] = RunConfig) -> list[str]:
    """The packaged recipes of a schema."""
    folder = resources.files(RECIPES) / schema.recipe_folder
    files = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return sorted(file.removesuffix(".yaml") for file in files if file.endswith(".yaml"))


def to_yaml(config: WholeConfig, origins: Mapping[str, str] | None = None) -> str:
    """The whole config, defaults included; it loads again to an equal one.

    `origins` (a LoadedConfig's) become comments behind the values.
    """
    text = write_yaml(_reopened(config.model_dump(mode="json")))
    if origins is None:
        return text
    tree, _ = read_yaml(text, str)
    lines = text.splitlines()
    width = min(max(map(len, lines)), 44)
    for path, node in tree.walk():
        if origin := origins.get(dotted(path)):
            number = int(node.origin) - 1
            lines[number] = f"{lines[number]:<{width}}  # {' '.join(origin.split())}"
    return "\n".join(lines) + "\n"


def show(loaded: LoadedConfig[C]) -> list[tuple[str, Any, str]]:
    """Key, value and origin of everything, in the schema's order."""
    values = flatten(loaded.config.model_dump(mode="json"))
    return [(key, value, loaded.origins[key]) for key, value in values.items()]


def read_text(path: Path) -> str:
    """A YAML file's text. Raises ConfigError if there is none to read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text") from None


def _read_recipe(name: str, schema: type[WholeConfig]) -> tuple[str, str]:
    """What to call the recipe in messages, and its text."""
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
        what = f"a config must be a mapping (key: value), not {write_value(tree.plain())}"
        raise config_error([*problems, Problem(tree.origin, what)])
    if problems and not tree.value:
        raise config_error(problems)  # the file could not be read
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
    tree, placeholder_problems = _fill_placeholders(tree, name, schema)
    problems = problems + placeholder_problems
    config: C | None = None
    try:
        config = schema.model_validate(tree.plain())
    except ValidationError as error:
        problems = problems + describe(error, tree, schema)
    named = {problem.text.partition("=")[0] for problem in problems}
    problems += [p for p in _oversized(tree) if p.text.partition("=")[0] not in named]
    if config is None or problems:
        raise config_error(problems, sources)
    written = {dotted(path): node.origin for path, node in tree.walk()}
    keys = flatten(config.model_dump(mode="json"))
    return LoadedConfig(config, {key: written.get(key, DEFAULT) for key in keys}, name)


def config_error(
    problems: Sequence[Problem], sources: Mapping[str, str] | None = None
) -> ConfigError:
    """All problems, file by file in the order of the lines, the command line's last."""

    def order(problem: Problem) -> tuple[bool, str, int]:
        file, _, line = problem.origin.rpartition(":")
        return problem.origin == COMMAND_LINE, file, int(line) if line.isdigit() else 0

    def text(problem: Problem) -> str:
        source = (sources or {}).get(re.split(r"[=:\[ ]", problem.text)[0])
        return f"{problem} (written as {source})" if source else str(problem)

    lines = [text(problem) for problem in sorted(problems, key=order)]
    return ConfigError("\n".join(dict.fromkeys(lines)))


def _oversized(tree: Located) -> Iterator[Problem]:
    """Numbers that PyTorch does not hold: whole ones in 64 bits, others in float32."""
    for path, node in tree.walk():
        rule = None
        if isinstance(node.value, int) and not -(2**63) <= node.value < 2**63:
            rule = "must lie within 64 bits"
        elif isinstance(node.value, float) and FLOAT32_MAX < abs(node.value) < math.inf:
            rule = "must lie within float32, below 3.4e+38"
        if rule is not None:
            yield Problem(node.origin, f"{dotted(path)}={write_value(node.value)[:40]}: {rule}")


def _fill_placeholders(
    tree: Located, name: str, schema: type[WholeConfig]
) -> tuple[Located, list[Problem]]:
    """The tree without placeholders, and those that nothing fills.

    `{seed}` is replaced in all texts; `{name}` and `{rm_seed}` too in output_dir. Templates keep
    their other braces.
    """
    defaults = {key: field.default for key, field in schema.model_fields.items()}
    seeds = {
        key: tree.value[key].plain() if key in tree.value else defaults.get(key)
        for key in ("seed", "rm_seed")
    }
    seeds["seed"] = str(seeds["seed"])  # even if it is no number, which validation will say
    problems: list[Problem] = []
    items = {
        key: _fill(
            value, (key,), seeds["rm_seed" if key in schema.rm_seed_sections else "seed"], problems
        )
        for key, value in tree.value.items()
    }
    folder = tree.value.get("output_dir", Located(defaults["output_dir"], "default"))
    if isinstance(folder.value, str):
        words = {"name": name} | {key: seed for key, seed in seeds.items() if key in defaults}
        problems += _unfilled(folder, words)
        items["output_dir"] = Located(_folder(folder.value, words), folder.origin)
    return Located(items, tree.origin), problems


def _reopened(values: dict[str, Any]) -> dict[str, Any]:
    """A filled config's values, to be loaded again: its folder names rm_seed by placeholder.

    Otherwise loading would put another `seed{rm_seed}` inside.
    """
    folder, rm_seed = values.get("output_dir", ""), values.get("rm_seed")
    if rm_seed is None or "{rm_seed}" in folder:
        return values
    start, seed, end = folder.rpartition(str(rm_seed))
    return values | {"output_dir": f"{start}{{rm_seed}}{end}" if seed else folder}


def _fill(node: Located, path: KeyPath, seed: object, problems: list[Problem]) -> Located:
    """The node with {seed} filled; without a seed every text that has it is a problem.

    The members of an ensemble keep {seed} for its `seeds`, and it reports its unfilled ones itself.
    """
    if isinstance(node.value, str) and "{seed}" in node.value:
        if seed is not None:
            return Located(node.value.replace("{seed}", str(seed)), node.origin)
        rule = "nothing fills {seed}, which is rm_seed here; add --rm_seed 3 or rm_seed: 3"
        problems.append(Problem(node.origin, f"{dotted(path)}={node.value}: {rule}"))
    if not isinstance(node.value, dict | list):
        return node
    items = dict(node.items())
    kind, seeds = (items[key].value if key in items else None for key in ("kind", "seeds"))
    kept = "members" if kind == "ensemble" and (seed is None or seeds is not None) else None
    filled = {
        key: item if key == kept else _fill(item, (*path, key), seed, problems)
        for key, item in items.items()
    }
    return Located(filled if isinstance(node.value, dict) else list(filled.values()), node.origin)


def _folder(text: str, words: dict[str, object]) -> str:
    """A run per reward-model seed: without {rm_seed} in it, the folder gets one inside."""
    rm_seed = words.get("rm_seed")
    if rm_seed is not None and "{rm_seed}" not in text:
        ending = f"/seed{rm_seed}"
        text = text if text.endswith(ending) else text.rstrip("/") + ending
    return re.sub(r"\{(\w+)\}", lambda brace: str(words.get(brace[1], brace[0])), text)


def _unfilled(folder: Located, words: dict[str, object]) -> Iterator[Problem]:
    *first, last = [f"{{{word}}}" for word in words]
    for word in sorted(set(re.findall(r"\{([^{}]*)\}", folder.value))):
        rule = f"output_dir={folder.value}: nothing fills {{{word}}}"
        if word not in words:
            yield Problem(folder.origin, f"{rule}; use {', '.join(first)} or {last}")
        elif words[word] is None:
            yield Problem(folder.origin, f"{rule}; add --rm_seed 3 or rm_seed: 3")


def merge(base: Located, over: Located, annotation: object = object) -> Located:
    """`over` on top of `base`: mappings merge, everything else replaces.

    A section whose `kind` changes is replaced, for the keys of one kind mean nothing to another.
    `annotation` is the type of the value: a schema, or `object` if no schema knows it.
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


def nest(key: str, value: Located) -> Located:
    """Mappings around `value`, one per word of the dotted key, of the same origin."""
    for word in reversed(key.split(".")):
        value = Located({word: value}, value.origin)
    return value


def parse_overrides(overrides: Sequence[str], schema: Section) -> tuple[Located, list[Problem]]:
    """All overrides as one tree, so that their order only matters for the same key."""
    tree, problems = Located({}, COMMAND_LINE), []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            what = f"{override}: needs key=value, as in ppo.num_steps=200"
            problems.append(Problem(COMMAND_LINE, what))
            continue
        value, broken = read_yaml(text if text.strip() else "null", lambda _: COMMAND_LINE)
        problems += [Problem(p.origin, f"{override}: {p.text}; quotes help") for p in broken]
        if not broken:
            tree = merge(tree, nest(key, value), schema)
    return tree, problems


def seed_overrides(rm_seed: int | None = None, rng_seed: int | None = None) -> list[str]:
    """What `--rm_seed` and `--rng_seed` stand for."""
    given = {"rm_seed": rm_seed, "seed": rng_seed}
    return [f"{key}={value}" for key, value in given.items() if value is not None]
