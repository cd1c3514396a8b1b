"""The table of a comparison: its rows and columns, means over seeds, the story of a family."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dinogen.report.compare.columns import COSTS, MEASURED, Column, label_of, show_counts
from dinogen.report.compare.model import ComparedRun, Number

# By which one the rows are sorted and the story is told: the first that most runs have.
MAIN_METRICS = ("fid", "fd_dinov2", "fid768", "kid", "kid768", "kd_dinov2")
BY_DEVICE = {"seconds", "training_images_per_s", "sampling_images_per_s"}
DIGITS = 3


def make_columns(runs: Sequence[ComparedRun]) -> list[Column]:
    """The columns that at least one run has a value for, in the order of the table."""
    named = [(name, label, group) for group, names in MEASURED for name, label in names]
    known = {name for name, _, _ in named} | {name for name, _ in COSTS}
    rest = {name: None for run in runs for name in run.numbers if name not in known}
    named += [(name, name, "Other") for name in rest]
    named += [(name, label, "Cost") for name, label in COSTS]
    columns = []
    for name, label, group in named:
        numbers = values_of(runs, name)
        if numbers:
            columns.append(_column(name, label, group, numbers, runs))
    return columns


def values_of(runs: Sequence[ComparedRun], name: str) -> dict[str, Number]:
    """Numbers of that name that have a value, by the name of the run."""
    found = {run.name: run.numbers.get(name) for run in runs}
    return {key: one for key, one in found.items() if one is not None and one.value is not None}


def main_metric(columns: Sequence[Column], runs: Sequence[ComparedRun]) -> Column | None:
    """The column that the comparison is told by; None if nothing was measured."""
    counts = {one.name: len(values_of(runs, one.name)) for one in columns}
    found = [name for name in MAIN_METRICS if name in counts]
    if not found:
        return next((one for one in columns if one.group != "Cost"), None)
    first = max(found, key=lambda name: (counts[name], -MAIN_METRICS.index(name)))
    return next(one for one in columns if one.name == first)


def sort_runs(runs: Sequence[ComparedRun], by: Column | None) -> list[ComparedRun]:
    """Best first, those without a value last; as given where values do not compare."""
    if by is None or not by.comparable or by.better == "none":
        return list(runs)
    sign = 1.0 if by.better == "lower" else -1.0

    def place(run: ComparedRun) -> float:
        number = run.numbers.get(by.name)
        return math.inf if number is None or number.value is None else sign * number.value

    return sorted(runs, key=place)


def unavailable(
    runs: Sequence[ComparedRun], label: Callable[[str], str]
) -> list[tuple[str, str, list[str]]]:
    """``(metrics, reason, runs)`` of all that could not be measured."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for name, number in run.numbers.items():
            if number.value is None and number.reason:
                found.setdefault(number.reason, {}).setdefault(name, []).append(run.name)
    return [
        (
            ", ".join(label(name) for name in names),
            reason,
            list(dict.fromkeys(run for some in names.values() for run in some)),
        )
        for reason, names in found.items()
    ]


def _column(
    name: str, label: str, group: str, numbers: dict[str, Number], runs: Sequence[ComparedRun]
) -> Column:
    one = next(iter(numbers.values()))
    column = Column(name, label, group, one.better, _decimals(numbers))
    counts = {(n.num_samples, n.num_reference) for n in numbers.values()}
    if len(counts) == 1:
        column = replace(column, counts=show_counts(one))
    if group == "Cost":
        devices = {_device(run, numbers[run.name]) for run in runs if run.name in numbers}
        same = name not in BY_DEVICE or len(devices) == 1
    else:
        same = len({n.fingerprint for n in numbers.values()}) == 1 and len(counts) == 1
    column = replace(column, comparable=same)
    # among one there is no best
    if same and one.better != "none" and len(numbers) > 1:
        best, near = _best(numbers, one.better)
        column = replace(column, best=best, near=near)
    return column


def _device(run: ComparedRun, number: Number) -> str | None:
    source = run.sources.get(number.source)
    return source.device if source else None


