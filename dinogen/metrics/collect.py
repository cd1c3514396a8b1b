"""Each image once through each extractor, shared out over ranks: moments always, rows if asked.

What extractors see of real images is cached under its fingerprint. A cached set is one safetensors
file that says itself what it is of, so processes that write it at the same time cannot mix theirs
up; the JSON file beside it is for people.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dinogen.distributed import process_group
from dinogen.distributed.process_group import gather_counts, gather_rows
from dinogen.errors import UserError
from dinogen.files import weights_sha256, write_bytes, write_json
from dinogen.metrics.extractors.base import ExtractorInfo, FeatureExtractor
from dinogen.metrics.sources import Reference
from dinogen.metrics.value import Facts, fingerprint
from dinogen.report.progress import LiveLine
from dinogen.runs.fingerprint import fingerprint_id
from shards.errors import ShardsError

log = logging.getLogger(__name__)

CACHE = Path("~/.cache/dinogen/metrics")  # of what extractors saw of real images


class Source(Protocol):
    """Images by number, 0 to ``num - 1``: the same image for the same number on any rank."""

    @property
    def num(self) -> int:
        """How many there are."""
        ...

    def read(self, numbers: list[int]) -> Tensor:
        """(len(numbers), 3, R, R) uint8 RGB, on any device; one R for all."""
        ...


@dataclass(frozen=True)
class Seen:
    """What one feature extractor saw of all images; the same on all ranks.

    Attributes:
        info: of the feature extractor.
        moments: of its features.
        features: (num, C) float32 on the CPU in order of number; None unless kept.
        logits: (num, classes) float32, the same way; None unless kept, or if it has none.
    """

    info: ExtractorInfo
    moments: Moments
    features: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Collected:
    """What the feature extractors saw of a source.

    Attributes:
        num: images.
        seen: by name of the feature extractor.
        images: the first ones, (num_images, 3, R, R) uint8 on the CPU; None unless requested.
    """

    num: int
    seen: dict[str, Seen]
    images: Tensor | None = None


def collect(
    source: Source,
    extractors: Sequence[FeatureExtractor],
    keep: Collection[str],
    batch: int,
    num_images: int = 0,
) -> Collected:
    """Read every image once and show it to every feature extractor once; all ranks together.

    Ranks take whole batches, and a batch holds the same images on any number of ranks. So rows
    are bitwise the same if all ranks have the same hardware. Ranks communicate only at the end,
    and a rank may have nothing to do.

    Args:
        source: the images.
        extractors: each has a name of its own.
        keep: names of the extractors whose rows are kept and gathered, N x C float32 on every rank.
        batch: images read and seen by the extractors at a time.
        num_images: how many of the first images are kept too.

    Raises:
        ValueError: no images.
        Unreadable: one cannot be read; raised on every rank.
    """
    if source.num < 1:
        raise ValueError("there are no images to measure")
    num_images = min(num_images, source.num)
    mine = _batches(source.num, batch)[process_group.rank()]
    notes = {
        extractor.info.name: _Notes(extractor, extractor.info.name in keep)
        for extractor in extractors
    }
    kept: list[Tensor] = []
    failure: Exception | None = None
    done = 0

    def parts() -> list[str]:
        return [f"{done:,}/{total:,} images"]

    total = sum(map(len, mine))
    try:
        with LiveLine("measuring", total, parts, show=process_group.is_main()) as line:
            for numbers in mine:
                images = source.read(numbers)
                kept.append(images[: max(0, num_images - numbers[0])].cpu())
                for note in notes.values():
                    note.take(images)
                done += len(numbers)
                line.move(done)
    except (UserError, ShardsError) as error:
        failure = error
    agree_readable(failure)
    seen = {name: note.joined(source.num) for name, note in notes.items()}
    first = _gather_images(kept) if num_images else None
    return Collected(source.num, seen, first)


class Unreadable(UserError):
    """Images that something is to be measured on cannot be read; names the first."""


def agree_readable(failure: Exception | None) -> None:
    """Agree with the other ranks that all images were read; every rank has to call it.

    Raises:
        Unreadable: a rank could not read its own.
    """
    if process_group.any_rank(failure is not None):
        raise Unreadable(str(failure or "an image cannot be read on another rank")) from failure


class _Notes:
    """What one feature extractor has seen on this rank."""

    def __init__(self, extractor: FeatureExtractor, keep: bool) -> None:
        self.extractor = extractor
        info = extractor.info
        self.moments = Moments.empty(info.num_channels)
        widths = {"features": info.num_channels, "logits": info.num_logits}
        self.widths = {name: width for name, width in widths.items() if keep and width}
        self.rows: dict[str, list[Tensor]] = {name: [] for name in self.widths}

    def take(self, images: Tensor) -> None:
        found = self.extractor(images)
        self.moments.add(found["features"])
        for name, kept in self.rows.items():
            kept.append(found[name])

    def joined(self, num: int) -> Seen:
        """What all ranks have seen."""
        moments = self.moments.merged()
        if moments.count != num:
            raise RuntimeError(f"{moments.count} of {num} images were seen")
        rows = {
            name: _gather(torch.cat([torch.empty(0, width), *self.rows.pop(name)]))
            for name, width in self.widths.items()
        }
        return Seen(self.extractor.info, moments, rows.get("features"), rows.get("logits"))


def _batches(num: int, batch: int) -> list[list[list[int]]]:
    """Of each rank the batches that it takes: runs of whole batches, in order of rank."""
    batches = [list(range(start, min(start + batch, num))) for start in range(0, num, batch)]
    shares = np.array_split(np.arange(len(batches)), process_group.world_size())
    return [[batches[index] for index in share] for share in shares]


def _gather(rows: Tensor) -> Tensor:
    """Rows of all ranks, in order of rank, though their numbers differ."""
    return gather_rows(rows, gather_counts(len(rows)))


def _gather_images(images: list[Tensor]) -> Tensor:
    """The first images, also on ranks that read none and so do not know their side."""
    side = images[0].shape[-1] if process_group.is_main() else 0  # rank 0 has the first batch
    side = int(process_group.all_reduce_sum(torch.tensor(side)))
    none = torch.empty(0, 3, side, side, dtype=torch.uint8)
    return _gather(torch.cat([none, *images]))


@dataclass
class Moments:
    """Sums of rows and of their outer products; rows themselves are not kept.

    Attributes:
        count: rows so far.
        total: (C,) float64, their sum.
        outer: (C, C) float64, the sum of x x^T.
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, num_channels: int) -> Moments:
        """Of no rows yet."""
        return cls(
            0,
            torch.zeros(num_channels, dtype=torch.float64),
            torch.zeros(num_channels, num_channels, dtype=torch.float64),
        )

    @classmethod
    def of(cls, rows: Tensor, block: int = 1024) -> Moments:
        """Of rows (N, C) that are all there, in blocks of float64."""
        moments = cls.empty(rows.shape[1])
        for part in rows.split(block):
            moments.add(part)
        return moments

    def add(self, rows: Tensor) -> None:
        """Take in (N, C) rows of any float type; N may be 0."""
        exact = rows.detach().to(self.total)
        self.count += len(exact)
        self.total += exact.sum(0)
        self.outer.addmm_(exact.T, exact)

    def merged(self) -> Moments:
        """The sum over all ranks, on each of them."""
        count = process_group.all_reduce_sum(torch.tensor(self.count))
        return Moments(
            int(count),
            process_group.all_reduce_sum(self.total),
            process_group.all_reduce_sum(self.outer),
        )

    def mean(self) -> Tensor:
        """(C,) float64.

        Raises:
            ValueError: no rows.
        """
        if not self.count:
            raise ValueError("no rows have no mean")
        return self.total / self.count

    def covariance(self) -> Tensor:
        """(C, C) float64, unbiased: divided by N - 1.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} rows have no covariance: it takes at least 2")
        mean = self.mean()
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def tensors(self) -> dict[str, Tensor]:
        """As tensors to be stored, such as in a safetensors file."""
        return {"count": torch.tensor(self.count), "total": self.total, "outer": self.outer}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> Moments:
        """Back from :meth:`tensors`."""
        return cls(int(stored["count"]), stored["total"], stored["outer"])


def seen_of_reference(
    source: Reference,
    extractors: Sequence[FeatureExtractor],
    keep: Collection[str],
    batch: int,
    cache: Path | None = None,
) -> dict[str, Seen]:
    """What each feature extractor sees of real images; all ranks together.

    Args:
        source: the images.
        extractors: that see them.
        keep: names of the feature extractors whose features are needed row by row.
        batch: images read and seen by the extractors at a time.
        cache: folder of what was worked out before; :data:`CACHE` unless given.
    """
    facts = source.facts()
    keys = {one.info.name: _key(one.info, source, facts) for one in extractors}
    folder = _expanded(cache or CACHE)
    found: dict[str, Seen] = {}
    for extractor in extractors:
        name = extractor.info.name
        seen = _load(folder, keys[name], extractor.info, name in keep)
        # a cache may be a node's own, and ranks have to agree on what is to be worked out
        if not process_group.any_rank(seen is None) and seen is not None:
            found[name] = seen
    missing = [extractor for extractor in extractors if extractor.info.name not in found]
    if missing:
        fresh = collect(source, missing, keep, batch).seen
        for name, seen in fresh.items():
            if process_group.local_rank() == 0:
                _store(folder, keys[name], seen)
        found |= fresh
    return found


def _key(extractor: ExtractorInfo, source: Reference, facts: Facts) -> Facts:
    """The fingerprint of no generated images at all: one set serves any number of them."""
    return fingerprint(extractor, source.resolution, 0, facts, source.num)


def _path(folder: Path, key: Facts) -> Path:
    return folder / f"{fingerprint_id(key)}.safetensors"


def _load(folder: Path, key: Facts, info: ExtractorInfo, keep: bool) -> Seen | None:
    """What was stored, if it is whole, of the same images, and all that is asked for."""
    path = _path(folder, key)
    try:
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sound = weights_sha256(tensors) == said.get("sha256")
        of_these = json.loads(said.get("facts", "null")) == key
    except (OSError, ValueError, SafetensorError) as error:
        log.warning("%s: is damaged (%s): it is computed again", path, error)
        return None
    if not sound or not of_these:
        log.warning("%s: is damaged or of other images: it is computed again", path)
        return None
    features = tensors.get("features")
    if keep and features is None:
        return None
    return Seen(info, Moments.from_tensors(tensors), features if keep else None)


def _store(folder: Path, key: Facts, seen: Seen) -> None:
    """Write a set; a cache that cannot be written costs time the next time, and no metric value."""
    tensors = seen.moments.tensors()
    if seen.features is not None:
        tensors["features"] = seen.features.contiguous()
    metadata = {"facts": json.dumps(key), "sha256": weights_sha256(tensors)}
    path = _path(folder, key)
    try:
        write_bytes(path, save(tensors, metadata))
        write_json(path.with_suffix(".json"), key)
    except OSError as error:
        log.warning(
            "%s: cannot be written (%s), so these real images are read again the next time: set "
            "metrics.cache to another folder",
            path,
            error.strerror or error,
        )


def _expanded(folder: Path) -> Path:
    """A folder with its ``~`` written out; a user without a home has a cache of this machine."""
    try:
        return folder.expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "dinogen" / "metrics"
