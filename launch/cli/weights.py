"""Weights in and out: ``dinogen export`` and ``dinogen import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.results import Nimg, Run, Stage


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(export)
    app.command("import")(import_weights)


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


def import_weights(
    kind: Annotated[str, typer.Argument(help="Layout of the weights: stylegan2.", metavar="KIND")],
    file: Annotated[Path, typer.Argument(help="File to read.", metavar="FILE")],
    out: Annotated[Path, typer.Argument(help="Folder of the run to write.", metavar="OUT")],
) -> None:
    """Write weights that others have trained as a run, for init_from, sample, evaluate and look.

    [bold]stylegan2[/bold] reads a pickle of stylegan2-ada-pytorch or of a StyleGAN2 in stylegan3:
    generator, discriminator, averages and ADA's p. Nothing in the pickle is run.

    [bold]Examples[/bold]

      dinogen import stylegan2 ffhq256.pkl runs/ffhq256

      dinogen sample runs/ffhq256 --num 64
    """
    from dinogen.formats.runs import check_free, reader_of, write_run
    from dinogen.runs.run import Run as RunFolder
    from launch.cli.console import setup_logging

    setup_logging()
    read = reader_of(kind)
    check_free(out)
    weights = read(file)
    checkpoint = write_run(out, weights)
    config = RunFolder(out).config_file
    typer.echo(
        f"{checkpoint}: family {weights.family['name']} at {weights.resolution} pixels, from {file}"
        f"\ntrain on: dinogen train {config} run=NEW init_from={out} data.path=DATA "
        "stages.0.kimg=1000"
    )
