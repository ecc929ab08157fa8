"""Trees of located values on top of one another, and the tree that `key=value` overrides make."""

from __future__ import annotations

from collections.abc import Sequence

from klippo.config.located import Located, Problem, read_yaml
from klippo.config.problems import Section, by_kind, child

COMMAND_LINE = "command line"


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
