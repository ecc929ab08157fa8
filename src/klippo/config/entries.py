"""Configs put together from named entries: the top-level keys of all YAML files of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from klippo.config import ensembles_paper
from klippo.config.load import C, LoadedConfig, config_error, read_text, resolve
from klippo.config.located import Located, Problem, read_yaml, write_value
from klippo.config.merge import COMMAND_LINE, merge, parse_overrides, seed_overrides
from klippo.config.schema import RunConfig
from klippo.config.walk import Section
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
    names = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if not names:
        raise ConfigError("--configs: needs the name of an entry, as in --configs defaults mine")
    entries = Entries(Path(folder), schema)
    tree = entries.merged([Located(name, COMMAND_LINE) for name in names])
    over, problems = parse_overrides([*overrides, *seed_overrides(rm_seed, rng_seed)], schema)
    tree = merge(tree, over, schema)
    sources = None
    if schema is RunConfig and ensembles_paper.is_foreign(tree):
        both = merge(entries.ppo_file(), tree, schema)
        translated = ensembles_paper.translate(Located(both.value, tree.origin))
        tree, sources = translated.tree, translated.sources
        problems += translated.problems
    if problems := list(dict.fromkeys(entries.problems + problems)):
        raise config_error(problems)
    return resolve(tree, [], names[-1], schema, sources)


class Entries:
    """What a folder's YAML files define, and the problems met in them so far."""

    def __init__(self, folder: Path, schema: Section) -> None:
        self.folder, self.schema = folder, schema
        self.problems: list[Problem] = []
        self._places: dict[str, list[Located]] = {}
        self._ppo_files: list[Located] = []
        for path in _yaml_files(folder):
            self._read(path)

    def merged(self, names: Sequence[Located]) -> Located:
        """The entries on top of one another, each on those that it extends.

        What several extend counts once, where it is first met, so that it undoes none of them.
        """
        found: dict[str, Located] = {}
        for name in names:
            found.pop(name.value, None)
            self._unfold(name, (), found)
        *_, last = found.values()
        tree = Located({}, last.origin)
        for entry in found.values():
            tree = merge(tree, entry, self.schema)
        return tree

    def ppo_file(self) -> Located:
        """The file of PPO settings beside the entries (see `ensembles_paper`), or nothing."""
        if len(self._ppo_files) > 1:
            first, second = self._ppo_files[:2]
            what = f"a second file of PPO settings, the first is {first.origin}; remove one"
            self.problems.append(Problem(second.origin, what))
        return next(iter(self._ppo_files), Located({}, str(self.folder)))

    def _read(self, path: Path) -> None:
        tree, problems = read_yaml(read_text(path), lambda line: f"{path}:{line}")
        self.problems += problems
        if not isinstance(tree.value, dict):
            what = f"a file of entries must be a mapping (name: settings), not {_short(tree)}"
            self.problems.append(Problem(tree.origin, what))
        elif ensembles_paper.is_ppo_file(tree):
            self._ppo_files.append(tree)
        else:
            for name, entry in tree.value.items():
                self._places.setdefault(name, []).append(entry)

    def _unfold(self, name: Located, inside: tuple[str, ...], found: dict[str, Located]) -> None:
        """Add an entry to those found, behind those that it extends."""
        if name.value in inside:
            circle = " -> ".join([*inside[inside.index(name.value) :], name.value])
            self._problem(name, f"{EXTENDS}: {circle} is a circle; remove one of its {EXTENDS}")
        elif name.value not in found:
            entry = self._entry(name)
            for base in self._extended(entry):
                self._unfold(base, (*inside, name.value), found)
            own = {key: value for key, value in entry.value.items() if key != EXTENDS}
            found[name.value] = Located(own, entry.origin)

    def _entry(self, name: Located) -> Located:
        """What the files say; empty where something is wrong with it."""
        places = self._places.get(name.value, [])
        nothing = Located({}, name.origin)
        if not places:
            self._problem(name, f"{name.value}: {self._missing(name.value)}")
            return nothing
        entry = places[0]
        for other in places[1:]:
            what = f"{name.value}: this entry is given twice, first at {entry.origin}; rename one"
            self._problem(other, what)
        if isinstance(entry.value, dict):
            return entry
        if entry.value is not None:
            what = f"{name.value}={_short(entry)}: an entry must be a mapping (key: value)"
            self._problem(entry, what)
        return nothing

    def _extended(self, entry: Located) -> list[Located]:
        given = entry.value.get(EXTENDS, Located([], entry.origin))
        names = given.value if isinstance(given.value, list) else [given]
        if all(isinstance(name.value, str) for name in names):
            return list(names)
        what = f"{EXTENDS}={_short(given)}: must be the name of an entry, or a list of names"
        self._problem(given, what)
        return []

    def _missing(self, name: str) -> str:
        known = sorted(
            key for key, places in self._places.items() if isinstance(places[0].value, dict)
        )
        if near := get_close_matches(name, known, n=3):
            return f"no such entry in {self.folder}; did you mean {' or '.join(near)}?"
        return f"no such entry in {self.folder}; there are: {', '.join(known) or 'none'}"

    def _problem(self, place: Located, text: str) -> None:
        self.problems.append(Problem(place.origin, text))


def _yaml_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of entries; name another with --config-dir")
    files = [path for path in folder.iterdir() if path.suffix in (".yaml", ".yml")]
    if not files:
        raise ConfigError(f"{folder}: no *.yaml or *.yml file here; name another with --config-dir")
    return sorted(path for path in files if path.is_file())


def _short(tree: Located) -> str:
    text = write_value(tree.plain())
    return text if len(text) <= 60 else text[:59] + "…"
