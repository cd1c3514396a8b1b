"""Finds the nearest real images, by features of an extractor or by pixels."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.config.training import MetricsConfig
from dinogen.metrics.extractors.base import NotAvailable
from dinogen.metrics.sources import as_pixels
from dinogen.metrics.suite import load_extractor
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)

SIDE = 32  # resolution at which pixels are compared
# in order of preference; the config names their weights
EXTRACTORS = ("dinov2", "inception768", "inception")
PART = 32
NUM_NEAREST = 3
BATCH = 512


@dataclass(frozen=True)
class Ruler:
    """Turns images into rows whose Euclidean distance measures how much they differ.

    Attributes:
        label: short name of the distance, such as ``rms``.
        what: the distance in words.
        side: largest useful resolution of real images.
        rows: (N, 3, R, R) in [-1, 1] -> (N, F) float32 on the CPU.
        max_real: largest number of real images to compare with in a reasonable time.
        caution: what else can make images look near; continues a sentence.
    """

    label: str
    what: str
    side: int
    rows: Callable[[Tensor], Tensor]
    max_real: int
    caution: str = ""


@dataclass(frozen=True)
class Nearest:
    """Nearest real images.

    Attributes:
        distances: (N, k), ascending.
        numbers: (N, k) int64, of the samples in their split.
        mirrored: (N, k) bool, whether the mirrored image is the nearer one.
        num: number of images compared with.
    """

    distances: Tensor
    numbers: Tensor
    mirrored: Tensor
    num: int


def nearest_of(
    queries: Tensor, ruler: Ruler, data: Dataset, split: str, with_mirrored: bool
) -> Nearest:
    """The nearest real images of a split for each row.

    Args:
        queries: (N, F) rows of the ruler.
        ruler: makes the rows of the real images.
        data: has the split.
        split: ``train``, ``val`` or ``test``.
        with_mirrored: whether mirrored real images count too.
    """
    available = data.num_samples(split)
    chosen = np.linspace(0, available - 1, min(available, ruler.max_real)).astype(int).tolist()
    parts = []
    for first in range(0, len(chosen), BATCH):
        numbers = chosen[first : first + BATCH]
        real = real_images(data, numbers, split, ruler.side)
        distances = _distances(queries, ruler.rows(real))
        mirrored = torch.zeros_like(distances, dtype=torch.bool)
        if with_mirrored:
            turned = _distances(queries, ruler.rows(real.flip(3)))
            mirrored = turned < distances
            distances = torch.minimum(distances, turned)
        parts.append(_closest(distances, torch.tensor(numbers).expand_as(distances), mirrored))
    best = _closest(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True)))
    return Nearest(*best, num=len(chosen))


def real_images(data: Dataset, numbers: list[int], split: str, side: int) -> Tensor:
    """(N, 3, side, side) in [-1, 1]; a damaged one is replaced by the next, and logged."""
    images: Tensor = data.read(numbers, split=split, image_size=side, on_error="skip")["image"]
    return images


def _closest(distances: Tensor, numbers: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest few of each row."""
    order = distances.argsort(1)[:, :NUM_NEAREST]
    return distances.gather(1, order), numbers.gather(1, order), mirrored.gather(1, order)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) Euclidean distances of rows; matrix products would lose precision for near rows."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def choose_ruler(config: MetricsConfig, resolution: int, device: torch.device) -> Ruler:
    """A feature extractor whose weights ``metrics:`` names, else pixels at 32x32.

    Args:
        config: of the run.
        resolution: of its images.
        device: where the feature extractor runs.
    """
    for name in EXTRACTORS:
        if getattr(config, name) is not None:
            try:
                return _by_extractor(name, config, resolution, device)
            except NotAvailable as error:
                log.warning("%s; pixels are compared instead", error)
    return _by_pixels(min(SIDE, resolution))


def _by_pixels(side: int) -> Ruler:
    def rows(images: Tensor) -> Tensor:
        if images.shape[2] != side:
            images = F.interpolate(images, size=(side, side), mode="area")
        values = ((images.clamp(-1, 1) + 1) * 127.5).flatten(1)
        return values / math.sqrt(values.shape[1])

    what = f"root mean square difference of a value of 0 to 255 at {side}x{side}"
    caution = " (by pixels a blurred image is near to every image)"
    return Ruler("rms", what, side, rows, max_real=50_000, caution=caution)


def _by_extractor(name: str, config: MetricsConfig, resolution: int, device: torch.device) -> Ruler:
    extractor = load_extractor(name, config, device)

    def rows(images: Tensor) -> Tensor:
        return torch.cat([extractor(as_pixels(part))["features"] for part in images.split(PART)])

    what = f"distance of the features of {name} ({extractor.info.resize})"
    if extractor.info.random:
        what += ", whose weights are RANDOM"
    return Ruler(name, what, resolution, rows, max_real=50_000 if device.type == "cuda" else 2_000)
