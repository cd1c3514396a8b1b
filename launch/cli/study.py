"""``dinogen study``: many runs as one plan; what it costs, running it, where it is, its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from launch.study.folder import Outcome
    from launch.study.plan import Study
    from launch.study.selection import Choice
    from launch.study.status import State

app = typer.Typer(help="Many runs as one plan: what it costs, running it, its report.")

File = Annotated[Path, typer.Argument(help="YAML file of the study.", metavar="FILE")]


def register(parent: typer.Typer) -> None:
    """Add ``dinogen study`` to the command line."""
    parent.add_typer(app, name="study", no_args_is_help=True)


@app.command()
def plan(file: File) -> None:
    """Show all runs, what is left of each, and what it will take by measured images per second.

    A speed comes from the run itself, else from one of the same config, else from one of the same
    family and resolution; where there is none it is unknown.

    [bold]Example[/bold]  dinogen study plan configs/study.yaml
    """
    from rich.console import Console
    from rich.table import Table

    from launch.study.messages import duration, speed_words
    from launch.study.plan import check_study
    from launch.study.selection import cost_of
    from launch.study.status import study_states

    study = _open(file)
    check_study(study)
    states, choices = study_states(study)
    runs = [one.run for one in states]
    table = Table("run", "state", "images left", "time", "measured", "why", title=str(file))
    costs = []
    for one in states:
        cost = cost_of(one.run, runs)
        costs.append(cost)
        time = "unknown" if cost.seconds is None else duration(cost.seconds)
        left = "unknown" if cost.num_images is None else f"{cost.num_images / 1000:,.4g} k"
        why = "; ".join(word for word in (one.why, cost.why) if word)
        style = None if one.good else "red"
        table.add_row(one.run.id, one.state, left, time, speed_words(cost.speeds), why, style=style)
    console = Console(highlight=False)
    console.print(table)
    known = [cost for cost in costs if cost.seconds is not None]
    total = sum(cost.seconds or 0.0 for cost in known)
    shared = [cost.processor_s for cost in known if cost.seconds]
    line = f"left to train: {duration(total)}"
    if shared and None not in shared:
        line += f", {sum(one or 0.0 for one in shared) / 3600:,.2f} hours of one process"
    if len(known) < len(costs):
        line += f", and {len(costs) - len(known)} runs of which it is unknown"
    console.print(f"{line}; measuring comes on top of it")
    _tell_choices(study, choices, states)


@app.command()
def run(
    file: File,
    on: Annotated[str, typer.Option(help="Where: local or slurm.")] = "local",
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="On this machine: how many; all by default. Without any: CPU processes."
        ),
    ] = None,
) -> None:
    """Train and measure all runs, then those of the final, and write the report.

    Given again after any interruption, it goes on where it was. A run that fails is recorded and
    does not stop the others; given again, it is tried again, after them.

    On SLURM each run is a chain of jobs. This command waits for them, since the final depends on
    what comes out; if it is ended, the jobs stay queued.

    [bold]Examples[/bold]

      dinogen study run configs/study.yaml

      dinogen study run configs/study.yaml --on slurm
    """
    from dinogen.errors import EXIT_STOPPED, UserError
    from dinogen.runs.run import Run
    from launch.study.folder import exit_code
    from launch.study.local import LocalStudy
    from launch.study.plan import check_study
    from launch.study.slurm import SlurmStudy

    study = _open(file)
    if on not in ("local", "slurm"):
        raise UserError(f"--on {on}: runs are started on local or slurm")
    if on == "slurm" and gpus is not None:
        raise UserError("--gpus is for --on local; on SLURM the cluster: of each config says it")
    check_study(study)
    outcomes = LocalStudy(study, gpus).run() if on == "local" else SlurmStudy(study).run()
    _tell_outcomes(study, outcomes)
    code = exit_code(outcomes)
    if code != EXIT_STOPPED and any(Run(one.run).has_config for one in outcomes):
        _report(study)
    if code:
        raise typer.Exit(code)


@app.command()
def status(file: File) -> None:
    """Show what is done, what runs, what waits and what failed; exits 1 if something did.

    [bold]Example[/bold]  dinogen study status configs/study.yaml
    """
    from rich.console import Console
    from rich.table import Table

    from launch.study.status import study_states

    study = _open(file)
    states, choices = study_states(study)
    table = Table("run", "state", "progress", study.plan.metric, "why", title=str(file))
    for one in states:
        metric_value = "" if one.metric_value is None else f"{one.metric_value:.4g}"
        style = None if one.good else "red"
        table.add_row(one.run.id, one.state, one.progress, metric_value, one.why, style=style)
    Console(highlight=False).print(table)
    _tell_choices(study, choices, states)
    if not all(one.good for one in states):
        raise typer.Exit(1)


@app.command()
def report(file: File) -> None:
    """Compare all runs that have begun: a page, JSON and Markdown in the study's folder.

    [bold]Example[/bold]  dinogen study report configs/study.yaml
    """
    _report(_open(file))


def _open(file: Path) -> Study:
    from launch.cli.console import setup_logging
    from launch.study.plan import open_study

    setup_logging()
    return open_study(file)


def _report(study: Study) -> None:
    from launch.study.status import write_report

    typer.echo(f"report: {write_report(study)}")


def _tell_outcomes(study: Study, outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "outcome", title=str(study.path))
    for one in outcomes:
        name = str(one.run.relative_to(study.folder))
        table.add_row(name, one.what, style=None if one.good else "red")
    Console(highlight=False).print(table)


def _tell_choices(study: Study, choices: dict[str, Choice], states: list[State]) -> None:
    """The best of each track, and what the final waits for."""
    for name, choice in choices.items():
        typer.echo(f"{name}: {choice.best or 'no best'} ({choice.why})")
    waits = [track for track in study.plan.final_tracks if track not in choices]
    if waits:
        left = sum(one.run.track in waits and one.state != "done" for one in states)
        typer.echo(f"the final waits for {left} runs of {', '.join(waits)}")
