"""The exchange format: one ``.pt`` per image, named after it, with its pooled pyramid."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinogen.features.pyramid import RESIZE
from dinogen.files import write_bytes, write_json
from dinogen.prepare.faces.crop import Crop
from dinogen.prepare.photos.find import named
from dinogen.prepare.photos.read import PrepareError
from dinogen.prepare.pyramid import Levels
from shards import open_dataset
from shards.errors import CorruptSample
from shards.format.sample import decode_meta
from shards.image.kinds import is_hidden
from shards.read.dataset import PackedDataset

GRIDS = (4, 8, 16)
_GUIDE = "guide.json"
# Longer names leave no room for ".pt" and the suffix of its temporary file.
_MAX_NAME = 200
# Names that every file system allows; "/" and "\\" would lead out of the folder.
_SAFE_NAME = re.compile(r"[^./\\:*?\"<>|\x00-\x1f\x7f][^/\\:*?\"<>|\x00-\x1f\x7f]*")


_logger = logging.getLogger(__name__)


class PartlyExportedError(PrepareError):
    """Some samples cannot be exported; all others are."""


class BadPyramid(PrepareError):
    """One ``.pt`` file cannot be used; the message names it."""


def export_pt(data: Path, out: Path, *, progress: Callable[[int, int], None] | None = None) -> int:
    """Write the main guide's pooled pyramid of every sample, of all splits, as ``out/NAME.pt``.

    NAME is the image's, without its suffix, see :func:`file_names`. A file holds
    ``{"4x4": (1, 16, C), "8x8": (1, 64, C), "16x16": (1, 256, C)}`` float32. ``guide.json`` beside
    them says which guide made them, if the dataset knows. A sample that cannot be used is named in
    a warning, and all others are exported.

    Args:
        data: packed dataset.
        out: folder; created if missing. Files of the same name are replaced.
        progress: called with the number of samples done and of all samples.

    Returns:
        Number of files written.

    Raises:
        PrepareError: the dataset lacks a pooled level.
        PartlyExportedError: at the end, if samples were left out.
        ShardsError: the dataset cannot be read.
    """
    dataset = open_dataset(data)
    missing = [f"p{grid}" for grid in GRIDS if f"p{grid}" not in dataset.manifest.levels]
    if missing:
        raise PrepareError(
            f"{data}: lacks the level {', '.join(missing)}: prepare it with pooled among "
            f"prepare.pyramids.kinds and with prepare.pyramids.grids {list(GRIDS)}"
        )
    out.mkdir(parents=True, exist_ok=True)
    splits = dataset.manifest.splits
    total = sum(info.num_samples for info in splits.values())
    names = file_names(_sources(dataset))
    num_done = 0
    bad: list[str] = []
    for split in splits:
        for number in range(dataset.num_samples(split)):
            try:
                sample = dataset.sample(number, split)
            except CorruptSample as error:
                # Without the error's advice, which is about training.
                bad.append(f"{error.shard}: {error.key}")
                _logger.warning(
                    "%s: %s%s: %s: not exported",
                    error.shard, error.key, error.member and f".{error.member}", error.what,
                )  # fmt: skip
                continue
            if absent := [f"p{grid}" for grid in GRIDS if f"p{grid}" not in sample.levels]:
                bad.append(sample.key)
                _logger.warning("%s: lacks %s: not exported", sample.key, ", ".join(absent))
                continue
            pyramid = {
                f"{grid}x{grid}": torch.from_numpy(sample.levels[f"p{grid}"].astype("float32"))[
                    None
                ]
                for grid in GRIDS
            }
            buffer = io.BytesIO()
            torch.save(pyramid, buffer)
            write_bytes(out / f"{names[sample.key]}.pt", buffer.getvalue())
            num_done += 1
            if progress is not None:
                progress(num_done, total)
    if dataset.manifest.guide:
        write_json(out / _GUIDE, dataset.manifest.guide)
    if bad:
        raise PartlyExportedError(
            f"{data}: {len(bad)} of {total} samples NOT EXPORTED ({named(bad)}): the other "
            f"{num_done} are in {out}. `dinogen shards verify {data}` lists what is damaged"
        )
    return num_done


def file_names(sources: Mapping[str, Any]) -> dict[str, str]:
    """Names of the images' files without ``.pt``; all different, and all inside their folder.

    Args:
        sources: by key, the path of the image that a sample comes from.

    Returns:
        By key, the path's last part without its suffix, as in the original experiment; the key if
        that name belongs to several images, is another one's key, or is no safe file name. If the
        key is no safe file name, as in tars from elsewhere with ``/`` or ``..``, its safe
        characters and a hash.
    """
    stems = {key: PurePosixPath(str(source)).stem for key, source in sources.items()}
    count = Counter(stem.lower() for stem in stems.values())
    keys = Counter(key.lower() for key in stems)
    return {
        key: stem
        if _is_safe(stem) and count[stem.lower()] == 1 and (stem == key or stem.lower() not in keys)
        else _safe_key(key, keys[key.lower()] == 1)
        for key, stem in stems.items()
    }


def _is_safe(name: str) -> bool:
    size = len(os.fsencode(name)) if not _lone_surrogates(name) else _MAX_NAME + 1
    return size <= _MAX_NAME and bool(_SAFE_NAME.fullmatch(name)) and not is_hidden(f"{name}.pt")


def _lone_surrogates(name: str) -> bool:
    """Bytes of a name that are not UTF-8; they would name a file that few programs can open."""
    return any("\ud800" <= letter <= "\udfff" for letter in name)


def _safe_key(key: str, is_unique: bool) -> str:
    if _is_safe(key) and is_unique:
        return key
    letters = re.sub(r"[^A-Za-z0-9_-]+", "-", key).strip("-")[-64:]
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{letters}-{digest}" if letters else digest


def _sources(dataset: PackedDataset) -> dict[str, Any]:
    """By key, the path of each sample's image; reads only the samples' metadata."""
    found: dict[str, Any] = {}
    for split in dataset.manifest.splits:
        table = dataset.table(split)
        for shard in range(len(table.shards)):
            index, descriptor = table.index(shard), table.file(shard).descriptor
            column = index.column("json")
            for row in range(len(index)):
                key = index.key(row)
                found[key] = ""
                if column is None or index.offsets[row, column] < 0:
                    continue
                data = os.pread(
                    descriptor, int(index.sizes[row, column]), int(index.offsets[row, column])
                )
                with suppress(ValueError):  # reported when the whole sample is read
                    found[key] = decode_meta(data, key).get("source", "")
    return found


def pt_paths(folder: Path) -> list[Path]:
    """The ``.pt`` files in a folder, sorted; hidden ones are skipped."""
    return sorted(path for path in folder.glob("*.pt") if not is_hidden(path.name))


class PtFiles:
    """A folder of the exchange format, by file name; nothing in it is unpickled.

    Attributes:
        folder: where they are.
        guide: identity of the guide that made them, or None if ``guide.json`` is missing.
        guides: always empty: the format holds the levels of one guide.
        clip: always empty.
        settings: their grids and kinds.

    Raises:
        PrepareError: there are no ``.pt`` files, or ``guide.json`` is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths = {path.stem: path for path in pt_paths(folder)}
        if not self._paths:
            raise PrepareError(f"{folder}: holds no .pt files")
        # They do not say how images were resized; other programs resize like Pillow.
        self.settings: dict[str, Any] = {
            "grids": list(GRIDS),
            "kinds": ["pooled"],
            "resize": RESIZE,
        }
        self.guide: dict[str, Any] | None = None
        self.guides: dict[str, dict[str, Any]] = {}
        self.clip: dict[str, Any] = {}
        path = folder / _GUIDE
        if path.exists():
            try:
                self.guide = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise PrepareError(f"{path}: not JSON ({error}): export again") from error

    def keys(self) -> set[str]:
        """Names of the files without ``.pt``."""
        return set(self._paths)

    def names(self, sources: Mapping[str, str]) -> dict[str, str]:
        """The name of each face's file: its key, or else the name of its image.

        Args:
            sources: by the face's key, the path of the image that it comes from.
        """
        called = file_names(sources)
        return {key: key if key in self._paths else called[key] for key in sources}

    def belongs(self, crop: Crop) -> bool:
        """True: these files do not say which image they were made from."""
        return True

    def levels(self, key: str) -> Levels:
        """The pooled levels of one image, ``{"p4": (16, C), ...}`` float16.

        Tensors may be of any float type, on any device, need gradients or be views; other keys are
        ignored.

        Raises:
            BadPyramid: the file is damaged, would run code, or holds something else.
        """
        path = self._paths[key]
        try:
            pyramid = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds on what is no file of tensors
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise BadPyramid(f"{path}: not a file of plain tensors ({reason})") from error
        _check(path, pyramid)
        return {f"p{grid}": _half(path, pyramid, grid) for grid in GRIDS}


