"""The processes that send a run to W&B, MLflow or Trackio, as the process that trains sees them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from dinogen.config import Config
from dinogen.runs.run import Run, Stage
from dinogen.training.logging.sinks.registry import sent_names
from dinogen.training.logging.sinks.tensorboard import write_summary

log = logging.getLogger(__name__)

# where dinogen is imported from, also if that is the current folder
_ROOT = str(Path(__file__).parents[4])

_REMEDY = "the same command, or dinogen evaluate, sends the rest"
# after which the log says that it waits
_PATIENCE_SECONDS = 3.0
# How long a run that has ended waits for what is still to be sent.
WAIT_SECONDS = {"done": 120.0, "stopped": 30.0, "failed": 30.0}


class Senders:
    """One process per sink that is sent to, from :meth:`start` to the end of the ``with`` block.

    They end with this process, however it ends. Where one fails, the log says so; nothing here
    raises, and nothing waits but the end of the block.

    Args:
        good_ends: exceptions after which the run goes on later.
    """

    def __init__(self, *good_ends: type[BaseException]) -> None:
        self.good_ends = good_ends
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.readers: list[threading.Thread] = []
        self.lost: set[str] = set()
        self.ended = False

    def start(self, config: Config) -> None:
        """Begin to send a run, whose config.yaml is written."""
        for name in sent_names(config):
            command = [sys.executable, "-m", "dinogen.training.logging.sinks.sender"]
            command += [str(Run.of(config).path), name, str(os.getpid())]
            path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": path},
                    # A Ctrl-C is for the run, which then says how it ended.
                    start_new_session=True,
                )
            except OSError as error:
                log.warning("logging: %s: NOTHING IS SENT: no process for it: %s", name, error)
                continue
            self.processes[name] = process
            assert process.stdout is not None
            reader = threading.Thread(target=self._read, args=(name, process.stdout), daemon=True)
            reader.start()
            self.readers.append(reader)

    def __enter__(self) -> Senders:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.ended = True
        status = "done"
        if kind is not None:
            status = "stopped" if issubclass(kind, self.good_ends) else "failed"
        for process in self.processes.values():
            assert process.stdin is not None
            try:
                process.stdin.write(f"{status}\n".encode())
                process.stdin.close()
            except OSError:
                pass  # it has ended already, which its exit code tells
        deadline = time.monotonic() + WAIT_SECONDS[status]
        try:
            self._wait(time.monotonic() + _PATIENCE_SECONDS)
            if late := self._running():
                seconds = WAIT_SECONDS[status]
                log.info("logging: waiting up to %g s for %s (Ctrl-C: no longer)", seconds, late)
                self._wait(deadline)
        except KeyboardInterrupt:
            pass  # of this wait alone: the run has ended
        for name, process in self.processes.items():
            code = process.poll()
            if code not in (0, 1) and name not in self.lost:  # 1: it has said what is missing
                log.warning("logging: %s: NOT EVERYTHING WAS SENT: %s", name, _REMEDY)
            process.kill()
            process.wait()
        for reader in self.readers:
            reader.join(1.0)

    def _read(self, name: str, messages: IO[bytes]) -> None:
        """Log what a sender says, and if it is gone while the run goes on."""
        for line in messages:
            try:
                message = json.loads(line)
                level, text = message["level"], message["text"]
            except (ValueError, KeyError, TypeError):
                level, text = "warning", line.decode(errors="replace").strip()
            log.log(logging.getLevelNamesMapping()[level.upper()], "logging: %s", text)
        if not self.ended:
            self.lost.add(name)
            log.warning(
                "logging: %s: NOTHING MORE IS SENT: its process was ended: %s", name, _REMEDY
            )

    def _running(self) -> str:
        """Names of the processes that have not ended."""
        return ", ".join(name for name, one in self.processes.items() if one.poll() is None)

    def _wait(self, deadline: float) -> None:
        while self._running() and time.monotonic() < deadline:
            time.sleep(0.05)


def show_results(stage: Stage) -> None:
    """Show in all sinks what has been measured or drawn of a finished stage since.

    Raises:
        OSError: the file for TensorBoard cannot be written.
    """
    write_summary(stage)
    if stage.result is not None and stage.run.has_config:
        with Senders() as senders:
            senders.start(stage.run.config)
