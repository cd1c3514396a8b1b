"""Weights in and out: ``dinogen export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.results import Nimg, Run, Stage


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(export)


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="File to write.", metavar="OUT.safetensors")],
    stage: Stage = None,
    nimg: Nimg = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights, for the file's card.")
    ] = None,
    intended_use: Annotated[
        str | None, typer.Option(help="What the generator may be used for, for its card.")
    ] = None,
) -> None:
    """Write the generator of a run as one safetensors file, with its config in the metadata.

    It is the moving average that sample uses, bit for bit. sample, evaluate, look and serve take
    the file in place of a run. Its metadata hold a card: data, guide, metrics as far as they were
    measured, licence and intended use.

    [bold]Examples[/bold]

      dinogen export runs/first first.safetensors

      dinogen export runs/first early.safetensors --stage 16 --nimg 180000
    """
    from dinogen.runs.layout import stage_name
    from dinogen.training.checkpointing.export import export as export_run
    from launch.cli.console import setup_logging

    setup_logging()
    said = {"licence": licence, "intended_use": intended_use}
    done = export_run(run, out, stage, nimg, **{k: v for k, v in said.items() if v is not None})
    info = done.info
    typer.echo(
        f"{done.path}: {info['network']['class'].rpartition('.')[2]} of stage "
        f"{stage_name(info['resolution'])} at {info['nimg']} images, "
        f"{done.num_parameters:,} parameters, guide: {info.get('guide_label', 'none')}"
    )
