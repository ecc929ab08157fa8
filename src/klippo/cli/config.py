"""`klippo config`: what a run would use, whether it is right, and what may stand in it."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from klippo.cli.ending import ending, plain
from klippo.cli.source import (
    ConfigDir,
    Configs,
    EntriesCommand,
    Overrides,
    RmSeed,
    RngSeed,
    Run,
    load,
)

if TYPE_CHECKING:
    from klippo.config.load import LoadedConfig
    from klippo.config.schema import WholeConfig

config_app = typer.Typer(
    help="Show, check and describe configs.", no_args_is_help=True, rich_markup_mode=None
)

Stage = Annotated[
    Literal["train", "sft", "reward-model"],
    typer.Option("--stage", help="The command whose config it is."),
]


@config_app.command(cls=EntriesCommand)
@ending
def show(
    run: Run = None,
    overrides: Overrides = None,
    configs: Configs = None,
    config_dir: ConfigDir = None,
    rm_seed: RmSeed = None,
    rng_seed: RngSeed = None,
    stage: Stage = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Every value and where it comes from."""
    from klippo.config.load import show

    loaded: LoadedConfig[WholeConfig] = load(
        run, overrides, configs, config_dir, rm_seed, rng_seed, _schema(stage)
    )
    rows = show(loaded)
    if as_json:
        entries = {key: {"value": value, "origin": origin} for key, value, origin in rows}
        typer.echo(json.dumps(entries, indent=2, ensure_ascii=False))
    elif sys.stdout.isatty():
        _print_table(rows)
    else:
        _print_lines(rows)


@config_app.command(cls=EntriesCommand)
@ending
def check(
    run: Run = None,
    overrides: Overrides = None,
    configs: Configs = None,
    config_dir: ConfigDir = None,
    rm_seed: RmSeed = None,
    rng_seed: RngSeed = None,
    stage: Stage = "train",
) -> None:
    """Say ok, or everything that is wrong."""
    loaded: LoadedConfig[WholeConfig] = load(
        run, overrides, configs, config_dir, rm_seed, rng_seed, _schema(stage)
    )
    typer.echo(plain(f"{loaded.name}: ok"))


@config_app.command()
@ending
def schema(stage: Stage = "train") -> None:
    """The JSON schema of a config, for editors."""
    from klippo.config.load import schema

    typer.echo(json.dumps(schema(_schema(stage)), indent=2, ensure_ascii=False))


def _schema(stage: str) -> type[WholeConfig]:
    from klippo.config.schema import RunConfig
    from klippo.supervised.settings import RewardModelConfig, SFTConfig

    schemas: dict[str, type[WholeConfig]] = {
        "train": RunConfig,
        "sft": SFTConfig,
        "reward-model": RewardModelConfig,
    }
    return schemas[stage]


def _print_table(rows: list[tuple[str, Any, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from klippo.config.located import write_value

    table = Table("key", "value", "origin")
    for key, value, origin in rows:
        style = "dim" if origin == "default" else ""
        cells = (key, write_value(value), origin)
        table.add_row(*(Text(plain(cell), style=style, overflow="fold") for cell in cells))
    Console().print(table)


def _print_lines(rows: list[tuple[str, Any, str]]) -> None:
    """Lines whose first part can be copied behind `klippo train RUN`."""
    from klippo.config.located import write_value

    words = [shlex.quote(plain(f"{key}={write_value(value)}")) for key, value, _ in rows]
    width = min(max(map(len, words)), 60)
    for word, (_, _, origin) in zip(words, rows, strict=True):
        typer.echo(f"{word:<{width}}  # {plain(origin)}")
