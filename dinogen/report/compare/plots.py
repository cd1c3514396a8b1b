"""Curves of a comparison: one for each experiment, over images and over time, as SVG for a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from scipy.optimize import isotonic_regression

from dinogen.report.compare.model import ComparedRun
from dinogen.report.compare.table import Seeds, caution_words, experiments, label_of

NUM_COLOURS = 10
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")  # type: ignore[assignment]
MAX_POINTS = 160
# Placeholders for the colours of the page, light or dark; no other text contains them.
INK, SERIES = "#0abcde", "#0abc{:02d}"
KIMG, MINUTES = "images seen, thousands", "training, minutes"
WIDE, NARROW, SMALL = (9.2, 3.9), (4.3, 3.7), (3.5, 1.75)
# An axis is logarithmic if what it shows differs by more than this factor.
WIDE_RANGE = 8
MAX_LETTERS = 26  # of a name beside its line
LINE_OF_TEXT = 0.06  # of the height of a wide plot


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        number: determines colour and dashes.
        x: thousands of images seen, or minutes of training.
        values: one for each.
        band: lowest and highest over the seeds; None of a single run.
        name: written beside its end; empty for none.
    """

    number: int
    x: Sequence[float]
    values: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    name: str = ""


@dataclass(frozen=True)
class Curve:
    """An experiment in a plot: a run, or several that differ only in the seed.

    Attributes:
        number: of its colour.
        num_seeds: number of runs that the line is the mean of.
        kimg: thousands of images seen.
        minutes: of training until then, on average; None if a run does not say.
        values: means over the runs.
        low: the lowest of them.
        high: the highest.
        caution: :func:`caution_words` of the values.
    """

    name: str
    number: int
    num_seeds: int
    kimg: list[float]
    minutes: list[float] | None
    values: list[float]
    low: list[float]
    high: list[float]
    caution: str

    @property
    def notes(self) -> list[str]:
        """The number of its seeds and its cautions, if there is anything to say."""
        seeds = [f"mean of {self.num_seeds} seeds"] if self.num_seeds > 1 else []
        return [*seeds, *(self.caution.split(", ") if self.caution else [])]

    def series(self, x: Sequence[float]) -> Series:
        """Its line, with a band if it is of several runs."""
        band = (self.low, self.high) if self.num_seeds > 1 else None
        return Series(self.number, x, self.values, band, self.name)


@dataclass(frozen=True)
class Plot:
    """A plot over images and over time, each drawn for wide and for narrow screens.

    Attributes:
        by_images: wide and narrow.
        by_time: the same; None if no run says how long it took.
        curves: the experiments in it.
    """

    title: str
    warning: str
    by_images: tuple[Markup, Markup]
    by_time: tuple[Markup, Markup] | None
    curves: tuple[Curve, ...]

    @property
    def notes(self) -> list[str]:
        """Those of all curves."""
        first, *others = self.curves
        return [note for note in first.notes if all(note in curve.notes for curve in others)]

    @property
    def legend(self) -> list[tuple[Curve, list[str]]]:
        """The curves, and what holds for some of them only."""
        shared = self.notes
        return [(one, [note for note in one.notes if note not in shared]) for one in self.curves]

    @property
    def untimed(self) -> list[str]:
        """Names of the experiments that are missing from the plot over time."""
        return [curve.name for curve in self.curves if curve.minutes is None]


def folders_of(runs: Sequence[ComparedRun], seeds: Sequence[Seeds]) -> list[str]:
    """Folders whose runs are compared among themselves, such as the tracks of a study.

    Only if each of at least two folders holds at least two experiments: else runs are all compared
    with each other, and there is no such folder.
    """
    title_of = {name: title for title, some in experiments(runs, seeds) for name in some}
    found: dict[str, set[str]] = {}
    for run in runs:
        found.setdefault(str(run.folder.parent), set()).add(title_of[run.name])
    apart = len(found) > 1 and all(len(titles) > 1 for titles in found.values())
    return list(found) if apart else []


