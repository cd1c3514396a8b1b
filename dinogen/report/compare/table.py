"""The table of a comparison: its columns, the order of its rows, and means over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinogen.report.compare.model import ComparedRun, Number, Point
from dinogen.runs.values import favours

# (heading, ((name, label), ...)) in the order of the table; metrics that are not listed come last.
MEASURED: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Inception",
        (
            ("fid", "FID"),
            ("kid", "KID"),
            ("is", "IS"),
            ("precision", "precision"),
            ("recall", "recall"),
            ("density", "density"),
            ("coverage", "coverage"),
            ("memorisation", "memorisation"),
        ),
    ),
    (
        "Inception-768",
        (
            ("fid768", "FID-768"),
            ("kid768", "KID-768"),
            ("precision768", "precision"),
            ("recall768", "recall"),
            ("density768", "density"),
            ("coverage768", "coverage"),
            ("memorisation768", "memorisation"),
        ),
    ),
    (
        "DINOv2",
        (
            ("fd_dinov2", "FD-DINOv2"),
            ("kd_dinov2", "KD-DINOv2"),
            ("precision_dinov2", "precision"),
            ("recall_dinov2", "recall"),
            ("density_dinov2", "density"),
            ("coverage_dinov2", "coverage"),
            ("memorisation_dinov2", "memorisation"),
        ),
    ),
    (
        "Face detector",
        (
            ("faces", "faces"),
            ("fd_onet", "FD-O-Net"),
            ("kd_onet", "KD-O-Net"),
            ("precision_onet", "precision"),
            ("recall_onet", "recall"),
            ("density_onet", "density"),
            ("coverage_onet", "coverage"),
            ("memorisation_onet", "memorisation"),
        ),
    ),
    (
        "Diversity",
        (("lpips_diversity", "LPIPS diversity"), ("guide_diversity", "guide diversity")),
    ),
    ("Detail", (("spectrum", "spectrum, dB"), ("sharpness", "sharpness"))),
    ("Prompts", (("clip_score", "CLIP score"), ("clip_retrieval", "retrieval"))),
    (
        "Reconstruction",
        (
            ("reconstruction_lpips", "LPIPS"),
            ("reconstruction_psnr", "PSNR, dB"),
            ("reconstruction_ssim", "SSIM"),
        ),
    ),
)
COSTS: tuple[tuple[str, str], ...] = (
    ("num_parameters", "parameters, M"),
    ("nimg", "images seen, k"),
    ("seconds", "training, h:m:s"),
    ("training_s", "of it steps, h:m:s"),
    ("gpu_hours", "GPU hours"),
    ("cpu_hours", "CPU hours"),
    ("peak_memory_mb", "peak memory, MiB"),
    ("training_images_per_s", "training, images/s"),
    ("sampling_images_per_s", "sampling, images/s"),
)


@dataclass(frozen=True)
class Column:
    """One kind of number for all runs.

    Attributes:
        name: as in :class:`Number`.
        label: heading.
        group: heading above several columns.
        better: ``lower``, ``higher`` or ``none``.
        decimals: number shown.
        comparable: False if fingerprints, counts or devices differ: then no run is the best.
        counts: numbers of samples and real images if they are the same for all, else empty.
        best: names of the runs with the best value.
        near: names of runs within two spreads of the best.
    """

    name: str
    label: str
    group: str
    better: str
    decimals: int
    comparable: bool = True
    counts: str = ""
    best: tuple[str, ...] = ()
    near: tuple[str, ...] = ()

    @property
    def full_label(self) -> str:
        """The label, with the feature extractor if several have a column of this label."""
        needs = self.label in ("precision", "recall", "density", "coverage", "memorisation")
        return (
            f"{self.label} ({self.group})"
            if needs or self.group == "Reconstruction"
            else self.label
        )

    @property
    def arrow(self) -> str:
        """The direction that is better."""
        return {"lower": "↓", "higher": "↑"}.get(self.better, "")

    def show(self, number: Number | None) -> str:
        """The value as text, or a dash."""
        if number is None or number.value is None:
            return "–"
        return self.text(number.value)

    def text(self, value: float) -> str:
        """Any value or spread of the column as text."""
        if self.name == "num_parameters":
            return f"{value / 1e6:,.2f}"
        if self.name == "nimg":
            return f"{value / 1e3:,.1f}"
        if self.name in ("seconds", "training_s"):
            minutes, rest = divmod(round(value), 60)
            return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        return f"{value:,.{self.decimals}f}".replace("-", "−")


def label_of(name: str) -> str:
    """The name of a number where its group heading is not visible."""
    for group, names in (*MEASURED, ("Cost", COSTS)):
        for one, label in names:
            if one == name:
                return Column(name, label, group, "none", 0).full_label
    return name


def show_counts(number: Number) -> str:
    """The number of images behind a value, in words; empty if unknown."""
    if number.num_samples is None:
        return ""
    if number.num_reference is None:
        return f"n {number.num_samples:,}"
    return f"n {number.num_samples:,} / {number.num_reference:,}"


def caution_words(*cautions: str | None) -> str:
    """``few images``, ``own network``, both, or nothing: what the cautions of values come to.

    Few images make a value uncertain; its own network is one that the run was trained with.
    """
    parts = [part for one in cautions if one for part in one.split("; ")]
    few = any(not favours(part) for part in parts)
    own = any(favours(part) for part in parts)
    return ", ".join(word for word, is_so in ((FEW, few), (OWN, own)) if is_so)


def all_digits(value: float) -> str:
    """A number with all its digits; whole numbers without a decimal point."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


