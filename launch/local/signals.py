"""Forwards signals that ask for a stop to worker processes, as soon as they can handle them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

# Here and not where it is used: a second signal would find it half imported by the first one's
# handler.
import psutil

IGNORABLE = (signal.SIGHUP, signal.SIGQUIT)
_EVERY = 0.2  # seconds between two checks for workers that can handle the signal
_SAME = 5.0  # seconds in which further signals mean the same as the one before
_MEANT = 3  # number of TERM or INT after which the launcher no longer waits for its workers


class SignalForwarder:
    """Signal handlers of a launcher whose workers save and exit when they are asked to.

    USR1 is kept until there are workers that catch it, and is also sent to those that start later:
    it would kill a worker that is still starting. TERM, INT, HUP and QUIT are forwarded as TERM if
    every worker catches it; otherwise there is nothing to save, and ``end`` is called. HUP and QUIT
    stay ignored, here and in the workers, if they were ignored at the start (``nohup``).

    Further signals while the workers save do no harm: a closed terminal sends HUP several times,
    and people press Ctrl-C twice. A later INT is forwarded as INT, which interrupts workers that
    are not saving. Only the third TERM or INT, with seconds between them, calls ``end``, which may
    kill them.

    Args:
        workers: process ids of the workers that exist now.
        end: ends the launcher and its workers; called in the main thread with the signal.
    """

    def __init__(
        self, workers: Callable[[], list[int]], end: Callable[[signal.Signals], None]
    ) -> None:
        self.stopping = False
        self._num_asked = 0
        self._counted = -_SAME
        self._workers = workers
        self._end = end
        self._wanted: set[signal.Signals] = set()
        self._given: set[tuple[int, signal.Signals]] = set()
        self._thread: threading.Thread | None = None

    def install(self) -> None:
        """Handle USR1, TERM and INT, and HUP and QUIT unless ignored; main thread only."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        for number in IGNORABLE:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            workers = self._workers()
            asked = signal.SIGTERM in self._wanted
            now = time.monotonic()
            if not asked or (number not in IGNORABLE and now - self._counted > _SAME):
                self._num_asked, self._counted = self._num_asked + 1, now
            # A worker that does not catch it has nothing to save.
            ready = bool(workers) and all(catches(pid, signal.SIGTERM) for pid in workers)
            if self._num_asked >= _MEANT or not (asked or ready):
                self._end(signal.Signals(number))
                return
            if asked and number == signal.SIGINT:
                for pid in workers:
                    _kill(pid, signal.SIGINT)
        self.stopping = True
        # Python catches INT from its first moment on, so only TERM tells who is ready to save.
        self._wanted.add(signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM)
        if self._thread is None:
            self._thread = threading.Thread(target=self._give, name="forward", daemon=True)
            self._thread.start()

    def _give(self) -> None:
        pause = threading.Event()
        while not pause.wait(_EVERY):
            for pid in self._workers():
                for number in tuple(self._wanted):
                    if (pid, number) not in self._given and catches(pid, number):
                        self._given.add((pid, number))
                        _kill(pid, number)


def children(pid: int) -> list[int]:
    """Process ids of the children of a process; none if it is gone."""
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own; assumed on systems without /proc."""
    if not Path("/proc/self").exists():
        return True
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        # Between fork and exec a child shows its parent's handlers, but the signal would kill it.
        if _command_line(pid) == _command_line(int(facts["PPid"])):
            return False
    except OSError:
        return False
    return bool(int(facts["SigCgt"], 16) >> (number - 1) & 1)


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has just ended
