"""Runs that differ in nothing but their seed, taken together: mean and spread over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dinogen.report.compare.columns import Column
from dinogen.report.compare.model import Run

# What does not make another experiment.
ASIDE = ("run", "seed", "notes", "cluster", "log", "checkpoint", "device", "metrics", "prepare")


@dataclass(frozen=True)
class Seeds:
    """Some runs of one experiment.

    Attributes:
        name: of the experiment: what the names of its runs have in common, else the family.
        runs: their names.
        values: by column: mean and standard deviation (N - 1) over the runs.
    """

    name: str
    runs: tuple[str, ...]
    values: dict[str, tuple[float, float]]


def over_seeds(runs: Sequence[Run], columns: Sequence[Column]) -> list[Seeds]:
    """Groups of at least two runs of one config under different seeds.

    Only figures that all runs of a group have, measured alike, are averaged.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.config and run.finished:
            groups.setdefault(_experiment(run.config), []).append(run)
    found = []
    for some in groups.values():
        if len({run.seed for run in some}) < 2:
            continue
        values = {}
        for column in columns:
            if column.group == "Cost":
                continue
            numbers = [run.numbers.get(column.name) for run in some]
            known = [n.value for n in numbers if n is not None and n.value is not None]
            if len(known) == len(some) and len({n.fingerprint for n in numbers if n}) == 1:
                values[column.name] = (statistics.fmean(known), statistics.stdev(known))
        found.append(Seeds(_common(some), tuple(run.name for run in some), values))
    return found


def _experiment(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key not in ASIDE}
    return json.dumps(rest, sort_keys=True, default=str)


def _common(runs: Sequence[Run]) -> str:
    """What the names of runs begin with alike."""
    names = [run.name for run in runs]
    first, last = min(names), max(names)
    length = next(
        (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first[:length].rstrip("-_/. ").removesuffix("seed").rstrip("-_/. ") or runs[0].family
