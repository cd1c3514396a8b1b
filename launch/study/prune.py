"""Which trials are stopped early: decided from values that are measured while they train.

The median rule is that of Google Vizier (Golovin et al. 2017, section 3.2); successive halving is
the asynchronous one (Li et al. 2018, algorithm 2).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from dinogen.config.search import PruneConfig
from dinogen.runs.run import Stage
from launch.study.trials import Report, Trial


def reports_of(stages: Sequence[Stage], metric: str, at_kimg: Sequence[float]) -> Iterator[Report]:
    """What was measured of a run while it trained; its very end decides nothing any more.

    Args:
        stages: of the run.
        metric: one of ``eval.generated``.
        at_kimg: points on the clock; a step is the first measurement at or after one of them, or
            without any each measurement.
    """
    end = stages[-1].end or math.inf
    lines = [line for stage in stages for line in stage.metrics if line["nimg"] < end]
    found = [
        (number, line["nimg"], (line["metrics"].get(metric) or {}).get("value"))
        for number, line in enumerate(lines, start=1)
    ]
    measured = [Report(step, nimg, value) for step, nimg, value in found if value is not None]
    if not at_kimg:
        yield from measured
        return
    for step, kimg in enumerate(at_kimg, start=1):
        later = (one for one in measured if one.nimg >= kimg * 1000)
        if (first := next(later, None)) is not None:
            yield Report(step, first.nimg, first.value)


def why_pruned(
    prune: PruneConfig, metric: str, better: str, trial: Trial, others: Sequence[Trial]
) -> str | None:
    """Why a trial is to be stopped after its newest report; None if it goes on.

    Args:
        prune: the rule.
        metric: whose values were reported.
        better: which way it is better, ``lower`` or ``higher``.
        trial: with the new report.
        others: the other trials.
    """
    rule = {"median": _median, "successive_halving": _halving}.get(prune.method)
    return rule(prune, metric, better, trial, others) if rule else None


def _median(
    prune: PruneConfig, metric: str, better: str, trial: Trial, others: Sequence[Trial]
) -> str | None:
    now = trial.reports[-1]
    done = [one for one in others if one.state == "done"]
    values = [report.value for one in done for report in one.reports if report.step == now.step]
    if len(done) < prune.min_trials or not values:
        return None
    sign = -1 if better == "higher" else 1
    best = min(sign * report.value for report in trial.reports)
    middle = statistics.median(sign * value for value in values)
    if best <= middle:
        return None
    return (
        f"after {now.nimg / 1000:.4g} kimg its best {metric} was {sign * best:.5g}, and the median "
        f"of {len(values)} trials {sign * middle:.5g}"
    )


def _halving(
    prune: PruneConfig, metric: str, better: str, trial: Trial, others: Sequence[Trial]
) -> str | None:
    now = trial.reports[-1]
    sign = -1 if better == "higher" else 1
    for rung in _rungs(prune):
        if rung > now.step:
            return None
        if any(report.step >= rung for report in trial.reports[:-1]):
            continue  # passed before
        reached = [
            sign * next(report.value for report in one.reports if report.step >= rung)
            for one in others
            if one.reports and one.reports[-1].step >= rung
        ]
        if len(reached) < prune.min_trials:
            continue
        ranked = sorted([*reached, sign * now.value])
        num_kept = max(1, len(ranked) // prune.factor)
        if sign * now.value > ranked[num_kept - 1]:
            return (
                f"after {now.nimg / 1000:.4g} kimg its {metric} was {now.value:.5g}, not among the "
                f"best {num_kept} of {len(ranked)} trials"
            )
    return None


def _rungs(prune: PruneConfig) -> Iterator[int]:
    """The steps at which trials are compared."""
    if prune.at_kimg:
        return iter(range(1, len(prune.at_kimg) + 1))
    return (prune.factor**i for i in itertools.count())
