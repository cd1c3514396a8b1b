"""``dinogen look`` and ``serve``: what a run draws, as files or in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(look)
    app.command()(serve)


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
        Path | None, typer.Option(help="Folder; RUN/RxR/visualizations by default.", metavar="DIR")
    ] = None,
) -> None:
    """Make images that show what a run has learnt: grids, its progress, interpolations, worst.

    visualizations.json beside them says what each shows, or why one is missing: not every family
    truncates, mixes styles or encodes images.

    [bold]Examples[/bold]

      dinogen look runs/first

      dinogen look runs/first --stage 16 --nimg 180000 --seed 7
    """
    import json

    from dinogen.visualize.look import write_visualizations
    from launch.cli.console import setup_logging

    setup_logging()
    index = write_visualizations(run, stage, nimg, seed, out, changes or ())
    entries = json.loads(index.read_text(encoding="utf-8"))
    for name, entry in entries.items():
        typer.echo(f"  {name}: {entry['file'] or 'left out: ' + entry['reason']}")
    typer.echo(index)


def serve(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    host: Annotated[
        str, typer.Option(help="Address to bind to; this machine alone by default.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")
    ] = 8000,
) -> None:
    """Open a page that draws from a run: by seed, truncation, stage, and from seed to seed.

    It draws from each stage's newest checkpoint, and serves until Ctrl-C.

    [bold]Examples[/bold]

      dinogen serve runs/first

      ssh -L 8000:localhost:8000 cluster dinogen serve runs/first
    """
    from dinogen.errors import UserError
    from launch.cli.console import setup_logging

    setup_logging()
    try:
        from dinogen.serve.server import open_site
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("starlette", "uvicorn"):
            raise
        raise UserError(f"serve needs {missing}: pip install 'dinogen[serve]'") from None

    site = open_site(run, host, port)
    if not site.private:
        typer.echo(f"dinogen: everybody who can reach {host} can open this page", err=True)
    typer.echo(f"{run}: {site.url} (Ctrl-C ends it)")
    site.run()
