"""A folder of configs as one study: each is a run of its own, and none stops the others."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinogen.config import Config, load_config
from dinogen.errors import EXIT_STOPPED, UserError
from dinogen.runs.layout import CONFIG
from launch.local.signals import SignalForwarder
from launch.local.start import build_command, count_processes
from launch.request import Request
from launch.slurm.jobs import read_jobs
from launch.slurm.plan import lacking_data
from launch.slurm.status import Row, job_rows, stage_rows
from launch.slurm.submit import launch_slurm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of one run of a study.

    Attributes:
        config: its file.
        run: its folder.
        what: in words.
        code: 0 if all is well, 75 if it was asked to stop, else of what failed.
    """

    config: Path
    run: Path
    what: str
    code: int = 0

    @property
    def good(self) -> bool:
        """False if somebody has to do something."""
        return self.code == 0


def is_study(folder: Path) -> bool:
    """Whether a folder holds configs; a run holds but its own, ``config.yaml``."""
    return any(path.name != CONFIG for path in folder.glob("*.yaml"))


def study_configs(folder: Path, overrides: Sequence[str] = ()) -> dict[Path, Config]:
    """The configs of a study by their files, in the order of the names.

    Raises:
        UserError: there is none, one of them is wrong, two would write into one folder, or the
            changes name a folder of runs.
    """
    for item in overrides:
        if item.partition("=")[0].strip() == "run":
            raise UserError(
                f"{item}: {folder} is a folder of configs, and each has a run of its own: leave it "
                "out, or give one of the files"
            )
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UserError(f"{folder}: holds no *.yaml: give a config or a folder of configs")
    configs = {path: load_config(path, list(overrides)) for path in files}
    runs: dict[Path, Path] = {}
    for path, config in configs.items():
        first = runs.setdefault(config.run.absolute(), path)
        if first != path:
            raise UserError(f"{path}: run: {config.run} is that of {first} too: give it another")
    return configs


def run_study(requests: Sequence[Request]) -> list[Outcome]:
    """Train one run after the other on this machine; asked to stop, the present one saves.

    Raises:
        UserError: a request that this machine cannot meet.
    """
    num_processes = count_processes(requests[0].num_processes)
    commands = [build_command(request, num_processes) for request in requests]
    process: subprocess.Popen[bytes] | None = None

    def workers() -> list[int]:
        return [process.pid] if process and process.poll() is None else []

    def end(number: signal.Signals) -> None:
        if not workers() or process is None:
            raise SystemExit(128 + number)
        relay.stopping = True  # or the next would begin
        process.terminate()

    relay = SignalForwarder(workers, end)
    relay.install()
    outcomes = []
    for request, (env, command) in zip(requests, commands, strict=True):
        path, run = request.path, request.config.run
        if relay.stopping:
            outcomes.append(Outcome(path, run, "not begun", EXIT_STOPPED))
            continue
        log.info("%s: %s", path, shlex.join(command))
        sys.stdout.flush()
        began = time.monotonic()
        # In a session of its own: Ctrl-C must reach it once, through SignalForwarder.
        process = subprocess.Popen(command, env=os.environ | env, start_new_session=True)
        code = process.wait()
        took = f"after {time.monotonic() - began:.0f} s"
        if code == EXIT_STOPPED:
            relay.stopping = True
            outcomes.append(Outcome(path, run, f"stopped and saved {took}", EXIT_STOPPED))
        elif code and relay.stopping:
            outcomes.append(Outcome(path, run, f"stopped {took}", EXIT_STOPPED))
        elif code:
            outcomes.append(Outcome(path, run, f"failed (exit code {code}) {took}", code))
        else:
            outcomes.append(Outcome(path, run, f"done {took}"))
    return outcomes


def unwritable(error: OSError) -> str:
    """What to say of a run whose files cannot be written: it costs this run alone."""
    return f"{error.filename or 'a file of it'} cannot be written ({error.strerror or error})"


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if all is well, 75 if the study was asked to stop, else 1."""
    if any(one.code == EXIT_STOPPED for one in outcomes):
        return EXIT_STOPPED
    return 0 if all(one.good for one in outcomes) else 1


def submit_study(requests: Sequence[Request]) -> list[Outcome]:
    """Submit each run as a chain of its own; one that cannot be is named, and the others go on.

    Raises:
        UserError: two of them would make the same data of photos at once.
    """
    makers: dict[str, Path] = {}
    for request in requests:
        if request.photos is None or request.config.data.mix:
            continue
        for path in lacking_data(request.config):
            first = makers.setdefault(path, request.path)
            if first != request.path:
                raise UserError(
                    f"{first} and {request.path} would both make {path} at once: pack it first "
                    "(dinogen prepare), or give each a data.path of its own"
                )
    outcomes = []
    for request in requests:
        log.info("%s:", request.path)
        try:
            launch_slurm(request)
            outcomes.append(Outcome(request.path, request.config.run, "submitted"))
        except UserError as error:
            outcomes.append(Outcome(request.path, request.config.run, str(error), error.exit_code))
        except OSError as error:
            outcomes.append(Outcome(request.path, request.config.run, unwritable(error), 1))
    return outcomes


def print_study(requests: Sequence[Request], launcher: Callable[[Request], None]) -> None:
    """What would be done for each run of a study: ``--dry-run``."""
    for request in requests:
        print(f"# {request.path}", flush=True)
        launcher(request)


def study_rows(folder: Path) -> list[tuple[str, Row]]:
    """Where each run of a study is, with its name: jobs where it was submitted, else its stages.

    Raises:
        UserError: a config is wrong, or SLURM does not answer.
    """
    rows: list[tuple[str, Row]] = []
    for path, config in study_configs(folder).items():
        try:
            submitted = bool(read_jobs(config.run).jobs)
        except UserError as error:
            rows.append((path.stem, Row("", "", "damaged", "", str(error), False)))
            submitted = False
        found = job_rows(config.run) if submitted else stage_rows(config)
        rows += [(path.stem, row) for row in found]
    return rows
