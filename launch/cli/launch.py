"""``dinogen launch`` and ``study``: one run, or many as one plan, on this machine or by SLURM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from launch.request import Request
    from launch.study.outcome import Outcome
    from launch.study.plan import Choice, Study
    from launch.study.search import Search
    from launch.study.status import State

# Where runs can be started, and the options that belong to one of them only.
PLACES = {
    "local": ("gpus", "max_restarts"),
    "slurm": (
        *("nodes", "gpus_per_node", "partition", "time", "account", "qos", "constraint"),
        *("sbatch", "photos"),
    ),
}
ON_LOCAL = "On this machine"
ON_SLURM = "On a cluster; each option is short for the key of the same name in cluster:"


study_app = typer.Typer(help="Many runs as one plan: what it costs, running it, its report.")

Plan = Annotated[
    Path,
    typer.Argument(
        help="YAML file of the study, or a folder of configs; or the name of one that dinogen "
        "brings.",
        metavar="PLAN",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(launch)
    app.add_typer(study_app, name="study", no_args_is_help=True)


def launch(
    config: Annotated[
        str,
        typer.Argument(
            help="YAML file of a run, or a folder of them; or the name of one that dinogen brings; "
            "or the word status.",
            metavar="CONFIG",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config; after status: RUN."),
    ] = None,
    on: Annotated[str, typer.Option(help="Where: local or slurm.")] = "local",
    stages: Annotated[
        str | None, typer.Option(help="Only one stage (8) or a range (4..64).", metavar="R..S")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="ddp or deepspeed instead of the config's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands and do nothing.")
    ] = False,
    unchecked: Annotated[
        bool,
        typer.Option(
            "--unchecked",
            help="Do not look at data, weights and ranks first: only the compute nodes see them.",
        ),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of GPUs; default: all. Without a GPU: processes on the CPU.",
            rich_help_panel=ON_LOCAL,
        ),
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            min=0, help="How often to restart failed processes [0].", rich_help_panel=ON_LOCAL
        ),
    ] = None,
    photos: Annotated[
        Path | None,
        typer.Option(help="First make the data from these photos.", rich_help_panel=ON_SLURM),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Of the largest stages.", rich_help_panel=ON_SLURM)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="0 for CPUs only.", rich_help_panel=ON_SLURM)
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
            help="Another flag for sbatch: --sbatch=--exclusive.",
            metavar="FLAG",
            rich_help_panel=ON_SLURM,
        ),
    ] = None,
) -> None:
    """Train on several GPUs of this machine, or submit a whole run to SLURM.

    A folder of configs is a study (dinogen study): each config is a run, and one that fails does
    not stop the others. On this machine they are trained one after the other. On SLURM each is a
    chain of jobs, and this command does not wait for them.

    On SLURM every stage is a job of its own that waits for the one before; with --photos the data
    are made first. The same command again submits what is neither done nor queued.

    [bold]dinogen launch status RUN[/bold] shows the jobs of a run and how far they are; for a
    folder of configs it shows the study.

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
        "unchecked": unchecked or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    launcher = _launcher(on, given)
    changes = [*(overrides or ()), *_as_overrides(given, engine)]
    from dinogen.config.base import find_config

    path = find_config(Path(config))
    if path.is_dir():
        _launch_folder(path, changes, stages, given, dry_run, launcher)
        return
    launcher(_request(path, changes, stages, given, dry_run))


def _launcher(on: str, given: dict[str, Any]) -> Callable[[Request], object]:
    """The function that starts runs there; refuses options that belong elsewhere only."""
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
    """The overrides that options stand for."""
    from dinogen.config.training import ClusterConfig

    changes = [f"engine.name={engine}"] if engine is not None else []
    keys = ClusterConfig.model_fields
    # JSON is YAML, and keeps 12:00:00 a string
    return changes + [
        f"cluster.{name}={json.dumps(value)}"
        for name, value in given.items()
        if name in keys and name in PLACES["slurm"]
    ]


def _launch_folder(
    folder: Path,
    changes: list[str],
    stages: str | None,
    given: dict[str, Any],
    dry_run: bool,
    launcher: Callable[[Request], object],
) -> None:
    """Run a folder of configs as a study, without waiting for SLURM."""
    from launch.local.start import launch_local
    from launch.study.plan import check_study, open_folder
    from launch.study.run import LocalStudy
    from launch.study.slurm import SlurmStudy

    study = open_folder(folder, changes, stages)
    if dry_run:
        for run in study.runs:
            typer.echo(f"# {run.source}")
            launcher(_request(run.source, changes, stages, given, dry_run))
        return
    check_study(study)
    if launcher is launch_local:
        _finish(study, LocalStudy(study, given.get("gpus"), given.get("max_restarts")).run())
    else:
        unchecked = given.get("unchecked", False)
        runner = SlurmStudy(study, given.get("photos"), wait=False, unchecked=unchecked)
        _finish(study, runner.run(), report=False)


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
        unchecked=given.get("unchecked", False),
    )


