"""The SLURM jobs of a run: queried, submitted, cancelled, and kept in RUN/launch/jobs.json.

No other file calls SLURM's programs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinogen.errors import UserError
from dinogen.files import write_json
from shards.files import Locked, lock

FORMAT = 1


@dataclass
class Job:
    """One submitted job.

    Attributes:
        step: what it does: ``faces``, ``pyramids``, ``pack``, ``train-8``, ``evaluate``.
        id: SLURM's number.
        after: number of the job that has to succeed first; None if there is none.
        submitted: when, in local time.
        command: the sbatch command.
        config: the copy of the config that it reads.
        log: its output.
        state: its last state once it has ended, because SLURM forgets it; None before.
        exit_code: of its script, once it has ended.
    """

    step: str
    id: str
    after: str | None
    submitted: str
    command: list[str]
    config: str
    log: str
    state: str | None = None
    exit_code: int | None = None


@dataclass
class Jobs:
    """All jobs ever submitted for a run, oldest first."""

    folder: Path
    jobs: list[Job] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "jobs.json"

    def newest(self, step: str) -> Job | None:
        """The job submitted last for a step."""
        return next((job for job in reversed(self.jobs) if job.step == step), None)

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.path, {"format": FORMAT, "jobs": [asdict(job) for job in self.jobs]})


def launch_folder(run: Path) -> Path:
    """The folder of a run for its submitted jobs and their output."""
    return run.absolute() / "launch"


def read_jobs(run: Path) -> Jobs:
    """The jobs that were submitted for a run so far; none if there is no file.

    Raises:
        UserError: the file exists, but cannot be read.
    """
    jobs = Jobs(launch_folder(run))
    try:
        data: dict[str, Any] = json.loads(jobs.path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, this version knows {FORMAT}")
        jobs.jobs = [_job(item) for item in data["jobs"]]
    except FileNotFoundError:
        return jobs
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{jobs.path}: cannot be read ({error}): find the jobs of the run with squeue, cancel "
            "them, and move the file away"
        ) from None
    return jobs


def _job(item: dict[str, Any]) -> Job:
    """A job as it was written, with values of the expected types.

    Raises:
        ValueError, TypeError: it is not a job.
    """
    job = Job(**item)
    texts = (job.step, job.id, job.submitted, job.config, job.log)
    optional = (job.after, job.state)
    words = job.command
    if (
        not all(isinstance(one, str) for one in texts)
        or not all(one is None or isinstance(one, str) for one in optional)
        or not (isinstance(words, list) and all(isinstance(one, str) for one in words))
        or not (job.exit_code is None or isinstance(job.exit_code, int))
        or not re.fullmatch(r"\d+", job.id)
        or not re.fullmatch(r"faces|pyramids|pack|evaluate|train-\d+", job.step)
        or job.state == ""
    ):
        raise ValueError(f"{item!r} is not a job")
    return job


@contextmanager
def launch_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a launch: two launches of a run at once would submit everything twice.

    Raises:
        UserError: another launch is running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("w") as file:
        if lock(file, path, shared=False, wait=False) is Locked.BUSY:
            raise UserError(f"{folder}: another launch of this run is running: wait for it")
        yield


# States of a job that has not ended; a requeued one is PENDING again.
ACTIVE = {
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SIGNALING",
    "SPECIAL_EXIT",
    "STAGE_OUT",
    "STOPPED",
    "PREEMPTED",  # with PreemptMode=REQUEUE it will run again
}


@dataclass(frozen=True)
class JobState:
    """The state of a job in SLURM.

    Attributes:
        state: such as PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT.
        reason: why it waits or ended; empty if SLURM gives none.
        exit_code: of the script; None unless it has ended.
        num_restarts: how often it was requeued.
    """

    state: str
    reason: str = ""
    exit_code: int | None = None
    num_restarts: int = 0

    @property
    def active(self) -> bool:
        """Whether it is queued or runs."""
        return self.state in ACTIVE


def has_slurm() -> bool:
    """Whether SLURM's programs are on the PATH."""
    return shutil.which("sbatch") is not None


def sbatch(command: list[str]) -> str:
    """Run an sbatch command with ``--parsable``; returns the job's number.

    Raises:
        UserError: sbatch is missing or refuses; with its message.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            "sbatch is not on the PATH: run this on a login node of the cluster, or add --dry-run "
            "to see what it would do"
        ) from None
    number = done.stdout.strip().split(";")[0]  # a federation adds its cluster's name
    if done.returncode or not number.isdigit():
        said = (done.stderr.strip() or done.stdout.strip()).replace("sbatch: error: ", "")
        raise UserError(f"sbatch refuses (exit code {done.returncode}): {said}")
    return number


def cancel(number: str) -> None:
    """Cancel a job; it is not an error if it has already ended."""
    subprocess.run(["scancel", number], capture_output=True, check=False)


def job_state(number: str) -> JobState | None:
    """State of a job; None if SLURM has forgotten it, as it does minutes after the end.

    Raises:
        UserError: SLURM does not answer.
    """
    done = _ask("scontrol", "--oneliner", "show", "job", number)
    if done.returncode == 0:
        return _parse(done.stdout)
    if "Invalid job id" not in done.stderr:
        raise UserError(f"SLURM does not answer: {done.stderr.strip() or done.stdout.strip()}")
    return _accounted(number)


def _parse(line: str) -> JobState:
    """State of a job from the output of ``scontrol --oneliner show job``."""
    found = dict(re.findall(r"(\w+)=(\S*)", line))
    state = found["JobState"]
    reason = found.get("Reason", "None")
    ended = state not in ACTIVE
    return JobState(
        state,
        "" if reason == "None" else reason,
        int(found.get("ExitCode", "0:0").split(":")[0]) if ended else None,
        int(found.get("Restarts", "0")),
    )


def _accounted(number: str) -> JobState | None:
    """State of a job from the accounting database, if the cluster has one."""
    if shutil.which("sacct") is None:
        return None
    flags = ("--noheader", "--allocations", "--parsable2", "--format=State,ExitCode")
    done = _ask("sacct", *flags, "--jobs", number)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return None
    state, _, code = lines[-1].partition("|")
    return JobState(state.split()[0], "", int(code.split(":")[0] or 0))  # CANCELLED by 1000


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on the PATH: run this on a login node") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"SLURM does not answer within 60 s ({command[0]})") from None
