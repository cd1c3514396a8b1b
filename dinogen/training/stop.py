"""Signals that stop a run: a handler sets a flag, ranks agree on a last step, the loop saves."""

from __future__ import annotations

import atexit
import itertools
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Generic, TypeVar

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

    def agreed(self) -> bool:
        """Whether any rank has to stop; every rank has to call it, between two stages."""
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


# Steps by which one rank can be further than another. A rank that has begun step n has read what
# the device computed in step n - 2, to which every rank has contributed.
_MOST_APART = 2
_EVERY = 0.2  # seconds between two polls of the store
_episodes = itertools.count()


class Steps(Generic[T]):
    """The batches of a stage, until its ranks stop, all of them after the same step; a context.

    A rank alone stops at once. Several ask each other through the store, in a thread, so that a
    step costs nothing for it: each says which step it has begun, and begins no other until rank 0
    has named the last one, which is the furthest that any rank has begun. A rank holds the batches
    that it may still need then, for its shards may be out of reach.

    Args:
        stop: set by signals.
        batches: of this rank.
        num: of the stage's steps that are left; no batch beyond them is read.
    """

    def __init__(self, stop: StopFlag, batches: Iterator[T], num: int) -> None:
        self._stop = stop
        self._batches = batches
        self._num_left = num
        self._ahead: deque[T] = deque()
        self._begun = 0
        self._asked = False
        self._last: int | None = None
        self._changed = threading.Condition()
        self._store = process_group.control_store()
        self._prefix = f"stop/{next(_episodes)}"
        self._left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="stop", daemon=True)

    def __enter__(self) -> Steps[T]:
        if self._store is not None:
            self._watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        if self._store is not None:
            self._watcher.join()

    def next(self) -> T | None:
        """The next step's batch; None if this rank has to stop before it.

        Raises:
            FetchError: a shard is not available, and this rank was not asked to stop.
        """
        if self._store is None and self._stop.name is not None:
            return None
        error = self._fill()
        if error is not None:
            if not self._asked and self._stop.name is None:
                raise error
            log.warning("%s", error)
        if self._store is None:
            return self._ahead.popleft() if self._ahead else None
        if not self._may_begin(error is not None):
            return None
        # It may have been asked before it had read what others have begun.
        return self._ahead.popleft() if self._ahead else next(self._batches)

    def _fill(self) -> FetchError | None:
        """Read the next batch, and those that another rank may make necessary.

        Returns:
            Why they are not all there.
        """
        wanted = 1 if self._store is None else 1 + _MOST_APART
        while len(self._ahead) < wanted and self._num_left and not self._asked:
            try:
                self._ahead.append(next(self._batches))
            except FetchError as error:
                return error
            self._num_left -= 1
        return None

    def _may_begin(self, must_stop: bool) -> bool:
        """Whether this rank takes part in the next step; waits until the last one is known."""
        with self._changed:
            if must_stop or self._stop.name is not None:
                self._answer()
            while self._asked and self._last is None:
                self._changed.wait()
            if self._last is not None and self._begun >= self._last:
                return False
            self._begun += 1
            return True

    def _answer(self) -> None:
        """Say once how many steps this rank has begun, which is a request for the others."""
        if not self._asked and self._store is not None:
            self._store.set(f"{self._prefix}/{process_group.rank()}", str(self._begun))
            self._store.set(self._prefix, "")
            self._asked = True

    def _watch(self) -> None:
        """Thread: answer for this rank, whatever it waits for, and find out the last step."""
        assert self._store is not None
        ranks = [f"{self._prefix}/{rank}" for rank in range(process_group.world_size())]
        last = f"{self._prefix}/last"
        with suppress(RuntimeError):  # the store went down with its rank: others end this one
            while not self._left.wait(_EVERY):
                if not self._asked:
                    if self._stop.name is None and not self._store.check([self._prefix]):
                        continue
                    with self._changed:
                        self._answer()
                    hurry()  # a shard that does not come must not keep the others waiting
                if process_group.is_main() and self._store.check(ranks):
                    self._store.set(last, str(max(int(self._store.get(rank)) for rank in ranks)))
                if self._store.check([last]):
                    with self._changed:
                        self._last = int(self._store.get(last))
                        self._changed.notify_all()
                    return
