"""The table of a comparison: its columns and the order of its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dinogen.report.compare.model import ComparedRun, Number
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


ARROWS = {"lower": "↓", "higher": "↑"}


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
        return ARROWS.get(self.better, "")

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
        best = best_of(values, one.better)
        column = replace(column, best=best, near=_near(numbers, best))
    return column


def _device(run: ComparedRun, number: Number) -> str | None:
    source = run.sources.get(number.source)
    return source.device if source else None


def best_of(values: Mapping[str, float], better: str) -> tuple[str, ...]:
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
                "alike": number.alike,
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