def _half(path: Path, pyramid: Mapping[str, Tensor], grid: int) -> NDArray[np.float16]:
    """One level (g * g, C) as shards store it."""
    name = f"{grid}x{grid}"
    try:
        half = pyramid[name].detach()[0].half().cpu()
        if not torch.isfinite(half).all():
            raise BadPyramid(f"{path}: {name} is not finite in float16, which shards store")
        found: NDArray[np.float16] = half.contiguous().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadPyramid(f"{path}: {name} holds no plain numbers ({reason})") from None
    return found


def _check(path: Path, pyramid: Any) -> None:
    wanted = {f"{grid}x{grid}": grid * grid for grid in GRIDS}
    if not isinstance(pyramid, dict) or not set(wanted) <= set(pyramid):
        found = sorted(map(str, pyramid)) if isinstance(pyramid, dict) else type(pyramid).__name__
        raise BadPyramid(f"{path}: holds {found}, expected a dict with {list(wanted)}")
    channels = set()
    for name, num_locations in wanted.items():
        value = pyramid[name]
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.dim() != 3 or shape[:2] != (1, num_locations):
            raise BadPyramid(f"{path}: {name} is {shape}, expected (1, {num_locations}, C)")
        if value.is_complex():
            raise BadPyramid(f"{path}: {name} holds complex numbers, expected real ones")
        channels.add(value.shape[2])
    if len(channels) != 1:
        raise BadPyramid(f"{path}: its levels have different numbers of channels {channels}")
