"""Reads stats.jsonl: the numbers of one stage, a JSON object a line."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from dinogen.errors import UserError

log = logging.getLogger(__name__)

Line = dict[str, Any]


def read_stats(path: Path | str) -> list[Line]:
    """The lines of a stats.jsonl in order of ``nimg``, each ``nimg`` once.

    A run that was killed and resumed may have logged the same images twice: what the later
    process wrote replaces everything from there on. A line cut off by a kill is left out with a
    warning.

    Raises:
        UserError: the file is missing or holds no line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    lines: list[Line] = []
    for number, row in enumerate(text.splitlines(), start=1):
        try:
            line = json.loads(row)
            nimg = int(line["nimg"])
        except (ValueError, KeyError, TypeError):
            log.warning("%s:%d: left out, not a whole line of statistics", path, number)
            continue
        while lines and lines[-1]["nimg"] >= nimg:
            lines.pop()
        lines.append(line)
    if not lines:
        raise UserError(f"{path}: holds no line of statistics: did the stage make a step?")
    return lines


def series(lines: list[Line], name: str) -> tuple[list[float], list[float]]:
    """``(kimg, value)`` of the lines that have a finite number under ``name``."""
    kimg, values = [], []
    for line in lines:
        value = line.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            kimg.append(line["nimg"] / 1000)
            values.append(float(value))
    return kimg, values
