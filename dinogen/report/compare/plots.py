"""Curves of several runs as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

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
    """The figure as an element that can stand in a page beside others of its kind."""
    figure.patch.set_visible(False)
    file = io.StringIO()
    # ids come from the salt, and those of two figures of a page must differ
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
