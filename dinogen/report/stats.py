"""Reads stats.jsonl: the numbers of one stage, a JSON object a line."""

from __future__ import annotations

import logging
from pathlib import Path

from dinogen.errors import UserError
from dinogen.report.runfiles import Line as Line
from dinogen.report.runfiles import iter_values, read_lines

log = logging.getLogger(__name__)


def read_stats(path: Path | str) -> list[Line]:
    """The sound lines of a stats.jsonl in order of ``nimg``; others are left out with a warning.

    Raises:
        UserError: the file is missing or holds no line.
    """
    found = read_lines(Path(path))
    if not found.there:
        raise UserError(f"{path}: cannot be read: there is no such file")
    for trouble in found.told():
        log.warning("%s", trouble)
    if not found.value:
        raise UserError(f"{path}: holds no line of statistics: did the stage make a step?")
    return found.value


def series(lines: list[Line], name: str) -> tuple[list[float], list[float]]:
    """``(kimg, value)`` of the lines that have a finite number under ``name``."""
    points = list(iter_values(lines, name))
    return [nimg / 1000 for nimg, _ in points], [value for _, value in points]
