"""What a stage logs: stats.jsonl and TensorBoard, both against nimg, without overlap on resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dinogen.distributed import process_group
from dinogen.families.base import Scalars
from dinogen.training.logging.jsonl import cut_lines
from dinogen.training.logging.tensorboard import FOLDER, Layout


class Logger:
    """Means since the last line, over samples of all ranks.

    Sums are kept on the device, so that adding never waits for it, and are part of the checkpoint:
    a run that was interrupted between two lines writes the same next line.

    Args:
        folder: of the stage; None on ranks that do not write.
        stage: resolution, part of each line.
        device: where the sums are kept.
    """

    def __init__(self, folder: Path | None, stage: int, device: torch.device) -> None:
        self.folder = folder
        self.stage = stage
        self.device = device
        # Apple's GPUs know no double precision
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.writer: SummaryWriter | None = None

    def start(self, nimg: int, state: dict[str, Any] | None, layout: Layout) -> None:
        """Open the files at ``nimg``; what was written past it is dropped.

        Args:
            nimg: where the run starts or resumes.
            state: what :meth:`state` gave, or None.
            layout: charts that TensorBoard shows in the tab Custom Scalars.
        """
        if state is not None:
            # Every rank has every name, as all of them are summed; the values count once.
            main = process_group.is_main()
            self.sums = {
                name: torch.tensor(
                    _number(value) if main else 0.0, dtype=self.dtype, device=self.device
                )
                for name, value in state["sums"].items()
            }
            self.weights = {name: main * value for name, value in state["weights"].items()}
        if self.folder is None:
            return
        cut_lines(self.folder / "stats.jsonl", nimg)
        self.writer = SummaryWriter(str(self.folder / FOLDER), purge_step=nimg + 1)
        self.writer.add_custom_scalars(layout)

    def add(self, losses: Scalars, weight: float, prefix: str = "") -> None:
        """Add a microbatch's means.

        Args:
            losses: scalar tensors.
            weight: the microbatch's share of the global batch.
            prefix: put before each name.
        """
        for name, value in losses.items():
            key = prefix + name
            item = self._scalar(value) * weight
            self.sums[key] = self.sums[key] + item if key in self.sums else item
            self.weights[key] = self.weights.get(key, 0.0) + weight

    def flush(self) -> dict[str, float]:
        """Means over all ranks since the last flush; every rank has to call it."""
        names = sorted(self.sums)
        if not names:
            return {}
        sums = torch.stack([self.sums[name] for name in names])
        weights = torch.tensor([self.weights[name] for name in names], dtype=torch.float64)
        total, weight = (
            process_group.all_reduce_sum(sums).cpu(),
            process_group.all_reduce_sum(weights),
        )
        self.sums.clear()
        self.weights.clear()
        return dict(zip(names, (total / weight).tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """Unwritten sums over all ranks, JSON-ready; every rank has to call it."""
        names = sorted(self.sums)
        if not names:
            return {"sums": {}, "weights": {}}
        sums = process_group.all_reduce_sum(
            torch.stack([self.sums[name] for name in names])
        ).tolist()
        weights = process_group.all_reduce_sum(
            torch.tensor([self.weights[name] for name in names], dtype=torch.float64)
        ).tolist()
        return {
            "sums": {name: _json_number(value) for name, value in zip(names, sums, strict=True)},
            "weights": dict(zip(names, weights, strict=True)),
        }

    def write(self, nimg: int, values: dict[str, float | None]) -> None:
        """One line to stats.jsonl and the same numbers to TensorBoard; rank 0 only writes."""
        if self.folder is None or self.writer is None:
            return
        line = {"nimg": nimg, "stage": self.stage} | {
            name: _json_number(value) for name, value in values.items()
        }
        with (self.folder / "stats.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, nimg)

    def write_text(self, tag: str, text: str, nimg: int) -> None:
        """A note, such as a warning, to TensorBoard."""
        if self.writer is not None:
            self.writer.add_text(tag, text, nimg)

    def write_image(self, tag: str, image: np.ndarray, nimg: int) -> None:
        """A picture (H, W, 3) uint8 to TensorBoard."""
        if self.writer is not None:
            self.writer.add_image(tag, image, nimg, dataformats="HWC")

    def sync(self) -> None:
        """Bring what was written to disk; done before each checkpoint."""
        if self.folder is None or self.writer is None:
            return
        self.writer.flush()
        path = self.folder / "stats.jsonl"
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        if self.writer is not None:
            self.writer.close()

    def _scalar(self, value: Tensor) -> Tensor:
        return value.detach().to(self.device, self.dtype)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _json_number(value: float | None) -> float | None:
    """JSON knows no NaN and no infinity; readers meet null."""
    return value if value is not None and math.isfinite(value) else None
