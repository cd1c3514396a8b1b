"""``dinogen compare``: many runs side by side, as a page, JSON and Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(compare)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Folders of runs, of many runs, of a study, or of configs; KEY=VALUE is for "
            "dinogen evaluate.",
            metavar="RUN...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write into.", metavar="DIR")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Comparison",
    metrics: Annotated[
        str | None,
        typer.Option(help="Only these are measured where they are missing.", metavar="fid,kid"),
    ] = None,
    over_training: Annotated[
        bool,
        typer.Option(
            "--over-training",
            help="Measure --metrics at all kept checkpoints too, for curves.",
        ),
    ] = False,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Measure and draw nothing; show what is there.")
    ] = False,
) -> None:
    """Put runs side by side: metric values, curves, images, and where every number comes from.

    A run whose end was never measured (dinogen evaluate) or looked at (dinogen look) is first,
    unless --as-is is given. One that failed, or whose files are damaged, is listed with what is
    known of it, and all others are compared. The exit code is 1 if every run is damaged.

    The page, index.html, holds all it needs; comparison.json and comparison.md say the same.

    [bold]Examples[/bold]

      dinogen compare runs/dcgan_64 runs/vae_64 --out compared

      dinogen compare configs/ablations --out compared --metrics fid --over-training

      dinogen compare runs --out compared --metrics fid,kid metrics.num_samples=10000
    """
    from dinogen.errors import UserError
    from dinogen.report.compare import write_comparison
    from launch.cli.console import setup_logging
    from launch.compare import folders_of, run_pending_steps, sort_words, sweep_checkpoints

    setup_logging()
    paths, changes = sort_words(runs)
    folders, problems = folders_of(paths)
    if not as_is:
        problems += run_pending_steps(folders, metrics, changes)
    if over_training:
        if metrics is None or as_is:
            raise UserError("--over-training: say what is measured: --metrics fid; not --as-is")
        problems += sweep_checkpoints(folders, metrics, changes)
    for problem in problems:
        typer.echo(problem, err=True)
    done = write_comparison(folders, out, title)
    for name, problems in done.damaged.items():
        typer.echo(f"DAMAGED {name}: {'; '.join(problems)}", err=True)
    said = f"{len(folders)} runs"
    if done.damaged:
        said += f", {len(done.damaged)} of them with damaged files (see Failures)"
    typer.echo(f"{said}: {done.page}")
    if not done.num_sound:
        typer.echo("dinogen: no run is sound", err=True)
        raise typer.Exit(1)
