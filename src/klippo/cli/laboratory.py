"""What to learn from runs and models: `klippo gold-eval` and `klippo best-of-n`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klippo.cli.ending import ending


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("gold-eval")(gold_eval)


@ending
def gold_eval(
    eval_dir: Annotated[
        Path, typer.Argument(metavar="EVAL_DIR", help="A run's folder, or its eval/.")
    ],
    gold_model: Annotated[
        str,
        typer.Argument(
            metavar="GOLD_MODEL",
            help="A model (folder, hub or demo: name), file.py:function, a YAML file with a "
            "reward section, or FILE.yaml:SECTION.",
        ),
    ],
    is_alpacafarm_rm: Annotated[
        bool, typer.Option("--is-alpacafarm-rm", help="It reads AlpacaFarm's template.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 32,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the scores of another gold model.")
    ] = False,
) -> int:
    """Add gold scores to the samples that a run has recorded."""
    from klippo.stages.gold_eval import gold_eval

    return gold_eval(
        eval_dir,
        gold_model,
        is_alpacafarm=is_alpacafarm_rm,
        batch_size=batch_size,
        overwrite=overwrite,
    )
