"""Runs what is left of a study on this machine; if it is killed, the next call continues."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

from dinogen.config import dump_config
from dinogen.errors import EXIT_STOPPED, UserError
from dinogen.files import write_text
from dinogen.runs.run import Run
from launch.doctor import usable_cores
from launch.local.signals import SignalForwarder
from launch.local.start import build_command, count_processes
from launch.request import Request
from launch.slurm.plan import metric_changes
from launch.study.data import lacking
from launch.study.outcome import Outcome, complaint, unwritable
from launch.study.plan import Study, open_study, present_runs, unmeasured_runs
from launch.study.runs import STEPS, StudyRun, is_trained, steps_left
from launch.study.search import Search
from launch.study.speed import add_speed, lines_wanted, short_run
from launch.study.state import Record, read_record, study_lock
from launch.study.trials import StorageError
from shards.files import Locked, lock

log = logging.getLogger(__name__)
_GIVE_UP_AFTER = 5  # trials of a search that have all failed


class StudyRunner(ABC):
    """Runs what is left of a study; a run that fails does not stop the others.

    Args:
        study: the study.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.metric = study.metric
        self.record: Record = read_record(study)
        self.outcomes: dict[str, Outcome] = {}
        self._failed: set[str] = set()
        self._without_data: set[str] = set()

    def run(self) -> list[Outcome]:
        """Run it; returns the outcome of each run that is known by then.

        Raises:
            UserError: another process is running the study.
        """
        with study_lock(self.study.folder):
            self.record = read_record(self.study)
            self._use(self.study)
            self._work()
            runs, choices = present_runs(self.study, self._settled)
            self.record.best = {n: one.best for n, one in choices.items() if one.best is not None}
            self.record.write()
        return [self._outcome(run) for run in runs]

    def _use(self, study: Study) -> None:
        """Go on with a study as its files say it now."""
        self.study = self.record.study = study
        for search in study.searches:
            search.trials.keep_trying = lambda: not self._stopping

    @property
    @abstractmethod
    def _stopping(self) -> bool:
        """Whether it was asked to stop."""

    @abstractmethod
    def _work(self) -> None:
        """Try each run once, those of the final as soon as they are known."""

    def _outcome(self, run: StudyRun) -> Outcome:
        outcome = self.outcomes.get(run.id) or self._not_tried(run)
        search = self.study.search_of(run)
        if outcome.good or search is None or not search.has_results:
            return outcome
        return replace(outcome, counts=outcome.code == EXIT_STOPPED)

    def _not_tried(self, run: StudyRun) -> Outcome:
        search = self.study.search_of(run)
        if search is not None and search.is_over(run):
            trial = search.trial_of(run)
            if trial.state == "pruned":
                return Outcome(run, f"pruned: {trial.why}")
            if trial.state == "failed":
                return Outcome(run, f"failed before: {trial.why}", 1)
            return Outcome(run, "done before")
        if search is not None and self._is_hopeless(search):
            num = self._num_failed(search)
            return Outcome(run, f"not begun: the first {num} trials have failed", 1)
        if steps_left(run, self.metric):
            return Outcome(run, "not begun", EXIT_STOPPED)
        return Outcome(run, "done before")

    def _settled(self, run: StudyRun) -> bool:
        search = self.study.search_of(run)
        if run.id in self._failed or (search is not None and search.is_over(run)):
            return True
        return not steps_left(run, self.metric)

    def _is_hopeless(self, search: Search) -> bool:
        """Whether the first trials have all failed, so that no further one is begun."""
        num_needed = min(_GIVE_UP_AFTER, search.settings.num)
        return self._num_failed(search) >= num_needed and not search.has_results

    def _num_failed(self, search: Search) -> int:
        """How many of its trials have failed in this call."""
        bad = (one for one in self.outcomes.values() if one.code not in (0, EXIT_STOPPED))
        return sum(search.owns(one.run) for one in bad)

    def _ask(self, search: Search) -> StudyRun | None:
        """A further trial; None if there are enough, or it could not work either."""
        stuck = any(run.id in self._without_data for run in search.runs)
        return None if stuck or self._is_hopeless(search) else search.ask()

    def _fail_trial(self, run: StudyRun, why: str) -> None:
        if (search := self.study.search_of(run)) is not None:
            search.fail(run, why)

    def _no_length(self, run: StudyRun) -> str | None:
        """Why it is not known for how many images a run trains; None if it is."""
        if run.budget is None or not run.unmeasured:
            return None
        return (
            f"it is not measured yet how many images {run.budget.minutes:g} minutes are: dinogen "
            f"study measure {self.study.path}, on a machine of the kind that it trains on"
        )

    def _settle(self) -> None:
        """Record the trials that are done, for those that follow depend on them."""
        for search in self.study.searches:
            search.settle()

    def _write_copy(self, run: StudyRun) -> Path:
        """The config that the run is started with."""
        copy = self.study.copy_of(run)
        write_text(copy, dump_config(run.config))
        return copy


