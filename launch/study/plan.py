"""What a study consists of: the runs of its tracks, and those of the final once it is known.

A plan is a YAML file, or a folder of configs, each of which is trained where its ``run:`` says.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinogen.config import ConfigError, load_config
from dinogen.config.base import find_config
from dinogen.config.study import StudyConfig, load_study
from dinogen.errors import UserError
from dinogen.runs.layout import CONFIG
from launch.request import choose_stages
from launch.study.budget import BUDGET
from launch.study.runs import StudyRun, final_runs, is_trained, track_runs
from launch.study.search import Search, better_of
from launch.study.trials import Trial

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """A plan, and all runs of its tracks.

    Attributes:
        path: the file, or the folder of configs.
        folder: where the study keeps its record, logs, copies of configs, and report.
        title: heading of its report.
        metric: decides which config is the best; None where runs are only trained.
        entries: by the names of the tracks, in the order of the plan: the runs of each config, or
            the search over it.
        plan: what the file says; None for a folder of configs.
    """

    path: Path
    folder: Path
    title: str
    metric: str | None
    entries: Mapping[str, tuple[tuple[StudyRun, ...] | Search, ...]]
    plan: StudyConfig | None = None

    @property
    def tracks(self) -> dict[str, tuple[StudyRun, ...]]:
        """The runs by the names of the tracks, with the trials that are known by now."""
        return {
            name: tuple(
                run for one in entries for run in (one.runs if isinstance(one, Search) else one)
            )
            for name, entries in self.entries.items()
        }

    @property
    def searches(self) -> list[Search]:
        """The searches over configs of the tracks."""
        every = (one for entries in self.entries.values() for one in entries)
        return [one for one in every if isinstance(one, Search)]

    def search_of(self, run: StudyRun) -> Search | None:
        """The search whose trial a run is; None if it is no trial."""
        if run.trial is None:
            return None
        return next(one for one in self.searches if one.owns(run))

    def trial_of(self, run: StudyRun) -> Trial | None:
        """The trial that a run is of; None if it is none."""
        search = self.search_of(run)
        return None if search is None else search.trial_of(run)

    def is_pruned(self, run: StudyRun) -> bool:
        """Whether a run is a trial that was stopped early."""
        trial = self.trial_of(run)
        return trial is not None and trial.state == "pruned"

    @property
    def runs(self) -> list[StudyRun]:
        """The runs of all tracks."""
        return [run for track in self.tracks.values() for run in track]

    @property
    def final_tracks(self) -> tuple[str, ...]:
        """Tracks whose best go into the final."""
        return self.plan.final_tracks if self.plan else ()

    def copy_of(self, run: StudyRun) -> Path:
        """The copy of its config that a run is started with."""
        return self.folder / "configs" / f"{run.id}.yaml"

    def log_of(self, run: StudyRun) -> Path:
        """The output of a run's commands."""
        return self.folder / "logs" / f"{run.id}.log"

    def final_runs(self, best: Mapping[str, str]) -> tuple[StudyRun, ...]:
        """Runs of the final.

        Args:
            best: name of the best config by track.
        """
        if self.plan is None:
            return ()
        runs: list[StudyRun] = []
        for track in self.final_tracks:
            for entry in self.plan.tracks[track].configs:
                if entry.label == best.get(track) and not self.plan.searched(track, entry.label):
                    runs += final_runs(self.path, self.plan, track, entry)
            for search in self.searches:
                for trial in search.trials.all() if search.track == track else ():
                    entry = search.entry_of(trial)
                    if entry.label == best.get(track):
                        runs += final_runs(self.path, self.plan, track, entry)
        return tuple(runs)

    def possible_runs(self) -> Iterator[StudyRun]:
        """The runs of all tracks, and those of the final for each config that may become the best.

        Raises:
            ConfigError: naming the file and key that is wrong.
        """
        yield from self.runs
        tracks = self.tracks
        for track in self.final_tracks:
            # a search makes many runs of one config: its first stands for all
            single = [run for run in tracks[track] if not run.trial]
            for name in dict.fromkeys(run.name for run in single):
                yield from self.final_runs({track: name})


