"""The state of a run's jobs: SLURM's states, progress, and why a job waits or failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dinogen.config import Config, load_config
from dinogen.errors import UserError
from dinogen.runs.run import Run
from launch.slurm.jobs import Job, Jobs, JobState, has_slurm, read_jobs
from launch.slurm.plan import lacking_data
from launch.slurm.submit import ask_states


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        step: what the job does.
        id: SLURM's number.
        state: SLURM's state, or ``forgotten``.
        progress: of a stage: images seen and planned, health.
        why: why it waits or failed, and where to look.
        good: False if the user has to act.
    """

    step: str
    id: str
    state: str
    progress: str
    why: str
    good: bool


def job_rows(run: Path) -> list[Row]:
    """The newest job of every step of a run, in the order of the chain.

    Raises:
        UserError: no jobs were submitted for the run, or SLURM does not answer.
    """
    jobs = read_jobs(run)
    if not jobs.jobs:
        raise UserError(
            f"{run}: no jobs were submitted for this run, there is no {jobs.path}: "
            "dinogen launch CONFIG --on slurm"
        )
    if not has_slurm():
        raise UserError("no SLURM here (no sbatch on the PATH): use a login node")
    states = ask_states(jobs)
    newest = [job for job in jobs.jobs if jobs.newest(job.step) is job]
    newest.sort(key=lambda job: _place(job.step))
    return [_row(job, jobs, states) for job in newest]


def _place(step: str) -> int:
    """Steps in the order of the work, stages by their size."""
    order = {"faces": -3, "pyramids": -2, "pack": -1, "evaluate": 10**9}
    return order[step] if step in order else int(step.removeprefix("train-"))


def _row(job: Job, jobs: Jobs, states: dict[str, JobState | None]) -> Row:
    state = states[job.id]
    done, progress = _progress(job)
    if state is None:
        why = "" if done else f"SLURM has forgotten it: see {job.log}"
        return Row(job.step, job.id, "forgotten", progress, why, done)
    name = state.state + (f" (restart {state.num_restarts})" if state.num_restarts else "")
    if state.active:
        return Row(job.step, job.id, name, progress, _why_waiting(job, state), True)
    if state.state == "COMPLETED":
        return Row(job.step, job.id, name, progress, "", True)
    return Row(job.step, job.id, name, progress, _why_ended(job, state, jobs, states), False)


def _why_waiting(job: Job, state: JobState) -> str:
    if state.state != "PENDING" or not state.reason:
        return ""
    words = {
        "Dependency": f"waits for job {job.after}",
        "BeginTime": "was requeued, starts soon",
        "Resources": "waits for free nodes",
        "Priority": "waits for jobs of higher priority",
        "DependencyNeverSatisfied": f"job {job.after} failed: run launch again",
    }
    return words.get(state.reason, state.reason)


def _why_ended(job: Job, state: JobState, jobs: Jobs, states: dict[str, JobState | None]) -> str:
    """Why a job failed: by itself, or because of the first job that failed."""
    passed = {job.id}  # in a damaged jobs.json jobs may wait for each other in a circle
    one, ended = job, state
    while ended.state == "CANCELLED":
        before = next((job for job in jobs.jobs if job.id == one.after), None)
        state_before = states.get(before.id) if before else None
        if before is None or state_before is None or state_before.active or before.id in passed:
            break
        if state_before.state == "COMPLETED":
            break
        if state_before.state != "CANCELLED" or before.after is None:
            what = f"(job {before.id}), which ended as {state_before.state}"
            return f"needs {before.step} {what}"
        passed.add(before.id)
        one, ended = before, state_before
    if state.state == "CANCELLED":
        return "it was cancelled"
    code = f"exit code {state.exit_code}, " if state.exit_code else ""
    return f"{code}see {job.log}"


def _progress(job: Job) -> tuple[bool, str]:
    """Whether the results of a job exist, and how far a stage is."""
    try:
        config: Config = load_config(job.config)
    except UserError as error:
        return False, str(error)
    stages = Run.of(config).planned
    stage = next((one for one in stages if job.step == f"train-{one.resolution}"), None)
    if stage is None:
        if job.step == "evaluate":
            return any(one.evaluated for one in stages), ""
        return not lacking_data(config), ""
    return stage.done, stage.progress


def stage_rows(config: Config) -> list[Row]:
    """The stages of a run that was not submitted, but trained on this machine or not at all."""
    return [
        Row(f"train-{stage.resolution}", "", stage.status, stage.progress, "", True)
        for stage in Run.of(config).planned
    ]
