"""A run as a chain of SLURM jobs: what has to be submitted, and submitting it."""

from __future__ import annotations

import hashlib
import logging
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinogen.config import Config, dump_config
from dinogen.errors import UserError
from dinogen.files import write_text
from dinogen.runs.run import Run
from launch.request import Request
from launch.slurm.jobs import (
    Job,
    Jobs,
    JobState,
    cancel,
    has_slurm,
    job_state,
    launch_folder,
    launch_lock,
    read_jobs,
    sbatch,
)
from launch.slurm.plan import SCRIPTS, Step, lacking_data, plan_steps

log = logging.getLogger(__name__)

States = Mapping[str, JobState | None]  # by the job's number; None if SLURM does not know it
_PLACE = "@AFTER@"


@dataclass
class Planned:
    """A step that is not done.

    Attributes:
        step: the step.
        after: the step before it, if that is not done either.
        id: number of its job; None until it is submitted.
        cancel: number of a job to cancel first, because it waits for another job than ``after``.
    """

    step: Step
    after: Planned | None
    id: str | None = None
    cancel: str | None = None


def launch_slurm(request: Request) -> int:
    """Submit what is neither done nor queued, or print the chain.

    Returns:
        The number of jobs of the run that are queued or running now.

    Raises:
        UserError: there are no data, no such stage, the jobs would be refused at their start, or
            sbatch refuses; what was submitted before is recorded.
    """
    from dinogen.families.registry import resolve

    config = resolve(request.config)
    folder = launch_folder(config.run)
    copies = make_copies(config, folder)
    steps = plan_steps(config, request.stages, request.photos, copies.config, metric=request.metric)
    if request.dry_run:
        jobs = read_jobs(config.run)
        states = ask_states(jobs) if has_slurm() else {}
        planned = plan(config, steps, jobs, states)
        _show(config, copies, planned)
        if not request.unchecked:
            _check(config, planned)
        return sum(state is not None and state.active for state in states.values())
    with launch_lock(folder):
        jobs = read_jobs(config.run)
        planned = plan(config, steps, jobs, ask_states(jobs))
        if not request.unchecked:
            _check(config, planned)
        copies.write()
        _submit(config, copies, planned, jobs)
    return len(planned)


def _show(config: Config, copies: Copies, planned: list[Planned]) -> None:
    """Print what the chain will take, and write its commands to a file of this folder."""
    from launch.slurm.forecast import forecast, table

    rows = []
    for one in planned:
        after = one.after.step.name if one.after else ""
        if one.after and one.after.id:
            after = f"job {one.after.id}"
        rows.append((one.step, f"queued: job {one.id}" if one.id else after))
    print(table(forecast(config, rows), config.cluster.setup))
    script = Path(f"{config.run.name}-launch.sh")
    write_text(script, chain_script(config, copies, planned) + "\n")
    print(f"commands: {script}" + ("" if planned else " (everything is done)"))


def _check(config: Config, planned: list[Planned]) -> None:
    """Check the stages that have no job yet.

    Raises:
        UserError: their jobs would be refused at the start.
    """
    from launch.check import check_run_here

    ranks = {
        int(one.step.args[1]): one.step.resources.nodes * one.step.resources.processes
        for one in planned
        if one.id is None and _is_stage(one.step)
    }
    if ranks:
        check_run_here(config, ranks, packed=not lacking_data(config))


def ask_states(jobs: Jobs) -> dict[str, JobState | None]:
    """The state of each step's newest job; its last state is noted in ``jobs``.

    Raises:
        UserError: SLURM does not answer.
    """
    states: dict[str, JobState | None] = {}
    for step in {job.step for job in jobs.jobs}:
        job = jobs.newest(step)
        assert job is not None
        state = job_state(job.id)
        if state is not None and not state.active:
            job.state, job.exit_code = state.state, state.exit_code
        elif state is None and job.state is not None:
            state = JobState(job.state, "", job.exit_code)
        states[job.id] = state
    return states


def plan(config: Config, steps: list[Step], jobs: Jobs, states: States) -> list[Planned]:
    """The steps that are not done, each after the one before it.

    Raises:
        UserError: the stage before the first one is neither done nor queued.
    """
    planned: list[Planned] = []
    before = _stage_before(config, steps, jobs, states)
    for step in steps:
        if step.done:
            continue
        job = jobs.newest(step.name)
        state = states.get(job.id) if job else None
        one = Planned(step, before)
        if job and state and state.active:
            # A job that waits for one that is no longer in the chain would never start.
            fits = before is None or before.id == job.after or state.state != "PENDING"
            if fits and state.reason != "DependencyNeverSatisfied":
                one.id = job.id
            else:
                one.cancel = job.id
        elif state and state.state == "COMPLETED" and before is None and not _leaves_files(step):
            continue
        planned.append(one)
        before = one
    return planned


def _stage_before(config: Config, steps: list[Step], jobs: Jobs, states: States) -> Planned | None:
    """The queued stage that the first chosen stage grows from; None if it is done."""
    first = next(step for step in steps if _is_stage(step))
    sizes = [stage.resolution for stage in config.stages]
    index = sizes.index(int(first.args[1]))
    if index == 0 or first.done or Run.of(config).stage(sizes[index - 1]).done:
        return None
    name = f"train-{sizes[index - 1]}"
    job = jobs.newest(name)
    state = states.get(job.id) if job else None
    if job is None or state is None or not state.active:
        raise UserError(
            f"stage {sizes[index]} grows from stage {sizes[index - 1]}, which is neither done nor "
            f"queued: launch both (--stages {sizes[index - 1]}..{sizes[-1]})"
        )
    return Planned(first, None, job.id)


