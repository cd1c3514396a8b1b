"""Signals that ask a run to stop: a handler sets a flag, the loop saves and leaves."""

from __future__ import annotations

import atexit
import logging
import signal
from collections.abc import Iterator
from types import FrameType
from typing import TypeVar

from dinogen import dist
from dinogen.errors import EXIT_STOPPED, UserError
from shards.errors import FetchError
from shards.fetch import hurry

log = logging.getLogger(__name__)
T = TypeVar("T")


class Stopped(UserError):
    """The run was asked to stop; everything up to now is saved."""

    exit_code = EXIT_STOPPED
    agreed = True


def _pass_over(number: int, frame: FrameType | None) -> None:
    """A signal that comes too late to mean anything."""


class StopFlag:
    """Context in which SIGTERM, SIGUSR1 and SIGINT only set a flag; a second SIGINT interrupts."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopFlag:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

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
        """The next batch; None if this rank was asked to stop: then no shard is worth waiting for.

        Raises:
            FetchError: a shard cannot be had, and nobody asked for a stop.
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
        """Whether any rank was asked to stop; every rank has to call it."""
        return dist.any_rank(self.name is not None)

    def error(self, where: str) -> Stopped:
        """What to raise after everything was saved."""
        return Stopped(
            f"stopped by {self.name or 'another rank'} {where}, all of it saved: run the same "
            "command to go on"
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        # A shard that does not come must not keep this rank from stopping.
        hurry()
