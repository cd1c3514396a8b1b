"""A comparison as one HTML page that needs no other file: table, curves, images."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from dinogen.report.compare.comparison import Comparison
from dinogen.report.compare.model import ComparedRun, Visualization
from dinogen.report.compare.table import (
    Column,
    all_digits,
    caution_words,
    label_of,
    number_rows,
    show_counts,
)

TEMPLATE = Path(__file__).with_name("page.html")
ID_DIGITS = 6
SECTIONS = (
    ("samples", "Samples", "The same sample numbers and the same seed for every run."),
    (
        "interpolations",
        "Interpolations",
        "From one sample to another, the same pairs for every run.",
    ),
    ("progress", "Over training", "The same latents at several checkpoints of the run."),
    ("latents", "Latents", "Truncation, styles and main directions, for families that have them."),
    ("reconstructions", "Reconstructions", "Real images, encoded and decoded."),
    (
        "worst",
        "Weakest samples",
        "Rated lowest by the discriminator, or by the distance to real images.",
    ),
    ("neighbours", "Nearest training images", "Next to samples: memorised images show up here."),
)


@dataclass(frozen=True)
class Cell:
    """One cell of the table, as text.

    Attributes:
        text: the value.
        spread: ``± ...``, or empty.
        note: counts and fingerprint if they differ within the column, or empty.
        mark: ``best``, ``near`` or empty.
        target: id of the row with the origin of the number; empty without a value.
    """

    text: str
    spread: str = ""
    note: str = ""
    mark: str = ""
    target: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot over images and over time, each drawn for wide and for narrow screens.

    Attributes:
        by_images: wide and narrow.
        by_time: the same; None if no run says how long it took.
        untimed: names of runs that are missing from the plot over time.
        cautions: by the name of a run: :func:`caution_words` of its points.
    """

    title: str
    warning: str
    by_images: tuple[Markup, Markup]
    by_time: tuple[Markup, Markup] | None
    runs: tuple[ComparedRun, ...]
    untimed: tuple[str, ...]
    cautions: dict[str, str]


def render_page(comparison: Comparison) -> str:
    """The page as text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    runs, numbers = comparison.all_runs, {r.name: n for n, r in enumerate(comparison.all_runs)}
    return template.render(
        c=comparison,
        families=list(dict.fromkeys(run.family for run in runs)),
        groups=_groups(comparison.columns),
        rows=[
            (run, [_cell(run, column, numbers[run.name]) for column in comparison.columns])
            for run in comparison.runs
        ],
        number_of=numbers,
        num_colours=NUM_COLOURS,
        seed_columns=[
            column
            for column in comparison.columns
            if any(column.name in one.values for one in comparison.seeds)
        ],
        plots=_plots(comparison.runs, numbers),
        timed=any(run.times[0] for run in runs),
        losses=_losses(runs, numbers),
        sections=_sections(comparison),
        more={run.name: _more(run) for run in runs},
        origins=[(run, [_origin(row) for row in number_rows(run)]) for run in runs],
        label_of=label_of,
    )


def _breakable(text: str) -> Markup:
    """Text that may break after an underscore, a dash or a slash."""
    return Markup("<wbr>").join(re.split(r"(?<=[_/-])", text))


def _groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """Headings above the columns, and the number of columns of each."""
    groups: list[tuple[str, int]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    return groups


def _cell(run: ComparedRun, column: Column, place: int) -> Cell:
    number = run.numbers.get(column.name)
    if number is None or number.value is None:
        return Cell("–")
    notes = [] if column.counts else [show_counts(number)]
    notes.append(caution_words(number.caution))
    if not column.comparable and number.fingerprint:
        notes.append(number.fingerprint[:ID_DIGITS])
    return Cell(
        text=column.text(number.value),
        spread="" if number.spread is None else f"± {column.text(number.spread)}",
        note=" · ".join(note for note in notes if note),
        mark="best" if run.name in column.best else "near" if run.name in column.near else "",
        target=f"n-{place}-{column.name}",
    )


def _plots(runs: Sequence[ComparedRun], numbers: dict[str, int]) -> list[Plot]:
    """A plot for each metric that was measured at several points of training."""
    names = dict.fromkeys(name for run in runs for line in run.measured for name in line["metrics"])
    plots = []
    for name in names:
        curves = [(run, points) for run in runs if (points := run.curve(name))]
        if not any(len(points) > 1 for _, points in curves):
            continue
        label = label_of(name)
        ways = {point.alike for _, points in curves for point in points}
        warning = (
            f"Measured in {len(ways)} different ways (fingerprints differ): the curves cannot "
            "be compared."
            if len(ways) > 1
            else ""
        )
        by_images, by_time, untimed = [], [], []
        for run, points in curves:
            kimg, values = [point.kimg for point in points], [point.value for point in points]
            by_images.append(Series(numbers[run.name], kimg, values))
            times = [run.seconds_at(one) for one in kimg]
            minutes = [one / 60 for one in times if one is not None]
            if len(minutes) == len(kimg):
                by_time.append(Series(numbers[run.name], minutes, values))
            else:
                untimed.append(run.name)
        shown = tuple(run for run, _ in curves)
        timed = _drawn(by_time, label, MINUTES) if by_time else None
        images = _drawn(by_images, label, KIMG)
        cautions = {
            run.name: words
            for run, points in curves
            if (words := caution_words(*(point.caution for point in points)))
        }
        plots.append(Plot(label, warning, images, timed, shown, tuple(untimed), cautions))
    return plots


def _drawn(lines: Sequence[Series], label: str, xlabel: str) -> tuple[Markup, Markup]:
    wide, narrow = (
        Markup(curves_svg(lines, label, size, xlabel=xlabel)) for size in (WIDE, NARROW)
    )
    return wide, narrow


def _losses(
    runs: Iterable[ComparedRun], numbers: dict[str, int]
) -> list[tuple[ComparedRun, Markup]]:
    """The loss of each run on its own: losses of different families have no common scale."""
    found = []
    for run in runs:
        if len(run.loss[1]) > 1:
            line = Series(numbers[run.name], *run.loss)
            # a plot of its own, with its own ids
            found.append((run, Markup(curves_svg([line], "", SMALL, smooth=True))))
    return found


def _sections(
    comparison: Comparison,
) -> list[tuple[str, str, str, list[tuple[ComparedRun, list[Visualization]]]]]:
    """Images of all runs by section; empty sections are left out."""
    sections = []
    for key, title, text in SECTIONS:
        shown = []
        for run in comparison.all_runs:
            visuals = [
                visual for visual in run.visualizations if visual.section == key and visual.path
            ]
            if visuals:
                shown.append((run, visuals[:1] if key == "samples" else visuals))
        if shown:
            sections.append((key, title, text, shown))
    return sections


def _more(run: ComparedRun) -> list[Visualization]:
    """Images of no common section, and those that are missing with the reason."""
    first = next(
        (visual for visual in run.visualizations if visual.section == "samples" and visual.path),
        None,
    )
    return [
        visual
        for visual in run.visualizations
        if visual.section == "more"
        or visual.path is None
        or (visual.section == "samples" and visual is not first)
    ]


def _origin(row: dict[str, Any]) -> dict[str, Any]:
    """A number with all its digits, as text."""
    value = row["value"]
    return {
        **row,
        "shown": (row["reason"] or "not available")
        if value is None
        else all_digits(value) + (f" (caution: {row['caution']})" if row["caution"] else ""),
        "spread": "" if row["spread"] is None else f"{row['spread']:.4g}",
    }


NUM_COLOURS = 10
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")  # type: ignore[assignment]
MAX_POINTS = 160
# Placeholders for the colours of the page, light or dark; no other text contains them.
INK, SERIES = "#0abcde", "#0abc{:02d}"
KIMG, MINUTES = "images seen, thousands", "training, minutes"
WIDE, NARROW, SMALL = (9.2, 3.9), (4.3, 3.7), (3.5, 1.75)


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        number: of the run; determines colour and dashes.
        x: thousands of images seen, or minutes of training.
        values: one for each.
    """

    number: int
    x: Sequence[float]
    values: Sequence[float]