def open_study(path: Path) -> Study:
    """Read a plan and every config that it names, also as the final would change it.

    Args:
        path: the file, or a folder of configs; or the name of one that is shipped.

    Raises:
        ConfigError: naming the file and key that is wrong.
        UserError: see :func:`open_folder`.
    """
    path = find_config(path)
    if path.is_dir():
        return open_folder(path)
    plan = load_study(path)
    entries = {
        name: tuple(
            Search(path, plan, name, entry)
            if plan.searched(name, entry.label)
            else tuple(track_runs(path, plan, name, entry))
            for entry in track.configs
        )
        for name, track in plan.tracks.items()
    }
    study = Study(path, plan.folder, plan.title, plan.metric, entries, plan)
    for _ in study.possible_runs():  # a mistake must not show after weeks of training
        pass
    return study


def is_config_folder(folder: Path) -> bool:
    """Whether a folder holds configs; the folder of a run holds only its own, ``config.yaml``."""
    return any(path.name != CONFIG for path in folder.glob("*.yaml"))


def open_folder(folder: Path, overrides: Sequence[str] = (), only: str | None = None) -> Study:
    """A folder of configs as a study whose runs are trained, each where its ``run:`` says.

    The study itself is in ``study-FOLDER`` in the folder that all the runs have in common.

    Args:
        folder: holds the YAML files.
        overrides: ``KEY=VALUE`` changes to all of them.
        only: the stages to train; None for all.

    Raises:
        UserError: there is no config, one of them is wrong, two would write into one folder, or the
            changes name a folder of runs.
    """
    for item in overrides:
        if item.partition("=")[0].strip() == "run":
            raise UserError(
                f"{item}: {folder} is a folder of configs, and each has a run of its own: leave it "
                "out, or give one of the files"
            )
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UserError(f"{folder}: holds no *.yaml: give a config or a folder of configs")
    name = folder.absolute().name
    runs: dict[Path, StudyRun] = {}
    for path in files:
        config = load_config(path, list(overrides))
        choose_stages(config, only)
        run = StudyRun(path.stem, name, path.stem, path, config.run, config, only)
        first = runs.setdefault(config.run.absolute(), run)
        if first is not run:
            raise UserError(
                f"{path}: run: {config.run} is that of {first.source} too: give it another"
            )
    place = Path(os.path.commonpath([path.parent for path in runs]))
    return Study(folder, place / f"study-{name}", name, None, {name: (tuple(runs.values()),)})


def check_study(study: Study) -> None:
    """Find the mistakes in a study that can be known before it runs.

    Raises:
        ConfigError: its metric is not known or has no better or worse, a search lacks the weights
            for it, or configs have changed since their runs were trained; names each of them.
    """
    if study.metric is not None:
        better_of(study.metric, f"{study.path}: metric")
    for search in study.searches:
        search.check_metric()
    found = [
        why
        for run in study.possible_runs()
        if (why := lost_budget(study, run) or changed(study, run))
    ]
    if found:
        raise ConfigError("\n".join(found))


def lost_budget(study: Study, run: StudyRun) -> str | None:
    """Why a run that has begun has no measured length any more; None if it has one."""
    copy = study.copy_of(run)
    if run.budget is None or run.budget.measured is not None or not copy.is_file():
        return None
    return (
        f"{study.folder / BUDGET}: holds no speed of {run.budget.key} for {run.budget.minutes:g} "
        f"minutes, but {run.id} has begun: restore the file, and the plan as it was; or move "
        f"{run.folder} and {copy} away, and it is measured again"
    )


def unmeasured_runs(study: Study) -> list[StudyRun]:
    """One run of each config whose length is in minutes and whose speed is not known yet.

    Those of the final are among them, for each config that may become the best.
    """
    found: dict[str, StudyRun] = {}
    for run in study.possible_runs():
        if run.budget is not None and run.unmeasured:
            found.setdefault(run.budget.key, run)
    return list(found.values())


def changed(study: Study, run: StudyRun) -> str | None:
    """How the config of a run has changed since it was trained; None if it has not.

    For a run that is not done the trainer itself reports it.
    """
    copy = study.copy_of(run)
    if run.unmeasured or not copy.is_file() or not is_trained(run):
        return None
    from dinogen.families.registry import resolve
    from dinogen.training.preflight import MAY_CHANGE

    # Once a run is done, one of another length is another run.
    ignored = {key: value for key, value in MAY_CHANGE.items() if key != "stages"}
    try:
        trained = load_config(copy)
    except ConfigError as error:
        log.warning("%s: the config that %s was trained with is not known", error, run.folder)
        return None
    then, now = (
        resolve(config).model_dump(mode="json", exclude=ignored) for config in (trained, run.config)
    )
    found = _difference(then, now)
    if found is None:
        return None
    key, old, new = found
    return (
        f"{run.source}: {key}: {run.folder} was trained with {old}, the study says {new} now: "
        f"restore it, or move that folder and {copy} away"
    )


