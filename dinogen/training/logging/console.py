"""The progress line of a stage: rich on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)


class ProgressLine:
    """Shows images/s, loss, floor and the time left.

    Args:
        title: such as ``stage 8x8``.
        start: nimg at which the bar begins.
        end: nimg at which it ends.
        show: False on ranks that stay silent.
    """

    def __init__(self, title: str, start: int, end: int, show: bool) -> None:
        self.title, self.start, self.end, self.show = title, start, end, show
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        if show and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task(title, total=end - start, text="")
            self.bar.start()

    def update(self, nimg: int, values: dict[str, float | None]) -> None:
        """Show the numbers of the newest line."""
        if not self.show:
            return
        speed = values.get("images_per_s") or 0.0
        parts = [f"{nimg / 1000:.1f}/{self.end / 1000:.1f} kimg", f"{speed:.1f} images/s"]
        for name in ("loss", "floor", "diversity"):
            value = values.get(name)
            if value is not None:
                parts.append(f"{name} {value:.4g}")
        if speed:
            parts.append(f"ETA {duration(max(0.0, (self.end - nimg) / speed))}")
        text = ", ".join(parts)
        if self.bar is not None:
            with suppress(OSError):  # the terminal is gone
                self.bar.update(self.task, completed=min(nimg, self.end) - self.start, text=text)
        else:
            log.info("%s: %s", self.title, text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            with suppress(OSError):
                self.bar.stop()


def duration(seconds: float) -> str:
    """``1:02:03``, or ``2 d 3:04:05`` from a day on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"
