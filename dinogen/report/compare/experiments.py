"""Experiments of a comparison: runs that differ only in the seed, and tables of what they reached.

An experiment of a single run has its name. Tracks of a study are compared among themselves.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinogen.report.compare.model import ComparedRun, Point
from dinogen.report.compare.table import ARROWS, MAIN_METRICS, Column, best_of, caution_words
from dinogen.report.progress import rounded

# Config keys that do not make it a different experiment.
ASIDE = ("run", "seed", "notes", "cluster", "log", "checkpoint", "device", "metrics", "prepare")


@dataclass(frozen=True)
class Experiment:
    """A run, or several that differ only in the seed.

    Attributes:
        name: of the run, or what the names of its runs begin with; no other experiment has it.
        runs: its runs; of several, each is finished.
    """

    name: str
    runs: tuple[ComparedRun, ...]

    @property
    def track(self) -> Path | None:
        """The track of a study that it is in; None without a study."""
        return self.runs[0].track

    @property
    def label(self) -> str:
        """The name without the folder of its track."""
        if self.track is None:
            return self.name
        return ", ".join(part.rpartition("/")[2] for part in self.name.split(", "))


def find_experiments(runs: Sequence[ComparedRun]) -> list[Experiment]:
    """The experiments of runs, in the order of the first run of each."""
    groups: dict[Any, list[ComparedRun]] = {}
    for run in runs:
        repeats = run.config and run.finished and run.seed is not None
        key = (_experiment(run.config), run.track) if repeats else run.name
        groups.setdefault(key, []).append(run)
    found = [tuple(some) for group in groups.values() for some in _apart(group)]
    names = [_common(some) for some in found]
    taken = Counter(names)
    return [
        Experiment(name if taken[name] == 1 else ", ".join(run.name for run in some), some)
        for name, some in zip(names, found, strict=True)
    ]


def _apart(runs: list[ComparedRun]) -> list[list[ComparedRun]]:
    """Runs of one config by folder if a seed occurs twice; alone if it does in one folder."""
    seeds = {run.seed for run in runs}
    if len(seeds) == 1:
        return [[run] for run in runs]
    if len(seeds) == len(runs):
        return [runs]
    folders: dict[Path, list[ComparedRun]] = {}
    for run in runs:
        folders.setdefault(run.folder.absolute().parent, []).append(run)
    if len(folders) == 1:
        return [[run] for run in runs]
    return [some for group in folders.values() for some in _apart(group)]


def _experiment(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key not in ASIDE}
    return json.dumps(rest, sort_keys=True, default=str)


def _common(runs: Sequence[ComparedRun]) -> str:
    """The common prefix of the names."""
    names = [run.name for run in runs]
    if len(names) == 1:
        return names[0]
    first, last = min(names), max(names)
    length = next(
        (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first[:length].rstrip("-_/. ").removesuffix("seed").rstrip("-_/. ") or runs[0].family


@dataclass(frozen=True)
class Seeds:
    """Metric values of an experiment with several seeds.

    Attributes:
        name: of the experiment.
        runs: their names.
        values: by column: mean and standard deviation (N - 1) over the runs.
    """

    name: str
    runs: tuple[str, ...]
    values: dict[str, tuple[float, float]]


def over_seeds(experiments: Sequence[Experiment], columns: Sequence[Column]) -> list[Seeds]:
    """Means over the seeds of each experiment that has several.

    Only metrics that all its runs have, measured in the same way, are averaged.
    """
    found = []
    for one in experiments:
        if len(one.runs) < 2:
            continue
        values = {}
        for column in columns:
            if column.group == "Cost":
                continue
            numbers = [run.numbers.get(column.name) for run in one.runs]
            known = [n.value for n in numbers if n is not None and n.value is not None]
            if len(known) == len(one.runs) and len({n.alike for n in numbers if n}) == 1:
                values[column.name] = (statistics.fmean(known), statistics.stdev(known))
        found.append(Seeds(one.name, tuple(run.name for run in one.runs), values))
    return found


EqualRow = tuple[str, tuple[str, ...], dict[str, tuple[float, float | None]]]


@dataclass(frozen=True)
class Equal:
    """Metric values of runs after equally much training.

    Attributes:
        folder: that holds the runs.
        unit: ``images`` or ``seconds``.
        amount: how much: what the shortest of the runs had.
        names: metrics.
        rows: name of a run, or of an experiment with several seeds; its runs; and the value of each
            metric, over the seeds their mean and standard deviation. Best first by the main metric.
        best: names of the rows with the best value, by metric.
        arrows: the direction that is better, by metric.
        left_out: runs whose files do not say how long they took.
        cautions: by the name of a row and the metric: :func:`caution_words` of its values.
    """

    folder: str
    unit: str
    amount: float
    names: tuple[str, ...]
    rows: tuple[EqualRow, ...]
    left_out: tuple[str, ...]
    cautions: dict[str, dict[str, str]]
    best: dict[str, tuple[str, ...]]
    arrows: dict[str, str]

    @property
    def words(self) -> str:
        """How much training, in words."""
        if self.unit == "images":
            return f"{rounded(self.amount, 4)} thousand images"
        if self.amount < 120:
            return f"{rounded(self.amount, 3)} s of training"
        return f"{rounded(self.amount / 60, 3)} minutes of training"


def at_equal(runs: Sequence[ComparedRun], experiments: Sequence[Experiment]) -> list[Equal]:
    """What the runs of a folder had reached after the same images and after the same time.

    Between two measurements a curve is a straight line. Only metrics that were measured in the same
    way in all the runs of a folder are compared.
    """
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        if run.finished and run.measured:
            groups.setdefault(str(run.folder.parent), []).append(run)
    tables = []
    for folder, some in groups.items():
        for unit in ("images", "seconds"):
            found = _equal(folder, unit, some, experiments)
            if found is not None:
                tables.append(found)
    return tables


def _equal(
    folder: str, unit: str, runs: Sequence[ComparedRun], experiments: Sequence[Experiment]
) -> Equal | None:
    names = list(
        dict.fromkeys(name for run in runs for line in run.measured for name in line["metrics"])
    )
    ends = {run.name: _x(run, run.measured[-1]["nimg"] / 1000, unit) for run in runs}
    timed = [run for run in runs if ends[run.name] is not None]
    if len(timed) < 2:
        return None
    amount = min(end for end in ends.values() if end is not None)
    values: dict[str, dict[str, float]] = {}
    said: dict[str, dict[str, list[str | None]]] = {}
    for name in names:
        curves = {run.name: run.curve(name) for run in timed}
        if len({point.alike for curve in curves.values() for point in curve}) != 1:
            continue
        found = {
            run.name: value
            for run in timed
            if (value := _value_at(run, curves[run.name], amount, unit)) is not None
        }
        if len(found) > 1:
            values[name] = found
            said[name] = {key: [one.caution for one in curve] for key, curve in curves.items()}
    if not values:
        return None
    rows: list[EqualRow] = []
    cautions = {}
    for title, some in _within(experiments, timed):
        cells = {}
        for name, found in values.items():
            known = [found[one] for one in some if one in found]
            if len(known) == len(some):
                spread = statistics.stdev(known) if len(known) > 1 else None
                cells[name] = (statistics.fmean(known), spread)
        every = {name: [one for run in some for one in said[name][run]] for name in cells}
        cautions[title] = {name: words for name in cells if (words := caution_words(*every[name]))}
        rows.append((title, some, cells))
    # a value of one experiment alone is compared with nothing
    names = [name for name in values if sum(name in cells for _, _, cells in rows) > 1]
    if not names:
        return None
    better = {name: _better(timed, name) for name in names}
    best = {
        name: best_of({title: cells[name][0] for title, _, cells in rows if name in cells}, way)
        for name, way in better.items()
        if way != "none"
    }
    by = next((name for name in MAIN_METRICS if name in names), names[0])
    if by in best:
        sign = -1.0 if better[by] == "higher" else 1.0
        rows.sort(key=lambda row: sign * row[2][by][0] if by in row[2] else math.inf)
    arrows = {name: ARROWS[way] for name, way in better.items() if way in ARROWS}
    left_out = tuple(run.name for run in runs if run not in timed)
    return Equal(folder, unit, amount, tuple(names), tuple(rows), left_out, cautions, best, arrows)


def _better(runs: Sequence[ComparedRun], name: str) -> str:
    """Which way a metric is better; earlier versions did not write it in every line."""
    lines = (line["metrics"].get(name) or {} for run in runs for line in run.measured)
    return next((way for one in lines if (way := one.get("better")) in ("lower", "higher")), "none")


def _x(run: ComparedRun, kimg: float, unit: str) -> float | None:
    return kimg if unit == "images" else run.seconds_at(kimg)


def _value_at(run: ComparedRun, curve: Sequence[Point], amount: float, unit: str) -> float | None:
    """The curve's value there; None before its first point."""
    points = [(x, one.value) for one in curve if (x := _x(run, one.kimg, unit)) is not None]
    if not points or not points[0][0] <= amount <= points[-1][0]:
        return None
    return float(np.interp(amount, [x for x, _ in points], [value for _, value in points]))


def _within(
    experiments: Sequence[Experiment], runs: Sequence[ComparedRun]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and runs of the experiments among some runs; of one that lacks a run, each alone."""
    names = {run.name for run in runs}
    for one in experiments:
        there = tuple(run.name for run in one.runs if run.name in names)
        if len(there) == len(one.runs):
            yield one.name, there
        else:
            yield from ((name, (name,)) for name in there)