# The rows are sorted by the metric that most runs have; of several, by the first one here.
MAIN_METRICS = ("fid", "fd_dinov2", "fid768", "kid", "kid768", "kd_dinov2")
BY_DEVICE = {"seconds", "training_s", "training_images_per_s", "sampling_images_per_s"}
DIGITS = 3
FEW, OWN = "few images", "own network"


def make_columns(runs: Sequence[ComparedRun]) -> list[Column]:
    """The columns for which at least one run has a value, in the order of the table."""
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
    """Numbers with that name and a value, by the name of the run."""
    found = {run.name: run.numbers.get(name) for run in runs}
    return {key: one for key, one in found.items() if one is not None and one.value is not None}


def main_column(columns: Sequence[Column], runs: Sequence[ComparedRun]) -> Column | None:
    """The column of the main metric; None if nothing was measured."""
    counts = {one.name: len(values_of(runs, one.name)) for one in columns}
    found = [name for name in MAIN_METRICS if name in counts]
    if not found:
        return next((one for one in columns if one.group != "Cost"), None)
    first = max(found, key=lambda name: (counts[name], -MAIN_METRICS.index(name)))
    return next(one for one in columns if one.name == first)


def sort_runs(runs: Sequence[ComparedRun], by: Column | None) -> list[ComparedRun]:
    """Best first, runs without a value last; unchanged if the values cannot be compared."""
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
    """``(metrics, reason, runs)`` of everything that could not be measured."""
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
        same = len({n.alike for n in numbers.values()}) == 1 and len(counts) == 1
    column = replace(column, comparable=same)
    # a single value cannot be the best
    if same and one.better != "none" and len(numbers) > 1:
        values = {key: n.value for key, n in numbers.items() if n.value is not None}
        best = _best(values, one.better)
        column = replace(column, best=best, near=_near(numbers, best))
    return column


def _device(run: ComparedRun, number: Number) -> str | None:
    source = run.sources.get(number.source)
    return source.device if source else None


def _best(values: Mapping[str, float], better: str) -> tuple[str, ...]:
    """Names with the best value; none if all are equal."""
    top = min(values.values()) if better == "lower" else max(values.values())
    best = tuple(name for name, value in values.items() if value == top)
    return best if len(best) < len(values) else ()


def _near(numbers: Mapping[str, Number], best: Sequence[str]) -> tuple[str, ...]:
    """Names within two spreads of the best value."""
    known = {
        name: (one.value, one.spread)
        for name, one in numbers.items()
        if one.value is not None and one.spread is not None
    }
    if not best or best[0] not in known:
        return ()
    top, of_top = known[best[0]]
    return tuple(
        name
        for name, (value, spread) in known.items()
        if name not in best and abs(value - top) <= 2 * math.hypot(spread, of_top)
    )


def _decimals(numbers: dict[str, Number]) -> int:
    """Enough for three digits of the median value and one of the smallest spread."""
    values = [abs(one.value) for one in numbers.values() if one.value]
    if not values:
        return 0
    wanted = DIGITS - 1 - math.floor(math.log10(statistics.median(values)))
    spreads = [one.spread for one in numbers.values() if one.spread]
    if spreads:
        wanted = max(wanted, -math.floor(math.log10(min(spreads))))
    return max(0, min(6, wanted))


def number_rows(run: ComparedRun) -> list[dict[str, Any]]:
    """Every number of a run with its origin, at full precision."""
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

    @property
    def words(self) -> str:
        """How much training, in words."""
        if self.unit == "images":
            return f"{self.amount:,.4g} thousand images"
        if self.amount < 120:
            return f"{self.amount:.3g} seconds of training"
        return f"{self.amount / 60:,.3g} minutes of training"