def _best(numbers: dict[str, Number], better: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names with the best value, and names that two spreads do not tell apart from it."""
    values = {name: one.value for name, one in numbers.items() if one.value is not None}
    top = min(values.values()) if better == "lower" else max(values.values())
    best = tuple(name for name, value in values.items() if value == top)
    if len(best) == len(values):
        return (), ()  # where all are alike none is better
    spread = numbers[best[0]].spread
    near = []
    for name, one in numbers.items():
        if name in best or one.spread is None or spread is None:
            continue
        if abs(values[name] - top) <= 2 * math.hypot(one.spread, spread):
            near.append(name)
    return best, tuple(near)


def _decimals(numbers: dict[str, Number]) -> int:
    """So many that a middling value has three digits, and the smallest spread one."""
    values = [abs(one.value) for one in numbers.values() if one.value]
    if not values:
        return 0
    wanted = DIGITS - 1 - math.floor(math.log10(statistics.median(values)))
    spreads = [one.spread for one in numbers.values() if one.spread]
    if spreads:
        wanted = max(wanted, -math.floor(math.log10(min(spreads))))
    return max(0, min(6, wanted))


def number_rows(run: ComparedRun) -> list[dict[str, Any]]:
    """Every number of a run with its origin, full precision, for its provenance."""
    rows = []
    for number in (*run.numbers.values(), *run.others.values()):
        source = run.sources.get(number.source)
        rows.append(
            {
                "name": number.name,
                "label": label_of(number.name),
                "value": number.value,
                "spread": number.spread,
                "better": number.better,
                "num_samples": number.num_samples,
                "num_reference": number.num_reference,
                "fingerprint": number.fingerprint,
                "reason": number.reason,
                "caution": number.caution,
                "source": number.source,
                "file": source.file if source else None,
                "command": source.command if source else None,
                "nimg": source.nimg if source else None,
                "device": source.device if source else None,
                "versions": source.versions if source else {},
                "config_sha256": run.config_sha256,
                "data_sha256": run.data_sha256,
            }
        )
    return rows


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


def over_seeds(runs: Sequence[ComparedRun], columns: Sequence[Column]) -> list[Seeds]:
    """Groups of at least two runs of one config under different seeds.

    Only metric values that all runs of a group have, measured alike, are averaged.
    """
    groups: dict[str, list[ComparedRun]] = {}
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


def _common(runs: Sequence[ComparedRun]) -> str:
    """What the names of runs begin with alike."""
    names = [run.name for run in runs]
    first, last = min(names), max(names)
    length = next(
        (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first[:length].rstrip("-_/. ").removesuffix("seed").rstrip("-_/. ") or runs[0].family


@dataclass(frozen=True)
class Row:
    """One step of a family.

    Attributes:
        run: name of the run.
        step: its place, in the words of the notes; empty where they say nothing.
        change: what it does otherwise.
        metric: value and spread of the main loss metric value as text, a dash where there is none.
        best: whether no other step of the family is better.
        failed: what did not work.
        said: whether ``failed`` is from the notes, and not from the files of the run.
        next: what to try.
    """

    run: str
    step: str
    change: str
    metric: str
    best: bool
    failed: str
    said: bool
    next: str


@dataclass(frozen=True)
class Chapter:
    """One family: its steps in order."""

    family: str
    rows: tuple[Row, ...]


def tell(runs: Sequence[ComparedRun], by: Column | None) -> list[Chapter]:
    """A chapter for each family, in the order in which they come; steps sorted as people count."""
    families: dict[str, list[ComparedRun]] = {}
    for run in runs:
        families.setdefault(run.family, []).append(run)
    return [
        Chapter(family, tuple(_row(run, some, by) for run in sorted(some, key=_place)))
        for family, some in families.items()
    ]


def _row(run: ComparedRun, family: Sequence[ComparedRun], by: Column | None) -> Row:
    number = run.numbers.get(by.name) if by else None
    metric, best = "–", False
    if by is not None and number is not None and number.value is not None:
        metric = by.text(number.value)
        if number.spread is not None:
            metric += f" ± {by.text(number.spread)}"
        values = [
            one.value
            for other in family
            if (one := other.numbers.get(by.name)) is not None and one.value is not None
        ]
        top = min(values) if by.better == "lower" else max(values)
        best = by.comparable and len(values) > 1 and number.value == top
    said = "failed" in run.notes
    problems = "" if run.finished and not run.problems else "; ".join(run.problems)
    return Row(
        run=run.name,
        step=run.notes.get("step", ""),
        change=run.notes.get("change", ""),
        metric=metric,
        best=best,
        failed=run.notes.get("failed", problems),
        said=said,
        next=run.notes.get("next", ""),
    )


def _place(run: ComparedRun) -> tuple[bool, list[tuple[int, int, str]]]:
    """Steps as people count them: 2 before 10, those without one last."""
    step = run.notes.get("step", "")
    parts = re.findall(r"\d+|\D+", step.lower())
    return not step, [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.strip()) for part in parts
    ]
