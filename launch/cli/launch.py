"""``dinogen launch``: start a run on this machine's GPUs, or as a chain of SLURM jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from launch.request import Request

# How a place is named on the command line, and which options it alone takes.
PLACES = {
    "local": ("gpus", "max_restarts"),
    "slurm": (
        *("nodes", "gpus_per_node", "partition", "time", "account", "qos", "constraint"),
        *("sbatch", "photos"),
    ),
}
ON_LOCAL = "On this machine"
ON_SLURM = "On a cluster; each option is short for the key of the same name in cluster:"


def register(app: typer.Typer) -> None:
    """Add ``dinogen launch`` to the command line."""
    app.command()(launch)


def launch(
    config: Annotated[
        str,
        typer.Argument(
            help="YAML file of the run, or a folder of them; or the word status.", metavar="CONFIG"
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config; after status: RUN."),
    ] = None,
    on: Annotated[str, typer.Option(help="Where: local or slurm.")] = "local",
    stages: Annotated[
        str | None, typer.Option(help="Only one stage (8) or some (4..64).", metavar="R..S")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="ddp or deepspeed instead of the config's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands and do nothing.")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many; all by default. Without any GPU: processes on the CPU.",
            rich_help_panel=ON_LOCAL,
        ),
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            min=0, help="Start failed processes again so often [0].", rich_help_panel=ON_LOCAL
        ),
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(help="Make the data of these photos first.", rich_help_panel=ON_SLURM),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="For the largest stages.", rich_help_panel=ON_SLURM)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="0: CPUs only.", rich_help_panel=ON_SLURM)
    ] = None,
    partition: Annotated[str | None, typer.Option(rich_help_panel=ON_SLURM)] = None,
    time: Annotated[
        str | None, typer.Option(help="Such as 12:00:00.", rich_help_panel=ON_SLURM)
    ] = None,
    account: Annotated[str | None, typer.Option(rich_help_panel=ON_SLURM)] = None,
    qos: Annotated[str | None, typer.Option(rich_help_panel=ON_SLURM)] = None,
    constraint: Annotated[str | None, typer.Option(rich_help_panel=ON_SLURM)] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            help="A further flag of sbatch: --sbatch=--exclusive.",
            metavar="FLAG",
            rich_help_panel=ON_SLURM,
        ),
    ] = None,
) -> None:
    """Train on several GPUs of this machine, or submit a whole run to SLURM.

    A folder of configs is a study: each is a run of its own, one after the other on this machine,
    a chain each on SLURM. One that fails does not stop the others.

    On SLURM every stage is a job of its own, after the one before it; with --photos the data are
    made first. Given again, it submits what is neither done nor queued.

    [bold]dinogen launch status RUN[/bold] shows the jobs of a run, or of all runs of a folder of
    configs, and how far they are.

    [bold]Examples[/bold]

      dinogen launch my.yaml --gpus 4

      dinogen launch my.yaml --gpus 4 --engine deepspeed --stages 4..64 --dry-run

      dinogen launch my.yaml --on slurm --nodes 2 --gpus-per-node 8 --time 12:00:00 --dry-run

      dinogen launch my.yaml --on slurm --photos /data/photos --partition gpu --account me

      dinogen launch configs/ablations --on slurm --partition gpu

      dinogen launch status runs/first
    """
    from launch.cli.console import setup_logging

    setup_logging()
    if config == "status":
        _status(overrides or [])
        return
    options: dict[str, Any] = {
        "gpus": gpus,
        "max_restarts": max_restarts,
        "photos": photos,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "partition": partition,
        "time": time,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "sbatch": sbatch,
    }
    given = {name: value for name, value in options.items() if value is not None}
    launcher = _launcher(on, given)
    changes = [*(overrides or ()), *_as_overrides(given, engine)]
    if Path(config).is_dir():
        _launch_study(Path(config), changes, stages, given, dry_run, launcher)
        return
    launcher(_request(Path(config), changes, stages, given, dry_run))


def _launcher(on: str, given: dict[str, Any]) -> Callable[[Request], None]:
    """What starts runs there; refuses options that only another place takes."""
    from dinogen.errors import UserError

    if on not in PLACES:
        raise UserError(f"--on {on}: runs are started on {' or '.join(PLACES)}")
    for place, names in PLACES.items():
        wrong = [name for name in names if name in given]
        if place != on and wrong:
            option = wrong[0].replace("_", "-")
            raise UserError(f"--{option} is for --on {place}, and this is --on {on}")
    if on == "local":
        from launch.local.start import launch_local

        return launch_local
    from launch.slurm.submit import launch_slurm

    return launch_slurm


def _as_overrides(given: dict[str, Any], engine: str | None) -> list[str]:
    """Options that stand for keys of the config."""
    from dinogen.config.cluster import ClusterConfig

    changes = [f"engine.name={engine}"] if engine is not None else []
    keys = ClusterConfig.model_fields
    # JSON is YAML, and keeps 12:00:00 a string
    return changes + [
        f"cluster.{name}={json.dumps(value)}"
        for name, value in given.items()
        if name in keys and name in PLACES["slurm"]
    ]


def _launch_study(
    folder: Path,
    changes: list[str],
    stages: str | None,
    given: dict[str, Any],
    dry_run: bool,
    launcher: Callable[[Request], None],
) -> None:
    """Launch all configs of a folder and print what became of each; exits 1 if one failed."""
    from rich.console import Console
    from rich.table import Table

    from launch.local.start import launch_local
    from launch.study.folder import exit_code, print_study, run_study, study_configs, submit_study

    files = study_configs(folder, changes)
    requests = [_request(path, changes, stages, given, dry_run) for path in files]
    if dry_run:
        print_study(requests, launcher)
        return
    outcomes = run_study(requests) if launcher is launch_local else submit_study(requests)
    table = Table("config", "run", "outcome", title=str(folder))
    for one in outcomes:
        style = None if one.good else "red"
        table.add_row(one.config.stem, str(one.run), one.what, style=style)
    Console(highlight=False).print(table)
    if code := exit_code(outcomes):
        raise typer.Exit(code)


def _request(
    path: Path,
    changes: list[str],
    stages: str | None,
    given: dict[str, Any],
    dry_run: bool,
) -> Request:
    from dinogen.config import load_config
    from launch.request import Request

    return Request(
        path=path,
        overrides=tuple(changes),
        config=load_config(path, changes),
        stages=stages,
        num_processes=given.get("gpus"),
        max_restarts=given.get("max_restarts"),
        photos=given.get("photos"),
        dry_run=dry_run,
    )


def _status(arguments: list[str]) -> None:
    """Print the table; exits 1 if a job did not end well."""
    from rich.console import Console
    from rich.table import Table

    from dinogen.errors import UserError
    from launch.slurm.status import job_rows
    from launch.study.folder import is_study, study_rows

    if len(arguments) != 1:
        raise UserError("write: dinogen launch status RUN")
    folder = Path(arguments[0])
    several = is_study(folder)
    rows = study_rows(folder) if several else [("", row) for row in job_rows(folder)]
    names = ("step", "job", "state", "progress", "why")
    table = Table(*(("config", *names) if several else names), title=arguments[0])
    for name, row in rows:
        cells = (row.step, row.id, row.state, row.progress, row.why)
        style = None if row.good else "red"
        table.add_row(*((name, *cells) if several else cells), style=style)
    Console(highlight=False).print(table)
    if not all(row.good for _, row in rows):
        raise typer.Exit(1)
