"""Configs put together from named entries: the top-level keys of all YAML files of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from klippo.config import ensembles_paper
from klippo.config.load import (
    COMMAND_LINE,
    C,
    LoadedConfig,
    config_error,
    merge,
    parse_overrides,
    read_text,
    resolve,
    seed_overrides,
)
from klippo.config.located import Located, Problem, read_yaml, write_value
from klippo.config.schema import RunConfig
from klippo.errors import ConfigError

FOLDER = "configs"
EXTENDS = "extends"


def load_entries(
    names: Sequence[str],
    folder: str | Path = FOLDER,
    overrides: Sequence[str] = (),
    *,
    schema: type[C] = RunConfig,  # type: ignore[assignment]
    rm_seed: int | None = None,
    rng_seed: int | None = None,
) -> LoadedConfig[C]:
    """The named entries of a folder merged in this order, then the overrides and the two seeds.

    A name may be several, joined by commas. Raises ConfigError that lists every problem.
    """
    names = [name.strip() for joined in names for name in joined.split(",") if name.strip()]
    if not names:
        raise ConfigError("--configs: needs the name of an entry, as in --configs defaults mine")
    entries = _Entries(Path(folder))
    over, problems = parse_overrides([*overrides, *seed_overrides(rm_seed, rng_seed)], schema)
    layers = entries.unfolded(names)
    tree = Located({}, layers[-1].origin)
    for layer in [*layers, over]:
        tree = merge(tree, layer, schema)
    sources = None
    if schema is RunConfig and ensembles_paper.is_foreign(tree):
        both = merge(entries.ppo_file(), tree, schema)
        tree, sources, refused = ensembles_paper.translate(Located(both.value, tree.origin))
        problems += refused
    if problems := list(dict.fromkeys(entries.problems + problems)):
        raise config_error(problems)
    return resolve(tree, [], names[-1], schema, sources)


class _Entries:
    """What a folder's YAML files define, and the problems met in them so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[Problem] = []
        self._entries: dict[str, list[Located]] = {}
        self._ppo_files: list[Located] = []
        for path in _yaml_files(folder):
            tree, problems = read_yaml(read_text(path), partial("{}:{}".format, path))
            self.problems += problems
            if not isinstance(tree.value, dict):
                what = f"a file of entries must be a mapping (name: settings), not {_short(tree)}"
                self._problem(tree, what)
            elif ensembles_paper.is_ppo_file(tree):
                self._ppo_files.append(tree)
            else:
                for name, entry in tree.value.items():
                    self._entries.setdefault(name, []).append(entry)

    def unfolded(self, names: Sequence[str]) -> list[Located]:
        """The entries in the order in which they count, each behind those that it extends.

        What several extend counts once, where it is first met, so that it undoes none of them.
        """
        layers: dict[str, Located] = {}
        for name in names:
            layers.pop(name, None)
            self._unfold(Located(name, COMMAND_LINE), (), layers)
        return list(layers.values())

    def ppo_file(self) -> Located:
        """The file of PPO settings beside the entries (see `ensembles_paper`), or nothing."""
        if len(self._ppo_files) > 1:
            first, second = self._ppo_files[:2]
            what = f"a second file of PPO settings, the first is {first.origin}; remove one"
            self._problem(second, what)
        return self._ppo_files[0] if self._ppo_files else Located({}, str(self.folder))

    def _unfold(self, name: Located, inside: tuple[str, ...], layers: dict[str, Located]) -> None:
        """Add an entry to the layers, behind those that it extends."""
        if name.value in inside:
            circle = " -> ".join([*inside[inside.index(name.value) :], name.value])
            self._problem(name, f"{EXTENDS}: {circle} is a circle; remove one of its {EXTENDS}")
        elif name.value not in layers:
            entry = self._entry(name)
            extended = entry.value.get(EXTENDS, Located([], entry.origin))
            bases = extended.value if isinstance(extended.value, list) else [extended]
            if all(isinstance(base.value, str) for base in bases):
                for base in bases:
                    self._unfold(base, (*inside, name.value), layers)
            else:
                what = "must be the name of an entry, or a list of names"
                self._problem(extended, f"{EXTENDS}={_short(extended)}: {what}")
            settings = {key: value for key, value in entry.value.items() if key != EXTENDS}
            layers[name.value] = Located(settings, entry.origin)

    def _entry(self, name: Located) -> Located:
        """What the files say; empty if something is wrong with it."""
        entry, *others = self._entries.get(name.value, [Located(None, name.origin)])
        for other in others:
            what = f"{name.value}: this entry is given twice, first at {entry.origin}; rename one"
            self._problem(other, what)
        if name.value not in self._entries:
            self._problem(name, f"{name.value}: {self._missing(name.value)}")
        elif not isinstance(entry.value, dict | None):
            what = f"{name.value}={_short(entry)}: an entry must be a mapping (key: value)"
            self._problem(entry, what)
        return entry if isinstance(entry.value, dict) else Located({}, name.origin)

    def _missing(self, name: str) -> str:
        known = sorted(
            k for k, (first, *_) in self._entries.items() if isinstance(first.value, dict)
        )
        if near := get_close_matches(name, known, n=3):
            return f"no such entry in {self.folder}; did you mean {' or '.join(near)}?"
        return f"no such entry in {self.folder}; there are: {', '.join(known) or 'none'}"

    def _problem(self, node: Located, text: str) -> None:
        self.problems.append(Problem(node.origin, text))


def _yaml_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of entries; name another with --config-dir")
    files = [path for path in folder.iterdir() if path.suffix in (".yaml", ".yml")]
    if not files:
        raise ConfigError(f"{folder}: no *.yaml or *.yml file here; name another with --config-dir")
    return sorted(path for path in files if path.is_file())


def _short(node: Located) -> str:
    return write_value(node.plain(), limit=60)
