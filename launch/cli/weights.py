"""Weights in and out: ``dinogen export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.results import Nimg, Source, Stage


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(export)


def export(
    run: Source,
    out: Annotated[Path, typer.Argument(help="File to write.", metavar="OUT")],
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help="safetensors (OUT.safetensors): the weights, for dinogen; torch-export (OUT.pt2) "
            "and onnx (OUT.onnx): a graph that runs without dinogen.",
        ),
    ] = "safetensors",
    stage: Stage = None,
    nimg: Nimg = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights, for the file's card.")
    ] = None,
    intended_use: Annotated[
        str | None, typer.Option(help="What the generator may be used for, for its card.")
    ] = None,
) -> None:
    """Write the generator of a run as one file, with its config in the metadata.

    It is the moving average that sample uses. As safetensors, bit for bit: sample, evaluate, look
    and serve take the file in place of a run. As torch-export or onnx, a graph from latents to
    images, or of one step of a diffusion walk, for any batch size: the file is compared with the
    network before it is written. The metadata hold a card: data, guide, metrics as far as they
    were measured, licence and intended use.

    [bold]Examples[/bold]

      dinogen export runs/first first.safetensors

      dinogen export runs/first first.onnx --format onnx

      dinogen export runs/first early.safetensors --stage 16 --nimg 180000
    """
    from dinogen.formats.export import export as export_run
    from dinogen.runs.layout import stage_name
    from launch.cli.console import setup_logging

    setup_logging()
    done = export_run(run, out, kind, stage, nimg, licence, intended_use)
    info = done.info
    same = "" if done.difference is None else f", within {done.difference:.1e} of the network"
    typer.echo(
        f"{done.path}: {info['network']['class'].rpartition('.')[2]} of stage "
        f"{stage_name(info['resolution'])} at {info['nimg']} images, "
        f"{done.num_parameters:,} parameters, guide: {info.get('guide_label', 'none')}{same}"
    )
