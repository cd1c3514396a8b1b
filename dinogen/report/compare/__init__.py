"""Writes a comparison of runs: a self-contained page, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinogen.errors import UserError
from dinogen.files import write_json, write_text
from dinogen.report.compare.comparison import Comparison, render_text
from dinogen.report.compare.page import render_page
from dinogen.report.compare.read import read_runs

PAGE, DATA, TEXT = "index.html", "comparison.json", "comparison.md"


@dataclass(frozen=True)
class Written:
    """A comparison on disk.

    Attributes:
        page: ``index.html``.
        damaged: what is wrong with the files of a damaged run, by the name of the run.
        num_sound: number of runs without damage.
    """

    page: Path
    damaged: dict[str, list[str]]
    num_sound: int


def write_comparison(
    runs: Sequence[Path], out: Path, title: str, notes: Sequence[str] = ()
) -> Written:
    """Write ``index.html``, ``comparison.json`` and ``comparison.md`` into a folder.

    Args:
        runs: folders of runs; failed ones and those that never began are listed as such.
        out: the folder; created if needed.
        title: heading of the page.
        notes: sentences below it.

    Returns:
        The page, which needs no other file and no network, and the damaged runs. The page lists
        them with the reasons, and compares what can be read of them.

    Raises:
        UserError: there is nothing to compare.
    """
    if not runs:
        raise UserError("no run to compare: give folders of runs")
    comparison = Comparison(read_runs(runs), title, notes)
    write_json(out / DATA, comparison.to_dict())
    write_text(out / TEXT, render_text(comparison))
    write_text(out / PAGE, render_page(comparison))
    damaged = {run.name: run.damage for run in comparison.damaged}
    return Written(out / PAGE, damaged, len(comparison.all_runs) - len(damaged))
