"""Draws docs/today.png: FID-768 over images and over time, for each model of a study.

    python docs/make_today.py runs/today_fast

Give `dinogen study report` first, after all runs of the study. Lines are means over the seeds, and
bands reach from the lowest seed to the highest. Minutes are at the speed that the study measured
first, from which it knew how many images a model is shown in the time.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinogen.files import write_bytes

METRIC = "fid768"
# cold colours see no features, warm ones do
COLOURS = {
    "dcgan": "#9db7d5",
    "stylegan2_ada": "#5b9bd5",
    "ddpm_v": "#7a7a7a",
    "flow_unet": "#2f6f8f",
    "flow_dit": "#12305e",
    "flow_dit_repa": "#e08214",
    "flow_rcg": "#b8860b",
    "drift_progressive": "#e0705f",
    "drift_dit": "#9b1b30",
}
TRACKS = {"images": "images seen, thousands", "minutes": "training, minutes on two CPU cores"}


def curves(study: Path, track: str) -> dict[str, np.ndarray]:
    """(seeds, 2, points) of each model: x and the metric."""
    report = json.loads((study / "report/comparison.json").read_text())
    budget: dict[str, Any] = json.loads((study / "budget.json").read_text())["configs"]
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for run in report["runs"]:
        folder = Path(run["folder"])
        if folder.parent.name != track:
            continue
        name = folder.name.rsplit("-seed", 1)[0]
        lines = [line for line in run["curves"]["measured"] if METRIC in line["metrics"]]
        x = np.array([line["nimg"] / 1000 for line in lines])
        if track == "minutes":
            planned = budget[f"{track}/{name}"]
            x *= planned["minutes"] / planned["kimg"]
        found[name].append(np.stack([x, [line["metrics"][METRIC]["value"] for line in lines]]))
    return {name: np.stack(runs) for name, runs in found.items()}


def draw(axes: Axes, lines: dict[str, np.ndarray], xlabel: str) -> None:
    """One panel, with the name of each model at the end of its line."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.8)
    axes.set_yscale("log")
    for name, runs in lines.items():
        x, values = runs[:, 0].mean(0), runs[:, 1]
        axes.fill_between(x, values.min(0), values.max(0), color=COLOURS[name], alpha=0.15, lw=0)
        axes.plot(x, values.mean(0), color=COLOURS[name], marker="o", markersize=4, lw=1.8)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("FID-768")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    bottom, top = axes.get_ylim()
    # a name is moved up until it is clear of the one below it
    gap = 0.045 * np.log(top / bottom)
    least = -np.inf
    for name, runs in sorted(lines.items(), key=lambda item: item[1][:, 1, -1].mean()):
        least = max(np.log(runs[:, 1, -1].mean()), least + gap)
        where = (runs[:, 0, -1].mean(), np.exp(least))
        axes.annotate(
            name, where, (6, 0), textcoords="offset points", va="center", color=COLOURS[name]
        )


def main() -> None:
    """Read the report, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="its folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("today.png"))
    args = parser.parse_args()
    canvas = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, (track, xlabel) in zip(canvas.subplots(1, 2), TRACKS.items(), strict=True):
        draw(axes, curves(args.study, track), xlabel)
    file = io.BytesIO()
    canvas.savefig(file, dpi=110, format="png", metadata={"Software": None})
    write_bytes(args.out, file.getvalue())


if __name__ == "__main__":
    main()