def _status(arguments: list[str]) -> None:
    """Print the table; exits 1 if a job did not end well."""
    from dinogen.errors import UserError
    from launch.cli.console import Line, print_lines
    from launch.slurm.status import job_rows
    from launch.study.plan import is_config_folder

    if len(arguments) != 1:
        raise UserError("write: dinogen launch status RUN")
    folder = Path(arguments[0])
    if is_config_folder(folder):
        status(folder)
        return
    rows = job_rows(folder)
    print_lines(
        arguments[0],
        ("step", "job", "state", "progress"),
        (Line((row.step, row.id, row.state, row.progress), row.why, row.good) for row in rows),
    )
    if not all(row.good for row in rows):
        raise typer.Exit(1)


@study_app.command()
def plan(file: Plan) -> None:
    """Show all runs, what is left of each, and how long that will take at measured speeds.

    A speed comes from the run itself, or from one of the same config, or from one of the same
    family and resolution. Without any, the time is unknown. A run that cannot work on this machine
    is red, with the reason. Below the table are the lengths that the plan gives its tracks; how
    many images a length in minutes is, it says once the speeds are measured.

    [bold]Example[/bold]  dinogen study plan configs/study.yaml
    """
    from dinogen.report.progress import rounded
    from launch.check import why_refused
    from launch.cli.console import Line, print_lines
    from launch.study.cost import NOTHING_LEFT, cost_of, duration, speed_words
    from launch.study.data import lacking
    from launch.study.plan import check_study
    from launch.study.runs import is_trained
    from launch.study.status import budget_words, study_states

    study = _open(file)
    check_study(study)
    states, choices = study_states(study)
    runs = [one.run for one in states]
    lines, costs = [], []
    for one in states:
        cost = NOTHING_LEFT if one.state == "pruned" else cost_of(one.run, runs)
        costs.append(cost)
        time = "unknown" if cost.seconds is None else duration(cost.seconds)
        left = "unknown" if cost.num_images is None else f"{rounded(cost.num_images / 1000, 4)} k"
        left_to_train = cost is not NOTHING_LEFT
        left_to_train &= not is_trained(one.run) and not lacking(study, one.run)
        sizes = [stage.resolution for stage in one.run.stages]
        refused = why_refused(one.run.config, sizes) if left_to_train else None
        why = "; ".join(word for word in (one.why, refused, cost.why) if word)
        cells = (one.run.id, one.state, left, time, speed_words(cost.speeds))
        lines.append(Line(cells, why, good=one.good and not refused))
    print_lines(str(file), ("run", "state", "images left", "time", "measured"), lines)
    for words in budget_words(study):
        typer.echo(words)
    for search in study.searches:
        # what a trial costs whose values are not known yet
        if search.trials.num_left:
            cost = cost_of(search.config_run, runs)
            costs += [cost] * search.trials.num_left
            time = "unknown" if cost.seconds is None else duration(cost.seconds)
            typer.echo(f"{search.id}: {search.trials.num_left} more trials, {time} each")
    known = [cost for cost in costs if cost.seconds is not None]
    total = sum(cost.seconds or 0.0 for cost in known)
    shared = [cost.processor_s for cost in known if cost.seconds]
    line = f"left to train: {duration(total)}"
    if shared and None not in shared:
        line += f", {sum(one or 0.0 for one in shared) / 3600:,.2f} hours of one process"
    if len(known) < len(costs):
        line += f"; unknown for {len(costs) - len(known)} runs"
    if any(one.prunes for one in study.searches):
        line += "; pruned trials take less"
    typer.echo(f"{line}; time for measuring is not included")
    _tell_choices(study, choices, states)


