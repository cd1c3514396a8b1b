"""The exchange format: one ``KEY.pt`` per picture with its pooled pyramid in float32."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinogen.files import write_bytes, write_json
from dinogen.prepare.pyramid import Levels
from dinogen.prepare.read import PrepareError
from shards import open_dataset

GRIDS = (4, 8, 16)
_GUIDE = "guide.json"


def export_pt(data: Path, out: Path, *, progress: Callable[[int, int], None] | None = None) -> int:
    """Write the pooled pyramid of every sample, of all splits, as ``out/KEY.pt``.

    A file holds ``{"4x4": (1, 16, C), "8x8": (1, 64, C), "16x16": (1, 256, C)}`` float32. Beside
    them ``guide.json`` says which guide made them, if the dataset knows.

    Args:
        data: packed dataset.
        out: folder; made if missing. Files of the same name are replaced.
        progress: called with the number of samples done and of all samples.

    Returns:
        Number of files written.

    Raises:
        PrepareError: the dataset lacks a pooled level.
        ShardsError: it cannot be read.
    """
    dataset = open_dataset(data)
    lacking = [f"p{grid}" for grid in GRIDS if f"p{grid}" not in dataset.manifest.levels]
    if lacking:
        raise PrepareError(
            f"{data}: lacks the level {', '.join(lacking)}: prepare it with pooled among "
            f"prepare.pyramids.kinds and prepare.pyramids.grids {list(GRIDS)}"
        )
    out.mkdir(parents=True, exist_ok=True)
    splits = dataset.manifest.splits
    total = sum(info.num_samples for info in splits.values())
    num_done = 0
    for split in splits:
        for number in range(dataset.num_samples(split)):
            sample = dataset.sample(number, split)
            pyramid = {
                f"{grid}x{grid}": torch.from_numpy(sample.levels[f"p{grid}"].astype("float32"))[
                    None
                ]
                for grid in GRIDS
            }
            buffer = io.BytesIO()
            torch.save(pyramid, buffer)
            write_bytes(out / f"{sample.key}.pt", buffer.getvalue())
            num_done += 1
            if progress is not None:
                progress(num_done, total)
    if dataset.manifest.guide:
        write_json(out / _GUIDE, dataset.manifest.guide)
    return num_done


class PtFiles:
    """A folder of the exchange format, by key; nothing in it is unpickled.

    Attributes:
        folder: where they lie.
        guide: identity of the guide that made them, or None where ``guide.json`` is missing.
        settings: their grids and kinds.

    Raises:
        PrepareError: there are no ``.pt`` files, or ``guide.json`` is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths = {path.stem: path for path in sorted(folder.glob("*.pt"))}
        if not self._paths:
            raise PrepareError(f"{folder}: holds no .pt files")
        self.settings: dict[str, Any] = {"grids": list(GRIDS), "kinds": ["pooled"]}
        self.guide: dict[str, Any] | None = None
        path = folder / _GUIDE
        if path.exists():
            try:
                self.guide = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise PrepareError(f"{path}: not JSON ({error}): export again") from error

    def keys(self) -> set[str]:
        """Names of the files without ``.pt``."""
        return set(self._paths)

    def levels(self, key: str) -> Levels:
        """The pooled levels of one picture, ``{"p4": (16, C), ...}`` float16.

        Raises:
            PrepareError: the file is damaged, would run code, or holds something else.
        """
        path = self._paths[key]
        try:
            pyramid = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds on what is no file of tensors
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise PrepareError(f"{path}: no file of plain tensors ({reason})") from error
        _check(path, pyramid)
        return {f"p{grid}": pyramid[f"{grid}x{grid}"][0].half().numpy() for grid in GRIDS}


def _check(path: Path, pyramid: Any) -> None:
    wanted = {f"{grid}x{grid}": grid * grid for grid in GRIDS}
    if not isinstance(pyramid, dict) or set(pyramid) != set(wanted):
        found = sorted(map(str, pyramid)) if isinstance(pyramid, dict) else type(pyramid).__name__
        raise PrepareError(f"{path}: holds {found}, needed is a dict with {list(wanted)}")
    channels = set()
    for name, num_places in wanted.items():
        value = pyramid[name]
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.dim() != 3 or shape[:2] != (1, num_places):
            raise PrepareError(f"{path}: {name} is {shape}, needed is (1, {num_places}, C)")
        if not torch.isfinite(value.half()).all():
            raise PrepareError(f"{path}: {name} is not finite in float16, as shards store it")
        channels.add(value.shape[2])
    if len(channels) != 1:
        raise PrepareError(f"{path}: its levels have different numbers of channels {channels}")
