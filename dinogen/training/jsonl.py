"""Files of one JSON object a line that a stage appends to, against nimg."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from dinogen.files import write_text


def cut_lines(path: Path, nimg: int) -> None:
    """Drop what was written past ``nimg``, and what a kill has cut off."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _nimg(line) <= nimg]
    if kept != lines:
        write_text(path, "".join(kept))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line, and bring it to disk: what it says took long to find out.

    Raises:
        ValueError: a number is not finite.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _nimg(line: str) -> float:
    """nimg of a line; infinite if the line was cut off by a kill."""
    try:
        return float(json.loads(line)["nimg"])
    except (ValueError, KeyError, TypeError):
        return math.inf
