"""The state of each run of a study, and the report of all that have begun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dinogen.config.study import FINAL, Length
from dinogen.errors import UserError
from dinogen.files import write_text
from dinogen.report.compare import write_comparison
from dinogen.report.compare.read import is_run
from dinogen.report.progress import rounded
from launch.slurm.jobs import ACTIVE, has_slurm, read_jobs
from launch.slurm.status import Row, job_rows
from launch.study.data import lacking
from launch.study.outcome import is_done, jobless
from launch.study.plan import Choice, Study, changed, present_runs
from launch.study.runs import StudyRun, is_trained, steps_left
from launch.study.search import Search
from launch.study.state import JOBS, Record, is_locked, read_record
from launch.study.trials import as_yaml


@dataclass(frozen=True)
class State:
    """One run, as the table shows it.

    Attributes:
        run: the run.
        state: ``done``, ``changed``, ``running``, ``queued``, ``failed``, ``interrupted``,
            ``begun``, ``no data``, ``to do``, ``pruned``, or ``unknown`` where its jobs cannot be
            read.
        progress: of the current stage, in words.
        value: of the study's metric; None if it is not measured.
        why: why it is not done, and where to look.
        good: False if the user has to act.
    """

    run: StudyRun
    state: str
    progress: str
    value: float | None
    why: str
    good: bool


def study_states(study: Study) -> tuple[list[State], dict[str, Choice]]:
    """The states of all runs that are known now, and the choices so far.

    Raises:
        UserError: the record of the study cannot be read.
    """
    record = read_record(study)
    busy = is_locked(study.folder)
    runs, choices = present_runs(study, lambda run: settled(study, record, run))
    return [_state(study, record, busy, run) for run in runs], choices


def settled(study: Study, record: Record, run: StudyRun) -> bool:
    """Whether a run is done or pruned, or has failed in its last attempt."""
    if record.failed(run) is not None or study.is_pruned(run):
        return True
    return not steps_left(run, study.metric)


def _state(study: Study, record: Record, busy: bool, run: StudyRun) -> State:
    metric = study.metric
    found = run.stages[-1].metric(metric) if metric else None
    value = found["value"] if found else None

    def state(word: str, why: str = "", good: bool = True) -> State:
        return State(run, word, _progress(run), value, why, good)

    trial = study.trial_of(run)
    if trial is not None and trial.state == "pruned":
        return state("pruned", trial.why)
    by_files = not steps_left(run, metric) and (metric is not None or run.stages[-1].evaluated)
    try:
        rows = [] if by_files else _job_rows(run)
    except UserError as error:
        return state("unknown", str(error), good=False)
    if active := [row for row in rows if row.state.split()[0] in ACTIVE]:
        running = next((row for row in active if row.state.startswith("RUNNING")), None)
        row = running or active[0]
        word = "running" if running else "queued"
        return state(word, f"{row.step}, job {row.id} {row.why}".rstrip())
    if is_done(run, metric, rows):
        # a folder may have been launched with changes that are not in its files
        why = changed(study, run) if study.plan else None
        return state("changed", why, good=False) if why else state("done")
    attempt = record.open(run)
    if attempt is not None and busy and attempt.step != JOBS:
        return state("running", f"{attempt.step}, log: {attempt.log}")
    if failed := record.failed(run):
        return state("failed", failed, good=False)
    if (attempt is None or attempt.step == JOBS) and any(not row.good for row in rows):
        return state("failed", jobless(run, metric, rows), good=False)
    if why := lacking(study, run):
        return state("no data", why, good=False)
    if is_trained(run):
        left = ", ".join(steps_left(run, metric))
        return state("begun", f"lacks {left}")
    if attempt is not None:
        return state("interrupted", "dinogen study run continues it")
    return state("begun" if _progress(run) else "to do")


def _job_rows(run: StudyRun) -> list[Row]:
    """The state of a run's jobs; none if it has none, or SLURM is not here."""
    if not has_slurm() or not read_jobs(run.folder).jobs:
        return []
    return job_rows(run.folder)


