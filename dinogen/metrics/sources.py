"""Where images to be measured come from: shards, a folder of files, or a generator; all uint8.

A run and the folder of PNG files that it writes are measured the same way, because generated
images are rounded to the 256 values of a file first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from dinogen.errors import UserError
from dinogen.metrics.value import Facts
from dinogen.report.images import to_uint8
from shards.files import sha256_file
from shards.image.decode import BadImage, decode
from shards.image.kinds import IMAGE_SUFFIXES, UNREAD, UNREAD_IMAGES
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)
_GRID = re.compile(r"grid_\d+x\d+\b.*\.png")


class Reference(ABC):
    """Real images by number that something is compared with, and what identifies them.

    Attributes:
        num: how many.
        resolution: their side in pixels.
    """

    num: int
    resolution: int

    @abstractmethod
    def read(self, numbers: list[int]) -> Tensor:
        """(len(numbers), 3, R, R) uint8 RGB."""

    @abstractmethod
    def facts(self) -> Facts:
        """``data``, ``split`` and ``resize``: the part of a fingerprint that is about them."""


class Images(Reference):
    """Images of packed shards, brought to a resolution as in training: by area.

    Args:
        dataset: has them.
        split: of it.
        numbers: of its samples, in packed order.
        resolution: side in pixels.

    Raises:
        UserError: the stored images are smaller.
    """

    def __init__(
        self, dataset: Dataset, split: str, numbers: Sequence[int], resolution: int
    ) -> None:
        stored = dataset.manifest.image_size
        if stored is not None and stored < resolution:
            raise UserError(
                f"{dataset.location}: its images are {stored}x{stored}, too small to measure "
                f"images of {resolution}x{resolution} against: prepare it again with "
                f"prepare.faces.size={resolution} or more"
            )
        self.dataset, self.split, self.numbers = dataset, split, list(numbers)
        self.num, self.resolution = len(self.numbers), resolution

    def read(self, numbers: list[int]) -> Tensor:
        """(len(numbers), 3, R, R) uint8 RGB.

        Raises:
            CorruptSample: one is damaged: with another in its place a metric value would mean
                nothing.
        """
        chosen = [self.numbers[number] for number in numbers]
        batch = self.dataset.read(chosen, split=self.split, image_size=self.resolution)
        return as_pixels(batch["image"])

    def facts(self) -> Facts:
        """The shards' hash, the split, and the filter that shrinks them."""
        shrunk = f"{self.dataset.manifest.resize_filter} to {self.resolution}"
        return {"data": data_sha256(self.dataset), "split": self.split, "resize": shrunk}


class Folder(Reference):
    """Image files of one folder in order of their names, read as photos are.

    All files are decoded once at the start. Files that cannot be used are left out, with a
    warning: one damaged file must not prevent the others from being measured.

    Args:
        folder: of the files.
        num: how many to take, the first by name; all unless given.

    Attributes:
        files: those that are used.
        left_out: why each of the others is not, by its name.

    Raises:
        UserError: there are none that can be read, or one is not square or of another size; names
            the file.
    """

    def __init__(self, folder: Path, num: int | None = None) -> None:
        self.folder = folder
        found = image_files(folder)[:num]
        self.left_out = _unread(folder)
        if not found:
            others = f" ({_counted(self.left_out)})" if self.left_out else ""
            raise UserError(f"{folder}: no images here that can be read{others}: give their folder")
        self._sha256 = ""
        self.files: list[Path] = []
        self.resolution = 0
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for file, size in zip(found, pool.map(_size, found), strict=True):
                if isinstance(size, str):
                    self.left_out[file.name] = size
                    continue
                self.resolution = _side(file, size, self.resolution)
                self.files.append(file)
        self.num = len(self.files)
        if not self.files:
            name = found[0].name
            raise UserError(
                f"{folder}: none of its {len(found)} images can be read; {name}: "
                f"{self.left_out[name]}"
            )
        if self.left_out:
            log.warning(
                "%s: %d files are LEFT OUT, all values are from the other %d:",
                folder,
                len(self.left_out),
                self.num,
            )
            for name, reason in sorted(self.left_out.items()):
                log.warning("  %s: %s", name, reason)

    def read(self, numbers: list[int]) -> Tensor:
        """(len(numbers), 3, R, R) uint8 RGB.

        Raises:
            UserError: a file was changed meanwhile and can no longer be read; names it.
        """
        return torch.stack([self._pixels(self.files[number]) for number in numbers])

    def _pixels(self, file: Path) -> Tensor:
        try:
            pixels = decode(file.read_bytes()).pixels
        except (OSError, BadImage) as error:
            raise UserError(f"{file}: was sound before, now cannot be read ({error})") from None
        if pixels.shape[:2] != (self.resolution, self.resolution):
            raise UserError(f"{file}: has another size than before: measure again")
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def facts(self) -> Facts:
        """The files' hash; they have no split, and nothing shrinks them."""
        self._sha256 = self._sha256 or files_sha256(self.files)
        return {"data": self._sha256, "split": "all", "resize": "none"}


