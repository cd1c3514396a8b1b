"""A batch: what it holds, what it needs of a dataset, and how planned samples are read into it."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from shards.errors import CorruptSample
from shards.format.index import NO_LABEL
from shards.format.manifest import Manifest
from shards.format.sample import level_grid, level_guide
from shards.format.table import SampleTable, Source
from shards.read.order import Order, Place, Plan, Portion
from shards.read.reader import Arrays, BatchReader, Failures, ImageDtype, LevelShape

# torch takes seconds to import: it is loaded with the first batch.
if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Batch(TypedDict, total=False):
    """What is read of B samples; a plain dict that holds what was asked for.

    Attributes:
        key: of each sample.
        position: int64 (B,), global positions of a stream, or the numbers that were read.
        image: (B, 3, R, R), float32 in [-1, 1] or uint8, as was asked.
        pyramid: levels of the main guide by their grid, (B, grid * grid, C) as stored.
        guides: the same of further guides, by their names.
        clip: (B, E) embeddings of the images.
        text: (B, E) embeddings of the captions, 0 where there is none.
        label: int64 (B,), if all samples have one.
    """

    key: list[str]
    position: Tensor
    image: Tensor
    pyramid: dict[int, Tensor]
    guides: dict[str, dict[int, Tensor]]
    clip: Tensor
    text: Tensor
    label: Tensor


class PackedSource(Protocol):
    """One packed dataset, with what is needed to make batches from it; see `PackedDataset`."""

    @property
    def location(self) -> str:
        """Folder or URL."""

    @property
    def manifest(self) -> Manifest:
        """What `manifest.json` says."""

    @property
    def source(self) -> Source:
        """Finds the files."""

    def num_samples(self, split: str = "train") -> int:
        """Samples in a split; 0 if there is no such split."""

    def read(self, numbers: Iterable[int], *, split: str = "train") -> Batch:
        """One batch of samples by their numbers in packed order."""

    def table(self, split: str) -> SampleTable:
        """Index of all samples of a split."""

    def level_shapes(self, levels: Sequence[int | str]) -> dict[str, LevelShape]:
        """Shapes of the payloads of some levels, by name."""


class WeightedSources(Protocol):
    """One or several packed datasets and their shares in the order; see `Dataset`."""

    @property
    def location(self) -> str:
        """Folder or URL; of a mix, all of them and their weights."""

    @property
    def manifest(self) -> Manifest:
        """What the datasets have in common."""

    @property
    def sets(self) -> Sequence[PackedSource]:
        """The packed datasets."""

    @property
    def weights(self) -> Sequence[Fraction]:
        """The share of each dataset in the order; they sum to 1."""


# (position, steps) -> the place that many steps later, a candidate to replace a damaged sample.
Successor = Callable[[int, int], Place]
log = logging.getLogger(__name__)


class SplitReader:
    """Reads samples of one split of one dataset. Safe to use from several threads.

    Args:
        dataset: to read from.
        split: of the dataset.
        image_size: side of the requested images, or None for no images.
        levels: as `Dataset.stream`.
        successor: in the dataset's own order; None stops at a damaged sample.
        among: whether there are other datasets, so that a message has to name the dataset.
        need_labels: a sample whose label is unknown counts as damaged.
        image_dtype: as `Dataset.stream`.

    Raises:
        ManifestError: if the dataset lacks the split or a level.
        ValueError: if the images are smaller than `image_size`, or two levels of a guide have
            the same grid.
    """

    def __init__(
        self,
        dataset: PackedSource,
        split: str,
        image_size: int | None,
        levels: Sequence[int | str],
        successor: Successor | None,
        among: bool = False,
        need_labels: bool = False,
        image_dtype: ImageDtype = "float32",
    ) -> None:
        size = dataset.manifest.image_size
        if image_size is not None and (image_size < 1 or (size is not None and image_size > size)):
            raise ValueError(f"image_size {image_size} is not between 1 and the stored {size}")
        self.table: SampleTable = dataset.table(split)
        shapes = dataset.level_shapes(levels)
        self._reader = BatchReader(self.table, shapes, image_size, image_dtype)
        self._successor = successor
        self._prefix = f"{dataset.location}/" if among else ""
        self._need_labels = need_labels
        self.shapes = self._reader.shapes

    def fill(self, places: Place, rows: list[int], out: Arrays) -> list[CorruptSample]:
        """Read sample i of `places` into row rows[i] of every array of `out`.

        Returns:
            The damaged samples that were replaced; `places` holds their replacements.

        Raises:
            CorruptSample: if one is damaged and there is no successor, or no sound one.
        """
        failures = self._read(places, rows, out)
        skipped = []
        for item, failure in sorted(failures.items()):
            if self._prefix:
                where = f"{self._prefix}{failure.shard}"
                failure = CorruptSample(where, failure.key, failure.member, failure.what)
            if self._successor is None or not self._replace(
                self._successor, places, item, rows[item], out
            ):
                raise failure
            skipped.append(failure)
        return skipped

    def _read(self, places: Place, rows: list[int], out: Arrays) -> Failures:
        """As `BatchReader.read`; if labels are needed, samples without one are failures too."""
        failures = self._reader.read(places, rows, out)
        if self._need_labels:
            pairs = _pairs(places)
            # Shards that cannot be read have no labels to look up.
            read = [item for item in range(len(pairs)) if item not in failures]
            labels = self.table.labels([pairs[item] for item in read])
            for number in np.flatnonzero(labels == NO_LABEL).tolist():
                failures[read[number]] = self.table.no_label(*pairs[read[number]])
        return failures

    def _replace(
        self, successor: Successor, places: Place, item: int, row: int, out: Arrays
    ) -> bool:
        """Fill a row from the next sound sample; False if there is none."""
        position = int(places.position[item])
        # far enough to include a whole epoch
        for step in range(1, 2 * self.table.num_samples):
            other = successor(position, step)
            if not self._read(other, [row], out):
                places.shard[item] = other.shard[0]
                places.sample[item] = other.sample[0]
                return True
        return False


class BatchMaker:
    """Makes batches from one or several datasets. Safe to use from several threads.

    Args:
        readers: of the datasets, in the order of their numbers in a plan.
        has_labels: whether all their samples have labels, which batches then hold.
        pin_memory: put tensors into pinned memory.
    """

    def __init__(
        self, readers: Sequence[SplitReader], has_labels: bool, pin_memory: bool = False
    ) -> None:
        self._readers = tuple(readers)
        self._has_labels = has_labels
        self._buffers = Buffers(pin_memory)

    def batch(self, plan: Plan) -> tuple[Batch, list[CorruptSample]]:
        """Read the samples of a plan; also returns the damaged ones that were replaced.

        Raises:
            CorruptSample: as `SplitReader.fill`.
        """
        import torch

        count = len(plan.position)
        shapes = self._readers[0].shapes(count)
        tensors = {name: self._buffers.take(*shape) for name, shape in shapes.items()}
        out: Arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        keys = [""] * count
        labels = np.zeros(count, np.int64)
        skipped: list[CorruptSample] = []
        for portion in plan.portions:
            reader, places = self._readers[portion.number], portion.places
            skipped += reader.fill(places, portion.rows, out)
            found = _pairs(places)
            for row, key in zip(portion.rows, reader.table.keys(found), strict=True):
                keys[row] = key
            if self._has_labels:
                mine = reader.table.labels(found)
                labels[portion.rows] = np.where(mine == NO_LABEL, -1, mine)
        batch: Batch = {"key": keys, "position": torch.from_numpy(plan.position.copy())}
        if "image" in tensors:
            batch["image"] = tensors.pop("image")
        batch["pyramid"] = {}
        for name, tensor in tensors.items():
            if name == "clip":
                batch["clip"] = tensor[:, 0]
            elif name == "text":
                batch["text"] = tensor[:, 0]
            elif guide := level_guide(name):
                batch.setdefault("guides", {}).setdefault(guide, {})[level_grid(name)] = tensor
            else:
                batch["pyramid"][level_grid(name)] = tensor
        if self._has_labels:
            batch["label"] = torch.from_numpy(labels)
        return batch, skipped


def _pairs(places: Place) -> list[tuple[int, int]]:
    """(shard, sample) of each place."""
    return list(zip(places.shard.tolist(), places.sample.tolist(), strict=True))


def read_batch(
    dataset: WeightedSources,
    numbers: list[int],
    split: str,
    image_size: int | None,
    levels: Sequence[int | str],
    on_error: Literal["stop", "skip"],
    need_labels: bool = False,
) -> Batch:
    """Batch of samples by their numbers in packed order; see `Dataset.read`."""
    check_on_error(on_error)
    sizes = [one.num_samples(split) for one in dataset.sets]
    count = sum(sizes)
    if not count:
        dataset.manifest.of_split(split, dataset.location)  # says which splits there are
    if not numbers or min(numbers) < 0 or max(numbers) >= count:
        raise IndexError(f"{split} has samples 0 to {count - 1}; requested: {numbers}")
    index = np.array(numbers, np.int64)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    number = np.searchsorted(starts, index, side="right") - 1
    readers, portions = [], []
    for which, one in enumerate(dataset.sets):
        if not sizes[which]:
            continue
        follow = _in_packed_order(one.table(split)) if on_error == "skip" else None
        among = len(dataset.sets) > 1
        readers.append(SplitReader(one, split, image_size, levels, follow, among, need_labels))
        rows = np.flatnonzero(number == which)
        if len(rows):
            places = _places(one.table(split), index[rows] - starts[which])
            portions.append(Portion(len(readers) - 1, places, rows.tolist()))
    maker = BatchMaker(readers, dataset.manifest.has_labels)
    batch, skipped = maker.batch(Plan(index, portions))
    name_skipped(skipped, set())
    return batch


def along(order: Order) -> Successor:
    """The order as a successor, safe for several threads and the same on every rank."""
    lock = threading.Lock()

    def following(position: int, step: int) -> Place:
        with lock:
            return order.places(position + step, 1)

    return following


def name_skipped(skipped: list[CorruptSample], named: set[tuple[str, str]]) -> None:
    """Log what was skipped, each sample once; `named` holds those that were logged."""
    for failure in skipped:
        if (failure.shard, failure.key) not in named:
            named.add((failure.shard, failure.key))
            log.error("SKIPPED a damaged sample, the next one replaces it: %s", failure)


def check_on_error(on_error: str) -> None:
    """Raise ValueError unless it is a valid value."""
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', not {on_error!r}")


def _in_packed_order(table: SampleTable) -> Successor:
    def following(number: int, step: int) -> Place:
        return _places(table, np.array([(number + step) % table.num_samples]))

    return following


def _places(table: SampleTable, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> Place:
    shard = np.searchsorted(table.starts, numbers, side="right") - 1
    return Place(numbers, shard, numbers - table.starts[shard], numbers)


_FREE_KEPT = 4


class Buffers:
    """Memory for batches, reused as soon as no tensor made from it is left.

    New memory costs a page fault per 4 KiB, which takes as long as reading into it.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[tuple[tuple[int, ...], np.dtype[Any]], deque[npt.NDArray[Any]]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        """An uninitialised tensor; its `.numpy()` shares the memory."""
        import torch

        if self._pinned:
            # torch's own allocator of pinned memory waits for copies that are still running.
            kind = getattr(torch, dtype.name)
            return torch.empty(shape, dtype=kind, pin_memory=True)
        free = self._free.setdefault((shape, dtype), deque(maxlen=_FREE_KEPT))
        try:
            buffer = free.pop()
        except IndexError:
            buffer = np.empty(shape, dtype)
        # The tensor's storage keeps `view` alive, and all tensors made from it share the storage.
        view = buffer[:]
        weakref.finalize(view, free.append, buffer).atexit = False
        return torch.from_numpy(view)
