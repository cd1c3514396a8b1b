"""What the command line shows: log messages, plain lines, progress bars."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.logging import RichHandler


def setup_logging(quiet: bool = False) -> None:
    """Show dinogen's messages on stderr; only errors if ``quiet`` (ranks other than 0)."""
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    else:
        # rich would break lines at 80 columns: a job's log has to stay easy to search.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    level = logging.ERROR if quiet else logging.INFO
    for name in ("dinogen", "shards", "launch"):
        logging.getLogger(name).setLevel(level)


def say(text: str, *, err: bool = False) -> None:
    """Print a line; a closed terminal or pipe is no error."""
    with suppress(OSError):
        print(text, file=sys.stderr if err else sys.stdout, flush=True)


@dataclass(frozen=True)
class Line:
    """One line of a table of runs or jobs.

    Attributes:
        cells: under the heads.
        why: reasons and remedies; they stand below the line.
        good: False if the user has to act.
    """

    cells: Sequence[str]
    why: str = ""
    good: bool = True


def print_lines(title: str, heads: Sequence[str], lines: Iterable[Line]) -> None:
    """Print a table on stdout that loses nothing in a narrow terminal.

    A reason is a sentence, often with a command to paste: in a column it would be cut in pieces.
    """
    lines = list(lines)
    columns = zip(heads, *(line.cells for line in lines), strict=True)
    widths = [max(map(len, column)) for column in columns]

    def aligned(cells: Sequence[str]) -> str:
        return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(title, style="italic")
    console.print(aligned(heads).rstrip(), style="bold")
    for line in lines:
        style = None if line.good else "red"
        console.print(aligned(line.cells).rstrip(), style=style)
        if line.why:
            console.print(textwrap.indent(line.why, "    "), style=style)


class Move(Protocol):
    """Updates a progress bar."""

    def __call__(self, num_done: int, total: int, rate: str | None = None) -> None:
        """Show ``num_done`` of ``total``; ``rate`` replaces the computed number per second."""


@contextmanager
def progress_bar(what: str, unit: str, show: bool = True) -> Iterator[Move]:
    """A progress bar on stderr; yields a function that updates it.

    Args:
        what: label in front of the bar.
        unit: of the rate, such as ``photos/s``.
        show: False on ranks that print nothing.
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
