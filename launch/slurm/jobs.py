"""RUN/launch/jobs.json: the SLURM jobs that were submitted for a run, and their commands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinogen.errors import UserError
from dinogen.files import write_json
from shards.lock import Locked, lock

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
