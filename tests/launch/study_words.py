"""`dinogen study` as it is typed, its tables, and what stands in the place of its comparison."""

from __future__ import annotations

from typer.testing import CliRunner

from dinogen.report.compare import Written
from launch.cli.main import app


def compared(runs, out, title):
    """In the place of the comparison: notes what it was asked for."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "runs").write_text("\n".join(map(str, runs)))
    return Written(out / "runs", {}, len(runs))


def study(command, path, *words):
    return CliRunner().invoke(app, ["study", command, str(path), *words])


def rows(result):
    """Cells of a printed table by the first of them."""
    lines = [line.split("│")[1:-1] for line in result.output.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}
