"""Files of one JSON object a line that a stage appends to, against nimg."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from dinogen.errors import UserError
from dinogen.files import next_free, write_bytes
from dinogen.runs.files import line_nimg, read_raw

log = logging.getLogger(__name__)


def cut_lines(path: Path, nimg: int) -> None:
    """Drop what was written past ``nimg``, and every line that is damaged or was cut off.

    A file with damage that no kill explains, which cuts off the last line alone, is kept beside the
    new one as ``NAME.damaged``, ``NAME.damaged-2`` and so on.

    Raises:
        UserError: the file cannot be read, or something else stands in its place.
    """
    found = read_raw(path)
    if found.troubles:
        raise UserError(f"{found.told()[0]}: move it away")
    lines = found.value.splitlines(keepends=True)
    kept = [line for line in lines if line_nimg(line) <= nimg]
    damaged = sum(line_nimg(line) == math.inf for line in lines)
    if damaged:
        log.warning("%s: %d damaged lines are dropped", path, damaged)
        if damaged > 1 or found.value.endswith(b"\n") or line_nimg(lines[-1]) < math.inf:
            kept_as = next_free(path.with_name(f"{path.name}.damaged"))
            write_bytes(kept_as, found.value)
            log.warning("%s: as it was, it is kept as %s", path, kept_as)
    text = b"".join(kept)
    if kept and not text.endswith(b"\n"):
        text += b"\n"  # or the next line would be appended to this one
    if text != found.value:
        write_bytes(path, text)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line, and bring it to disk: what it says took long to find out.

    What a kill has left of a line before stays a line of its own.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(line, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
