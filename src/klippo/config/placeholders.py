"""`{seed}` in texts; `{name}`, `{seed}` and `{rm_seed}` in output_dir.

Only these words are replaced: templates keep their own braces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from klippo.config.located import KeyPath, Located, Problem, dotted
from klippo.config.schema import WholeConfig


def fill_placeholders(
    tree: Located, name: str, schema: type[WholeConfig]
) -> tuple[Located, list[Problem]]:
    """The tree without placeholders, and those that nothing fills."""
    seed, rm_seed = _value(tree, "seed", schema), _value(tree, "rm_seed", schema)
    filled, problems = {}, []
    for key, value in tree.value.items():
        by_rm_seed = key in schema.rm_seed_sections
        if by_rm_seed and rm_seed is None:
            problems += [
                Problem(
                    place.origin,
                    f"{dotted(path)}={place.value}: nothing fills {{seed}}, which is rm_seed here; "
                    "add --rm_seed 3 or rm_seed: 3",
                )
                for path, place in _open_seeds(value, (key,))
            ]
        filled[key] = _fill_members(value, rm_seed) if by_rm_seed else _fill(value, seed)
    default = Located(schema.model_fields["output_dir"].default, "default")
    folder = tree.value.get("output_dir", default)
    if isinstance(folder.value, str):
        problems += _unfilled(folder, rm_seed, schema)
        filled["output_dir"] = Located(_folder(folder.value, name, seed, rm_seed), folder.origin)
    return Located(filled, tree.origin), problems


def reopened(values: dict[str, Any]) -> dict[str, Any]:
    """A filled config's values, to be loaded again: its folder names rm_seed by placeholder.

    Otherwise loading would put another `seed{rm_seed}` inside.
    """
    folder, rm_seed = values.get("output_dir", ""), values.get("rm_seed")
    if rm_seed is None or "{rm_seed}" in folder:
        return values
    start, found, end = folder.rpartition(str(rm_seed))
    return values | {"output_dir": f"{start}{{rm_seed}}{end}" if found else folder}


def _value(tree: Located, key: str, schema: type[WholeConfig]) -> Any:
    field = schema.model_fields.get(key)
    default = Located(field.default if field else None, "default")
    return tree.value.get(key, default).plain()


def _folder(text: str, name: str, seed: Any, rm_seed: Any) -> str:
    """A run per reward-model seed: without {rm_seed} in it, the folder gets one inside."""
    if rm_seed is not None and "{rm_seed}" not in text:
        ending = f"/seed{rm_seed}"
        text = text if text.endswith(ending) else text.rstrip("/") + ending
    words = {"{name}": name, "{seed}": str(seed), "{rm_seed}": str(rm_seed)}
    return re.sub(r"\{(name|seed|rm_seed)\}", lambda brace: words[brace[0]], text)


def _unfilled(folder: Located, rm_seed: Any, schema: type[WholeConfig]) -> Iterator[Problem]:
    known = [f"{{{key}}}" for key in ("name", "seed", "rm_seed") if _has(schema, key)]
    for brace in sorted(set(re.findall(r"\{[^{}]*\}", folder.value))):
        rule = f"output_dir={folder.value}: nothing fills {brace}"
        if brace not in known:
            *first, last = known
            yield Problem(folder.origin, f"{rule}; use {', '.join(first)} or {last}")
        elif brace == "{rm_seed}" and rm_seed is None:
            yield Problem(folder.origin, f"{rule}; add --rm_seed 3 or rm_seed: 3")


def _has(schema: type[WholeConfig], key: str) -> bool:
    return key == "name" or key in schema.model_fields


def _open_seeds(tree: Located, path: KeyPath) -> Iterator[tuple[KeyPath, Located]]:
    """Texts with {seed}; an ensemble reports those of its own members."""
    if isinstance(tree.value, dict):
        for key, item in tree.value.items():
            if not (key == "members" and _is_ensemble(tree)):
                yield from _open_seeds(item, (*path, key))
    elif isinstance(tree.value, list):
        for index, item in enumerate(tree.value):
            yield from _open_seeds(item, (*path, index))
    elif isinstance(tree.value, str) and "{seed}" in tree.value:
        yield path, tree


def _is_ensemble(tree: Located) -> bool:
    kind = tree.value.get("kind")
    return kind is not None and kind.value == "ensemble"


def _fill_members(tree: Located, rm_seed: Any) -> Located:
    """{seed} is rm_seed, but where an ensemble has `seeds`, its members keep it for these."""
    if rm_seed is None:
        return tree
    if not isinstance(tree.value, dict):
        return _fill(tree, rm_seed)
    seeds = tree.value.get("seeds")
    keeps = {"members"} if _is_ensemble(tree) and seeds and seeds.value is not None else set()
    items = tree.value.items()
    return Located(
        {k: v if k in keeps else _fill_members(v, rm_seed) for k, v in items}, tree.origin
    )


def _fill(tree: Located, seed: Any) -> Located:
    if isinstance(tree.value, dict):
        return Located({k: _fill(v, seed) for k, v in tree.value.items()}, tree.origin)
    if isinstance(tree.value, list):
        return Located([_fill(item, seed) for item in tree.value], tree.origin)
    if isinstance(tree.value, str):
        return Located(tree.value.replace("{seed}", str(seed)), tree.origin)
    return tree
