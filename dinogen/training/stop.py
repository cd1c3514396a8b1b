"""Signals that ask a run to stop: a handler sets a flag, the loop saves and leaves."""

from __future__ import annotations

import signal
from types import FrameType

from dinogen import dist
from dinogen.errors import UserError
from shards.fetch import hurry

# EX_TEMPFAIL: not an error, run the same command again to go on
EXIT_STOPPED = 75


class Stopped(UserError):
    """The run was asked to stop; everything up to now is saved."""

    exit_code = EXIT_STOPPED
    agreed = True


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
            signal.signal(number, handler)  # type: ignore[arg-type]
        hurry(False)

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