@study_app.command()
def run(
    file: Plan,
    on: Annotated[str, typer.Option(help="Where: local or slurm.")] = "local",
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="On this machine; default: all. Without a GPU: processes on the CPU."
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option(help="On SLURM: wait for the jobs, so that the final can follow.")
    ] = True,
) -> None:
    """Train and measure all runs, then those of the final, and write the report.

    The same command continues after any interruption. A run that fails is recorded and does not
    stop the others; the next call tries it again, after them.

    On SLURM each run is a chain of jobs. This command waits for them, because the final depends on
    their results; if you stop it, the jobs stay queued.

    Where the plan gives a track minutes, the speed of each config is measured first, once.

    With search: in the plan, trials take the place of a config: grid, random or TPE. Bad ones are
    stopped early, one that fails stops nothing, and the best can go into the final.

    The configs of a folder are only trained, each in the folder that its run: names.

    [bold]Examples[/bold]

      dinogen study run configs/study.yaml

      dinogen study run configs/search_fast.yaml

      dinogen study run configs/study.yaml --on slurm
    """
    from dinogen.errors import UserError
    from launch.study.plan import check_study
    from launch.study.run import LocalStudy
    from launch.study.slurm import SlurmStudy

    study = _open(file)
    if on not in ("local", "slurm"):
        raise UserError(f"--on {on}: runs are started on local or slurm")
    if on == "slurm" and gpus is not None:
        raise UserError("--gpus is for --on local; on SLURM set cluster: in the configs")
    check_study(study)
    runner = LocalStudy(study, gpus) if on == "local" else SlurmStudy(study, wait=wait)
    outcomes = runner.run()
    _finish(runner.study, outcomes, report=wait)


@study_app.command()
def measure(
    file: Plan,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="On this machine; default: all. Without a GPU: processes on the CPU."
        ),
    ] = None,
) -> None:
    """Measure the speed of each config whose length is in minutes, and train nothing.

    `dinogen study run` does it too, before anything else. On SLURM it does not, for the machine of
    the command is not the one that trains: run this in a job of that kind.

    [bold]Example[/bold]  srun --gpus 1 dinogen study measure configs/today.yaml
    """
    from launch.study.plan import check_study
    from launch.study.run import LocalStudy
    from launch.study.status import budget_words

    study = _open(file)
    check_study(study)
    runner = LocalStudy(study, gpus)
    if outcomes := runner.measure():
        _finish(runner.study, outcomes, report=False)
        return
    for words in budget_words(runner.study) or ["no track has minutes: nothing to measure"]:
        typer.echo(words)


@study_app.command()
def status(file: Plan) -> None:
    """Show what is done, running, waiting or failed; exits with 1 if something failed.

    [bold]Example[/bold]  dinogen study status configs/study.yaml
    """
    from launch.cli.console import Line, print_lines
    from launch.study.status import study_states

    study = _open(file)
    states, choices = study_states(study)
    lines = []
    for one in states:
        value = "" if one.value is None else f"{one.value:.4g}"
        lines.append(Line((one.run.id, one.state, one.progress, value), one.why, one.good))
    print_lines(str(file), ("run", "state", "progress", study.metric or ""), lines)
    _tell_choices(study, choices, states)
    if not all(one.good for one in states):
        raise typer.Exit(1)


@study_app.command()
def report(file: Plan) -> None:
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


def _finish(study: Study, outcomes: list[Outcome], report: bool = True) -> None:
    """Print what became of each run; write the report if that is wanted and a run has begun."""
    from dinogen.errors import EXIT_STOPPED
    from dinogen.runs.run import Run
    from launch.cli.console import Line, print_lines
    from launch.study.outcome import exit_code

    lines = (Line((one.run.id, one.what), good=one.good) for one in outcomes)
    print_lines(str(study.path), ("run", "outcome"), lines)
    code = exit_code(outcomes)
    if report and code != EXIT_STOPPED and any(Run(one.run.folder).has_config for one in outcomes):
        _report(study)
    if code:
        raise typer.Exit(code)


def _best_trial(search: Search) -> str:
    best = next((one for one in search.ranked if one.value is not None), None)
    if best is None:
        return ""
    return f"; best: trial {best.number}, {search.metric} {best.value:.4g} with {best.words}"


def _tell_choices(study: Study, choices: dict[str, Choice], states: list[State]) -> None:
    """Print the best of each track, and what the final waits for."""
    for name, choice in choices.items():
        typer.echo(f"{name}: {choice.best or 'no best'} ({choice.why})")
    for search in study.searches:
        typer.echo(f"{search.id}: {search.summary}{_best_trial(search)}")
    waits = [track for track in study.final_tracks if track not in choices]
    if waits:
        left = sum(one.run.track in waits and one.state != "done" for one in states)
        typer.echo(f"the final waits for {left} runs of {', '.join(waits)}")
