"""Where each run of a study is, and the report of all that have begun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dinogen.errors import UserError
from dinogen.files import write_text
from dinogen.report.compare import write_comparison
from dinogen.report.compare.read import is_run
from launch.slurm import queue
from launch.slurm.jobs import read_jobs
from launch.slurm.status import job_rows
from launch.study.plan import Study, StudyRun, changed, is_trained, lacking, steps_left
from launch.study.selection import Choice, present_runs
from launch.study.state import Record, is_locked, read_record


@dataclass(frozen=True)
class State:
    """One run, as the table shows it.

    Attributes:
        run: the run.
        state: ``done``, ``running``, ``queued``, ``failed``, ``interrupted``, ``begun``,
            ``no data`` or ``to do``.
        progress: of the stage at hand, in words.
        metric value: what the study's metric came to; None if it is not measured.
        why: why it is not done, and where to look.
        good: False if somebody has to do something.
    """

    run: StudyRun
    state: str
    progress: str
    metric_value: float | None
    why: str
    good: bool


def study_states(study: Study) -> tuple[list[State], dict[str, Choice]]:
    """All runs that are known now, and what was chosen so far.

    Raises:
        UserError: the record of the study cannot be read.
    """
    record = read_record(study)
    busy = is_locked(study.folder)
    runs, choices = present_runs(study, lambda run: settled(study, record, run))
    return [_state(study, record, busy, run) for run in runs], choices


def settled(study: Study, record: Record, run: StudyRun) -> bool:
    """Whether a run is done, or has failed when it was tried last."""
    return record.failed(run) is not None or not steps_left(run, study.plan.metric)


def _state(study: Study, record: Record, busy: bool, run: StudyRun) -> State:
    metric = study.plan.metric
    found = run.stages[-1].metric(metric)
    metric_value = found["value"] if found else None
    left = steps_left(run, metric)

    def state(word: str, why: str = "", good: bool = True) -> State:
        return State(run, word, _progress(run), metric_value, why, good)

    if not left:
        why = changed(study, run)
        return state("changed", why, good=False) if why else state("done")
    if queued := _queued(run):
        return state(*queued)
    attempt = record.open(run)
    if attempt is not None and busy:
        return state("running", f"{attempt.step}, log: {attempt.log}")
    if failed := record.failed(run):
        return state("failed", failed, good=False)
    if why := lacking(run):
        return state("no data", why, good=False)
    if is_trained(run, metric):
        return state("begun", f"lacks {', '.join(left)}")
    if attempt is not None:
        return state("interrupted", "dinogen study run goes on")
    return state("begun" if _progress(run) else "to do")


def _queued(run: StudyRun) -> tuple[str, str] | None:
    """Whether SLURM has a job of the run, and which."""
    if not queue.has_slurm():
        return None
    try:
        if not read_jobs(run.folder).jobs:
            return None
        active = [row for row in job_rows(run.folder) if row.state.split()[0] in queue.ACTIVE]
    except UserError as error:
        return "unknown", str(error)
    if not active:
        return None
    running = next((row for row in active if row.state.startswith("RUNNING")), None)
    row = running or active[0]
    return "running" if running else "queued", f"{row.step}, job {row.id} {row.why}".rstrip()


def _progress(run: StudyRun) -> str:
    """How far the last stage is that has begun."""
    words = ""
    for stage in run.stages:
        if told := stage.progress:
            words = told if len(run.stages) == 1 else f"{stage.resolution}: {told}"
    return words


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
        metric_value = "" if one.metric_value is None else f"{one.metric_value:.4g}"
        lines.append(f"| {one.run.id} | {one.state} | {metric_value} | {one.progress} |")
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