class Generated:
    """Images that a network makes by number; knows how fast it made them.

    Args:
        sample: numbers (N,) int64 -> (N, 3, R, R) in [-1, 1]; the same image for a number,
            no matter which others are requested with it.
        num: how many there are.
        resolution: side in pixels.
        how: how they differ from what `dinogen sample` makes; part of the fingerprint.
    """

    def __init__(
        self,
        sample: Callable[[Tensor], Tensor],
        num: int,
        resolution: int,
        how: Facts | None = None,
    ) -> None:
        self._sample = sample
        self.how = how or {}
        self.num, self.resolution = num, resolution
        self._made: list[tuple[int, float]] = []

    @torch.no_grad()
    def read(self, numbers: list[int]) -> Tensor:
        """(len(numbers), 3, R, R) uint8 RGB on the CPU."""
        before = time.monotonic()
        images = as_pixels(self._sample(torch.tensor(numbers)))  # the copy waits for the GPU
        self._made.append((len(numbers), time.monotonic() - before))
        return images

    @property
    def images_per_s(self) -> float:
        """Speed on this rank, rounding and copying included; 0 before the first images.

        The first batch warms up and counts only where it is alone.
        """
        made = self._made[1:] or self._made
        seconds = sum(one for _, one in made)
        return sum(num for num, _ in made) / seconds if seconds else 0.0


class Reconstructed:
    """Real images and their reconstructions by an autoencoder, by number.

    Args:
        real: the images.
        reconstruct: (N, 3, R, R) in [-1, 1] and their numbers (N,) -> the same, encoded
            and decoded.
    """

    def __init__(self, real: Reference, reconstruct: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.real, self.num = real, real.num
        self._reconstruct = reconstruct

    @torch.no_grad()
    def read(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Images and reconstructions, each (len(numbers), 3, R, R) uint8 RGB on the CPU."""
        pixels = self.real.read(numbers)
        images = pixels.float() / 127.5 - 1
        return pixels, as_pixels(self._reconstruct(images, torch.tensor(numbers)))


def as_pixels(images: Tensor) -> Tensor:
    """(N, 3, R, R) in [-1, 1] -> uint8 on the CPU, by the rule by which PNG files are written."""
    pixels = to_uint8(images.detach().float().cpu().numpy())
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def data_sha256(data: Dataset) -> str:
    """Hash of what all shards of a dataset hold, wherever it lies; of a mix, its weights too."""
    parts: list[object] = []
    for one, weight in zip(data.sets, data.weights, strict=True):
        shards = one.manifest.shards
        # plain tars have no hash of their own
        parts.append([(s.split, s.num_samples, s.sha256 or [s.name, s.num_bytes]) for s in shards])
        parts.append(str(weight))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def files_sha256(files: Iterable[Path]) -> str:
    """Hash of what some files hold, in their order; their names do not matter."""
    text = "\n".join(sha256_file(file) for file in files)
    return hashlib.sha256(text.encode()).hexdigest()


def image_files(folder: Path) -> list[Path]:
    """Image files directly in a folder, in order of their names, without hidden ones.

    The grid that `dinogen sample` writes next to its images is not one of them.
    """
    return [file for file in _visible(folder) if file.suffix.lower() in IMAGE_SUFFIXES]


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(file for file in files if file.is_file() and not _GRID.match(file.name))


def _unread(folder: Path) -> dict[str, str]:
    """What to do about the files that hold images but are not read on this machine, by name."""
    found = ((file.name, file.suffix.lower()) for file in _visible(folder))
    return {
        name: f"not read here: {UNREAD[suffix]}"
        for name, suffix in found
        if suffix in UNREAD_IMAGES
    }


def _counted(names: Iterable[str]) -> str:
    counts = Counter(Path(name).suffix.lower() for name in names)
    return ", ".join(
        f"{count} {suffix}: {UNREAD[suffix]}" for suffix, count in counts.most_common()
    )


def _size(file: Path) -> tuple[int, int] | str:
    """(width, height) of an image file, or why it cannot be used."""
    try:
        height, width = decode(file.read_bytes()).pixels.shape[:2]
    except OSError as error:
        return f"unreadable: {error.strerror}"
    except BadImage as error:
        return str(error)
    return width, height


def _side(file: Path, size: tuple[int, int], expected: int) -> int:
    """Side of a square image.

    Args:
        file: it.
        size: its width and height.
        expected: the side of those before it; 0 for the first.

    Raises:
        UserError: it is not square, or not of the side of the others.
    """
    width, height = size
    if width != height:
        raise UserError(f"{file}: {width}x{height} pixels: only square images can be measured")
    if expected and width != expected:
        raise UserError(
            f"{file}: {width}x{height} pixels, but the files before it have {expected}x{expected}: "
            "all have to be of one size; put others elsewhere"
        )
    return width