def curves_svg(
    lines: Sequence[Series],
    ylabel: str,
    size: tuple[float, float] = WIDE,
    *,
    xlabel: str = KIMG,
    smooth: bool = False,
) -> str:
    """An ``<svg>`` element with curves over training, without a legend.

    Args:
        lines: at least one, each with at least one point.
        ylabel: label of the y axis.
        size: inches.
        xlabel: what ``x`` of the lines is.
        smooth: average neighbouring points.
    """
    canvas = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(canvas)
    axes = canvas.subplots()
    style(axes)
    for line in lines:
        x, values = _fewer(line.x, line.values) if smooth else (line.x, line.values)
        axes.plot(
            x,
            values,
            color=SERIES.format(line.number % NUM_COLOURS),
            linestyle=DASHES[line.number // NUM_COLOURS % len(DASHES)],
            linewidth=2.0,
            marker="o" if len(values) <= 40 and not smooth else None,
            markersize=4.5,
            solid_capstyle="round",
        )
    shown = [value for line in lines for value in line.values]
    if min(shown) > 0 and max(shown) > 20 * min(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(xlabel, parse_math=False)
    if ylabel:
        axes.set_ylabel(ylabel, parse_math=False)
    return _svg(canvas, f"{ylabel}{xlabel}{size}{[line.number for line in lines]}")


def style(axes: Axes) -> None:
    """Thin lines in the colour of the page's text, no frame."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_alpha(0.5)
    axes.tick_params(colors=INK, which="both", labelsize=10)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color=INK, alpha=0.16, linewidth=0.8)
    axes.patch.set_visible(False)


def _fewer(x: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """A curve averaged to at most :data:`MAX_POINTS` points."""
    if len(values) <= MAX_POINTS:
        return list(x), list(values)
    return (
        [float(part.mean()) for part in np.array_split(np.asarray(x), MAX_POINTS)],
        [float(part.mean()) for part in np.array_split(np.asarray(values), MAX_POINTS)],
    )


def _svg(canvas: Figure, salt: str) -> str:
    """The plot as an element that can share a page with others."""
    canvas.patch.set_visible(False)
    file = io.StringIO()
    # ids derive from the salt, and must be unique in a page
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        names = ("Creator", "Date", "Format", "Type")
        canvas.savefig(file, format="svg", metadata=dict.fromkeys(names))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    text = text.replace(INK, "currentColor")
    text = re.sub(r"#0abc(\d\d)", lambda found: f"var(--s{int(found[1])})", text)
    width, height = canvas.get_size_inches() * 72
    return re.sub(
        r"<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {height:g}" role="img">', text, count=1
    )
