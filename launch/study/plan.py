"""What a study consists of: the runs of its tracks, and those of the final once it is known."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinogen.config import Config, ConfigError, load_config
from dinogen.config.study import FINAL, EntryConfig, StudyConfig, TrackConfig, load_study
from dinogen.runs.run import Run, Stage
from launch.slurm.plan import lacking_data

log = logging.getLogger(__name__)

# What is done for each run, in this order.
STEPS = ("train", "evaluate", "look")


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        track: its track, or ``final``.
        name: of its config in the track; in the final TRACK-CONFIG.
        seed: of the run.
        source: the YAML file that it comes from.
        outside: the folder that this file names, where it may have been trained before.
        config: as it is trained.
    """

    track: str
    name: str
    seed: int
    source: Path
    outside: Path
    config: Config

    @property
    def id(self) -> str:
        """``gan/dcgan_64-seed0``, which is also its folder in the study's."""
        return f"{self.track}/{self.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.config.run

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of its config, as far as they are."""
        return Run.of(self.config).planned


@dataclass(frozen=True)
class Study:
    """A study's file, and all runs of its tracks.

    Attributes:
        path: the file.
        plan: what it says.
        tracks: the runs by the names of the tracks, in the order of the file.
    """

    path: Path
    plan: StudyConfig
    tracks: Mapping[str, tuple[StudyRun, ...]]

    @property
    def folder(self) -> Path:
        """Folder of all that the study makes."""
        return self.plan.folder

    def copy_of(self, run: StudyRun) -> Path:
        """The config that a run is started with."""
        return self.folder / "configs" / f"{run.id}.yaml"

    def log_of(self, run: StudyRun) -> Path:
        """What its commands print."""
        return self.folder / "logs" / f"{run.id}.log"

    def final_runs(self, best: Mapping[str, str]) -> tuple[StudyRun, ...]:
        """Runs of the final.

        Args:
            best: name of the best config by track.
        """
        runs: list[StudyRun] = []
        for track in self.plan.final_tracks:
            entries = self.plan.tracks[track].configs
            for entry in entries:
                if entry.label == best.get(track):
                    runs += _final_runs(self.path, self.plan, track, entry)
        return tuple(runs)


def open_study(path: Path) -> Study:
    """Read a study's file and every config that it names, also as the final would change it.

    Raises:
        ConfigError: naming the file and key that is wrong.
    """
    plan = load_study(path)
    tracks = {
        name: tuple(
            run for entry in track.configs for run in _track_runs(path, plan, name, track, entry)
        )
        for name, track in plan.tracks.items()
    }
    for track in plan.final_tracks:
        for entry in plan.tracks[track].configs:
            _final_runs(path, plan, track, entry)  # a mistake must not show after weeks of training
    return Study(path, plan, tracks)


def steps_left(run: StudyRun, metric: str) -> list[str]:
    """What has still to be done for a run, of :data:`STEPS`."""
    if not all(stage.done for stage in run.stages):
        return list(STEPS)
    last = run.stages[-1]
    metric_value = last.metric(metric)
    done = {"evaluate": metric_value is not None and metric_value["value"] is not None}
    done["look"] = last.visualized
    return [step for step in STEPS[1:] if not done[step]]


def is_trained(run: StudyRun, metric: str) -> bool:
    """Whether all stages of a run are done."""
    return STEPS[0] not in steps_left(run, metric)


def lacking(run: StudyRun) -> str | None:
    """Which data a run lacks and how they are made; None if they are there."""
    paths = lacking_data(run.config)
    if not paths:
        return None
    if run.config.data.mix:
        return f"data.mix: {paths[0]} holds no packed data: make what is mixed first"
    return (
        f"data.path: {paths[0]} holds no packed data: "
        f"dinogen prepare PHOTOS {paths[0]} -c {run.source}"
    )


def check_study(study: Study) -> None:
    """What can be known to be wrong with a study before it goes on.

    Raises:
        ConfigError: its metric is not known or has no better and worse, or its configs have changed
            since runs were trained; names each of them.
    """
    from dinogen.metrics.registry import better, chosen_names

    (metric,) = chosen_names([study.plan.metric], f"{study.path}: metric")
    if better(metric) == "none":
        raise ConfigError(f"{study.path}: metric: {metric} has no better and worse: name another")
    runs = [run for track in study.tracks.values() for run in track]
    for track in study.plan.final_tracks:
        for entry in study.plan.tracks[track].configs:
            runs += study.final_runs({track: entry.label})
    found = [why for run in runs if (why := changed(study, run))]
    if found:
        raise ConfigError("\n".join(found))


def changed(study: Study, run: StudyRun) -> str | None:
    """How the config of a trained run has changed since; None if it has not.

    Of a run that is still trained the trainer itself says so.
    """
    copy = study.copy_of(run)
    if not copy.is_file() or not is_trained(run, study.plan.metric):
        return None
    from dinogen.families.registry import resolve
    from dinogen.training.preflight import MAY_CHANGE

    # A shorter or longer run is another one once it is done.
    ignored = {key: value for key, value in MAY_CHANGE.items() if key != "stages"}
    try:
        trained = load_config(copy)
    except ConfigError as error:
        log.warning("%s: what %s was trained with is not known", error, run.folder)
        return None
    then, now = (
        resolve(config).model_dump(mode="json", exclude=ignored) for config in (trained, run.config)
    )
    found = _difference(then, now)
    if found is None:
        return None
    key, old, new = found
    return (
        f"{run.source}: {key}: {run.folder} was trained with {old}, the study says {new} now: put "
        f"it back, or move that folder and {copy} away"
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
            f"{source}: metrics.names: lacks {plan.metric}, by which {path} chooses: add it"
        )
    run = StudyRun(track, name, seed, source, config.run, config)
    return replace(run, config=config.model_copy(update={"run": plan.folder / run.id}))


def _source(path: Path, entry: EntryConfig) -> Path:
    """A config of the study; relative paths begin where the study's file lies."""
    return path.parent / entry.config


def _lengths(config: Config, epochs: float, where: str) -> list[str]:
    """Changes that make a run that many epochs long, its stages in the same proportions."""
    if len({stage.kimg is None for stage in config.stages}) > 1:
        raise ConfigError(
            f"{where}: some of its stages are given in kimg and some in epochs: give all in one, "
            "or the lengths in final.overrides"
        )
    sizes = [stage.kimg or stage.epochs or 0.0 for stage in config.stages]
    changes: list[str] = []
    for number, size in enumerate(sizes):
        length = epochs * size / sum(sizes)
        changes += [f"stages.{number}.epochs={length:.12g}", f"stages.{number}.kimg=null"]
    return changes
