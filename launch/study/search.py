"""The trials of one config as runs: what is pruned, done or failed, and what follows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinogen.config import ConfigError
from dinogen.config.study import EntryConfig, StudyConfig
from dinogen.errors import UserError
from dinogen.runs.fingerprint import alike_id
from dinogen.runs.run import Run
from launch.study.prune import reports_of, why_pruned
from launch.study.runs import StudyRun, steps_left, track_run
from launch.study.trials import FolderTrials, Trial, Trials


class Search:
    """The trials of one config, each of them a run.

    Args:
        path: the plan's file.
        plan: what it says.
        track: of the config.
        entry: the config.

    Attributes:
        id: ``TRACK/NAME`` of the config.
        settings: the section ``search:``.
        metric: decides in the study.
        trials: what is known of the trials.
        config_run: the config without values of a trial; it is not trained.

    Raises:
        ConfigError: the config has no such key or takes no such value, or nothing to prune by is
            measured.
        UserError: the record of the trials cannot be read, or is of another search.
    """

    def __init__(self, path: Path, plan: StudyConfig, track: str, entry: EntryConfig) -> None:
        assert plan.search is not None
        self.settings, self.track, self.metric = plan.search, track, plan.metric
        self._path, self._plan, self._entry = path, plan, entry
        self._made: dict[int, StudyRun] = {}
        self.id = f"{track}/{entry.label}"
        self.config_run = track_run(path, plan, track, entry, entry.label)
        self._check_parameters()
        self._prune_better = self._check_prune()
        self.trials = _open_trials(path, plan, self.id, self._pruned_by)

    def _check_parameters(self) -> None:
        """The config has every key, and takes the first and last of its values."""
        from dinogen.families.registry import resolve

        for key, one in self.settings.parameters.items():
            for value in one.choices or (one.at(0.0), one.high):
                entry = self.entry_of(Trial(0, {key: value}))
                try:
                    run = track_run(self._path, self._plan, self.track, entry, "")
                    resolve(run.config)
                except ConfigError as error:
                    raise ConfigError(f"{self._path}: search.parameters: {error}") from None

    def _check_prune(self) -> str:
        """Which way the metric is better that trials are pruned by."""
        prune, config = self.settings.prune, self.config_run.config
        metric = (prune.metric if prune else None) or self.metric
        key = "search.prune.metric" if prune and prune.metric else "metric"
        better = better_of(metric, f"{self._path}: {key}")
        if prune is None or not self.prunes:
            return better
        measured = config.eval
        if metric not in measured.generated or not (measured.every_kimg or measured.every_epochs):
            raise ConfigError(
                f"{self._path}: search.prune: {self.config_run.source} does not measure {metric} "
                f"while it trains: add eval.every_kimg=N and eval.generated=[{metric}] to overrides"
            )
        return better

    def check_metric(self) -> None:
        """The feature extractor of the study's metric has its weights.

        Raises:
            ConfigError: it has not; names the key that says where they are.
        """
        import torch

        from dinogen.metrics.registry import OF_FEATURES
        from dinogen.metrics.suite import Extractors

        prune = self.settings.prune
        config = self.config_run.config.metrics
        for metric in {self.metric, (prune.metric if prune else None) or self.metric}:
            if metric in OF_FEATURES:
                extractors = Extractors(config, torch.device("cpu"))
                found = extractors.get(OF_FEATURES[metric].extractor)
                if isinstance(found, UserError):
                    raise ConfigError(f"{self._path}: {metric} is not available: {found}")

    @property
    def runs(self) -> tuple[StudyRun, ...]:
        """The trials of this machine that are known by now."""
        return tuple(self._run(one) for one in self.trials.all() if not one.elsewhere)

    def _run(self, trial: Trial) -> StudyRun:
        if trial.number not in self._made:
            entry = self.entry_of(trial)
            made = track_run(self._path, self._plan, self.track, entry, entry.label)
            self._made[trial.number] = replace(made, trial=trial.number)
        return self._made[trial.number]

    def entry_of(self, trial: Trial) -> EntryConfig:
        """The config with the values of a trial."""
        changes = (*self._entry.overrides, *trial.overrides)
        name = trial.name(self._entry.label)
        return self._entry.model_copy(update={"name": name, "overrides": changes})

    def owns(self, run: StudyRun) -> bool:
        """Whether a run is one of the trials."""
        return run.trial in self._made and self._made[run.trial].id == run.id

    def trial_of(self, run: StudyRun) -> Trial:
        """The trial that a run is of."""
        return next(one for one in self.trials.all() if one.number == run.trial)

    def ask(self) -> StudyRun | None:
        """The run of a further trial; None if there are enough."""
        trial = self.trials.ask()
        return None if trial is None else self._run(trial)

    @property
    def prunes(self) -> bool:
        """Whether trials may be stopped early."""
        return self.settings.prune is not None and self.settings.prune.method != "none"

    @property
    def _pruned_by(self) -> dict[str, Any]:
        """What the values that decide about pruning depend on, by key; nothing if none is pruned.

        A step is the number of a measurement, so values at other intervals have other steps.
        """
        prune, measured = self.settings.prune, self.config_run.config.eval
        if prune is None or not self.prunes:
            return {}
        return {
            "search.prune.metric": prune.metric or self.metric,
            "search.prune.at_kimg": list(prune.at_kimg),
            "eval.every_kimg": measured.every_kimg,
            "eval.every_epochs": measured.every_epochs,
        }

    def watch(self, run: StudyRun) -> str | None:
        """Read what was measured while a trial trained; why it is pruned, None if it is not."""
        prune = self.settings.prune
        if prune is None or not self.prunes:
            return None
        trial = self.trial_of(run)
        if trial.state == "done":
            return None
        metric = prune.metric or self.metric
        last = trial.reports[-1].step if trial.reports else 0
        for report in reports_of(run.stages, metric, prune.at_kimg):
            if report.step <= last or trial.state == "pruned":
                continue
            others = [one for one in self.trials.all() if one.number != trial.number]
            told = replace(trial, reports=[*trial.reports, report])
            why = why_pruned(prune, metric, self._prune_better, told, others)
            self.trials.report(trial, report, why)
        return trial.why if trial.state == "pruned" else None

    def settle(self) -> None:
        """Record the trials that are done by now."""
        for run in self.runs:
            trial = self.trial_of(run)
            if self.is_over(run) or steps_left(run, self.metric):
                continue
            found = run.stages[-1].metric(self.metric) or {}
            trial.state, trial.why = "done", ""
            trial.value, trial.fingerprint = found["value"], found["fingerprint"]
            trial.alike = found["alike"]
            self.trials.end(trial)

    def fail(self, run: StudyRun, why: str) -> None:
        """Record that a trial has failed."""
        trial = self.trial_of(run)
        trial.state, trial.why = "failed", why
        self.trials.end(trial)

    @property
    def has_results(self) -> bool:
        """Whether any trial is done or pruned."""
        return any(one.ended for one in self.trials.all())

    def is_over(self, run: StudyRun) -> bool:
        """Whether a trial is done or pruned, or has failed and is not tried again."""
        trial = self.trial_of(run)
        return trial.ended or (trial.state == "failed" and not self.trials.retries)

    @property
    def ranked(self) -> list[Trial]:
        """The trials, best first; those without a value at the end, by number."""
        sign = -1 if self.trials.better == "higher" else 1

        def key(trial: Trial) -> tuple[float, int]:
            return (math.inf if trial.value is None else sign * trial.value, trial.number)

        return sorted(self.trials.all(), key=key)

    def best_runs(self, num: int) -> list[StudyRun]:
        """The best trials of this machine that have begun."""
        here = [one for one in self.ranked if not one.elsewhere and self.has_begun(one)]
        return [self._run(one) for one in here[:num]]

    def has_begun(self, trial: Trial) -> bool:
        """Whether a trial's run has begun, as far as this machine knows."""
        return trial.elsewhere or Run(self._run(trial).folder).has_config

    @property
    def importances(self) -> dict[str, float]:
        """How much each parameter matters, largest first; nothing without optuna."""
        try:
            from launch.study.stored import importances
        except UserError:
            return {}
        return importances(self.settings, self.trials.better, self.trials.all())

    @property
    def known(self) -> bool:
        """Whether there are all trials, and those of other machines have ended."""
        others = [one for one in self.trials.all() if one.elsewhere]
        return not self.trials.num_left and all(
            one.ended or one.state == "failed" for one in others
        )

    @property
    def elsewhere(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and metric value of each trial that other machines have made."""
        known: dict[str, Any] = {}
        for run in self.runs:
            known |= (run.stages[-1].evaluation or {}).get("fingerprints") or {}
        return [
            (
                trial.name(self._entry.label),
                {
                    "value": trial.value,
                    "better": self.trials.better,
                    "fingerprint": trial.fingerprint,
                    "alike": trial.alike or alike_id(trial.fingerprint, known),
                },
            )
            for trial in self.trials.all()
            if trial.elsewhere and trial.state == "done"
        ]

    @property
    def summary(self) -> str:
        """How many trials there are, in words."""
        trials = self.trials.all()
        words = (
            [f"{len(trials)} of {self.settings.num} trials known"]
            if self.trials.num_left
            else [f"{self.settings.num} trials"]
        )
        for state in ("done", "pruned", "failed"):
            if num := sum(one.state == state for one in trials):
                words.append(f"{num} {state}")
        if num := sum(one.elsewhere and not one.ended for one in trials):
            words.append(f"{num} on other machines")
        return ", ".join(words)


def _open_trials(path: Path, plan: StudyConfig, name: str, pruned_by: Mapping[str, Any]) -> Trials:
    search = plan.search
    assert search is not None
    file, better = plan.folder / f"{name}-trials.json", better_of(plan.metric, f"{path}: metric")
    if search.storage is None and not search.learns:
        return FolderTrials(search, plan.metric, better, file, pruned_by=pruned_by)
    from launch.study.stored import StoredTrials, suggest

    if search.storage is None:
        return FolderTrials(search, plan.metric, better, file, suggest, pruned_by)
    where = f"{path}: search.storage"
    return StoredTrials(name, search, plan.metric, better, file, where, pruned_by)


def better_of(metric: str, where: str) -> str:
    """Which way a metric is better.

    Args:
        metric: its name.
        where: the plan and key, named in errors.

    Raises:
        ConfigError: it is not known, or has no better or worse.
    """
    from dinogen.metrics.registry import better, chosen_names

    (metric,) = chosen_names([metric], where)
    if better(metric) == "none":
        raise ConfigError(f"{where}: {metric} has no better or worse: choose another")
    return better(metric)
