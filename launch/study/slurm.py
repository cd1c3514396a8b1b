"""Runs what is left of a study by SLURM: each run a chain of jobs; the next call continues."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from dinogen.errors import EXIT_STOPPED, UserError
from launch.request import Request
from launch.slurm.jobs import ACTIVE, cancel, launch_folder, read_jobs
from launch.slurm.plan import lacking_data
from launch.slurm.status import job_rows
from launch.slurm.submit import ask_states, launch_slurm
from launch.study.data import lacking
from launch.study.outcome import Outcome, is_done, jobless, unwritable
from launch.study.plan import Study, present_runs
from launch.study.run import StudyRunner
from launch.study.runs import StudyRun, steps_left
from launch.study.search import Search
from launch.study.state import JOBS, Attempt

log = logging.getLogger(__name__)

# Seconds between two looks at the jobs; the longer nothing happens, the less often.
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 60.0


class SlurmStudy(StudyRunner):
    """A study on SLURM: each run is a chain of jobs; the final's follow when its tracks have ended.

    Each run is submitted once; the next call submits what failed in the meantime. Asked to stop, it
    leaves the jobs queued.

    Args:
        study: the study.
        photos: folder to make missing data from; None if they are packed.
        wait: whether to wait until all jobs have ended, or only to submit what can be submitted.
        unchecked: submit without looking at data, weights and ranks first.
    """

    def __init__(
        self,
        study: Study,
        photos: Path | None = None,
        wait: bool = True,
        unchecked: bool = False,
    ) -> None:
        super().__init__(study)
        self.unchecked = unchecked
        self.photos = photos
        self.wait = wait
        self._waiting: dict[str, tuple[StudyRun, Attempt, float]] = {}
        self._quiet: set[str] = set()  # without a queued job at the last look
        self._stop = threading.Event()

    @property
    def _stopping(self) -> bool:
        return self._stop.is_set()

    def _work(self) -> None:
        self._check_photos()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            news = self._submit_new()
            if not self.wait:
                self.outcomes |= {
                    run.id: Outcome(run, "submitted") for run, _, _ in self._waiting.values()
                }
                break
            news += self._look()
            if not self._waiting and not news:
                break
            pause = _FIRST_PAUSE if news else min(1.2 * pause, _LAST_PAUSE)
            if self._waiting:
                self._stop.wait(pause)

    def _check_photos(self) -> None:
        """No two runs may make the same data at once."""
        makers: dict[str, StudyRun] = {}
        for run in self.study.runs if self.photos else ():
            if run.config.data.mix:
                continue
            for path in lacking_data(run.config):
                first = makers.setdefault(path, run)
                if first is not run:
                    raise UserError(
                        f"{first.source} and {run.source} would both make {path} at once: pack it "
                        "first (dinogen prepare), or give each a data.path of its own"
                    )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def _submit_new(self) -> int:
        """Submit every run that can be by now; returns how many runs that was tried for."""
        self._settle()
        runs, _ = present_runs(self.study, self._settled)
        num = 0
        for run in [*runs, *self._further_trials(runs)]:
            if run.id in self.outcomes or run.id in self._waiting or self._stop.is_set():
                continue
            search = self.study.search_of(run)
            if search is not None and self.study.is_pruned(run):
                self._prune(run, search)
                continue
            if search is not None and (
                search.is_over(run)
                or self._is_hopeless(search)
                or self._num_queued(search) >= search.settings.most_at_once
            ):
                continue
            # SLURM measures a run that is only trained, too: launch_slurm knows if that is done
            if self.metric is not None and not steps_left(run, self.metric):
                self.outcomes[run.id] = Outcome(run, "done before")
                continue
            num += 1
            why = lacking(self.study, run)
            if why and (self.photos is None or run.config.data.mix):
                log.warning("%s: %s", run.id, why)
                self._without_data.add(run.id)
                self.outcomes[run.id] = Outcome(run, why, 1)
                continue
            if why := self._no_length(run):
                log.error("%s: %s", run.id, why)
                self._failed.add(run.id)
                self.outcomes[run.id] = Outcome(run, why, 1)
                continue
            self._submit(run)
        return num

    def _num_queued(self, search: Search) -> int:
        return sum(search.owns(run) for run, _, _ in self._waiting.values())

    def _further_trials(self, runs: Sequence[StudyRun]) -> Iterator[StudyRun]:
        """As many new trials as may be queued beside the known ones."""
        for search in self.study.searches:
            left = (run for run in runs if search.owns(run) and run.id not in self.outcomes)
            num = sum(run.id in self._waiting or not self._settled(run) for run in left)
            while num < search.settings.most_at_once and not self._stop.is_set():
                run = self._ask(search)
                if run is None:
                    break
                yield run
                num += 1

    def _prune(self, run: StudyRun, search: Search) -> None:
        """Cancel the jobs of a trial; the one that trains saves first."""
        for row in job_rows(run.folder) if read_jobs(run.folder).jobs else []:
            if row.state.split()[0] in ACTIVE:
                cancel(row.id)
        what = f"pruned: {search.trial_of(run).why}"
        log.info("%s: %s", run.id, what)
        if (waiting := self._waiting.pop(run.id, None)) is not None:
            _, attempt, began = waiting
            self.record.end(attempt, time.monotonic() - began, EXIT_STOPPED, None)
        self.outcomes[run.id] = Outcome(run, what)

    def _submit(self, run: StudyRun) -> None:
        copy = self.study.copy_of(run)
        log.info("%s:", run.id)
        request = Request(
            copy,
            (),
            run.config,
            run.only,
            photos=self.photos,
            unchecked=self.unchecked,
            metric=self.metric,
        )
        command = ["dinogen", "launch", str(copy), "--on", "slurm"]
        attempt = self.record.open(run)
        if attempt is None or attempt.step != JOBS:
            attempt = self.record.begin(run, JOBS, command, launch_folder(run.folder))
        try:
            self._write_copy(run)
            num_jobs = launch_slurm(request)
        except (UserError, OSError) as error:
            what = str(error) if isinstance(error, UserError) else unwritable(error)
            self._fail(run, attempt, 0.0, what)
            return
        if num_jobs or steps_left(run, self.metric):
            self._waiting[run.id] = (run, attempt, time.monotonic())
            return
        self.record.end(attempt, 0.0, 0, None)
        self.outcomes[run.id] = Outcome(run, "done before")

    def _look(self) -> int:
        """Find the runs whose jobs have ended; returns their number."""
        before = len(self._waiting)
        for run, attempt, began in list(self._waiting.values()):
            if self._stop.is_set():
                break
            search = self.study.search_of(run)
            try:
                if search is not None and search.watch(run) is not None:
                    self._prune(run, search)
                    continue
                states = ask_states(read_jobs(run.folder)).values()
                if any(state is not None and state.active for state in states):
                    self._quiet.discard(run.id)
                    continue
                rows = job_rows(run.folder)
                done = is_done(run, self.metric, rows)
                if not done and run.id not in self._quiet:
                    # A file system of several nodes may show a job's files late.
                    self._quiet.add(run.id)
                    continue
                took = time.monotonic() - began
                if done:
                    self._done(run, attempt, took)
                else:
                    self._fail(run, attempt, took, jobless(run, self.metric, rows))
            except UserError as error:
                log.warning("%s: %s", run.id, error)  # SLURM or the storage may answer again
        return before - len(self._waiting)

    def _done(self, run: StudyRun, attempt: Attempt, seconds: float) -> None:
        self._waiting.pop(run.id)
        log.info("%s: done", run.id)
        self.record.end(attempt, seconds, 0, None)
        self.outcomes[run.id] = Outcome(run, f"done after {seconds:.0f} s")

    def _fail(self, run: StudyRun, attempt: Attempt, seconds: float, what: str) -> None:
        self._fail_trial(run, what)  # first: if the storage does not answer, the run stays waiting
        self._waiting.pop(run.id, None)
        self._failed.add(run.id)
        self.outcomes[run.id] = Outcome(run, what, 1)
        log.error("%s: %s", run.id, what)
        self.record.end(attempt, seconds, 1, what)

    def _not_tried(self, run: StudyRun) -> Outcome:
        search = self.study.search_of(run)
        if self._settled(run) or (search is not None and self._is_hopeless(search)):
            return super()._not_tried(run)
        what = "its jobs stay queued" if run.id in self._waiting else "not submitted"
        return Outcome(run, what, EXIT_STOPPED)
