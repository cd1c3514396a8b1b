"""TensorBoard: curves, images, a chart layout, and the results of a finished stage."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dinogen.config import Config
from dinogen.families.abilities import MeasuresHeldOut, Probes
from dinogen.families.base import Family
from dinogen.files import write_bytes
from dinogen.runs.run import Stage
from dinogen.training.logging.sinks.base import Charts, Event, LiveSink
from dinogen.training.logging.sinks.summary import final_values, hyperparameters

log = logging.getLogger(__name__)

# folder of the stage's results within its TensorBoard folder
FINAL = "final"


class TensorboardSink(LiveSink):
    """Curves, sample grids and warnings in ``RUN/RxR/tb``."""

    def start(self, stage: Stage, nimg: int, charts: Charts) -> None:
        """See :class:`LiveSink`; ``charts`` are those of the tab Custom Scalars."""
        # At 0 the grid of a run that was killed before its first checkpoint goes too.
        purge = nimg + 1 if nimg else 0
        self.writer = SummaryWriter(str(stage.tensorboard_folder), purge_step=purge)
        self.writer.add_custom_scalars(charts)

    def write(self, event: Event) -> None:
        """See :class:`Sink`."""
        for name, value in event.values.items():
            if value is not None:
                self.writer.add_scalar(name, value, event.nimg)
        for name, path in event.images.items():
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self.writer.add_image(name, pixels, event.nimg, dataformats="HWC")
        for warning in event.warnings:
            self.writer.add_text("warnings", warning, event.nimg)

    def flush(self) -> None:
        """See :class:`LiveSink`."""
        self.writer.flush()

    def close(self, status: str) -> None:
        """See :class:`Sink`."""
        self.writer.close()


def chart_layout(family: Family, config: Config) -> Charts:
    """Charts for the tab Custom Scalars, which begins with what tells whether a run is well.

    Args:
        family: names its phases, and what it measures.
        config: of the run; says which metrics are measured in training.

    Returns:
        {category: {chart: ["Multiline", [tag pattern]]}}, as ``add_custom_scalars`` takes it.
    """
    measured = config.eval.every_kimg is not None
    first = {"loss": ["loss$", "floor$"]}
    if measured:
        first |= {name: [f"metrics/{name}$"] for name in config.eval.generated}
        if isinstance(family, MeasuresHeldOut):
            first["held out"] = ["val/"]
    if isinstance(family, Probes):
        first["diversity"] = ["diversity$"]
    first["images/s"] = ["images_per_s$"]
    phases = {phase.name: [f"{phase.name}/(?!grad_norm)"] for phase in family.phases}
    machine = {
        "waiting for data, saving": ["(data_wait|save_share)$"],
        "damaged samples": ["num_skipped$"],
    }
    if family.device.type == "cuda":
        machine["peak memory, MiB"] = ["peak_memory_mb$"]
        machine["share of peak FLOP/s"] = ["mfu$"]
    categories = {
        "At a glance": first,
        "Losses by phase": phases,
        "Gradient norms": {"gradient norms": [".*/grad_norm$"]},
        "Machine": machine,
    }
    return {
        category: {chart: ["Multiline", tags] for chart, tags in charts.items()}
        for category, charts in categories.items()
    }


def write_summary(stage: Stage) -> None:
    """Write the results of a finished stage, as read from its files, for TensorBoard.

    The tab HParams shows hyperparameters and final metric values, which were measured in training
    or by ``dinogen evaluate`` and are also scalars ``final/NAME``. They are a run of their own,
    ``tb/final``, whose scalars are the columns of the table; each call writes it again. Nothing is
    written for an unfinished stage, nor where ``logging`` leaves out TensorBoard.

    Args:
        stage: where it lies; its run's config says what was chosen.

    Raises:
        OSError: the file cannot be written.
    """
    result = stage.result
    if result is None or "nimg" not in result or "tensorboard" not in stage.run.config.sinks:
        return
    final = stage.tensorboard_folder / FINAL
    with tempfile.TemporaryDirectory() as place:
        with SummaryWriter(place) as writer:
            # Without the summary of the experiment TensorBoard makes the table's columns of all
            # runs there are; with it, of the first one's alone.
            _, start, end = hparams(hyperparameters(stage, result), {})
            writer.file_writer.add_summary(start)
            writer.file_writer.add_summary(end)
            for name, (value, nimg) in final_values(stage, result).items():
                writer.add_scalar(f"final/{name}", value, nimg)
            for name, path, nimg in _images(stage, result):
                try:
                    pixels = np.asarray(Image.open(path).convert("RGB"))
                except (OSError, ValueError, SyntaxError) as error:
                    log.warning("%s is not shown in TensorBoard: %s", path, error)
                    continue
                writer.add_image(name, pixels, nimg, dataformats="HWC")
        (made,) = Path(place).iterdir()
        older = list(final.glob("*tfevents*"))
        write_bytes(final / made.name, made.read_bytes())
    for path in older:
        if path.name != made.name:
            path.unlink()


def _images(stage: Stage, result: dict[str, Any]) -> Iterator[tuple[str, Path, int]]:
    """Name, file and images seen of the images that are there."""
    known = result.get("files") or {}
    files = {name: known.get(name) for name in ("final", "real")}
    named = [(name, stage.folder / file, result["nimg"]) for name, file in files.items() if file]
    visuals = stage.visualizations_folder
    for name, entry in stage.visualizations.items():
        file = entry.get("file")
        if file and file.endswith(".png"):
            named.append((f"visualizations/{name}", visuals / file, entry.get("nimg") or 0))
    yield from (each for each in named if each[1].is_file())
