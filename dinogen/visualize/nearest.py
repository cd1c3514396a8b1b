"""Finds the nearest real images, by features of an extractor or by pixels.

What an extractor sees of real images is cached, as for metrics: it takes longer than all else here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.config.training import MetricsConfig
from dinogen.errors import UserError
from dinogen.metrics.collect import seen_of_reference
from dinogen.metrics.extractors.base import NotAvailable
from dinogen.metrics.sources import Images, Reference, as_pixels
from dinogen.metrics.suite import BATCH as METRICS_BATCH
from dinogen.metrics.suite import load_extractor
from dinogen.metrics.value import Facts
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
        what: the distance in words.
        side: largest useful resolution of real images.
        rows: (N, 3, R, R) in [-1, 1] -> (N, F) float32 on the CPU.
        max_real: largest number of real images to compare with in a reasonable time.
        caution: what else can make images look near; continues a sentence.
        cached: rows (N, F) of real images, computed once and then read from ``metrics.cache``; None
            if computing them again is as fast.
    """

    what: str
    side: int
    rows: Callable[[Tensor], Tensor]
    max_real: int
    caution: str = ""
    cached: Callable[[Reference], Tensor] | None = None


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
    for numbers, rows, turned in _rows(ruler, data, split, chosen, with_mirrored):
        distances = _distances(queries, rows)
        mirrored = torch.zeros_like(distances, dtype=torch.bool)
        if turned is not None:
            others = _distances(queries, turned)
            mirrored = others < distances
            distances = torch.minimum(distances, others)
        parts.append(_closest(distances, torch.tensor(numbers).expand_as(distances), mirrored))
    best = _closest(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True)))
    return Nearest(*best, num=len(chosen))


class Mirrored(Reference):
    """The images of another reference, mirrored."""

    def __init__(self, images: Reference) -> None:
        self.images, self.num, self.resolution = images, images.num, images.resolution

    def read(self, numbers: list[int]) -> Tensor:
        """(len(numbers), 3, R, R) uint8 RGB."""
        return self.images.read(numbers).flip(3)

    def facts(self) -> Facts:
        """Those of the images, and that they are mirrored."""
        facts = self.images.facts()
        return {**facts, "resize": f"{facts['resize']}, mirrored"}


def _rows(
    ruler: Ruler, data: Dataset, split: str, chosen: list[int], with_mirrored: bool
) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """In parts: numbers of real images, their rows, and if asked those of the mirrored images."""
    parts = [chosen[first : first + BATCH] for first in range(0, len(chosen), BATCH)]
    if ruler.cached is not None:
        try:
            images = Images(data, split, chosen, ruler.side)
            rows = ruler.cached(images).split(BATCH)
            turned = ruler.cached(Mirrored(images)).split(BATCH) if with_mirrored else None
        except UserError as error:  # a cached set has no damaged images; below they are replaced
            log.warning("%s: what the extractor sees of real images is not cached", error)
        else:
            yield from zip(parts, rows, turned or [None] * len(parts), strict=True)
            return
    for numbers in parts:
        real = real_images(data, numbers, split, ruler.side)
        yield numbers, ruler.rows(real), ruler.rows(real.flip(3)) if with_mirrored else None


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
    return Ruler(what, side, rows, max_real=50_000, caution=caution)


def _by_extractor(name: str, config: MetricsConfig, resolution: int, device: torch.device) -> Ruler:
    extractor = load_extractor(name, config, device)

    def rows(images: Tensor) -> Tensor:
        return torch.cat([extractor(as_pixels(part))["features"] for part in images.split(PART)])

    def cached(images: Reference) -> Tensor:
        # the batches of metrics, which read and write the same cache
        seen = seen_of_reference(images, [extractor], [name], METRICS_BATCH, config.cache)[name]
        assert seen.features is not None  # they were asked for
        return seen.features

    what = f"distance of the features of {name} ({extractor.info.resize})"
    if extractor.info.random:
        what += ", whose weights are RANDOM"
    max_real = 50_000 if device.type == "cuda" else 2_000
    return Ruler(what, resolution, rows, max_real, cached=cached)
