"""Positions of the order to decoded batches; all state is one integer."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from shards.ahead import Ahead, Share
from shards.buffers import Buffers
from shards.errors import CorruptSample
from shards.fetch import stop_at
from shards.order import Order, Place
from shards.reader import Arrays, BatchReader
from shards.remote import RemoteFolder
from shards.sample import level_grid
from shards.table import SampleTable

if TYPE_CHECKING:
    from shards.dataset import Dataset

Batch = dict[str, Any]
# The place so many steps behind a position: where to look for a sound sample.
Successor = Callable[[int, int], Place]
log = logging.getLogger(__name__)
# A second batch in hand hides the jitter of a slow read; more only costs memory.
_SPARE_BATCHES = 1
# Finding places costs much the same for one batch as for several.
_BATCHES_PLACED = 8


@dataclass
class _Work:
    """What a stream reads with: shared by its threads, without a way back to the stream."""

    dataset: Dataset
    reader: BatchReader
    buffers: Buffers
    split: str
    successor: Successor | None

    def batch(self, places: Place) -> tuple[Batch, list[CorruptSample]]:
        """Read the samples at some places.

        With a successor, a damaged sample is replaced by the next sound one and reported.

        Raises:
            CorruptSample: if one is damaged and there is no successor, or none that is sound.
        """
        count = len(places.position)
        shapes = self.reader.shapes(count)
        tensors = {name: self.buffers.take(*shape) for name, shape in shapes.items()}
        out: Arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        failures = self.reader.read(places, list(range(count)), out)
        skipped = []
        for item, failure in sorted(failures.items()):
            if self.successor is None or not self._replace(self.successor, places, item, out):
                raise failure
            skipped.append(failure)
        table = self.dataset.table(self.split)
        rows = list(zip(places.shard.tolist(), places.sample.tolist(), strict=True))
        batch: Batch = {
            "key": table.keys(rows),
            "position": torch.from_numpy(places.position.copy()),
        }
        if "image" in tensors:
            batch["image"] = tensors.pop("image")
        batch["pyramid"] = {level_grid(name): tensor for name, tensor in tensors.items()}
        if self.dataset.manifest.has_labels:
            batch["label"] = torch.from_numpy(table.labels(rows))
        return batch, skipped

    def _replace(self, successor: Successor, places: Place, item: int, out: Arrays) -> bool:
        """Fill a row from the next sound sample; False if there is none."""
        position = int(places.position[item])
        # so far that a whole epoch is among them
        for step in range(1, 2 * self.dataset.num_samples(self.split)):
            other = successor(position, step)
            if not self.reader.read(other, [item], out):
                places.shard[item] = other.shard[0]
                places.sample[item] = other.sample[0]
                return True
        return False


class Stream:
    """Endless iterator over one rank's share of each batch; made by `Dataset.stream`.

    A batch is a dict: `image` float32 (B, 3, R, R) in [-1, 1]; `pyramid` {grid: (B, grid * grid,
    C)} as stored; `key` list of str; `position` int64 (B,), global positions; `label` int64 (B,)
    if all samples have one. Its tensors are the caller's for as long as the caller holds them.

    Attributes:
        num_skipped: damaged samples that were replaced in the batches yielded so far.
        num_samples: length of an epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        start: int,
        image_size: int | None,
        levels: Sequence[int | str],
        split: str,
        num_threads: int,
        num_lanes: int,
        window_shards: int,
        on_error: Literal["stop", "skip"],
        pin_memory: bool,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks")
        if batch_size < world_size:
            raise ValueError(f"batch_size {batch_size} leaves some of {world_size} ranks without")
        if start < 0 or num_threads < 0:
            raise ValueError("start and num_threads must not be negative")
        _check_on_error(on_error)
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory needs a GPU; set it to False on this machine")
        sizes = [shard.num_samples for shard in dataset.manifest.of_split(split)]
        self._order = Order(sizes, seed, num_lanes, window_shards)
        self._work = _Work(
            dataset,
            _reader(dataset, split, image_size, levels),
            Buffers(pin_memory),
            split,
            # Its own: the reading threads use it, the one above belongs to the caller.
            _along(Order(sizes, seed, num_lanes, window_shards)) if on_error == "skip" else None,
        )
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._position = self._next_read = start
        self._places: deque[Place] = deque()
        self._pending: deque[Future[tuple[Batch, list[CorruptSample]]]] = deque()
        self._num_ahead = num_threads + _SPARE_BATCHES if num_threads else 0
        self._stop = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        if num_threads:
            self._pool = ThreadPoolExecutor(
                num_threads, "shards", initializer=stop_at, initargs=(self._stop,)
            )
        self._closed = False
        self._ahead: Ahead | None = None
        if isinstance(dataset.source, RemoteFolder):
            order = Order(sizes, seed, num_lanes, window_shards)
            share = Share(batch_size, rank, world_size)
            self._ahead = Ahead(dataset.source, dataset.table(split), order, share, start)
            weakref.finalize(self, self._ahead.close)
        self._named: set[tuple[str, str]] = set()
        self.num_skipped = 0
        self.num_samples = self._order.num_samples

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("the stream is closed")
        try:
            batch, skipped = self._take()
        except BaseException:
            self.close()
            raise
        _name(skipped, self._named)
        self.num_skipped += len(skipped)
        self._position += self._batch_size
        return batch

    def _take(self) -> tuple[Batch, list[CorruptSample]]:
        if self._pool is None:
            return self._work.batch(self._next_places())
        while len(self._pending) < self._num_ahead:
            self._pending.append(self._pool.submit(self._work.batch, self._next_places()))
        return self._pending.popleft().result()

    def _next_places(self) -> Place:
        if not self._places:
            part = (self._batch_size, self._rank, self._world_size, _BATCHES_PLACED)
            self._places.extend(self._order.shares(self._next_read, *part))
            self._next_read += self._batch_size * _BATCHES_PLACED
        if self._ahead is not None:
            self._ahead.advance(self._position)
        return self._places.popleft()

    def state_dict(self) -> dict[str, int]:
        """{"position": global position of the next batch to be yielded}; give it as `start`."""
        return {"position": self._position}

    def close(self) -> None:
        """Stop reading ahead and end the threads. A closed stream yields nothing more."""
        self._closed = True
        # A thread may be waiting for a shard that nobody needs any more.
        self._stop.set()
        if self._ahead is not None:
            self._ahead.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_batch(
    dataset: Dataset,
    numbers: list[int],
    split: str,
    image_size: int | None,
    levels: Sequence[int | str],
    on_error: Literal["stop", "skip"],
) -> Batch:
    """Batch of samples by their numbers in packed order; see `Dataset.read`."""
    _check_on_error(on_error)
    table = dataset.table(split)
    count = table.num_samples
    if not numbers or min(numbers) < 0 or max(numbers) >= count:
        raise IndexError(f"{split} has samples 0 to {count - 1}; asked for {numbers}")

    def following(number: int, step: int) -> Place:
        return _places(table, [(number + step) % count])

    reader = _reader(dataset, split, image_size, levels)
    successor = following if on_error == "skip" else None
    work = _Work(dataset, reader, Buffers(pinned=False), split, successor)
    batch, skipped = work.batch(_places(table, numbers))
    _name(skipped, set())
    return batch


