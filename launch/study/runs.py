"""One run of a study: where it is, how it is made from the plan, and what is left of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinogen.config import Config, ConfigError, load_config
from dinogen.config.study import FINAL, EntryConfig, Length, StudyConfig
from dinogen.runs.run import Run, Stage
from launch.request import choose_stages
from launch.study.budget import Budget, find_budget, length_changes, stage_shares

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
        trial: its number in a search; None if it is no trial.
        budget: the minutes that it is given; None if its length is not in minutes. Until they are
            measured, the lengths in ``config`` are not those that it is trained with.
    """

    id: str
    track: str
    name: str
    source: Path
    outside: Path
    config: Config
    only: str | None = None
    trial: int | None = None
    budget: Budget | None = None

    @property
    def unmeasured(self) -> bool:
        """Whether its length is in minutes, and the speed of its config is not known yet."""
        return self.budget is not None and self.budget.measured is None

    @property
    def budget_key(self) -> str:
        """Its name in budget.json, where its length is in minutes; else empty."""
        return self.budget.key if self.budget is not None else ""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.config.run

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that are to be trained, as far as they are."""
        chosen = choose_stages(self.config, self.only)
        return tuple(one for one in Run.of(self.config).planned if one.resolution in chosen)


def track_runs(path: Path, plan: StudyConfig, track: str, entry: EntryConfig) -> list[StudyRun]:
    """The runs of a config of a track, one for each seed."""
    changes, budget = _track_changes(path, plan, track, entry)
    return [
        _run(path, plan, track, f"{entry.label}-seed{seed}", entry, changes, seed, budget)
        for seed in plan.tracks[track].seeds
    ]


def track_run(
    path: Path, plan: StudyConfig, track: str, entry: EntryConfig, folder: str
) -> StudyRun:
    """The one run of a config that is searched over, or of a trial."""
    (seed,) = plan.tracks[track].seeds
    changes, budget = _track_changes(path, plan, track, entry)
    return _run(path, plan, track, folder, entry, changes, seed, budget)


def final_runs(path: Path, plan: StudyConfig, track: str, entry: EntryConfig) -> list[StudyRun]:
    """The runs of a config in the final, one for each seed."""
    final = plan.final
    assert final is not None
    changes, budget = _track_changes(path, plan, track, entry)
    label = f"{track}-{entry.label}"
    if final.epochs is not None:
        config = load_config(_source(path, entry), changes)
        changes += _epochs(config, final.epochs, f"{path}: final.epochs: {entry.config}")
        budget = None
    changes += final.overrides
    if final.kimg is not None or final.minutes is not None:
        more, budget = _budgeted(path, plan, FINAL, final, entry, label, changes)
        changes += more
    entry = entry.model_copy(update={"name": label})
    return [
        _run(path, plan, FINAL, f"{entry.label}-seed{seed}", entry, changes, seed, budget)
        for seed in final.seeds
    ]


def _track_changes(
    path: Path, plan: StudyConfig, track: str, entry: EntryConfig
) -> tuple[list[str], Budget | None]:
    """The changes to a config of a track, with those of its length; and its minutes, if any."""
    section = plan.tracks[track]
    changes = [*plan.overrides, *section.overrides, *entry.overrides]
    more, budget = _budgeted(path, plan, track, section, entry, entry.label, changes)
    return changes + more, budget


def _budgeted(
    path: Path,
    plan: StudyConfig,
    track: str,
    section: Length,
    entry: EntryConfig,
    label: str,
    changes: list[str],
) -> tuple[list[str], Budget | None]:
    """Changes for the length that a section gives; and the minutes, if it gives those."""
    if section.kimg is None and section.minutes is None:
        return [], None
    key = f"tracks.{track}" if track != FINAL else FINAL
    unit = "kimg" if section.minutes is None else "minutes"
    where = f"{path}: {key}.{unit}: {entry.config}"
    config = load_config(_source(path, entry), changes)
    stage_shares(config, where)  # a mistake must not wait for a measurement
    budget = find_budget(plan.folder, f"{track}/{label}", section, config)
    kimg = section.kimg
    if budget is not None and budget.measured is not None:
        kimg = budget.measured.kimg
    if kimg is None:
        return [], budget
    return length_changes(config, kimg, section.measurements, where), budget


def _run(
    path: Path,
    plan: StudyConfig,
    track: str,
    folder: str,
    entry: EntryConfig,
    changes: Sequence[str],
    seed: int,
    budget: Budget | None,
) -> StudyRun:
    source = _source(path, entry)
    config = load_config(source, [*changes, f"seed={seed}"])
    names = config.metrics.names
    if names and plan.metric not in names:
        raise ConfigError(
            f"{source}: metrics.names: lacks {plan.metric}, which {path} chooses by: add it"
        )
    run_id = f"{track}/{folder}"
    config, outside = config.model_copy(update={"run": plan.folder / run_id}), config.run
    return StudyRun(run_id, track, entry.label, source, outside, config, budget=budget)


def _source(path: Path, entry: EntryConfig) -> Path:
    """A config of the study; relative paths start at the folder of the study's file."""
    return path.parent / entry.config


def _epochs(config: Config, epochs: float, where: str) -> list[str]:
    """Changes that give a run this number of epochs, its stages in the same proportions."""
    changes: list[str] = []
    for number, share in enumerate(stage_shares(config, where)):
        changes += [f"stages.{number}.epochs={epochs * share:.12g}", f"stages.{number}.kimg=null"]
    return changes


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
