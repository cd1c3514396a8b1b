"""What became of the runs of a study, in words and exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinogen.errors import EXIT_STOPPED
from launch.slurm.status import Row
from launch.study.runs import StudyRun, steps_left


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run of a study.

    Attributes:
        run: the run.
        what: the outcome in words.
        code: 0 if all is well, 75 if it was asked to stop, else the code of what failed.
        counts: False for a trial that failed while others of its search have not.
    """

    run: StudyRun
    what: str
    code: int = 0
    counts: bool = True

    @property
    def good(self) -> bool:
        """False if the user has to act."""
        return self.code == 0


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 if all is well, 75 if the study was asked to stop, else 1."""
    if any(one.code == EXIT_STOPPED for one in outcomes):
        return EXIT_STOPPED
    return 0 if all(one.good or not one.counts for one in outcomes) else 1


def unwritable(error: OSError) -> str:
    """The message for a run whose files cannot be written; the others go on."""
    return f"{error.filename or 'a file of it'} cannot be written ({error.strerror or error})"


def complaint(run: StudyRun, step: str, metric: str | None, code: int, log: Path) -> str | None:
    """What went wrong in a step, and where to look; None if it has made what it should.

    Args:
        run: the run.
        step: one of ``STEPS``.
        metric: decides in the study; None if runs are only trained.
        code: the command's exit code.
        log: its output.
    """
    if code:
        return f"{step} failed (exit code {code}): {last_line(log)} (log: {log})"
    if step not in steps_left(run, metric):
        return None
    if step == "evaluate" and (why := _unavailable(run, metric)):
        return why
    return f"{step} ended, but did not make what it should (log: {log})"


def is_done(run: StudyRun, metric: str | None, rows: Sequence[Row]) -> bool:
    """Whether nothing is left of a run; SLURM also measures a run that is only trained.

    Args:
        run: the run.
        metric: decides in the study; None if runs are only trained.
        rows: the state of its jobs.
    """
    if steps_left(run, metric):
        return False
    if metric is not None or run.stages[-1].evaluated:
        return True
    return all(row.good for row in rows if row.step == "evaluate")


def jobless(run: StudyRun, metric: str | None, rows: Sequence[Row]) -> str:
    """Why a run is not done although its jobs have ended.

    Args:
        run: the run.
        metric: decides in the study; None if runs are only trained.
        rows: the state of its jobs.
    """
    bad = next((row for row in rows if not row.good), None)
    if bad is not None:
        return f"{bad.step} (job {bad.id}) ended as {bad.state}: {bad.why}"
    if metric is not None and not any(row.step == "evaluate" for row in rows):
        return f"{metric} cannot be measured: no data are held out (prepare.pack.val_fraction)"
    if why := _unavailable(run, metric):
        return why
    left = ", ".join(steps_left(run, metric))
    return f"its jobs ended, but {left} did not make what it should (dinogen launch status)"


def _unavailable(run: StudyRun, metric: str | None) -> str | None:
    metric_value = run.stages[-1].metric(metric) if metric else None
    if metric_value is None or metric_value["value"] is not None:
        return None
    return f"{metric} is not available: {metric_value['reason']}"


_MOST = 300  # characters of a log's last line


def last_line(log: Path) -> str:
    """The last line that is not empty of a text file, cut to a readable length."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no output"
    return next((line.strip()[:_MOST] for line in reversed(lines) if line.strip()), "no output")
