"""Queries, submits and cancels SLURM jobs: the only file that calls SLURM's programs."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from dinogen.errors import UserError

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


def submit(command: list[str]) -> str:
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