def _places(table: SampleTable, numbers: list[int]) -> Place:
    index = np.array(numbers, np.int64)
    shard = np.searchsorted(table.starts, index, side="right") - 1
    return Place(index, shard, index - table.starts[shard], index)


def _along(order: Order) -> Successor:
    """The order, which is the same for every rank, for several threads."""
    lock = threading.Lock()

    def following(position: int, step: int) -> Place:
        with lock:
            return order.places(position + step, 1)

    return following


def _name(skipped: list[CorruptSample], named: set[tuple[str, str]]) -> None:
    """Write into the log what was skipped, each sample once; `named` remembers them."""
    for failure in skipped:
        if (failure.shard, failure.key) not in named:
            named.add((failure.shard, failure.key))
            log.error("SKIPPED a damaged sample, the next one takes its place: %s", failure)


def _check_on_error(on_error: str) -> None:
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error is 'stop' or 'skip', not {on_error!r}")


def _reader(
    dataset: Dataset, split: str, image_size: int | None, levels: Sequence[int | str]
) -> BatchReader:
    stored = dataset.manifest.image_size
    if image_size is not None and (image_size < 1 or (stored is not None and image_size > stored)):
        raise ValueError(f"image_size {image_size} is not between 1 and the stored {stored}")
    return BatchReader(dataset.table(split), dataset.level_shapes(levels), image_size)
