"""The best config of each track, and the runs that are known because of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launch.study.plan import Study, StudyRun


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
