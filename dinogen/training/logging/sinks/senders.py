"""The processes that send a run to W&B, MLflow or Trackio, as the process that trains sees them."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from dinogen import hub
from dinogen.config import Config
from dinogen.runs.run import Run, Stage
from dinogen.training.logging.sinks.registry import sent_names
from dinogen.training.logging.sinks.sender import TOLD
from dinogen.training.logging.sinks.tensorboard import write_summary
from dinogen.training.stop import StopFlag, Stopped

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
    raises, and nothing waits but the end of the block. A signal ends that wait, and nothing else.

    Args:
        stop: of the run; after a signal there is no time for a long wait.
    """

    def __init__(self, stop: StopFlag | None = None) -> None:
        self.stop = stop
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.readers: list[threading.Thread] = []
        self.lost: set[str] = set()
        self.ended = False
        self.asked = False  # by a signal to wait no longer

    def start(self, config: Config, names: Sequence[str] | None = None) -> None:
        """Begin to send a run, whose config.yaml is written.

        Args:
            config: of the run.
            names: of the sinks; None for all that ``logging`` names.
        """
        for name in sent_names(config) if names is None else names:
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
            status = "stopped" if issubclass(kind, Stopped) else "failed"
        for process in self.processes.values():
            assert process.stdin is not None
            try:
                process.stdin.write(f"{status}\n".encode())
                process.stdin.close()
            except OSError:
                pass  # it has ended already, which its exit code tells
        signalled = self.stop is not None and self.stop.name is not None
        seconds = WAIT_SECONDS["stopped" if signalled else status]
        deadline = time.monotonic() + seconds
        with _signals_to(self._ask):
            self._wait(time.monotonic() + _PATIENCE_SECONDS)
            if (late := self._running()) and not self.asked:
                log.info("logging: waiting up to %g s for %s (Ctrl-C: no longer)", seconds, late)
                self._wait(deadline)
            for name, process in self.processes.items():
                if process.poll() not in (0, TOLD) and name not in self.lost:
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
        if not self.ended and self.processes[name].wait() != TOLD:
            self.lost.add(name)
            log.warning(
                "logging: %s: NOTHING MORE IS SENT: its process was ended: %s", name, _REMEDY
            )

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Signal handler of the wait: the run has ended, and how stays as it is."""
        self.asked = True

    def _running(self) -> str:
        """Names of the processes that have not ended."""
        return ", ".join(name for name, one in self.processes.items() if one.poll() is None)

    def _wait(self, deadline: float) -> None:
        while self._running() and time.monotonic() < deadline and not self.asked:
            time.sleep(0.05)


@contextmanager
def _signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Context in which a handler takes the signals that stop a run, unless they are ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        found = {number: signal.getsignal(number) for number in StopFlag.SIGNALS}
        before = {number: one for number, one in found.items() if one not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


def show_results(stage: Stage) -> None:
    """Show in all sinks what has been measured or drawn of a finished stage since.

    Only training begins to send a run: the config of a run from elsewhere may name any server, and
    would get there with the logins of the user who measures it.

    Raises:
        OSError: the file for TensorBoard cannot be written.
    """
    write_summary(stage)
    if stage.result is None or not stage.run.has_config:
        return
    names = sent_names(stage.run.config)
    sent = [name for name in names if _sent_by_training(stage.run, name)]
    for name in names:
        if name not in sent:
            log.info("logging: %s: gets nothing: no training of this run has sent to it", name)
    with Senders() as senders:
        senders.start(stage.run.config, sent)


def _sent_by_training(run: Run, name: str) -> bool:
    """Whether a run has a record of its own of what was sent, and is none from the hub."""
    record = run.sent_folder / f"{name}.json"
    return record.is_file() and not any(
        hub.in_cache(one) for one in (run.path, run.config_file, record)
    )
