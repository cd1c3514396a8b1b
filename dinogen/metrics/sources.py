"""Where pictures to be measured come from: shards, a folder of files, or a generator; all uint8.

A run and the folder of PNG files that it writes are measured alike, because whatever is generated
is rounded to the 256 values of a file first.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dinogen.errors import UserError
from dinogen.metrics.fingerprint import Facts, data_sha256, files_sha256
from dinogen.report.pictures import to_uint8
from shards.dataset import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg")
_GRID = re.compile(r"grid_\d+x\d+\b.*\.png")
_MODES = ("RGB", "L", "P", "1", "RGBA")


class Reference(ABC):
    """Real pictures by number that something is compared with, and what identifies them.

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


class Pictures(Reference):
    """Pictures of packed shards, brought to a resolution as in training: by area.

    Args:
        dataset: has them.
        split: of it.
        numbers: of its samples, in packed order.
        resolution: side in pixels.

    Raises:
        UserError: the stored pictures are smaller.
    """

    def __init__(
        self, dataset: Dataset, split: str, numbers: Sequence[int], resolution: int
    ) -> None:
        stored = dataset.manifest.image_size
        if stored is not None and stored < resolution:
            raise UserError(
                f"{dataset.location}: its pictures are {stored}x{stored}, too small to measure "
                f"pictures of {resolution}x{resolution} against: prepare it again with "
                f"prepare.faces.size={resolution} or more"
            )
        self.dataset, self.split, self.numbers = dataset, split, list(numbers)
        self.num, self.resolution = len(self.numbers), resolution

    def read(self, numbers: list[int]) -> Tensor:
        """(len(numbers), 3, R, R) uint8 RGB.

        Raises:
            CorruptSample: one is damaged: with another in its place a figure would mean nothing.
        """
        chosen = [self.numbers[number] for number in numbers]
        batch = self.dataset.read(chosen, split=self.split, image_size=self.resolution)
        return as_pixels(batch["image"])

    def facts(self) -> Facts:
        """The shards' hash, the split, and the filter that shrinks them."""
        shrunk = f"{self.dataset.manifest.resize_filter} to {self.resolution}"
        return {"data": data_sha256(self.dataset), "split": self.split, "resize": shrunk}


class Folder(Reference):
    """PNG and JPEG files of one folder in order of their names, as they are.

    Args:
        folder: of the files.
        num: the first so many; all unless given.

    Raises:
        UserError: there are none, or one is not square, of another size or cannot be read; names
            the file.
    """

    def __init__(self, folder: Path, num: int | None = None) -> None:
        self.folder = folder
        found = picture_files(folder)
        if not found:
            raise UserError(f"{folder}: no PNG or JPEG files here: give the folder they lie in")
        self.files = found[:num]
        self.num = len(self.files)
        self._sha256 = ""
        self.resolution = _side(self.files[0], None)
        for file in self.files[1:]:
            _side(file, self.resolution)

    def read(self, numbers: list[int]) -> Tensor:
        """(len(numbers), 3, R, R) uint8 RGB.

        Raises:
            UserError: a file is damaged; names it.
        """
        return torch.stack([_pixels(self.files[number]) for number in numbers])

    def facts(self) -> Facts:
        """The files' hash; they have no split, and nothing shrinks them."""
        self._sha256 = self._sha256 or files_sha256(self.files)
        return {"data": self._sha256, "split": "all", "resize": "none"}


class Generated:
    """Pictures that a network makes by number; knows how fast it made them.

    Args:
        sample: numbers (N,) int64 -> (N, 3, R, R) in [-1, 1]; the same picture for a number
            whatever else is asked for.
        num: how many there are.
        resolution: side in pixels.
        how: in what they differ from what the generator gives people; part of the fingerprint.
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
        """Speed on this rank, rounding and copying included; 0 before the first pictures.

        The first batch warms up and counts only where it is alone.
        """
        made = self._made[1:] or self._made
        seconds = sum(one for _, one in made)
        return sum(num for num, _ in made) / seconds if seconds else 0.0


class Reconstructed:
    """Real pictures beside what an autoencoder makes of them, by number.

    Args:
        real: the pictures.
        reconstruct: (N, 3, R, R) in [-1, 1] and their numbers (N,) -> the same, encoded
            and decoded.
    """

    def __init__(self, real: Reference, reconstruct: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.real, self.num = real, real.num
        self._reconstruct = reconstruct

    @torch.no_grad()
    def read(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Pictures and reconstructions, each (len(numbers), 3, R, R) uint8 RGB on the CPU."""
        pixels = self.real.read(numbers)
        images = pixels.float() / 127.5 - 1
        return pixels, as_pixels(self._reconstruct(images, torch.tensor(numbers)))


def as_pixels(images: Tensor) -> Tensor:
    """(N, 3, R, R) in [-1, 1] -> uint8 on the CPU, by the rule by which PNG files are written."""
    pixels = to_uint8(images.detach().float().cpu().numpy())
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def picture_files(folder: Path) -> list[Path]:
    """PNG and JPEG files that lie in a folder itself, in order of their names.

    The grid that `dinogen sample` puts beside its pictures is none of them.
    """
    if not folder.is_dir():
        return []
    files = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in files if path.is_file() and not _GRID.match(path.name))


def _side(file: Path, expected: int | None) -> int:
    """Side of a square picture, from the head of its file.

    Raises:
        UserError: it is not square, or not of the ``expected`` side, or cannot be read.
    """
    try:
        with Image.open(file) as picture:
            (width, height), mode = picture.size, picture.mode
    except (OSError, UnidentifiedImageError) as error:
        raise _damaged(file, error) from None
    if width != height:
        raise UserError(f"{file}: {width}x{height} pixels: only square pictures can be measured")
    if expected is not None and width != expected:
        raise UserError(
            f"{file}: {width}x{height} pixels, but the files before it have {expected}x{expected}: "
            "all have to be of one size; put others elsewhere"
        )
    if mode not in _MODES:
        raise UserError(f"{file}: pixels of kind {mode}: save it as RGB with 8 bits")
    return width


def _pixels(file: Path) -> Tensor:
    """One picture (3, R, R) uint8."""
    try:
        with Image.open(file) as picture:
            if "A" in picture.getbands() and picture.getchannel("A").getextrema()[0] != 255:
                raise UserError(f"{file}: is partly transparent: save it on a background, as RGB")
            pixels = np.array(picture.convert("RGB"))
    except OSError as error:
        raise _damaged(file, error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: cannot be read as a picture ({error}): replace or remove it")