def colours(runs: Sequence[ComparedRun], seeds: Sequence[Seeds]) -> dict[str, int]:
    """The number of the colour of each run: one for each experiment, the same in all folders."""
    apart = bool(folders_of(runs, seeds))
    title_of = {name: title for title, some in experiments(runs, seeds) for name in some}
    numbers: dict[str, int] = {}
    found = {}
    for run in runs:
        title = title_of[run.name]
        key = title.rpartition("/")[2] if apart else title
        found[run.name] = numbers.setdefault(key, len(numbers))
    return found


def metric_plots(
    runs: Sequence[ComparedRun], seeds: Sequence[Seeds], numbers: dict[str, int]
) -> list[Plot]:
    """A plot for each metric that was measured at several points of training, and each folder.

    Args:
        runs: as given, which is the order of the folders.
        seeds: runs that differ only in the seed: one line, the mean.
        numbers: see :func:`colours`; their order is that of the legends.
    """
    names = dict.fromkeys(name for run in runs for line in run.measured for name in line["metrics"])
    folders = folders_of(runs, seeds)
    plots = []
    for name in names:
        for folder in folders or [""]:
            some = [run for run in runs if not folder or str(run.folder.parent) == folder]
            plot = _plot(name, folder, some, seeds, numbers)
            if plot is not None:
                plots.append(plot)
    return plots


def _plot(
    name: str,
    folder: str,
    runs: Sequence[ComparedRun],
    seeds: Sequence[Seeds],
    numbers: dict[str, int],
) -> Plot | None:
    """A metric of the runs of a folder, or of all; None if there is no curve."""
    by_name = {run.name: run for run in runs}
    curves: list[Curve] = []
    for title, some in experiments(runs, seeds):
        # below the name of their folder it is not repeated
        shown = title.rpartition("/")[2] if folder else title
        curves += _curves(shown, name, [by_name[one] for one in some], numbers)
    if not any(len(curve.kimg) > 1 for curve in curves):
        return None
    order = {one: place for place, one in enumerate(numbers.values())}
    curves.sort(key=lambda curve: order[curve.number])
    ways = {point.alike for run in runs for point in run.curve(name)}
    warning = (
        f"Measured in {len(ways)} different ways (fingerprints differ): the curves cannot be "
        "compared."
        if len(ways) > 1
        else ""
    )
    by_images = [curve.series(curve.kimg) for curve in curves]
    by_time = [curve.series(curve.minutes) for curve in curves if curve.minutes is not None]
    label = label_of(name)
    where = f"{folder.rpartition('/')[2]}: " if folder else ""
    return Plot(
        f"{where}{label} over training",
        warning,
        _drawn(by_images, label, KIMG),
        _drawn(by_time, label, MINUTES) if by_time else None,
        tuple(curves),
    )


def _curves(
    title: str, name: str, runs: Sequence[ComparedRun], numbers: dict[str, int]
) -> list[Curve]:
    """The curve of an experiment; one for each of its runs if they have no part in common."""
    measured = [(run, points) for run in runs if (points := run.curve(name))]
    if not measured:
        return []
    first = max(points[0].kimg for _, points in measured)
    last = min(points[-1].kimg for _, points in measured)
    if first > last:
        return [one for run, _ in measured for one in _curves(run.name, name, [run], numbers)]
    every = {point.kimg for _, points in measured for point in points}
    kimg = sorted(one for one in every if first <= one <= last)
    values = np.array(
        [
            np.interp(kimg, [one.kimg for one in points], [one.value for one in points])
            for _, points in measured
        ]
    )
    seconds = [[run.seconds_at(one) for one in kimg] for run, _ in measured]
    known = [[one / 60 for one in row if one is not None] for row in seconds]
    timed = all(len(row) == len(kimg) for row in known)
    return [
        Curve(
            title,
            numbers[measured[0][0].name],
            len(measured),
            kimg,
            np.mean(known, 0).tolist() if timed else None,
            values.mean(0).tolist(),
            values.min(0).tolist(),
            values.max(0).tolist(),
            caution_words(*(point.caution for _, points in measured for point in points)),
        )
    ]


def _drawn(lines: Sequence[Series], label: str, xlabel: str) -> tuple[Markup, Markup]:
    wide = curves_svg(lines, label, WIDE, xlabel=xlabel, names=len(lines) > 1)
    return Markup(wide), Markup(curves_svg(lines, label, NARROW, xlabel=xlabel))