def at_equal(runs: Sequence[ComparedRun], seeds: Sequence[Seeds]) -> list[Equal]:
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
            found = _equal(folder, unit, some, seeds)
            if found is not None:
                tables.append(found)
    return tables


def _equal(
    folder: str, unit: str, runs: Sequence[ComparedRun], seeds: Sequence[Seeds]
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
    for title, some in experiments(timed, seeds):
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
        name: _best({title: cells[name][0] for title, _, cells in rows if name in cells}, way)
        for name, way in better.items()
        if way != "none"
    }
    by = next((name for name in MAIN_METRICS if name in names), names[0])
    if by in best:
        sign = -1.0 if better[by] == "higher" else 1.0
        rows.sort(key=lambda row: sign * row[2][by][0] if by in row[2] else math.inf)
    left_out = tuple(run.name for run in runs if run not in timed)
    return Equal(folder, unit, amount, tuple(names), tuple(rows), left_out, cautions, best)


def _better(runs: Sequence[ComparedRun], name: str) -> str:
    """Which way a metric is better."""
    lines = (line["metrics"].get(name) for run in runs for line in run.measured)
    return next(str(one.get("better") or "none") for one in lines if one is not None)


def _x(run: ComparedRun, kimg: float, unit: str) -> float | None:
    return kimg if unit == "images" else run.seconds_at(kimg)


def _value_at(run: ComparedRun, curve: Sequence[Point], amount: float, unit: str) -> float | None:
    """The curve's value there; None before its first point."""
    points = [(x, one.value) for one in curve if (x := _x(run, one.kimg, unit)) is not None]
    if not points or not points[0][0] <= amount <= points[-1][0]:
        return None
    return float(np.interp(amount, [x for x, _ in points], [value for _, value in points]))


def experiments(
    runs: Sequence[ComparedRun], seeds: Sequence[Seeds]
) -> list[tuple[str, tuple[str, ...]]]:
    """Runs that differ only in the seed together, the others alone."""
    names = [run.name for run in runs]
    groups = [(one.name, one.runs) for one in seeds if set(one.runs) <= set(names)]
    grouped = {name for _, some in groups for name in some}
    return [*groups, *((name, (name,)) for name in names if name not in grouped)]


# Config keys that do not make it a different experiment.
ASIDE = ("run", "seed", "notes", "cluster", "log", "checkpoint", "device", "metrics", "prepare")


@dataclass(frozen=True)
class Seeds:
    """Runs of one experiment with different seeds.

    Attributes:
        name: of the experiment: the common prefix of the run names, else the family.
        runs: their names.
        values: by column: mean and standard deviation (N - 1) over the runs.
    """

    name: str
    runs: tuple[str, ...]
    values: dict[str, tuple[float, float]]


def over_seeds(runs: Sequence[ComparedRun], columns: Sequence[Column]) -> list[Seeds]:
    """Groups of at least two runs that differ only in the seed.

    Only metrics that all runs of a group have, measured in the same way, are averaged.
    """
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        if run.config and run.finished:
            groups.setdefault(_experiment(run.config), []).append(run)
    found = []
    for some in (one for group in groups.values() for one in _apart(group)):
        if len({run.seed for run in some}) < 2:
            continue
        values = {}
        for column in columns:
            if column.group == "Cost":
                continue
            numbers = [run.numbers.get(column.name) for run in some]
            known = [n.value for n in numbers if n is not None and n.value is not None]
            if len(known) == len(some) and len({n.alike for n in numbers if n}) == 1:
                values[column.name] = (statistics.fmean(known), statistics.stdev(known))
        found.append(Seeds(_common(some), tuple(run.name for run in some), values))
    return found


def _apart(runs: list[ComparedRun]) -> list[list[ComparedRun]]:
    """Runs of one config by folder if a seed occurs twice: two tracks may train the same."""
    if len({run.seed for run in runs}) == len(runs):
        return [runs]
    folders: dict[Path, list[ComparedRun]] = {}
    for run in runs:
        folders.setdefault(run.folder.parent, []).append(run)
    return list(folders.values())


def _experiment(config: dict[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key not in ASIDE}
    return json.dumps(rest, sort_keys=True, default=str)


def _common(runs: Sequence[ComparedRun]) -> str:
    """The common prefix of the names."""
    names = [run.name for run in runs]
    first, last = min(names), max(names)
    length = next(
        (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first[:length].rstrip("-_/. ").removesuffix("seed").rstrip("-_/. ") or runs[0].family
