"""Where a command's config comes from: RUN, or entries named by --configs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, Protocol

import typer
from typer.core import TyperCommand

from klippo.cli.ending import ending
from klippo.errors import ConfigError

if TYPE_CHECKING:
    from klippo.config.load import C, LoadedConfig

Run = Annotated[str | None, typer.Argument(metavar="RUN", help="A YAML file or a recipe's name.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, for instance ppo.num_steps=200."),
]
Configs = Annotated[
    list[str] | None,
    typer.Option(
        "--configs",
        metavar="NAME...",
        help="Instead of RUN: entries (top-level keys) of the YAML files in --config-dir, merged "
        "in this order, as in --configs defaults mine.",
    ),
]
ConfigDir = Annotated[
    str | None,
    typer.Option(
        "--config-dir", "--config_dir", help="Folder of the entries.", show_default="configs"
    ),
]
RmSeed = Annotated[
    int | None,
    typer.Option(
        "--rm_seed", "--rm-seed", help="Sets rm_seed: {seed} in the names of reward models."
    ),
]
RngSeed = Annotated[
    int | None, typer.Option("--rng_seed", "--rng-seed", help="Sets seed, that of the run.")
]

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the models for which the config has "
        "trust_remote_code: true; without both, none runs.",
    ),
]


class EntriesCommand(TyperCommand):
    """A command whose --configs takes every name up to the next option; KEY=VALUE stays one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_names(args))


def spread_names(arguments: list[str]) -> list[str]:
    """`--configs A B C` as click reads it: `--configs= --configs=A --configs=B --configs=C`."""
    spread: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("-"):
            inside = argument.partition("=")[0] == "--configs"
        is_name = inside and "=" not in argument
        spread.append(f"--configs={argument.removeprefix('--configs')}" if is_name else argument)
    return spread


class Load(Protocol):
    """Loads the config that the command line asks for."""

    def __call__(self, schema: type[C]) -> LoadedConfig[C]: ...


P = ParamSpec("P")


def with_config(
    command: Callable[Concatenate[Load, P], int | None], *, rm_seed: bool = True
) -> Callable[..., None]:
    """A command that takes RUN, KEY=VALUE, --configs and the seeds before its own options."""

    def loading(
        run: Run = None,
        overrides: Overrides = None,
        configs: Configs = None,
        config_dir: ConfigDir = None,
        rm_seed: RmSeed = None,
        rng_seed: RngSeed = None,
        **options: Any,
    ) -> int | None:
        source = partial(load, run, overrides, configs, config_dir, rm_seed, rng_seed)
        return command(source, **options)  # type: ignore[call-arg]

    *shared, _ = inspect.signature(loading, eval_str=True).parameters.values()
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [p for p in (*shared, *own) if rm_seed or p.name != "rm_seed"]
    loading.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    loading.__name__, loading.__doc__, loading.__annotations__ = (
        command.__name__,
        command.__doc__,
        {},
    )
    return ending(loading)


def load(
    run: str | None,
    overrides: list[str] | None,
    configs: list[str] | None,
    config_dir: str | None,
    rm_seed: int | None,
    rng_seed: int | None,
    schema: type[C],
) -> LoadedConfig[C]:
    """The config that the command line asks for. Raises ConfigError."""
    from klippo.config.entries import FOLDER, load_entries
    from klippo.config.load import load_config, seed_overrides

    words = [*([] if run is None else [run]), *(overrides or [])]
    if configs:
        stray = [word for word in words if "=" not in word]
        if stray:
            raise ConfigError(
                f"{stray[0]}: both RUN and --configs {' '.join(configs).strip()} are given; remove "
                "one (names of entries stand together behind --configs)"
            )
        folder = FOLDER if config_dir is None else config_dir
        return load_entries(
            configs, folder, words, schema=schema, rm_seed=rm_seed, rng_seed=rng_seed
        )
    if config_dir is not None:
        raise ConfigError(f"--config-dir {config_dir}: needs --configs NAME...")
    if run is None:
        raise ConfigError(
            "RUN is missing: name a YAML file or a recipe, or entries with --configs NAME..."
        )
    more = seed_overrides(rm_seed, rng_seed)
    return load_config(run, [*(overrides or []), *more], schema=schema)
