"""STUDY/study.json: the steps that were tried for each run, how they ended, and their logs.

What is done is read from the files of the runs; this record is for people, and says what failed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from dinogen.errors import UserError
from dinogen.files import next_free, write_json
from dinogen.runs.files import read_attempts, read_object
from dinogen.runs.layout import STUDY
from launch.study.plan import Study
from launch.study.runs import StudyRun
from shards.files import Locked, lock
from shards.files import is_locked as is_file_locked

log = logging.getLogger(__name__)

FORMAT = 1
JOBS = "jobs"  # the step that is all steps of a run on SLURM


@dataclass
class Attempt:
    """One try of one step of a run.

    Attributes:
        step: ``train``, ``evaluate``, ``look``, or :data:`JOBS`.
        command: the command that did it.
        log: what it printed.
        began: when, in local time.
        seconds: how long it took; None as long as it runs, or if it was killed together with
            the study.
        code: the exit code of the command; 75 if it was asked to stop.
        what: what went wrong, in words; None if nothing did.
    """

    step: str
    command: list[str]
    log: str
    began: str
    seconds: float | None = None
    code: int | None = None
    what: str | None = None

    @property
    def open(self) -> bool:
        """Whether it has not ended."""
        return self.seconds is None


@dataclass
class Record:
    """All attempts of a study by the runs' ids, oldest first.

    Attributes:
        study: the study.
        attempts: by run.
        best: name of the best config by track.
        damaged: whether parts of the file could not be read; it is kept when a new one is written.
    """

    study: Study
    attempts: dict[str, list[Attempt]] = field(default_factory=dict)
    best: dict[str, str] = field(default_factory=dict)
    damaged: bool = False

    @property
    def path(self) -> Path:
        """The file."""
        return self.study.folder / STUDY

    def begin(self, run: StudyRun, step: str, command: Sequence[str], log: Path) -> Attempt:
        """Record that a step begins."""
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        attempt = Attempt(step, list(command), str(log), began)
        self.attempts.setdefault(run.id, []).append(attempt)
        self.write()
        return attempt

    def end(self, attempt: Attempt, seconds: float, code: int, what: str | None) -> None:
        """Record how it ended."""
        attempt.seconds, attempt.code, attempt.what = round(seconds, 1), code, what
        self.write()

    def failed(self, run: StudyRun) -> str | None:
        """What went wrong in the last attempt of a run; None if nothing did."""
        newest = {attempt.step: attempt for attempt in self.attempts.get(run.id, [])}
        return next((one.what for one in newest.values() if one.what), None)

    def open(self, run: StudyRun) -> Attempt | None:
        """The attempt that is running, or was killed together with the study."""
        attempts = self.attempts.get(run.id, [])
        return attempts[-1] if attempts and attempts[-1].open else None

    def write(self) -> None:
        """Write the file, whole or not at all."""
        facts = {
            "format": FORMAT,
            "study": str(self.study.path),
            "title": self.study.title,
            "metric": self.study.metric,
            "best": self.best,
        }
        runs = {key: [asdict(one) for one in attempts] for key, attempts in self.attempts.items()}
        folders = {
            run.id: os.path.relpath(run.folder, self.study.folder)
            for run in self.study.runs
            if run.id in runs
        }
        if self.damaged:
            kept = next_free(self.path.with_name(f"{self.path.name}.damaged"))
            self.path.replace(kept)
            log.warning("%s: damaged, and kept as %s", self.path, kept)
            self.damaged = False
        write_json(self.path, facts | {"folders": folders, "runs": runs})


def read_record(study: Study) -> Record:
    """What was tried so far; nothing if there is no file.

    Parts that cannot be read are left out with a warning: what is done is known from the runs. When
    the file is written again, the old one is kept next to it.

    Raises:
        UserError: a later version of dinogen wrote it.
    """
    record = Record(study)
    whole = read_object(record.path)
    data = whole.value or {}
    if isinstance(data.get("format"), int) and data["format"] != FORMAT:
        raise UserError(
            f"{record.path}: cannot be read (format {data['format']}, this version knows "
            f"{FORMAT}): move it away; what is done is known from the runs"
        )
    found = read_attempts(record.path)
    problems = list(found.problems)
    known = {one.name for one in fields(Attempt)}
    needed = {one.name for one in fields(Attempt) if one.default is MISSING}
    for key, attempts in found.value.items():
        record.attempts[key] = []
        for one in attempts:
            given = {name: value for name, value in one.items() if name in known}
            if any(given.get(name) is None for name in needed):
                problems.append(
                    f": runs: {key}: an attempt lacks one of {', '.join(sorted(needed))}"
                )
                continue
            record.attempts[key].append(Attempt(**given))
    best = data.get("best")
    if isinstance(best, dict) and all(isinstance(name, str) for name in best.values()):
        record.best = best
    elif best is not None:
        problems.append(f": best: {best!r} is not a mapping of tracks to names")
    for problem in problems:
        log.warning("%s%s; what is done is known from the runs", record.path, problem)
    record.damaged = bool(problems)
    return record


@contextmanager
def study_lock(folder: Path) -> Iterator[None]:
    """Lock a study for one `dinogen study run`; the system releases it however the process ends.

    Raises:
        UserError: another one is running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("w") as file:
        for left in reversed(range(5)):
            if lock(file, path, shared=False, wait=False) is not Locked.BUSY:
                break
            if not left:
                raise UserError(
                    f"{folder}: another dinogen study run is using this folder: wait, or stop it"
                )
            time.sleep(0.1)  # is_locked takes it for a moment
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process holds ``FOLDER/.lock`` now."""
    return is_file_locked(folder / ".lock")
