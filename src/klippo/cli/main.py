"""The command line: one thin command per task, each importing its room when called."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from klippo.cli import lab, training
from klippo.cli.config import config_app
from klippo.cli.ending import EXIT_CODES, ending
from klippo.cli.judge import judge_app
from klippo.cli.source import EntriesCommand, with_config

# Read when PyTorch starts its threads: idle ones sleep instead of spinning. On cores that another
# process uses too this makes a run several times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="PPO for language models from any reward.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def klippo(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"klippo {version_of('klippo')}")
        raise typer.Exit


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Versions, devices, storage, and which keys are set."""
    from klippo.cli.doctor import doctor

    return doctor(as_json=as_json)


app.add_typer(config_app, name="config")
app.add_typer(judge_app, name="judge")
app.command(cls=EntriesCommand)(with_config(training.train))
for of_models in (training.sft, training.reward_model):
    app.command(cls=EntriesCommand)(with_config(of_models, rm_seed=False))
app.command(cls=EntriesCommand)(with_config(training.baselines))
for command in (
    lab.gold_eval, lab.best_of_n, lab.report, lab.generate, lab.compare, lab.merge, doctor,
):  # fmt: skip
    app.command()(ending(command))


def main() -> None:
    """The `klippo` command."""
    app(prog_name="klippo")
