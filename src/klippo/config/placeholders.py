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


def reopened(values: dict[str, Any]) -> dict[str, Any]:
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
    return node.map(
        lambda key, item: item if key == kept else _fill(item, (*path, key), seed, problems)
    )


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
