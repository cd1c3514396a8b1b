"""Progress that people watch: a bar on a terminal, and a log line now and then without one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

log = logging.getLogger(__name__)

# Seconds until the first log line, and between two of them.
FIRST, EVERY = 10.0, 30.0
BAR_WIDTH = 5


class LiveLine:
    """One line of progress, kept up to date.

    On a terminal it is a bar that never wraps: parts that do not fit are left out from the end.
    Without one it is logged after 10 s and then every 30 s, by a thread, so also while a step takes
    longer than that. Inside another line that is shown it shows nothing.

    Args:
        title: such as ``stage 8x8``.
        total: at which it is complete.
        parts: what to say, the most important first; called by the thread as well.
        show: False on ranks that stay silent.
        first: seconds until the first log line.
        every: seconds between two of them.
    """

    _shown = threading.Lock()

    def __init__(
        self,
        title: str,
        total: float,
        parts: Callable[[], Sequence[str]],
        show: bool = True,
        first: float = FIRST,
        every: float = EVERY,
    ) -> None:
        self.title, self.parts, self.every = title, parts, every
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.thread: threading.Thread | None = None
        self.show = show and self._shown.acquire(blocking=False)
        if not self.show:
            return
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(BAR_WIDTH),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
            )
            self.task = self.bar.add_task(title, total=total, text="")
            self.bar.start()
            return
        self.closed = threading.Event()
        self.due = time.monotonic() + first
        self.thread = threading.Thread(target=self._log_when_due, name="progress", daemon=True)
        self.thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def move(self, done: float) -> None:
        """Show on a terminal that ``done`` of the total are done."""
        if self.bar is not None:
            taken = len(self.title) + BAR_WIDTH + 2
            text = fitting(self.parts(), self.console.width - taken)
            with suppress(OSError):  # the terminal is gone
                self.bar.update(self.task, completed=done, text=text)

    def say(self) -> None:
        """Log the line now, where there is no terminal."""
        if self.thread is not None:
            self.due = time.monotonic() + self.every
            log.info("%s: %s", self.title, ", ".join(self.parts()))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if not self.show:
            return
        self.show = False
        if self.bar is not None:
            with suppress(OSError):
                self.bar.stop()
        if self.thread is not None:
            self.closed.set()
            self.thread.join()
        self._shown.release()

    def _log_when_due(self) -> None:
        while not self.closed.wait(max(0.0, self.due - time.monotonic())):
            if time.monotonic() >= self.due:
                self.say()


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the first parts as fit into ``width`` columns, and the first in any case."""
    text = ""
    for number, part in enumerate(parts):
        longer = f"{text}, {part}" if number else part
        if number and len(longer) > width:
            break
        text = longer
    return text


def rounded(value: float, num_digits: int) -> str:
    """A number to N significant digits, such as 1,370, and never as 1.37e+03."""
    return f"{float(f'{value:.{num_digits}g}'):,.15g}"


def duration(seconds: float) -> str:
    """``1:02:03``, or ``2 d 3:04:05`` from a day on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"
