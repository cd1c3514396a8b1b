"""Signals that stop a run: a handler sets a flag, the loop saves and leaves."""

from __future__ import annotations

import atexit
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from dinogen.distributed import process_group
from dinogen.errors import EXIT_STOPPED, UserError
from shards.errors import FetchError
from shards.remote.download import hurry

log = logging.getLogger(__name__)
T = TypeVar("T")
_SAME = 5.0  # seconds in which further signals mean the same as the first


class Stopped(UserError):
    """The run was stopped by a signal; everything up to now is saved."""

    exit_code = EXIT_STOPPED
    agreed = True


def _pass_over(number: int, frame: FrameType | None) -> None:
    """A signal that comes too late to have an effect."""


class StopFlag:
    """Context in which stop signals only set a flag.

    SIGHUP (the terminal is gone) and SIGQUIT stay ignored where they were ignored at the start, as
    ``nohup`` requires. A SIGINT that comes some seconds after the first signal interrupts at once,
    unless a checkpoint is being saved: who presses Ctrl-C twice in a row loses nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    IGNORABLE = (signal.SIGHUP, signal.SIGQUIT)

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        self._saving = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopFlag:
        for number in self.SIGNALS:
            if number in self.IGNORABLE and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Context in which no signal interrupts: what was learnt is on its way to disk."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            if number == signal.SIGUSR1 and handler == signal.SIG_DFL:
                # A job's time may run out while a finished run leaves: by default that would kill
                # it, and a finished stage would count as failed. Ignored only at the very end,
                # when Python has no handlers any more: whatever is started before would inherit
                # it, and a shell cannot trap what it was started to ignore.
                handler = _pass_over
                atexit.register(signal.signal, number, signal.SIG_IGN)
            signal.signal(number, handler)  # type: ignore[arg-type]
        hurry(False)

    def next(self, batches: Iterator[T]) -> T | None:
        """The next batch; None if this rank has to stop: then no shard is worth waiting for.

        Raises:
            FetchError: a shard is not available, and no stop was requested.
        """
        if self.name is not None:
            return None
        try:
            return next(batches)
        except FetchError as error:
            if self.name is None:
                raise
            log.warning("%s", error)
            return None

    def agreed(self) -> bool:
        """Whether any rank has to stop; every rank has to call it."""
        return process_group.any_rank(self.name is not None)

    def error(self, where: str) -> Stopped:
        """What to raise after everything was saved."""
        return Stopped(
            f"stopped by {self.name or 'another rank'} {where}, all of it saved: run the same "
            "command to go on"
        )

    @property
    def _old(self) -> bool:
        return time.monotonic() - self._since > _SAME

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and not self._saving and self._old:
            raise KeyboardInterrupt
        # A shard that does not come must not keep this rank from stopping.
        hurry()
