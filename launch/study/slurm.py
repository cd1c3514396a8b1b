"""Runs a study by SLURM: each run a chain of jobs, the final's once those of the tracks ended."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType

from dinogen.config import dump_config
from dinogen.errors import EXIT_STOPPED, UserError
from dinogen.files import write_text
from launch.request import Request
from launch.slurm.jobs import launch_folder, read_jobs
from launch.slurm.status import job_rows
from launch.slurm.submit import ask_states, launch_slurm
from launch.study.folder import Outcome, unwritable
from launch.study.messages import jobless
from launch.study.plan import Study, StudyRun, lacking, steps_left
from launch.study.selection import present_runs
from launch.study.state import Attempt, read_record, study_lock

log = logging.getLogger(__name__)

# Seconds between two looks at the jobs; the longer nothing happens, the more seldom.
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 60.0


class SlurmStudy:
    """Submits what is left of a study and waits for it; asked to stop, the jobs stay queued.

    Each run is submitted once; given again, what failed meanwhile is submitted again.

    Args:
        study: the study.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.metric = study.plan.metric
        self.record = read_record(study)
        self.outcomes: dict[str, Outcome] = {}
        self._waiting: dict[str, tuple[StudyRun, Attempt, float]] = {}
        self._quiet: set[str] = set()  # without a queued job at the last look
        self._failed: set[str] = set()
        self._stop = threading.Event()

    def run(self) -> list[Outcome]:
        """Do it, and say what became of each run that is known by then.

        Raises:
            UserError: another one is at work in the study's folder.
        """
        with study_lock(self.study.folder):
            self.record = read_record(self.study)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, self._handle)
            pause = _FIRST_PAUSE
            while not self._stop.is_set():
                news = self._submit_new() + self._look()
                if not self._waiting and not news:
                    break
                pause = _FIRST_PAUSE if news else min(1.2 * pause, _LAST_PAUSE)
                if self._waiting:
                    self._stop.wait(pause)
            runs, choices = present_runs(self.study, self._settled)
            self.record.best = {n: one.best for n, one in choices.items() if one.best is not None}
            self.record.write()
        return [self.outcomes.get(run.id) or self._unfinished(run) for run in runs]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def _settled(self, run: StudyRun) -> bool:
        return run.id in self._failed or not steps_left(run, self.metric)

    def _submit_new(self) -> int:
        """Submit every run that can be by now; how many were."""
        runs, _ = present_runs(self.study, self._settled)
        num = 0
        for run in runs:
            if run.id in self.outcomes or run.id in self._waiting or self._stop.is_set():
                continue
            if not steps_left(run, self.metric):
                self.outcomes[run.id] = Outcome(run.source, run.folder, "done before")
                continue
            num += 1
            if why := lacking(run):
                log.warning("%s: %s", run.id, why)
                self.outcomes[run.id] = Outcome(run.source, run.folder, why, 1)
                continue
            self._submit(run)
        return num

    def _submit(self, run: StudyRun) -> None:
        copy = self.study.copy_of(run)
        folder = launch_folder(run.folder)
        command = ["dinogen", "launch", str(copy), "--on", "slurm"]
        log.info("%s:", run.id)
        attempt = self.record.open(run) or self.record.begin(run, "jobs", command, folder)
        try:
            write_text(copy, dump_config(run.config))
            launch_slurm(Request(copy, (), run.config, metric=self.metric))
        except UserError as error:
            self._fail(run, attempt, 0.0, str(error))
            return
        except OSError as error:
            self._fail(run, attempt, 0.0, unwritable(error))
            return
        self._waiting[run.id] = (run, attempt, time.monotonic())

    def _look(self) -> int:
        """See which runs have no job any more; how many have ended."""
        before = len(self._waiting)
        for run, attempt, began in list(self._waiting.values()):
            if self._stop.is_set():
                break
            try:
                states = ask_states(read_jobs(run.folder)).values()
                if any(state is not None and state.active for state in states):
                    self._quiet.discard(run.id)
                    continue
                done = not steps_left(run, self.metric)
                if not done and run.id not in self._quiet:
                    # A file system of several nodes may show a job's files late.
                    self._quiet.add(run.id)
                    continue
                took = time.monotonic() - began
                if done:
                    self._done(run, attempt, took)
                else:
                    self._fail(run, attempt, took, jobless(run, self.metric, job_rows(run.folder)))
            except UserError as error:
                log.warning("%s: %s", run.id, error)  # SLURM may answer again
        return before - len(self._waiting)

    def _done(self, run: StudyRun, attempt: Attempt, seconds: float) -> None:
        self._waiting.pop(run.id)
        log.info("%s: done", run.id)
        self.record.end(attempt, seconds, 0, None)
        self.outcomes[run.id] = Outcome(run.source, run.folder, f"done after {seconds:.0f} s")

    def _fail(self, run: StudyRun, attempt: Attempt, seconds: float, what: str) -> None:
        self._waiting.pop(run.id, None)
        self._failed.add(run.id)
        log.error("%s: %s", run.id, what)
        self.record.end(attempt, seconds, 1, what)
        self.outcomes[run.id] = Outcome(run.source, run.folder, what, 1)

    def _unfinished(self, run: StudyRun) -> Outcome:
        if not steps_left(run, self.metric):
            return Outcome(run.source, run.folder, "done")
        what = "its jobs stay queued" if run.id in self._waiting else "not submitted"
        return Outcome(run.source, run.folder, what, EXIT_STOPPED)
