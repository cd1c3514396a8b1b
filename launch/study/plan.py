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

from dinogen.config import Config, ConfigError, load_config
from dinogen.config.base import find_config
from dinogen.config.study import FINAL, EntryConfig, StudyConfig, TrackConfig, load_study
from dinogen.errors import UserError
from dinogen.runs.layout import CONFIG
from dinogen.runs.run import Run, Stage
from launch.request import choose_stages
from launch.slurm.plan import lacking_data

log = logging.getLogger(__name__)

# What a study does for each run, in this order.
STEPS = ("train", "evaluate", "look")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        id: its name in the study: ``gan/dcgan_64-seed0``, which is also its folder in the study's;
            of a folder of configs the name of the file.
        track: its track, or ``final``.
        name: of its config in the track; in the final TRACK-CONFIG.
        source: the YAML file that it comes from.
        outside: the folder that this file names, where it may have been trained before.
        config: as it is trained.
        only: the stages to train, ``8`` or ``4..64``; None for all.
    """

    id: str
    track: str
    name: str
    source: Path
    outside: Path
    config: Config
    only: str | None = None

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.config.run

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that are to be trained, as far as they are."""
        chosen = choose_stages(self.config, self.only)
        return tuple(one for one in Run.of(self.config).planned if one.resolution in chosen)


@dataclass(frozen=True)
class Study:
    """A plan, and all runs of its tracks.

    Attributes:
        path: the file, or the folder of configs.
        folder: where the study keeps its record, logs, copies of configs, and report.
        title: heading of its report.
        metric: decides which config is the best; None where runs are only trained.
        tracks: the runs by the names of the tracks, in the order of the plan.
        plan: what the file says; None for a folder of configs.
    """

    path: Path
    folder: Path
    title: str
    metric: str | None
    tracks: Mapping[str, tuple[StudyRun, ...]]
    plan: StudyConfig | None = None

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
                if entry.label == best.get(track):
                    runs += _final_runs(self.path, self.plan, track, entry)
        return tuple(runs)

    def possible_runs(self) -> Iterator[StudyRun]:
        """The runs of all tracks, and those of the final for each config that may become the best.

        Raises:
            ConfigError: naming the file and key that is wrong.
        """
        yield from self.runs
        for track in self.final_tracks:
            for name in dict.fromkeys(run.name for run in self.tracks[track]):
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
    tracks = {
        name: tuple(
            run for entry in track.configs for run in _track_runs(path, plan, name, track, entry)
        )
        for name, track in plan.tracks.items()
    }
    study = Study(path, plan.folder, plan.title, plan.metric, tracks, plan)
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
    return Study(folder, place / f"study-{name}", name, None, {name: tuple(runs.values())})


def steps_left(run: StudyRun, metric: str | None) -> list[str]:
    """What has still to be done for a run, of :data:`STEPS`; only training without a metric."""
    if not all(stage.done for stage in run.stages):
        return list(STEPS if metric else STEPS[:1])
    if metric is None:
        return []
    last = run.stages[-1]
    metric_value = last.metric(metric)
    done = {"evaluate": metric_value is not None and metric_value["value"] is not None}
    done["look"] = last.visualized
    return [step for step in STEPS[1:] if not done[step]]


def is_trained(run: StudyRun) -> bool:
    """Whether all stages of a run are done."""
    return all(stage.done for stage in run.stages)


def lacking(run: StudyRun) -> str | None:
    """The data that a run lacks and how to make them; None if they exist."""
    paths = lacking_data(run.config)
    if not paths:
        return None
    if run.config.data.mix:
        return f"data.mix: {paths[0]} holds no packed data: pack each part of the mix first"
    return (
        f"data.path: {paths[0]} holds no packed data: "
        f"dinogen prepare PHOTOS {paths[0]} -c {run.source}"
    )


def check_study(study: Study) -> None:
    """Find the mistakes in a study that can be known before it runs.

    Raises:
        ConfigError: its metric is not known or has no better or worse, or configs have changed
            since their runs were trained; names each of them.
    """
    if study.metric is not None:
        from dinogen.metrics.registry import better, chosen_names

        (metric,) = chosen_names([study.metric], f"{study.path}: metric")
        if better(metric) == "none":
            raise ConfigError(
                f"{study.path}: metric: {metric} has no better or worse: choose another"
            )
    found = [why for run in study.possible_runs() if (why := changed(study, run))]
    if found:
        raise ConfigError("\n".join(found))


