"""What a stage logs: stats.jsonl and TensorBoard, all against nimg."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dinogen.batch import Scalars
from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.files import next_free, write_bytes
from dinogen.runs.files import line_nimg, read_raw
from dinogen.runs.layout import STATS, TENSORBOARD
from dinogen.training.logging.tensorboard import Layout


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
        cut_lines(self.folder / STATS, nimg)
        self.writer = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=nimg + 1)
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
        with (self.folder / STATS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, nimg)

    def write_text(self, tag: str, text: str, nimg: int) -> None:
        """A note, such as a warning, to TensorBoard."""
        if self.writer is not None:
            self.writer.add_text(tag, text, nimg)

    def write_image(self, tag: str, image: np.ndarray, nimg: int) -> None:
        """An image (H, W, 3) uint8 to TensorBoard."""
        if self.writer is not None:
            self.writer.add_image(tag, image, nimg, dataformats="HWC")

    def sync(self) -> None:
        """Bring what was written to disk; done before each checkpoint."""
        if self.folder is None or self.writer is None:
            return
        self.writer.flush()
        path = self.folder / STATS
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


log = logging.getLogger(__name__)


def cut_lines(path: Path, nimg: int) -> None:
    """Drop what was written past ``nimg``, and every line that is damaged or was cut off.

    A file with damage that no kill explains, which cuts off the last line alone, is kept beside the
    new one as ``NAME.damaged``, ``NAME.damaged-2`` and so on.

    Raises:
        UserError: the file cannot be read, or something else stands in its place.
    """
    found = read_raw(path)
    if found.problems:
        raise UserError(f"{found.messages()[0]}: move it away")
    lines = found.value.splitlines(keepends=True)
    kept = [line for line in lines if line_nimg(line) <= nimg]
    damaged = sum(line_nimg(line) == math.inf for line in lines)
    if damaged:
        log.warning("%s: %d damaged lines are dropped", path, damaged)
        if damaged > 1 or found.value.endswith(b"\n") or line_nimg(lines[-1]) < math.inf:
            kept_as = next_free(path.with_name(f"{path.name}.damaged"))
            write_bytes(kept_as, found.value)
            log.warning("%s: as it was, it is kept as %s", path, kept_as)
    text = b"".join(kept)
    if kept and not text.endswith(b"\n"):
        text += b"\n"  # or the next line would be appended to this one
    if text != found.value:
        write_bytes(path, text)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line, and bring it to disk: what it says took long to find out.

    What a kill has left of a line before stays a line of its own.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(line, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
