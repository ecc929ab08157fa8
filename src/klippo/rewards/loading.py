"""Finding a user's function by its name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from klippo.errors import ConfigError


def load_function(spec: str) -> Callable[..., Any]:
    """The callable behind `package.module:name` or `path/to/file.py:name`.

    Modules are looked for in the working directory too; a file may import its neighbours.
    Raises ConfigError when the file, the module or the name is missing, or is not callable.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"function {spec!r} must look like package.module:name or path/to/file.py:name"
        )
    is_file = place.endswith(".py") or "/" in place
    module = _load_file(Path(place).expanduser()) if is_file else _load_module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"function {spec!r}: {place} has no {name!r}{_nearest(part, found)}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"function {spec!r}: it is {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(
            f"function file {path} does not exist (looked in {Path.cwd()}); check the path"
        )
    path = path.resolve()
    name = f"klippo_function_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ConfigError(f"function file {path} is not Python; name a file that ends in .py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickle look a function's module up there
    _add_to_path(path.parent)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise _broken(str(path), error) from error
    return module


def _load_module(name: str) -> ModuleType:
    _add_to_path(Path.cwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"there is no module {error.name!r}, neither installed nor in {Path.cwd()}; "
                "install it, or name a file: path/to/file.py:name"
            ) from None
        raise _broken(name, error) from error
    except Exception as error:
        raise _broken(name, error) from error


def _add_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _broken(name: str, error: Exception) -> ConfigError:
    if isinstance(error, SyntaxError):
        site = f"{error.filename}:{error.lineno}"
    else:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename != __file__ and "importlib" not in frame.filename
        ]
        site = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else name
    return ConfigError(
        f"{name} cannot be imported: {type(error).__name__}: {error} at {site}; mend it there"
    )


def _nearest(name: str, holder: Any) -> str:
    public = [key for key in vars(holder) if not key.startswith("_")] if _has_vars(holder) else []
    near = difflib.get_close_matches(name, public, n=1)
    return f"; did you mean {near[0]!r}?" if near else "; check the name"


def _has_vars(holder: Any) -> bool:
    return hasattr(holder, "__dict__")
