"""Curves of a comparison: one for each experiment, over images and over time, as SVG for a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from dinogen.report.compare.experiments import Experiment
from dinogen.report.compare.model import ComparedRun, Point
from dinogen.report.compare.table import caution_words, label_of

NUM_COLOURS = 10
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")  # type: ignore[assignment]
MAX_POINTS = 160
# Placeholders for the colours of the page, light or dark; no other text contains them.
INK, SERIES = "#0abcde", "#0abc{:02d}"
KIMG, MINUTES = "images seen, thousands", "training, minutes"
WIDE, NARROW, SMALL = (9.2, 3.9), (4.3, 3.7), (3.5, 1.75)
# An axis is logarithmic if what it compares spans more than this factor.
WIDE_RANGE = 8
MAX_LETTERS = 27  # of a name beside its line
LINE_OF_TEXT = 0.06  # of the height of the axes of a wide plot


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
    """An experiment in a plot: a run, or the mean of several that differ only in the seed.

    Attributes:
        number: of its colour and dashes.
        num_seeds: number of runs that the line is the mean of.
        kimg: thousands of images seen.
        minutes: of training until then, on average; None if a run does not say.
        values: means over the runs.
        low: the lowest values of the runs.
        high: the highest.
        notes: how many seeds, and cautions, in words.
    """

    name: str
    number: int
    num_seeds: int
    kimg: list[float]
    minutes: list[float] | None
    values: list[float]
    low: list[float]
    high: list[float]
    notes: list[str]

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
        """What holds for all curves."""
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


def colours(experiments: Sequence[Experiment]) -> dict[str, int]:
    """The number of the colour of each run: one for each experiment, the same in all tracks."""
    numbers: dict[str, int] = {}
    return {
        run.name: numbers.setdefault(one.label, len(numbers))
        for one in experiments
        for run in one.runs
    }


def metric_plots(
    experiments: Sequence[Experiment], tracks: Sequence[Path | None], numbers: dict[str, int]
) -> list[Plot]:
    """A plot for each metric that was measured at several points of training, and each track.

    Args:
        experiments: one line each.
        tracks: of the experiments, in the order of the plots; None: those without a study.
        numbers: see :func:`colours`; legends are in their order.
    """
    lines = [line for one in experiments for run in one.runs for line in run.measured]
    names = dict.fromkeys(name for line in lines for name in line["metrics"])
    plots = []
    for name in names:
        for track in tracks:
            some = [one for one in experiments if one.track == track]
            plot = _plot(name, some, numbers, _title(track, tracks))
            if plot is not None:
                plots.append(plot)
    return plots


def _title(track: Path | None, tracks: Sequence[Path | None]) -> str:
    """The name of a track, with that of its study where another has a track of this name."""
    if track is None:
        return ""
    same = [one for one in tracks if one is not None and one.name == track.name]
    return f"{track.parent.name}/{track.name}" if len(same) > 1 else track.name


def _plot(
    name: str, experiments: Sequence[Experiment], numbers: dict[str, int], title: str
) -> Plot | None:
    """A metric of the experiments of a track; None if there is no curve."""
    curves = [curve for one in experiments for curve in _curves(one, name, numbers)]
    if not any(len(curve.kimg) > 1 for curve in curves):
        return None
    curves.sort(key=lambda curve: curve.number)
    ways = {point.alike for one in experiments for run in one.runs for point in run.curve(name)}
    warning = (
        f"Measured in {len(ways)} different ways (fingerprints differ): the curves cannot be "
        "compared."
        if len(ways) > 1
        else ""
    )
    by_images = [curve.series(curve.kimg) for curve in curves]
    by_time = [curve.series(curve.minutes) for curve in curves if curve.minutes is not None]
    label = label_of(name)
    return Plot(
        f"{title}: {label} over training" if title else f"{label} over training",
        warning,
        _drawn(by_images, label, KIMG, title),
        _drawn(by_time, label, MINUTES, title) if by_time else None,
        tuple(curves),
    )


def _curves(experiment: Experiment, name: str, numbers: dict[str, int]) -> list[Curve]:
    """The mean of the runs; or each of them, if a mean would say less than they do."""
    measured = [(run, points) for run in experiment.runs if (points := run.curve(name))]
    if not measured:
        return []
    first = max(points[0].kimg for _, points in measured)
    last = min(points[-1].kimg for _, points in measured)
    every = {point.kimg for _, points in measured for point in points}
    kimg = sorted(one for one in every if first <= one <= last)
    alike = len({point.alike for _, points in measured for point in points}) == 1
    if alike and (len(kimg) > 1 or len(every) == 1) and len(measured) > 1:
        cut = ["as far as all seeds were measured"] if len(kimg) < len(every) else []
        return [_curve(experiment.label, numbers, measured, kimg, cut)]
    # of one colour, apart by their dashes
    apart = {run.name: numbers[run.name] + n * NUM_COLOURS for n, (run, _) in enumerate(measured)}
    found = []
    for run, points in measured:
        label = run.name if run.track is None else run.name.rpartition("/")[2]
        label = experiment.label if len(experiment.runs) == 1 else label
        found.append(_curve(label, apart, [(run, points)], [one.kimg for one in points], []))
    return found


def _curve(
    label: str,
    numbers: dict[str, int],
    measured: Sequence[tuple[ComparedRun, list[Point]]],
    kimg: list[float],
    notes: list[str],
) -> Curve:
    """The mean of runs; between two measurements the curve of a run is a straight line."""
    values = np.array(
        [
            np.interp(kimg, [one.kimg for one in points], [one.value for one in points])
            for _, points in measured
        ]
    )
    seconds = [[run.seconds_at(one) for one in kimg] for run, _ in measured]
    known = [[one / 60 for one in row if one is not None] for row in seconds]
    timed = all(len(row) == len(kimg) for row in known)
    words = caution_words(*(point.caution for _, points in measured for point in points))
    seeds = [f"mean of {len(measured)} seeds"] if len(measured) > 1 else []
    return Curve(
        label,
        numbers[measured[0][0].name],
        len(measured),
        kimg,
        np.mean(known, 0).tolist() if timed else None,
        values.mean(0).tolist(),
        values.min(0).tolist(),
        values.max(0).tolist(),
        [*seeds, *notes, *(words.split(", ") if words else [])],
    )


def _drawn(lines: Sequence[Series], label: str, xlabel: str, title: str) -> tuple[Markup, Markup]:
    wide = curves_svg(lines, label, WIDE, xlabel=xlabel, names=len(lines) > 1, salt=title)
    return Markup(wide), Markup(curves_svg(lines, label, NARROW, xlabel=xlabel, salt=title))


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
        names: write the name of each line beside its end, if there is room for all.
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
    _scale_axes(axes, lines)
    axes.set_xlabel(xlabel, parse_math=False)
    if ylabel:
        axes.set_ylabel(ylabel, parse_math=False)
    if names and len(lines) * LINE_OF_TEXT <= 1:
        _write_names(axes, lines)
    return _svg(canvas, f"{ylabel}{xlabel}{size}{lines}{salt}")


def _scale_axes(axes: Axes, lines: Sequence[Series]) -> None:
    """Make an axis logarithmic where lines differ by more than :data:`WIDE_RANGE`."""
    ends = [line.x[-1] for line in lines]
    _scale(axes.set_xscale, axes.xaxis, ends, [one for line in lines for one in line.x])
    values = [one for line in lines for one in line.values]
    lowest = [one for line in lines for one in (line.band or [line.values])[0]]
    # a band that reaches far below all lines would leave them no room
    if min(lowest) > min(values) / WIDE_RANGE:
        _scale(axes.set_yscale, axes.yaxis, values, lowest)


def _scale(
    set_scale: Callable[[str], None], axis: Axis, compared: Sequence[float], shown: Sequence[float]
) -> None:
    """A logarithmic axis, if what it compares spans enough, and what it shows is above 0."""
    if min(*compared, *shown) > 0 and max(compared) > WIDE_RANGE * min(compared):
        decade = max(compared) < 10 * min(shown)
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decade else (1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())


def _write_names(axes: Axes, lines: Sequence[Series]) -> None:
    """The name of each line at the right edge, as high as its end or near it."""
    # takes 0.2 s, which only pages need
    from scipy.optimize import isotonic_regression

    axes.autoscale_view()
    to_edge = axes.transData + axes.transAxes.inverted()
    ends = [to_edge.transform((line.x[-1], line.values[-1])) for line in lines]
    wanted = np.array([end[1] for end in ends])
    order = np.argsort(wanted, kind="stable")
    steps = LINE_OF_TEXT * np.arange(len(lines))
    # least squares to the ends, in their order and at least a line of text apart
    placed = isotonic_regression(wanted[order] - steps).x.clip(0, 1 - steps[-1]) + steps
    for place, height in zip(order, placed, strict=True):
        line, end = lines[place], ends[place]
        colour = SERIES.format(line.number % NUM_COLOURS)
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
            _shortened(line.name),
            color=colour,
            fontsize=9.5,
            va="center",
            transform=axes.transAxes,
            parse_math=False,
        )


def _shortened(name: str) -> str:
    """A name of one line; of a long one the middle is left out, as names differ at their ends."""
    name = " ".join(name.split())
    half = MAX_LETTERS // 2
    return name if len(name) <= MAX_LETTERS else f"{name[:half]}…{name[-half:]}"


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
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}),
        warnings.catch_warnings(),
    ):
        # the browser has glyphs that matplotlib's own font lacks
        warnings.filterwarnings("ignore", "Glyph .* missing")
        names = ("Creator", "Date", "Format", "Type")
        canvas.savefig(file, format="svg", metadata=dict.fromkeys(names))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.DOTALL)
    # in tags only: names of runs are text, where < and > are written otherwise
    text = re.sub(r"<[^>]*>", lambda found: _tag(found[0]), text)
    text = re.sub(r"\s*\n\s*", " ", text)
    width, height = canvas.get_size_inches() * 72
    return re.sub(
        r"<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {height:g}" role="img">', text, count=1
    )


def _tag(tag: str) -> str:
    """A tag without ids that nothing refers to, in the font and the colours of the page."""
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"', "", tag).replace("xlink:href", "href")
    tag = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", tag)
    tag = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    tag = tag.replace(INK, "currentColor")
    return re.sub(r"#0abc(\d\d)", lambda found: f"var(--s{int(found[1])})", tag)
