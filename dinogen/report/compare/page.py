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

from dinogen.report.compare.columns import Column, all_digits, label_of, show_counts
from dinogen.report.compare.comparison import Comparison
from dinogen.report.compare.model import ComparedRun, Look
from dinogen.report.compare.table import number_rows

TEMPLATE = Path(__file__).with_name("page.html")
ID_DIGITS = 6
SECTIONS = (
    ("samples", "Samples", "The same numbers under the same seed for every run."),
    ("interpolations", "Interpolations", "From one sample to another, the same ones for all."),
    ("progress", "Over training", "The same latents at checkpoints of the run."),
    ("latents", "Latents", "Truncation, styles and main directions, where the family has them."),
    ("reconstructions", "Reconstructions", "Real pictures, encoded and decoded again."),
    (
        "worst",
        "Weakest samples",
        "What the discriminator, or the distance to real ones, rates low.",
    ),
    ("neighbours", "Nearest training pictures", "Beside samples: what was learnt by heart shows."),
)


@dataclass(frozen=True)
class Cell:
    """One cell of the table, as text.

    Attributes:
        text: value.
        spread: ``± ...``, or empty.
        note: counts and fingerprint where the column's cells differ in them, or empty.
        mark: ``best``, ``near`` or empty.
        target: id of the row that says where the number comes from; empty without a value.
    """

    text: str
    spread: str = ""
    note: str = ""
    mark: str = ""
    target: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot, drawn for wide and for narrow screens."""

    title: str
    warning: str
    wide: Markup
    narrow: Markup
    runs: tuple[ComparedRun, ...]


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
        losses=_losses(runs, numbers),
        sections=_sections(comparison),
        more={run.name: _more(run) for run in runs},
        origins=[(run, [_origin(row) for row in number_rows(run)]) for run in runs],
        label_of=label_of,
    )


def _breakable(text: str) -> Markup:
    """Text that may go on in the next line behind an underscore, a dash or a slash."""
    return Markup("<wbr>").join(re.split(r"(?<=[_/-])", text))


def _groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """Headings above the columns, and how many each spans."""
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
    if number.caution:
        notes.append("few images")
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
    """A plot for each metric value that was measured at several points of training."""
    names = dict.fromkeys(name for run in runs for line in run.measured for name in line["metrics"])
    plots = []
    for name in names:
        lines, shown, prints = [], [], set()
        for run in runs:
            points = [
                (line["nimg"] / 1000, value, one.get("fingerprint"))
                for line in run.measured
                if (one := line["metrics"].get(name)) is not None
                and (value := one.get("value")) is not None
            ]
            if points:
                prints |= {point[2] for point in points}
                kimg, values = [p[0] for p in points], [p[1] for p in points]
                lines.append(Series(numbers[run.name], kimg, values))
                shown.append(run)
        if not any(len(line.values) > 1 for line in lines):
            continue
        label = label_of(name)
        warning = (
            f"Measured in {len(prints)} different ways (fingerprints differ): the curves do not "
            "compare."
            if len(prints) > 1
            else ""
        )
        wide, narrow = (Markup(curves_svg(lines, label, size)) for size in (WIDE, NARROW))
        plots.append(Plot(label, warning, wide, narrow, tuple(shown)))
    return plots


def _losses(
    runs: Iterable[ComparedRun], numbers: dict[str, int]
) -> list[tuple[ComparedRun, Markup]]:
    """The loss of each run by itself: losses of different families have no common scale."""
    found = []
    for run in runs:
        if len(run.loss[1]) > 1:
            line = Series(numbers[run.name], *run.loss)
            # every plot takes its own ids
            found.append((run, Markup(curves_svg([line], "", SMALL, smooth=True))))
    return found


def _sections(
    comparison: Comparison,
) -> list[tuple[str, str, str, list[tuple[ComparedRun, list[Look]]]]]:
    """Pictures of all runs under common headings; headings without any are left out."""
    sections = []
    for key, title, text in SECTIONS:
        shown = []
        for run in comparison.all_runs:
            looks = [look for look in run.looks if look.section == key and look.path]
            if looks:
                shown.append((run, looks[:1] if key == "samples" else looks))
        if shown:
            sections.append((key, title, text, shown))
    return sections


def _more(run: ComparedRun) -> list[Look]:
    """Pictures that stand in no common section, and what was left out and why."""
    first = next((look for look in run.looks if look.section == "samples" and look.path), None)
    return [
        look
        for look in run.looks
        if look.section == "more"
        or look.path is None
        or (look.section == "samples" and look is not first)
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
# Colours that are replaced by those of the page, light or dark; no other text looks like them.
INK, SERIES = "#0abcde", "#0abc{:02d}"
WIDE, NARROW, SMALL = (9.2, 3.9), (4.3, 3.7), (3.5, 1.75)


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        number: of the run, from which colour and dashes follow.
        kimg: thousands of images.
        values: as many.
    """

    number: int
    kimg: Sequence[float]
    values: Sequence[float]


def curves_svg(
    lines: Sequence[Series], ylabel: str, size: tuple[float, float] = WIDE, *, smooth: bool = False
) -> str:
    """An ``<svg>`` element of some curves over thousands of images, without a legend.

    Args:
        lines: at least one, each with at least one point.
        ylabel: what is drawn.
        size: inches.
        smooth: draw means over stretches of the curve, and not each point.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    style(axes)
    for line in lines:
        kimg, values = _fewer(line.kimg, line.values) if smooth else (line.kimg, line.values)
        axes.plot(
            kimg,
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
    axes.set_xlabel("images seen, thousands", parse_math=False)
    if ylabel:
        axes.set_ylabel(ylabel, parse_math=False)
    return _svg(figure, f"{ylabel}{size}{[line.number for line in lines]}")


def style(axes: Axes) -> None:
    """Thin lines in the colour of the page's text, nothing around the plot."""
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


def _fewer(kimg: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over stretches of a curve, at most :data:`MAX_POINTS`."""
    if len(values) <= MAX_POINTS:
        return list(kimg), list(values)
    return (
        [float(part.mean()) for part in np.array_split(np.asarray(kimg), MAX_POINTS)],
        [float(part.mean()) for part in np.array_split(np.asarray(values), MAX_POINTS)],
    )


def _svg(figure: Figure, salt: str) -> str:
    """The metric value as an element that can stand in a page beside others of its kind."""
    figure.patch.set_visible(False)
    file = io.StringIO()
    # ids come from the salt, and those of two metric values of a page must differ
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        names = ("Creator", "Date", "Format", "Type")
        figure.savefig(file, format="svg", metadata=dict.fromkeys(names))
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
    width, height = figure.get_size_inches() * 72
    return re.sub(
        r"<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {height:g}" role="img">', text, count=1
    )
