"""``dinogen compare``: many runs side by side, as a page, JSON and Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dinogen.config import Config, load_config, parse_config
from dinogen.errors import UserError
from dinogen.report.compare.read import find_runs, is_run
from launch.study.folder import is_study


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
    unless --as-is is given. One that failed, or whose files are damaged, is listed with what is
    known of it, and all others are compared. The exit code is 1 if every run is damaged.

    The page, index.html, holds all it needs; comparison.json and comparison.md say the same.

    [bold]Examples[/bold]

      dinogen compare runs/dcgan_64 runs/vae_64 --out compared

      dinogen compare configs/ablations --out compared --metrics fid --over-training

      dinogen compare runs --out compared --metrics fid,kid metrics.num_samples=10000
    """
    from dinogen.errors import UserError
    from dinogen.report.compare.comparison import write_comparison
    from launch.cli.console import setup_logging
    from launch.pending import make_missing, measure_over_training

    setup_logging()
    paths, changes = sort_words(runs)
    folders, problems = folders_of(paths)
    if not as_is:
        problems += make_missing(folders, metrics, changes)
    if over_training:
        if metrics is None or as_is:
            raise UserError("--over-training: say what is measured: --metrics fid; not --as-is")
        problems += measure_over_training(folders, metrics, changes)
    for problem in problems:
        typer.echo(problem, err=True)
    done = write_comparison(folders, out, title)
    for name, troubles in done.damaged.items():
        typer.echo(f"DAMAGED {name}: {'; '.join(troubles)}", err=True)
    said = f"{len(folders)} runs"
    if done.damaged:
        said += f", {len(done.damaged)} of them with damaged files (see Failures)"
    typer.echo(f"{said}: {done.page}")
    if not done.num_sound:
        typer.echo("dinogen: no run is sound", err=True)
        raise typer.Exit(1)


_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def sort_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Paths, and ``KEY=VALUE`` changes for evaluate.

    What exists is a path, whatever is in its name. What does not is a change only if its key is
    one of a config: a path that was mistyped is not to be passed over because it holds a "=".

    Raises:
        UserError: a word is neither; or a change is not one that a config can take.
    """
    paths, changes = [], []
    for word in words:
        key, found, _ = word.partition("=")
        if os.path.lexists(word):
            paths.append(Path(word))
        elif found and _KEY.fullmatch(key) and key.partition(".")[0] in Config.model_fields:
            changes.append(word)
        elif found and "/" not in key:
            raise UserError(
                f"{word}: no such folder, and {key!r} is no key of a config: give a folder that is "
                "there, or a change such as metrics.num_samples=10000"
            )
        else:
            raise UserError(f"{word}: no such folder: give folders of runs, or one that holds some")
    parse_config({}, changes, source="KEY=VALUE")
    return paths, changes


def folders_of(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The folders of all runs that some paths stand for, each once, and what is wrong.

    Raises:
        UserError: no path holds a run.
    """
    folders: list[Path] = []
    problems: list[str] = []
    lost: list[UserError] = []
    for path in paths:
        if not is_run(path) and path.is_dir() and is_study(path):
            for file in sorted(path.glob("*.yaml")):
                try:
                    folders.append(load_config(file).run)
                except UserError as error:
                    problems.append(f"{error}\n{file}: its run is left out")
            continue
        try:
            folders += find_runs([path])
        except UserError as error:  # something is there, but no run: it is listed as damaged
            lost.append(error)
            folders.append(path)
    if len(folders) == len(lost):
        raise UserError("\n".join([*problems, *map(str, lost)]))
    return list(dict.fromkeys(folders)), problems
