"""Code that comes with a model: it runs only if the config and the command both say so."""

from __future__ import annotations

from collections.abc import Iterator

from klippo.errors import ConfigError
from klippo.hub import trust_code_of
from klippo.rewards.settings import EnsembleSettings
from klippo.settings import CodeSettings, Settings

KEY, FLAG = "trust_remote_code", "--trust-remote-code"


def trust_code(config: Settings, flag: bool) -> None:
    """Let the code of the models that the config trusts run, if the command agrees.

    Raises ConfigError if only one of both does.
    """
    trusted = dict(_trusted(config, ""))
    if trusted and not flag:
        key, names = next(iter(trusted.items()))
        raise ConfigError(
            f"{key}=true lets Python code that comes with {names[0]} run with all your rights, and "
            f"the command does not agree; pass {FLAG} as well (from Python: {KEY}=True), or remove "
            f"{key}"
        )
    if flag and not trusted:
        raise ConfigError(
            f"{FLAG} is given, and no model in the config has {KEY}: true; write it beside the "
            "model whose code you have read, as in policy.trust_remote_code=true, or leave the "
            "flag out"
        )
    trust_code_of(name for names in trusted.values() for name in names)


def _trusted(value: object, path: str) -> Iterator[tuple[str, list[str]]]:
    """Each key that is true, and the models that it is about."""
    if isinstance(value, CodeSettings) and (names := value.trusted_models()):
        yield f"{path}.{KEY}", names
    if isinstance(value, Settings | dict) and not isinstance(value, EnsembleSettings):
        for key, item in dict(value).items():
            yield from _trusted(item, f"{path}.{key}".removeprefix("."))
