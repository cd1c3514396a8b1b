"""``dinogen look``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(look)


def look(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Where things lie now: data.path=FOLDER."),
    ] = None,
    stage: Annotated[
        int | None, typer.Option(help="Resolution; the largest trained by default.", metavar="R")
    ] = None,
    nimg: Annotated[
        int | None,
        typer.Option(min=0, help="Checkpoint, by its images seen; the newest by default."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of all latents; the same for runs to be compared.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder; RUN/RxR/looks by default.", metavar="DIR")
    ] = None,
) -> None:
    """Make pictures that show what a run has learnt: grids, its progress, interpolations, worst.

    What they are is in looks.json beside them, and why one is missing: not every family truncates,
    mixes styles or encodes pictures.

    [bold]Examples[/bold]

      dinogen look runs/first

      dinogen look runs/first --stage 16 --nimg 180000 --seed 7
    """
    import json

    from dinogen.training.looks import write_looks
    from launch.logs import setup_logging

    setup_logging()
    index = write_looks(run, stage, nimg, seed, out, changes or ())
    entries = json.loads(index.read_text(encoding="utf-8"))
    for name, entry in entries.items():
        typer.echo(f"  {name}: {entry['file'] or 'left out: ' + entry['reason']}")
    typer.echo(index)