def _leaves_files(step: Step) -> bool:
    """Whether the files of a step show if it is done, however its job ended."""
    return _is_stage(step) or step.script.stem == "results"


def _is_stage(step: Step) -> bool:
    return step.name.startswith("train-")


def sbatch_command(config: Config, copies: Copies, step: Step, after: str | None) -> list[str]:
    """The command that submits a step after job ``after``.

    Raises:
        UserError: a path has a comma, which sbatch cannot pass to a job.
    """
    variables = {
        "DINOGEN_SLURM": str(SCRIPTS),
        "DINOGEN_SETUP": str(copies.setup),
        "DINOGEN_PROCESSES": str(step.resources.processes),
        "DINOGEN_RESTARTS": str(config.cluster.max_restarts),
    }
    command = ["sbatch", "--parsable"]
    fewest = config.cluster.min_nodes
    if _is_stage(step) and fewest is not None and fewest < step.resources.nodes:
        variables["DINOGEN_MIN_NODES"] = str(fewest)
        command.append("--no-kill")
    for name, value in variables.items():
        if "," in value:
            raise UserError(f"{name}={value}: sbatch cannot pass a path with a comma: rename it")
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    command += [
        f"--job-name={config.run.name}-{step.name}",
        f"--output={log_pattern(copies, step, '%j')}",
        "--export=" + ",".join(["ALL", *(f"{key}={value}" for key, value in variables.items())]),
    ]
    if step.name != "evaluate":
        command.append(f"--signal=B:USR1@{config.cluster.signal_seconds}")
    return [*command, *step.resources.flags, str(step.script), *step.args]


def log_pattern(copies: Copies, step: Step, number: str) -> Path:
    """Output of the step's job with this number."""
    return copies.config.parent / f"{step.name}-{number}.log"


def chain_script(config: Config, copies: Copies, planned: list[Planned]) -> str:
    """The whole chain as a shell script."""
    lines = [f"# config: {copies.config}", f"# setup:  {copies.setup}"]
    for one in planned:
        variable = one.step.name.replace("-", "_")
        if one.cancel is not None:
            lines.append(f"scancel {one.cancel}  # {one.step.name}: waits for a missing job")
        if one.id is not None:
            lines.append(f"{variable}={one.id}  # queued or running")
            continue
        after = None
        place = ""
        if one.after is not None:
            place = f"${one.after.step.name.replace('-', '_')}"
            after = one.after.id or _PLACE
        command = shlex.join(sbatch_command(config, copies, one.step, after))
        lines.append(f"{variable}=$({command.replace(_PLACE, place)})")
    if not planned:
        lines.append("# everything is done")
    return "\n".join(lines)


def _submit(config: Config, copies: Copies, planned: list[Planned], jobs: Jobs) -> None:
    """Submit the steps without a job; record each at once, since a later one may be refused."""
    if not planned:
        log.info("%s: everything is done", config.run)
    for one in planned:
        name = one.step.name
        if one.id is not None:
            log.info("%-10s job %s is queued or running", name, one.id)
            continue
        if one.cancel is not None:
            log.info("%-10s job %s waits for a missing job: cancelled", name, one.cancel)
            cancel(one.cancel)
        after = one.after.id if one.after else None
        command = sbatch_command(config, copies, one.step, after)
        try:
            one.id = sbatch(command)
        except UserError as error:
            raise UserError(
                f"{name}: {error}\nJobs that were submitted before stay queued (dinogen launch "
                f"status {config.run}); fix it and run the same command again"
            ) from None
        jobs.jobs.append(
            Job(
                step=name,
                id=one.id,
                after=after,
                submitted=time.strftime("%Y-%m-%d %H:%M:%S"),
                command=command,
                config=str(copies.config),
                log=str(log_pattern(copies, one.step, one.id)),
            )
        )
        jobs.write()
        log.info("%-10s job %s%s", name, one.id, f" after {after}" if after else "")


@dataclass(frozen=True)
class Copies:
    """The files that jobs read. Their names depend on their contents: a change makes a new file.

    Attributes:
        config: the resolved config.
        setup: shell lines that name Python, and those of ``cluster.setup``.
    """

    config: Path
    config_text: str
    setup: Path
    setup_text: str

    def write(self) -> None:
        """Write both."""
        write_text(self.config, self.config_text)
        write_text(self.setup, self.setup_text)


def make_copies(config: Config, folder: Path) -> Copies:
    """The files that the jobs of a run read, in ``folder``; not written yet."""
    text = dump_config(config)
    # The site's lines come last: in a container Python has another path.
    lines = [f"DINOGEN_PYTHON={shlex.quote(sys.executable)}", *config.cluster.setup]
    setup = "\n".join(lines) + "\n"
    return Copies(
        folder / f"config-{_digest(text)}.yaml", text, folder / f"setup-{_digest(setup)}.sh", setup
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
