"""STUDY/report: the comparison of all runs that have begun, and what was chosen and what failed."""

from __future__ import annotations

from pathlib import Path

from dinogen.errors import UserError
from dinogen.files import write_text
from dinogen.report.compare.comparison import write_comparison
from dinogen.report.compare.read import is_run
from launch.study.plan import Study
from launch.study.selection import Choice
from launch.study.status import State, study_states

SUMMARY = "study.md"


def write_report(study: Study) -> Path:
    """Write the comparison and ``study.md``; returns the comparison's page.

    Raises:
        UserError: no run has begun.
    """
    states, choices = study_states(study)
    begun = [one.run.folder for one in states if is_run(one.run.folder)]
    if not begun:
        raise UserError(
            f"{study.folder}: no run has begun: dinogen study run {study.path}, and look with "
            f"dinogen study status {study.path} at what failed"
        )
    out = study.folder / "report"
    write_text(out / SUMMARY, summary(study, states, choices))
    return write_comparison(begun, out, study.plan.title).page


def summary(study: Study, states: list[State], choices: dict[str, Choice]) -> str:
    """All runs of the study in a table, the best of each track, and what failed; Markdown."""
    metric = study.plan.metric
    lines = [f"# {study.plan.title}", "", f"`dinogen study run {study.path}`", ""]
    lines += [f"| run | state | {metric} | progress |", "|---|---|---|---|"]
    for one in states:
        figure = "" if one.figure is None else f"{one.figure:.4g}"
        lines.append(f"| {one.run.id} | {one.state} | {figure} | {one.progress} |")
    lines += ["", f"## The best by {metric}", ""]
    for track in study.tracks:
        choice = choices.get(track)
        told = "its runs are not done" if choice is None else f"{choice.best}: {choice.why}"
        if choice is not None and choice.best is None:
            told = f"none: {choice.why}"
        lines.append(f"- {track}: {told}")
    bad = [one for one in states if not one.good]
    if bad:
        lines += ["", "## What failed", ""]
        lines += [f"- {one.run.id}: {one.why}" for one in bad]
    return "\n".join(lines) + "\n"