def changed(study: Study, run: StudyRun) -> str | None:
    """How the config of a run has changed since it was trained; None if it has not.

    For a run that is not done the trainer itself reports it.
    """
    copy = study.copy_of(run)
    if not copy.is_file() or not is_trained(run):
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


def _track_runs(
    path: Path, plan: StudyConfig, name: str, track: TrackConfig, entry: EntryConfig
) -> list[StudyRun]:
    changes = [*plan.overrides, *track.overrides, *entry.overrides]
    return [_run(path, plan, name, entry.label, entry, changes, seed) for seed in track.seeds]


def _final_runs(path: Path, plan: StudyConfig, track: str, entry: EntryConfig) -> list[StudyRun]:
    final = plan.final
    assert final is not None
    changes = [*plan.overrides, *plan.tracks[track].overrides, *entry.overrides]
    if final.epochs is not None:
        config = load_config(_source(path, entry), changes)
        changes += _lengths(config, final.epochs, f"{path}: final.epochs: {entry.config}")
    changes += final.overrides
    name = f"{track}-{entry.label}"
    return [_run(path, plan, FINAL, name, entry, changes, seed) for seed in final.seeds]


def _run(
    path: Path,
    plan: StudyConfig,
    track: str,
    name: str,
    entry: EntryConfig,
    changes: Sequence[str],
    seed: int,
) -> StudyRun:
    source = _source(path, entry)
    config = load_config(source, [*changes, f"seed={seed}"])
    names = config.metrics.names
    if names and plan.metric not in names:
        raise ConfigError(
            f"{source}: metrics.names: lacks {plan.metric}, which {path} chooses by: add it"
        )
    run_id = f"{track}/{name}-seed{seed}"
    config, outside = config.model_copy(update={"run": plan.folder / run_id}), config.run
    return StudyRun(run_id, track, name, source, outside, config)


def _source(path: Path, entry: EntryConfig) -> Path:
    """A config of the study; relative paths start at the folder of the study's file."""
    return path.parent / entry.config


def _lengths(config: Config, epochs: float, where: str) -> list[str]:
    """Changes that give a run this number of epochs, its stages in the same proportions."""
    if len({stage.kimg is None for stage in config.stages}) > 1:
        raise ConfigError(
            f"{where}: some of its stages have kimg and some have epochs: use one of them for "
            "all, or set the lengths in final.overrides"
        )
    sizes = [stage.kimg or stage.epochs or 0.0 for stage in config.stages]
    changes: list[str] = []
    for number, size in enumerate(sizes):
        length = epochs * size / sum(sizes)
        changes += [f"stages.{number}.epochs={length:.12g}", f"stages.{number}.kimg=null"]
    return changes


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


def choose(track: str, runs: Sequence[StudyRun], metric: str) -> Choice:
    """The best config of a track by the mean over its seeds."""
    found = [
        (run, metric_value)
        for run in runs
        if (metric_value := _metric_value(run, metric)) and _has_value(metric_value)
    ]
    if not found:
        reasons = {
            str(metric_value["reason"])
            for run in runs
            if (metric_value := _metric_value(run, metric)) and not _has_value(metric_value)
        }
        why = f"no run has {metric}"
        return Choice(track, None, {}, f"{why}: {'; '.join(sorted(reasons))}" if reasons else why)
    values: dict[str, list[float]] = {}
    for run, metric_value in found:
        values.setdefault(run.name, []).append(float(metric_value["value"]))
    means = {name: sum(given) / len(given) for name, given in values.items()}
    kinds = {str(metric_value["fingerprint"]): run.id for run, metric_value in found}
    if len(kinds) > 1:
        told = ", ".join(f"{run} ({kind})" for kind, run in kinds.items())
        return Choice(
            track,
            None,
            means,
            f"{metric} was measured in different ways, and cannot be compared: {told} have "
            "different fingerprints: measure them the same way (metrics:, data.path, resolution)",
        )
    better = found[0][1]["better"]
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
    choices = {
        name: choose(name, track, metric)
        for name, track in study.tracks.items()
        if all(settled(run) for run in track)
    }
    wanted = study.final_tracks
    if wanted and all(track in choices for track in wanted):
        best = {name: one.best for name, one in choices.items() if one.best is not None}
        runs += study.final_runs(best)
    return runs, choices


def _metric_value(run: StudyRun, metric: str) -> dict[str, Any] | None:
    return run.stages[-1].metric(metric)


def _has_value(metric_value: dict[str, Any]) -> bool:
    return metric_value["value"] is not None
