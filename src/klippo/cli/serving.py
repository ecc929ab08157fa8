"""Sampling for runs elsewhere: `klippo serve-rollouts`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from klippo.cli.ending import ending


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve-rollouts")(serve_rollouts)


@ending
def serve_rollouts(
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. One that other machines reach needs a token in the "
            "environment variable KLIPPO_ROLLOUT_TOKEN, here and where the run starts."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8321,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="Where vLLM computes; auto takes the GPU where there is one."),
    ] = "auto",
) -> int:
    """Sample with vLLM for runs that name this server in rollout.vllm.servers.

    Model, settings and weights come from the run; one run at a time.
    """
    from klippo.train.serve_rollouts import serve_rollouts

    return serve_rollouts(host=host, port=port, device=device)
