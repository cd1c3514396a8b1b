"""Runs a study on this machine, one command after the other; killed at any moment, it goes on."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
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
from launch.study.folder import Outcome, unwritable
from launch.study.messages import complaint
from launch.study.plan import STEPS, Study, StudyRun, is_trained, lacking, steps_left
from launch.study.selection import present_runs
from launch.study.state import Record, read_record, study_lock
from shards.lock import Locked, lock

log = logging.getLogger(__name__)


class LocalStudy:
    """Does what is left of a study. Each run is tried once; what failed before comes last.

    Args:
        study: the study.
        num_processes: of a training and an evaluation; None for one per GPU.
    """

    def __init__(self, study: Study, num_processes: int | None) -> None:
        self.study = study
        self.metric = study.plan.metric
        self.num_processes = count_processes(num_processes)
        self.record: Record = read_record(study)
        self.outcomes: dict[str, Outcome] = {}
        self._failed: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._relay = SignalForwarder(self._workers, self._end)

    def run(self) -> list[Outcome]:
        """Do it, and say what became of each run that is known by then.

        Raises:
            UserError: another one is at work in the study's folder.
        """
        with study_lock(self.study.folder):
            self.record = read_record(self.study)
            self._relay.install()
            while not self._relay.stopping and (run := self._next()) is not None:
                try:
                    self.outcomes[run.id] = self._try(run)
                except (UserError, OSError) as error:  # its folder, which is no other run's fault
                    log.error("%s: %s", run.id, error)
                    self._failed.add(run.id)
                    self.outcomes[run.id] = Outcome(run.source, run.folder, str(error), 1)
            runs, choices = present_runs(self.study, self._settled)
            self.record.best = {n: one.best for n, one in choices.items() if one.best is not None}
            self.record.write()
        return [self.outcomes.get(run.id) or self._untouched(run) for run in runs]

    def _next(self) -> StudyRun | None:
        """The next run that was not tried yet; the final comes when its tracks are settled."""
        runs, _ = present_runs(self.study, self._settled)
        left = [run for run in runs if run.id not in self.outcomes and steps_left(run, self.metric)]
        left.sort(key=lambda run: self.record.failed(run) is not None)
        return left[0] if left else None

    def _settled(self, run: StudyRun) -> bool:
        return run.id in self._failed or not steps_left(run, self.metric)

    def _untouched(self, run: StudyRun) -> Outcome:
        if steps_left(run, self.metric):
            return Outcome(run.source, run.folder, "not begun", EXIT_STOPPED)
        return Outcome(run.source, run.folder, "done before")

    def _try(self, run: StudyRun) -> Outcome:
        """All steps of a run that are not done; without a training there is nothing to measure."""
        if why := lacking(run):
            log.warning("%s: %s", run.id, why)
            return Outcome(run.source, run.folder, why, 1)
        try:
            write_text(self.study.copy_of(run), dump_config(run.config))
            self._wait_for_folder(run)
        except OSError as error:
            log.error("%s: %s", run.id, unwritable(error))
            self._failed.add(run.id)
            return Outcome(run.source, run.folder, unwritable(error), 1)
        began = time.monotonic()
        problems: list[str] = []
        for step in STEPS:
            if self._relay.stopping:
                return Outcome(run.source, run.folder, "stopped", EXIT_STOPPED)
            if step not in steps_left(run, self.metric):
                continue
            code, problem = self._step(run, step)
            if self._relay.stopping and code:
                what = "stopped and saved" if code == EXIT_STOPPED else f"stopped in {step}"
                return Outcome(run.source, run.folder, what, EXIT_STOPPED)
            if problem:
                problems.append(problem)
            if not is_trained(run, self.metric):
                break
        if problems:
            self._failed.add(run.id)
            return Outcome(run.source, run.folder, "; ".join(problems), 1)
        return Outcome(run.source, run.folder, f"done after {time.monotonic() - began:.0f} s")

    def _step(self, run: StudyRun, step: str) -> tuple[int, str | None]:
        """Give the command of a step; its exit code, and what went wrong in words."""
        env, command = self._command(run, step)
        path = self.study.log_of(run)
        log.info("%s: %s, log: %s", run.id, step, path)
        attempt = self.record.begin(run, step, command, path)
        began = time.monotonic()
        self._process = start(command, env, path)
        code = self._process.wait()
        self._relay.stopping |= code == EXIT_STOPPED
        stopped = self._relay.stopping and code
        what = None if stopped else complaint(run, step, self.metric, code, path)
        self.record.end(attempt, time.monotonic() - began, code, what)
        if what:
            log.error("%s: %s", run.id, what)
        return code, what

    def _command(self, run: StudyRun, step: str) -> tuple[dict[str, str], list[str]]:
        """Variables and command of a step; torchrun only where there are several processes."""
        copy = self.study.copy_of(run)
        several = self.num_processes > 1
        if step == "train" and (several or run.config.engine.name == "deepspeed"):
            return build_command(Request(copy, (), run.config), self.num_processes)
        words = [step, str(copy if step == "train" else run.folder)]
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
        """Wait while somebody trains there: it may have outlived a study that was killed."""
        told = False
        run.folder.mkdir(parents=True, exist_ok=True)
        while not self._relay.stopping:
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
        """Asked to stop while nothing runs that could save, or asked twice."""
        self._relay.stopping = True
        if self._process is not None:
            self._process.terminate()


def start(command: list[str], env: dict[str, str], path: Path) -> subprocess.Popen[bytes]:
    """Start a command whose output is added to a log.

    In a session of its own: Ctrl-C must reach it once, through SignalForwarder.
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
