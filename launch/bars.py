"""One kind of progress bar for all commands: what, how many, how fast, how long still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Move(Protocol):
    """Moves a bar."""

    def __call__(self, num_done: int, total: int, rate: str | None = None) -> None:
        """Show ``num_done`` of ``total``; ``rate`` stands in place of what is done per second."""


@contextmanager
def progress_bar(what: str, unit: str, show: bool = True) -> Iterator[Move]:
    """A bar on stderr; yields what moves it.

    Args:
        what: stands before the bar.
        unit: of the rate, such as ``photos/s``.
        show: False on ranks that stay silent.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(what, total=None, rate="-")

        def move(num_done: int, total: int, rate: str | None = None) -> None:
            if rate is None:
                speed = bar.tasks[task].speed
                rate = "-" if speed is None else f"{speed:.1f}"
            bar.update(task, completed=num_done, total=total, rate=rate)

        yield move
