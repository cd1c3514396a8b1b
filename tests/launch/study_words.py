"""`dinogen study` as it is typed, its tables, and what stands in the place of its comparison."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from dinogen.report.compare import Written
from launch.cli.main import app


def compared(runs, out, title, notes=()):
    """In the place of the comparison: notes what it was asked for."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "runs").write_text("\n".join(map(str, runs)))
    (out / "notes").write_text("\n".join(notes))
    return Written(out / "runs", {}, len(runs))


def study(command, path, *words):
    return CliRunner().invoke(app, ["study", command, str(path), *words])


def rows(result):
    """Cells of a printed table by the first of them, and after them the reason below, if any."""
    lines = iter(result.output.splitlines())
    head = next(line for line in lines if re.match(r"(run|step)  ", line))
    starts = [match.start() for match in re.finditer(r"\S+( \S+)*", head)]
    ends = [*starts[1:], None]
    table, name = {}, ""
    for line in lines:
        if line.startswith("    "):
            table[name].append(line.strip())
            continue
        if line[starts[1] - 2 : starts[1]].strip():
            break  # what is said below the table
        name, *cells = (line[a:b].strip() for a, b in zip(starts, ends, strict=True))
        table[name] = cells
    return table
