"""The loss curve of a stage, drawn with the collapse floor and the diversity of its samples."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinogen.files import write_bytes
from dinogen.runs.files import Line, read_stats, series

BLUE, RED, GREY, ORANGE = "#2563a8", "#b3261e", "#8a8f98", "#b8690f"
COLLAPSING, COLLAPSED = 0.5, 0.1


def plot_loss_curve(stats_path: Path | str, out: Path | str, *, title: str) -> Path:
    """Draw ``loss`` against thousands of images, with the floor of a collapsed generator.

    Args:
        stats_path: stats.jsonl of the stage.
        out: the PNG file; written atomically.
        title: drawn above the curve; should say so if the guide's weights are random.

    Returns:
        ``out``.

    Raises:
        UserError: the statistics are missing or empty.
    """
    lines = read_stats(stats_path)
    has_diversity = bool(series(lines, "diversity")[0])
    width, height = 7.2, 5.75 if has_diversity else 4.15
    canvas = Figure(figsize=(width, height))
    FigureCanvasAgg(canvas)
    # matplotlib's own layouts take a third of the whole time
    canvas.subplots_adjust(
        0.95 / width, 0.55 / height, 1 - 0.12 / width, 1 - 0.75 / height, hspace=0.08
    )
    canvas.suptitle(title, fontsize=11)
    if has_diversity:
        loss_axes, diversity_axes = canvas.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        _draw_diversity(diversity_axes, lines)
        bottom = diversity_axes
    else:
        loss_axes = bottom = canvas.subplots()
    _draw_loss(loss_axes, lines)
    bottom.set_xlabel("images shown, thousands")
    png = io.BytesIO()
    canvas.savefig(png, format="png", dpi=110)
    out = Path(out)
    write_bytes(out, png.getvalue())
    return out


def _draw_loss(axes: Axes, lines: list[Line]) -> None:
    """Loss, its running mean, the floor, the fade-in and the updates that were skipped."""
    kimg, loss = series(lines, "loss")
    crowded = len(loss) >= 40
    axes.plot(
        kimg,
        loss,
        color=BLUE,
        alpha=0.35 if crowded else 1.0,
        linewidth=1 if crowded else 1.8,
        marker="o" if len(loss) < 10 else None,
        markersize=4,
        label=None if crowded else "loss",
    )
    if crowded:
        axes.plot(kimg, _running_mean(loss), color=BLUE, linewidth=1.8, label="loss")
    _draw_floor(axes, lines)
    kimg_alpha, alpha = series(lines, "alpha")
    faded = [at for at, share in zip(kimg_alpha, alpha, strict=True) if share < 1.0]
    if faded:
        axes.axvspan(faded[0], faded[-1], color=GREY, alpha=0.18, linewidth=0, label="fade-in")
    whole = set(kimg)
    lost = [
        line["nimg"] / 1000 for line in lines if "loss" in line and line["nimg"] / 1000 not in whole
    ]
    if lost:
        axes.plot(
            lost,
            [0.02] * len(lost),
            "x",
            color=RED,
            transform=axes.get_xaxis_transform(),
            label=f"not finite: {len(lost)}",
        )
    if loss and min(loss) > 0 and max(loss) > 10 * min(loss):
        axes.set_yscale("log")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    # above the curves, which may be anywhere inside
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def _draw_floor(axes: Axes, lines: list[Line]) -> None:
    """The floor as a dashed line that carries its own name and value."""
    _, floor = series(lines, "floor")
    if not floor:
        return
    axes.axhline(
        floor[-1],
        color=RED,
        linestyle="--",
        linewidth=1.4,
        label=f"collapse floor {floor[-1]:.4g}: the same features for every z",
    )


def _draw_diversity(axes: Axes, lines: list[Line]) -> None:
    """Diversity of samples over that of real images, with the two thresholds of collapse."""
    kimg, diversity = series(lines, "diversity")
    axes.plot(kimg, diversity, color=ORANGE, linewidth=1.6, marker="o", markersize=4)
    for level, name in ((COLLAPSING, "collapsing below"), (COLLAPSED, "collapsed below")):
        axes.axhline(level, color=RED, linestyle=":", linewidth=1.2)
        axes.text(
            0.995,
            level,
            f"{name} {level:.0%} ",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=RED,
        )
    axes.set_ylim(0, max(1.1, 1.08 * max(diversity)))
    axes.set_ylabel("diversity / real")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.25)


def _running_mean(values: list[float]) -> list[float]:
    """Mean over a centred window of a twentieth of the curve; shorter at both ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    where = np.arange(len(values))
    low = np.maximum(where - half, 0)
    high = np.minimum(where + half + 1, len(values))
    means: list[float] = ((sums[high] - sums[low]) / (high - low)).tolist()
    return means
