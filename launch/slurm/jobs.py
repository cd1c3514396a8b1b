"""RUN/launch/jobs.json: which SLURM jobs were submitted for a run, by which commands."""

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
        after: number of the job that has to end well before it; None if there is none.
        submitted: when, in local time.
        command: the sbatch command.
        config: the copy of the config that it reads.
        log: its output.
        state: SLURM's last word on it once it has ended, since SLURM forgets; None before.
        exit_code: of its script, then.
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
    """Where a run keeps what was submitted for it, and the jobs' output."""
    return run.absolute() / "launch"


def read_jobs(run: Path) -> Jobs:
    """What was submitted for a run so far; nothing if there is no file.

    Raises:
        UserError: the file is there, but cannot be understood.
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
            f"{jobs.path}: cannot be read ({error}): look with squeue which jobs of the run are "
            "there, cancel them, and move the file away"
        ) from None
    return jobs


def _job(item: dict[str, Any]) -> Job:
    """A job as it was written, whose values are of the kinds that its readers expect.

    Raises:
        ValueError, TypeError: it is no job.
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
        raise ValueError(f"{item!r} is no job")
    return job


@contextmanager
def launch_lock(folder: Path) -> Iterator[None]:
    """One launch at a time for a run: two would submit everything twice.

    Raises:
        UserError: another one is at work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("w") as file:
        if lock(file, path, shared=False, wait=False) is Locked.BUSY:
            raise UserError(f"{folder}: another launch is at work there: wait for it")
        yield