_POLL = 0.3  # seconds between two looks at what a trial measures


class LocalStudy(StudyRunner):
    """A study on this machine, one command after the other; runs that failed before come last.

    Asked to stop, the present command saves, and no other begins.

    Args:
        study: the study.
        num_processes: of a training and an evaluation; None for one per GPU.
        max_restarts: how often failed processes of a training are started again.
    """

    def __init__(
        self, study: Study, num_processes: int | None = None, max_restarts: int | None = None
    ) -> None:
        super().__init__(study)
        self.num_processes = count_processes(num_processes)
        self.max_restarts = max_restarts
        self._process: subprocess.Popen[bytes] | None = None
        self._speedless: dict[str, str] = {}  # why a speed could not be measured, by budget
        self._signals = SignalForwarder(self._workers, self._end)

    @property
    def _stopping(self) -> bool:
        return self._signals.stopping

    def measure(self) -> list[Outcome]:
        """Measure the speed of each config whose length is in minutes, and train nothing.

        Returns:
            The outcome of each config that was not measured before.

        Raises:
            UserError: another process is running the study.
        """
        with study_lock(self.study.folder):
            self.record = read_record(self.study)
            self._signals.install()
            return self._measure_speeds()

    def _measure_speeds(self) -> list[Outcome]:
        found = []
        for run in unmeasured_runs(self.study):
            run = replace(run, id=run.budget_key)  # it stands for all runs of its config
            if self._signals.stopping:
                found.append(Outcome(run, "stopped", EXIT_STOPPED))
                continue
            why = lacking(self.study, run)
            try:
                outcome = Outcome(run, why, 1) if why else self._measure_speed(run)
            except (UserError, OSError) as error:
                outcome = Outcome(run, str(error), 1)
            if not outcome.good:
                log.error("%s: its speed is not measured: %s", run.id, outcome.what)
                self._speedless[run.budget_key] = f"its speed is not measured: {outcome.what}"
            found.append(outcome)
        if found:
            self._use(open_study(self.study.path))  # with the lengths that are known now
        return found

    def _measure_speed(self, run: StudyRun) -> Outcome:
        """Measure one config by a short run that is thrown away, and write it down."""
        short = short_run(self.study, run)
        if (failed := self._train_short(run, short)) is not None:
            return failed
        if (num_lines := lines_wanted(short)) is not None:
            short = short_run(self.study, run, num_lines)
            if (failed := self._train_short(run, short)) is not None:
                return failed
        words = add_speed(self.study, short, run)
        shutil.rmtree(short.folder)
        self.study.copy_of(short).unlink()
        log.info("%s: %s", run.id, words)
        return Outcome(run, words)

    def _train_short(self, run: StudyRun, short: StudyRun) -> Outcome | None:
        """Train a short run from its beginning; the outcome of ``run`` if that did not work."""
        shutil.rmtree(short.folder, ignore_errors=True)
        self._write_copy(short)
        code, problem = self._step(short, "train")
        if self._signals.stopping and code:
            return Outcome(run, "stopped", EXIT_STOPPED)
        return Outcome(run, problem, 1) if problem else None

    def _no_length(self, run: StudyRun) -> str | None:
        why = super()._no_length(run)
        return why and self._speedless.get(run.budget_key, why)

    def _work(self) -> None:
        self._signals.install()
        self._measure_speeds()
        while not self._signals.stopping and (run := self._next()) is not None:
            try:
                self.outcomes[run.id] = self._try(run)
            except StorageError:
                raise  # it says nothing about the run, which the next call goes on with
            except (UserError, OSError) as error:  # of its folder: the other runs go on
                log.error("%s: %s", run.id, error)
                self._failed.add(run.id)
                self.outcomes[run.id] = Outcome(run, str(error), 1)
            outcome = self.outcomes[run.id]
            if outcome.code not in (0, EXIT_STOPPED) and run.id not in self._without_data:
                self._fail_trial(run, outcome.what)

    def _next(self) -> StudyRun | None:
        """The next run that was not tried yet; the final's follow when its tracks have ended."""
        self._settle()
        runs, _ = present_runs(self.study, self._settled)
        left = [run for run in runs if run.id not in self.outcomes and not self._settled(run)]
        for search in filter(self._is_hopeless, self.study.searches):
            left = [run for run in left if not search.owns(run)]
        fresh = [run for run in left if self.record.failed(run) is None]
        if fresh:
            return fresh[0]
        for search in self.study.searches:
            if (run := self._ask(search)) is not None:
                return run
        return left[0] if left else None

    def _try(self, run: StudyRun) -> Outcome:
        """Do the steps of a run that are left; a run that is not trained is not measured."""
        if why := lacking(self.study, run):
            log.warning("%s: %s", run.id, why)
            self._without_data.add(run.id)
            return Outcome(run, why, 1)
        if why := self._no_length(run):
            self._failed.add(run.id)
            return Outcome(run, why, 1)
        try:
            self._write_copy(run)
            self._wait_for_folder(run)
        except OSError as error:
            log.error("%s: %s", run.id, unwritable(error))
            self._failed.add(run.id)
            return Outcome(run, unwritable(error), 1)
        began = time.monotonic()
        problems: list[str] = []
        for step in STEPS:
            if self._signals.stopping:
                return Outcome(run, "stopped", EXIT_STOPPED)
            if step not in steps_left(run, self.metric):
                continue
            code, problem = self._step(run, step)
            if (why := self._pruned(run)) is not None:
                return Outcome(run, f"pruned: {why}")
            if self._signals.stopping and code:
                what = "stopped and saved" if code == EXIT_STOPPED else f"stopped in {step}"
                return Outcome(run, what, EXIT_STOPPED)
            if problem:
                problems.append(problem)
            if not is_trained(run):
                break
        if problems:
            self._failed.add(run.id)
            return Outcome(run, "; ".join(problems), 1)
        return Outcome(run, f"done after {time.monotonic() - began:.0f} s")

    def _step(self, run: StudyRun, step: str) -> tuple[int, str | None]:
        """Run the command of a step; returns its exit code, and what went wrong in words."""
        env, command = self._command(run, step)
        path = self.study.log_of(run)
        log.info("%s: %s, log: %s", run.id, step, path)
        attempt = self.record.begin(run, step, command, path)
        began = time.monotonic()
        self._process = start(command, env, path)
        pruned = self._wait(run, step)
        code = self._process.wait()
        self._signals.stopping |= code == EXIT_STOPPED and not pruned
        stopped = self._signals.stopping and code
        what = None if stopped or pruned else complaint(run, step, self.metric, code, path)
        self.record.end(attempt, time.monotonic() - began, code, what)
        if what:
            log.error("%s: %s", run.id, what)
        return code, what

    def _wait(self, run: StudyRun, step: str) -> bool:
        """Wait for the command; whether its trial is pruned, for which training saves and stops."""
        search = self.study.search_of(run)
        if search is None or step != "train":
            return False
        assert self._process is not None
        asked, known = False, True
        while self._process.poll() is None:
            try:
                if not asked and (why := search.watch(run)) is not None:
                    log.info("%s: pruned: %s: it saves and stops", run.id, why)
                    asked = True
                    self._process.terminate()
                known = True
            except UserError as error:
                if known:
                    log.warning("%s: %s", run.id, error)  # the storage may answer again
                known = False
            time.sleep(_POLL)
        # it may have trained further than the point that decides
        return search.watch(run) is not None

    def _pruned(self, run: StudyRun) -> str | None:
        trial = self.study.trial_of(run)
        return trial.why if trial is not None and trial.state == "pruned" else None

    def _command(self, run: StudyRun, step: str) -> tuple[dict[str, str], list[str]]:
        """Variables and command of a step; torchrun only where it is needed."""
        copy = self.study.copy_of(run)
        launcher = self.num_processes > 1 or run.config.engine.name == "deepspeed"
        if step == "train" and (launcher or self.max_restarts):
            restarts = self.max_restarts
            request = Request(copy, (), run.config, stages=run.only, max_restarts=restarts)
            return build_command(request, self.num_processes)
        words = [step, str(copy if step == "train" else run.folder)]
        if step == "train" and run.only is not None:
            words += ["--stage", run.only]
        words += metric_changes(run.config) if step == "evaluate" else []
        num = self.num_processes if step == "evaluate" else 1
        env = {}
        if "OMP_NUM_THREADS" not in os.environ:
            env["OMP_NUM_THREADS"] = str(max(1, usable_cores() // num))
        if num == 1:
            return env, [sys.executable, "-m", "launch.cli", *words]
        torchrun = [sys.executable, "-m", "launch.local.torchrun", "--standalone"]
        return env, [*torchrun, "--nproc-per-node", str(num), "-m", "launch.cli", *words]

    def _wait_for_folder(self, run: StudyRun) -> None:
        """Wait while another process trains there, such as one that outlived a killed study."""
        told = False
        run.folder.mkdir(parents=True, exist_ok=True)
        while not self._signals.stopping:
            path = Run(run.folder).lock_file
            with path.open("w") as file:
                if lock(file, path, shared=False, wait=False) is not Locked.BUSY:
                    return
            if not told:
                log.warning("%s: another process trains there: waiting for it", run.folder)
            told = True
            time.sleep(0.5)

    def _workers(self) -> list[int]:
        process = self._process
        return [process.pid] if process is not None and process.poll() is None else []

    def _end(self, number: signal.Signals) -> None:
        """End the command: it cannot save yet, or the signal came again."""
        self._signals.stopping = True
        if self._process is not None:
            self._process.terminate()


def start(command: list[str], env: dict[str, str], path: Path) -> subprocess.Popen[bytes]:
    """Start a command whose output is appended to a log.

    It gets a session of its own: Ctrl-C must reach it once, through SignalForwarder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')}: {shlex.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