def _difference(then: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first value that differs between two dumped configs: its key, before, and now."""
    if then == now:
        return None
    inside: list[tuple[str, Any, Any]] = []
    if isinstance(then, dict) and isinstance(now, dict):
        inside = [(name, then.get(name), now.get(name)) for name in then | now]
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        inside = [(str(i), *pair) for i, pair in enumerate(zip(then, now, strict=True))]
    found = (_difference(old, new, f"{key}.{name}".lstrip(".")) for name, old, new in inside)
    return next((one for one in found if one is not None), (key, then, now))


@dataclass(frozen=True)
class Choice:
    """The best of a track.

    Attributes:
        track: its name.
        best: name of the best config; None if there is none, ``why`` gives the reason.
        metric_values: mean over the seeds, by config; configs without any are not in it.
        why: the reason, in words.
    """

    track: str
    best: str | None
    metric_values: dict[str, float]
    why: str


def choose(
    track: str,
    runs: Sequence[StudyRun],
    metric: str,
    elsewhere: Sequence[tuple[str, dict[str, Any]]] = (),
) -> Choice:
    """The best config of a track by the mean over its seeds.

    Args:
        track: its name.
        runs: of the track.
        metric: that decides.
        elsewhere: name and metric value of the trials that other machines have made.
    """
    found = [
        (run.name, run.id, metric_value)
        for run in runs
        if (metric_value := _metric_value(run, metric)) and _has_value(metric_value)
    ]
    found += [(name, f"{track}/{name} on another machine", value) for name, value in elsewhere]
    if not found:
        reasons = {
            str(metric_value["reason"])
            for run in runs
            if (metric_value := _metric_value(run, metric)) and not _has_value(metric_value)
        }
        why = f"no run has {metric}"
        return Choice(track, None, {}, f"{why}: {'; '.join(sorted(reasons))}" if reasons else why)
    values: dict[str, list[float]] = {}
    for name, _, metric_value in found:
        values.setdefault(name, []).append(float(metric_value["value"]))
    means = {name: sum(given) / len(given) for name, given in values.items()}
    kinds = {
        metric_value["alike"]: f"{run} ({metric_value.get('fingerprint')})"
        for _, run, metric_value in found
    }
    if len(kinds) > 1:
        told = ", ".join(kinds.values())
        return Choice(
            track,
            None,
            means,
            f"{metric} was measured in different ways, and cannot be compared: {told} have "
            "different fingerprints: measure them the same way (metrics:, data.path, resolution)",
        )
    better = found[0][2]["better"]
    if better not in ("lower", "higher"):
        return Choice(track, None, means, f"{metric} has no better or worse: choose another metric")
    best = (min if better == "lower" else max)(means, key=means.__getitem__)
    num = len(values[best])
    why = f"{metric} {means[best]:.4g}" + (f", mean of {num} seeds" if num > 1 else "")
    return Choice(track, best, means, why)


def present_runs(
    study: Study, settled: Callable[[StudyRun], bool]
) -> tuple[list[StudyRun], dict[str, Choice]]:
    """All runs that are known now, and what was chosen.

    Args:
        study: the study.
        settled: whether a run of a track is done or has failed.

    Returns:
        The runs of the tracks, then those of the final, if its tracks are settled; and the choice
        of each track that is settled.
    """
    runs = study.runs
    metric = study.metric
    if metric is None:
        return runs, {}
    choices = {}
    for name, track in study.tracks.items():
        searches = [one for one in study.searches if one.track == name]
        if not all(settled(run) for run in track) or not all(one.known for one in searches):
            continue
        kept = [run for run in track if not study.is_pruned(run)]
        others = [value for one in searches for value in one.elsewhere]
        choices[name] = choose(name, kept, metric, others)
    wanted = study.final_tracks
    if wanted and all(track in choices for track in wanted):
        best = {name: one.best for name, one in choices.items() if one.best is not None}
        runs += study.final_runs(best)
    return runs, choices


def _metric_value(run: StudyRun, metric: str) -> dict[str, Any] | None:
    return run.stages[-1].metric(metric)


def _has_value(metric_value: dict[str, Any]) -> bool:
    return metric_value["value"] is not None