def loss_plots(
    runs: Iterable[ComparedRun], numbers: dict[str, int]
) -> list[tuple[ComparedRun, Markup]]:
    """The loss of each run on its own: losses of different families have no common scale."""
    found = []
    for place, run in enumerate(runs):
        if len(run.loss[1]) > 1:
            line = Series(numbers[run.name], *run.loss)
            svg = curves_svg([line], "", SMALL, smooth=True, salt=str(place))
            found.append((run, Markup(svg)))
    return found


def curves_svg(
    lines: Sequence[Series],
    ylabel: str,
    size: tuple[float, float] = WIDE,
    *,
    xlabel: str = KIMG,
    smooth: bool = False,
    names: bool = False,
    salt: str = "",
) -> str:
    """An ``<svg>`` element with curves over training, without a legend.

    Args:
        lines: at least one, each with at least one point.
        ylabel: label of the y axis.
        size: inches.
        xlabel: what ``x`` of the lines is.
        smooth: average neighbouring points.
        names: write the name of each line beside its end.
        salt: makes ids unique in a page where all else is the same.
    """
    canvas = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(canvas)
    axes = canvas.subplots()
    style(axes)
    for line in lines:
        x, values = _fewer(line.x, line.values) if smooth else (line.x, line.values)
        colour = SERIES.format(line.number % NUM_COLOURS)
        axes.plot(
            x,
            values,
            color=colour,
            linestyle=DASHES[line.number // NUM_COLOURS % len(DASHES)],
            linewidth=2.0,
            marker="o" if len(values) <= 40 and not smooth else None,
            markersize=4.5,
            solid_capstyle="round",
        )
        if line.band is not None:
            axes.fill_between(line.x, *line.band, color=colour, alpha=0.16, linewidth=0)
    _scale(axes.set_yscale, axes.yaxis, [one for line in lines for one in line.values])
    if not smooth:
        ends = [line.x[-1] for line in lines]
        _scale(axes.set_xscale, axes.xaxis, [one for line in lines for one in line.x], ends)
    axes.set_xlabel(xlabel, parse_math=False)
    if ylabel:
        axes.set_ylabel(ylabel, parse_math=False)
    if names:
        _write_names(axes, lines)
    return _svg(canvas, f"{ylabel}{xlabel}{size}{lines}{salt}")


def _scale(
    set_scale: Callable[[str], None],
    axis: Axis,
    shown: Sequence[float],
    compared: Sequence[float] = (),
) -> None:
    """Make an axis logarithmic if what it compares differs by so much, and all can be shown."""
    compared = compared or shown
    if min(shown) > 0 and max(compared) > WIDE_RANGE * min(compared):
        set_scale("log")
        decade = max(shown) < 10 * min(shown)
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decade else (1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())


def _write_names(axes: Axes, lines: Sequence[Series]) -> None:
    """The name of each line at the right edge, as high as its end or near it."""
    axes.autoscale_view()
    to_edge = axes.transData + axes.transAxes.inverted()
    ends = [to_edge.transform((line.x[-1], line.values[-1])) for line in lines]
    wanted = np.array([end[1] for end in ends])
    order = np.argsort(wanted, kind="stable")
    steps = LINE_OF_TEXT * np.arange(len(lines))
    # least squares to the ends, in their order and at least a line of text apart
    placed = isotonic_regression(wanted[order] - steps).x + steps
    for place, height in zip(order, placed, strict=True):
        line, end = lines[place], ends[place]
        colour = SERIES.format(line.number % NUM_COLOURS)
        name = line.name if len(line.name) <= MAX_LETTERS else f"{line.name[: MAX_LETTERS - 1]}…"
        axes.plot(
            (end[0], 1.012),
            (end[1], height),
            color=colour,
            alpha=0.45,
            linewidth=0.8,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.text(
            1.02,
            height,
            name,
            color=colour,
            fontsize=9.5,
            va="center",
            transform=axes.transAxes,
            parse_math=False,
        )


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
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    text = text.replace(INK, "currentColor")
    text = re.sub(r"#0abc(\d\d)", lambda found: f"var(--s{int(found[1])})", text)
    width, height = canvas.get_size_inches() * 72
    return re.sub(
        r"<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {height:g}" role="img">', text, count=1
    )
