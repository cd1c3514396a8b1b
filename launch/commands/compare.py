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
    """Put runs side by side: figures, curves, pictures, and where every number comes from.

    A run whose end was never measured (dinogen evaluate) or looked at (dinogen look) is first,
    unless --as-is is given. One that failed is listed with what is known of it.

    The page, index.html, holds all it needs; comparison.json and comparison.md say the same.

    [bold]Examples[/bold]

      dinogen compare runs/dcgan_64 runs/vae_64 --out compared

      dinogen compare configs/ablations --out compared --metrics fid --over-training

      dinogen compare runs --out compared --metrics fid,kid metrics.num_samples=10000
    """
    from dinogen.errors import UserError
    from dinogen.report.compare import write_comparison
    from dinogen.report.compare_read import find_runs
    from launch.logs import setup_logging
    from launch.missing import make_missing
    from launch.over_training import measure_over_training
    from launch.study import is_study, study_configs

    setup_logging()
    changes = [item for item in runs if "=" in item and not Path(item).exists()]
    folders: list[Path] = []
    for path in (Path(item) for item in runs if item not in changes):
        if path.is_dir() and is_study(path):
            folders += [config.run for config in study_configs(path).values()]
        else:
            folders += find_runs([path])
    problems = [] if as_is else make_missing(folders, metrics, changes)
    if over_training:
        if metrics is None or as_is:
            raise UserError("--over-training: say what is measured: --metrics fid; not --as-is")
        problems += measure_over_training(folders, metrics, changes)
    for problem in problems:
        typer.echo(problem, err=True)
    page = write_comparison(folders, out, title)
    typer.echo(f"{len(folders)} runs: {page}")
