"""``dinogen serve``: a page in the browser that draws from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add ``dinogen serve`` to the command line."""
    app.command()(serve)


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
    from launch.logs import setup_logging

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