def _progress(run: StudyRun) -> str:
    """The progress of the last stage that has begun."""
    words = ""
    for stage in run.stages:
        if told := stage.progress:
            words = told if len(run.stages) == 1 else f"{stage.resolution}: {told}"
    return words


def budget_words(study: Study) -> list[str]:
    """The length of the runs of each track and of the final that the plan gives, a line each."""
    if study.plan is None:
        return []
    sections: list[tuple[str, Length]] = [*study.plan.tracks.items()]
    if study.plan.final is not None:
        sections.append((FINAL, study.plan.final))
    runs = list(study.possible_runs())
    lines = []
    for name, section in sections:
        if section.kimg is not None:
            lines.append(f"{name}: {rounded(section.kimg, 6)} k images each")
        if section.minutes is not None:
            budgets = {run.name: run.budget for run in runs if run.track == name}
            parts = [
                f"{label} {one.measured.words if one.measured else 'not measured yet'}"
                for label, one in budgets.items()
                if one is not None
            ]
            lines.append(f"{name}: {section.minutes:g} minutes each: {'; '.join(parts)}")
    return lines


SUMMARY = "study.md"
_SHOWN = 8  # trials of a search that are compared side by side


def write_report(study: Study) -> Path:
    """Write the comparison and ``study.md``; returns the comparison's page.

    Raises:
        UserError: no run has begun.
    """
    states, choices = study_states(study)
    poor = {run.id for search in study.searches for run in search.runs} - {
        run.id for search in study.searches for run in search.best_runs(_SHOWN)
    }
    begun = [one.run.folder for one in states if one.run.id not in poor and is_run(one.run.folder)]
    if not begun:
        raise UserError(
            f"{study.folder}: no run has begun: dinogen study run {study.path}; dinogen study "
            f"status {study.path} shows what failed"
        )
    out = study.folder / "report"
    write_text(out / SUMMARY, summary(study, states, choices))
    return write_comparison(begun, out, study.title, budget_words(study)).page


def summary(study: Study, states: list[State], choices: dict[str, Choice]) -> str:
    """All runs of the study in a table, the best of each track, and what failed; Markdown."""
    metric = study.metric
    lines = [f"# {study.title}", "", f"`dinogen study run {study.path}`", ""]
    if budgets := budget_words(study):
        lines += [*(f"- {line}" for line in budgets), ""]
    lines += [f"| run | state | {metric or ''} | progress |", "|---|---|---|---|"]
    for one in states:
        value = "" if one.value is None else f"{one.value:.4g}"
        lines.append(f"| {one.run.id} | {one.state} | {value} | {one.progress} |")
    if metric is not None:
        lines += ["", f"## The best by {metric}", ""]
        lines += [f"- {track}: {_best(choices.get(track))}" for track in study.tracks]
    for search in study.searches:
        lines += ["", f"## Trials of {search.id}", "", f"{search.summary}, best first.", ""]
        lines += trial_table(search)
    bad = [one for one in states if not one.good]
    if bad:
        lines += ["", "## What failed", ""]
        lines += [f"- {one.run.id}: {one.why}" for one in bad]
    return "\n".join(lines) + "\n"


def trial_table(search: Search) -> list[str]:
    """All trials with their values, best first, and what matters most; Markdown."""
    keys = list(search.settings.parameters)
    head = ["trial", *keys, search.metric, "state", "why"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for trial in search.ranked:
        word: str = (
            "to do" if trial.state == "begun" and not search.has_begun(trial) else trial.state
        )
        word += " on another machine" if trial.elsewhere else ""
        value = "" if trial.value is None else f"{trial.value:.4g}"
        values = [as_yaml(trial.values.get(key)) for key in keys]
        cells = [str(trial.number), *values, value, word, trial.why]
        lines.append("| " + " | ".join(one.replace("|", "\\|") for one in cells) + " |")
    if shares := search.importances:
        told = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
        lines += ["", f"Importance for {search.metric} (PED-ANOVA): {told}."]
    return lines


def _best(choice: Choice | None) -> str:
    if choice is None:
        return "its runs are not done"
    return f"{choice.best or 'none'}: {choice.why}"
