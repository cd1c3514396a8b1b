"""``dinogen export`` and ``dinogen evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")]
Stage = Annotated[
    int | None, typer.Option(help="Resolution; the largest trained by default.", metavar="R")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(evaluate)
    app.command()(export)


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="File to write.", metavar="OUT.safetensors")],
    stage: Stage = None,
    nimg: Annotated[
        int | None,
        typer.Option(min=0, help="Checkpoint, by its images seen; the newest by default."),
    ] = None,
) -> None:
    """Write the generator of a run as one safetensors file, with its config in the metadata.

    It is the moving average, which sample draws from, bit for bit.

    [bold]Examples[/bold]

      dinogen export runs/first first.safetensors

      dinogen export runs/first early.safetensors --stage 16 --nimg 180000
    """
    from dinogen.training.export import export as export_run
    from launch.logs import setup_logging

    setup_logging()
    done = export_run(run, out, stage, nimg)
    info = done.info
    typer.echo(
        f"{done.path}: {info['network']['class'].rpartition('.')[2]} of stage "
        f"{info['resolution']}x{info['resolution']} at {info['nimg']} images, "
        f"{done.num_parameters:,} parameters, taught by {info.get('guide_label', 'no guide')}"
    )


def evaluate(
    run: Run,
    stage: Stage = None,
    split: Annotated[
        str, typer.Option(help="Which part of the data: val, test or train.", metavar="SPLIT")
    ] = "val",
    # not --num: torchrun takes that for the beginning of an option of its own
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="So many, spread over the split; all by default.")
    ] = None,
) -> None:
    """Measure the newest checkpoint on samples that it was not trained on.

    Under torchrun the samples are shared among the ranks; the figures stay the same.

    [bold]Examples[/bold]

      dinogen evaluate runs/first

      dinogen evaluate runs/first --stage 16 --split train --num-samples 1000

      torchrun --standalone --nproc-per-node 4 -m launch.cli evaluate runs/first
    """
    from dinogen import dist
    from dinogen.training.evaluate import RESULT
    from dinogen.training.evaluate import evaluate as evaluate_run
    from launch.logs import setup_logging

    setup_logging(quiet=not dist.is_main())
    result = evaluate_run(run, stage, split, num_samples)
    if dist.is_main():
        size = f"{result['resolution']}x{result['resolution']}"
        taught = result.get("guide_label")
        typer.echo(
            f"stage {size} at {result['nimg']} images, {result['num_samples']} samples of {split}"
            + (f", guide: {taught}" if taught else "")
        )
        for name, value in result["metrics"].items():
            typer.echo(f"  {name}: {'not finite' if value is None else f'{value:.6g}'}")
        typer.echo(f"  {' '.join(result['warnings']) or result['verdict']}")
        if result["num_skipped"]:
            typer.echo(f"  {result['num_skipped']} damaged samples were left out")
        typer.echo(run / size / RESULT)
    dist.shutdown()
