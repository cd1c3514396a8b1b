"""Turns positions of the order into decoded batches; its whole state is one integer."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Literal, get_args

from shards.errors import CorruptSample, ManifestError
from shards.read.batch import (
    Batch,
    BatchMaker,
    SplitReader,
    Successor,
    WeightedSources,
    along,
    check_on_error,
    name_skipped,
)
from shards.read.classes import ClassOrder, within_class
from shards.read.order import Order, Plan, Planner, planner_of, seed_of
from shards.read.reader import ImageDtype
from shards.remote.download import stop_at
from shards.remote.prefetch import Prefetcher, Share
from shards.remote.storage import RemoteFolder

# One spare batch hides the jitter of a slow read; more only costs memory.
_SPARE_BATCHES = 1
# Planning several batches costs about as much as planning one.
_BATCHES_PLANNED = 16


def _class_order(
    dataset: WeightedSources, split: str, seed: int, run: int, first: int
) -> Callable[[], ClassOrder]:
    """Makes the order of a dataset in runs of one class.

    Raises:
        ManifestError: its samples have no labels.
        ValueError: it is a mix.
    """
    if len(dataset.sets) > 1:
        raise ValueError("per_class needs one dataset: a mix has no order by class")
    if not dataset.manifest.has_labels:
        raise ManifestError(f"{dataset.location}: its samples have no labels to be ordered by")
    table = dataset.sets[0].table(split)
    labels = table.all_labels()
    sizes = [shard.num_samples for shard in table.shards]
    return partial(ClassOrder, labels, sizes, seed, run, first)


class Stream:
    """Endless iterator over one rank's share of each batch; made by `Dataset.stream`.

    A batch is a dict: `image` (B, 3, R, R), float32 in [-1, 1] or uint8; `pyramid` {grid: (B,
    grid * grid, C)} as stored; `guides` {name: {grid: (B, grid * grid, C)}} if levels of further
    guides are requested; `clip` and `text` (B, E) if they are; `key` list of str; `position` int64
    (B,), global positions; `label` int64 (B,) if all samples have one. Its tensors are not reused
    as long as the caller holds them.

    Attributes:
        num_skipped: damaged samples that were replaced in the batches yielded so far.
        num_samples: length of an epoch; for a mix, the number of samples of all datasets.
    """

    def __init__(
        self,
        dataset: WeightedSources,
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
        need_labels: bool = False,
        image_dtype: ImageDtype = "float32",
        per_class: int = 0,
        first: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks")
        if batch_size < world_size:
            raise ValueError(
                f"batch_size {batch_size} must be at least the number of ranks, {world_size}"
            )
        if start < 0 or num_threads < 0:
            raise ValueError("start and num_threads must not be negative")
        if per_class and batch_size % per_class:
            raise ValueError(f"batch_size {batch_size} must be a multiple of per_class {per_class}")
        check_on_error(on_error)
        if image_dtype not in get_args(ImageDtype):
            raise ValueError(f"image_dtype must be 'float32' or 'uint8', not {image_dtype!r}")
        if pin_memory:
            import torch

            if not torch.cuda.is_available():
                raise ValueError("pin_memory needs a GPU; set it to False on this machine")
        # Each user gets its own order: they are not safe for several threads.
        num_sets = len(dataset.sets)
        orders = [
            partial(
                Order,
                [shard.num_samples for shard in one.table(split).shards],
                seed_of(seed, number, num_sets),
                num_lanes,
                window_shards,
            )
            for number, one in enumerate(dataset.sets)
        ]

        by_class = _class_order(dataset, split, seed, per_class, first) if per_class else None

        def planner() -> Planner:
            if by_class is not None:
                return by_class()
            return planner_of([order() for order in orders], dataset.weights)

        def successor(order: Callable[[], Order]) -> Successor:
            return along(order()) if by_class is None else within_class(by_class())

        readers = [
            SplitReader(
                one,
                split,
                image_size,
                levels,
                successor(order) if on_error == "skip" else None,
                among=num_sets > 1,
                need_labels=need_labels,
                image_dtype=image_dtype,
            )
            for one, order in zip(dataset.sets, orders, strict=True)
        ]
        self._planner = planner()
        self._maker = BatchMaker(readers, dataset.manifest.has_labels, pin_memory)
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._position = self._next_read = start
        self._plans: deque[Plan] = deque()
        self._pending: deque[Future[tuple[Batch, list[CorruptSample]]]] = deque()
        self._num_pending = num_threads + _SPARE_BATCHES if num_threads else 0
        self._stop = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        if num_threads:
            self._pool = ThreadPoolExecutor(
                num_threads, "shards", initializer=stop_at, initargs=(self._stop,)
            )
        self._closed = False
        self._prefetchers: list[Prefetcher] = []
        share = Share(batch_size, rank, world_size)
        for number, one in enumerate(dataset.sets):
            if isinstance(one.source, RemoteFolder):
                mine = planner().only(number)
                prefetcher = Prefetcher(one.source, one.table(split), mine, share, start)
                self._prefetchers.append(prefetcher)
                weakref.finalize(self, prefetcher.close)
        self._named: set[tuple[str, str]] = set()
        self.num_skipped = 0
        self.num_samples = self._planner.num_samples

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
        name_skipped(skipped, self._named)
        self.num_skipped += len(skipped)
        self._position += self._batch_size
        return batch

    def _take(self) -> tuple[Batch, list[CorruptSample]]:
        if self._pool is None:
            return self._maker.batch(self._next_plan())
        while len(self._pending) < self._num_pending:
            self._pending.append(self._pool.submit(self._maker.batch, self._next_plan()))
        return self._pending.popleft().result()

    def _next_plan(self) -> Plan:
        if not self._plans:
            part = (self._batch_size, self._rank, self._world_size, _BATCHES_PLANNED)
            self._plans.extend(self._planner.plans(self._next_read, *part))
            self._next_read += self._batch_size * _BATCHES_PLANNED
        for prefetcher in self._prefetchers:
            prefetcher.advance(self._position)
        return self._plans.popleft()

    def state_dict(self) -> dict[str, int]:
        """{"position": global position of the next batch}; pass it as `start`."""
        return {"position": self._position}

    def close(self) -> None:
        """Stop prefetching and end the threads. A closed stream yields nothing more."""
        self._closed = True
        # A thread may be waiting for a shard that is no longer needed.
        self._stop.set()
        for prefetcher in self._prefetchers:
            prefetcher.close()
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
