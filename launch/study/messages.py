"""What went wrong with a step of a study's run, in words and with the place to look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.slurm.status import Row
from launch.study.plan import StudyRun, steps_left
from launch.study.selection import Speed

_MOST = 300  # characters of a log's last line


def complaint(run: StudyRun, step: str, metric: str, code: int, log: Path) -> str | None:
    """What went wrong; None if the step has made what it was to make.

    Args:
        run: the run.
        step: one of ``STEPS``.
        metric: that decides in the study.
        code: the command's exit code.
        log: its output.
    """
    if code:
        return f"{step} failed (exit code {code}): {last_line(log)} (log: {log})"
    if step not in steps_left(run, metric):
        return None
    metric_value = run.stages[-1].metric(metric) if step == "evaluate" else None
    if metric_value is not None:
        return f"{metric} is not available: {metric_value['reason']}"
    return f"{step} ended well, but did not make what it should (log: {log})"


def jobless(run: StudyRun, metric: str, rows: Sequence[Row]) -> str:
    """Why a run is not done though none of its jobs is queued any more.

    Args:
        run: the run.
        metric: that decides in the study.
        rows: what became of its jobs.
    """
    bad = next((row for row in rows if not row.good), None)
    if bad is not None:
        return f"{bad.step} (job {bad.id}) ended as {bad.state}: {bad.why}"
    if not any(row.step == "evaluate" for row in rows):
        return (
            f"{metric} cannot be measured: its data hold nothing back (prepare.pack.val_fraction)"
        )
    metric_value = run.stages[-1].metric(metric)
    if metric_value is not None and metric_value["value"] is None:
        return f"{metric} is not available: {metric_value['reason']}"
    left = ", ".join(steps_left(run, metric))
    return f"its jobs ended well, but {left} did not make what it should (dinogen launch status)"


def duration(seconds: float) -> str:
    """Seconds for people: ``40 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    for size, most, unit in ((60, 5400, "min"), (3600, 172_800, "h")):
        if seconds < most:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"


def speed_words(speeds: Sequence[Speed]) -> str:
    """By which measured speeds a time was worked out, and where these come from."""
    return "; ".join(
        f"{one.images_per_s:,.3g}/s"
        + (f" on {one.num_processes}x {one.device}" if one.device else "")
        + f" in {one.where}"
        + ("" if one.same else " (another config of the family)")
        for one in speeds
    )


def last_line(log: Path) -> str:
    """The last line that is not empty of a text file, cut to a readable length."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no output"
    return next((line.strip()[:_MOST] for line in reversed(lines) if line.strip()), "no output")
