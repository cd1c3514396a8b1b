"""Fetches the shards of coming batches in advance; the order says which those are."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Set
from dataclasses import dataclass

import numpy as np

from shards.errors import ShardsError
from shards.format.table import SampleTable
from shards.read.order import Shares
from shards.remote.download import stop_at
from shards.remote.storage import HeldFile, RemoteFolder

log = logging.getLogger(__name__)
_PARALLEL = 4
# Batches planned at once, and that are planned even if the cache has no space for more.
_BATCHES = 8
# Held files are open files, of which a process may have 1024 by default.
_MOST_PLANNED = 400
# How often to check again what other processes may have changed: space in the cache, its users.
_ASK_S = 1.0
_DIVIDE_S = 3.0
_CLOSE_S = 1.0


@dataclass(frozen=True)
class Share:
    """One rank's part of every batch, as in `Order.shares`."""

    batch_size: int
    rank: int
    world_size: int


class Prefetcher:
    """Threads that fetch what a stream needs next, and hold it until its last planned use.

    They plan one window of the order, at most a quarter of an epoch, or as much as fits into this
    stream's part of the cache. What cannot be fetched is left to the reader that needs it, which
    then raises the error.

    Args:
        source: where the shards come from.
        table: the split.
        order: not shared with other objects.
        share: which part of each batch is read.
        start: position of the first batch.
    """

    def __init__(
        self, source: RemoteFolder, table: SampleTable, order: Shares, share: Share, start: int
    ) -> None:
        self._source, self._table, self._order, self._share = source, table, order, share
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._position = self._seen = start
        self._may_be_evicted = source.cache.limit is not None
        # Position behind the last planned batch that needs a shard.
        self._last_use: dict[int, int] = {}
        # A window is a large part of a small set, and most of the next epoch is cached by then.
        self._horizon = min(order.window_span, order.num_samples // 4)
        self._wanted: deque[int] = deque()
        self._held: dict[int, HeldFile] = {}
        self._budget = float("inf")
        self._num_users = 0
        self._divided = 0.0
        # Daemons: a transfer that hangs must not keep the process from ending.
        self._threads = [
            threading.Thread(target=target, name="shards-prefetch", daemon=True)
            for target in (self._plan, *[self._fetch] * _PARALLEL)
        ]
        for thread in self._threads:
            thread.start()

    def advance(self, position: int) -> None:
        """Say that no batch before `position` is needed any more."""
        with self._changed:
            self._position = position
            self._changed.notify_all()

    def close(self) -> None:
        """Abandon running fetches, and wait up to a second for the threads to end.

        Another process may wait for the lock of what one of them fetches.
        """
        self._stop.set()
        with self._changed:
            self._held.clear()
            self._changed.notify_all()
        until = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(until - time.monotonic(), 0))

    def _plan(self) -> None:
        """Find out which shards come next, and release those that are no longer needed."""
        with self._source.cache.user():
            while not self._stop.is_set():
                self._divide()
                with self._changed:
                    if not self._may_plan([]):
                        self._changed.wait(_ASK_S)
                        self._forget()
                        continue
                    seen = self._seen = max(self._seen, self._position)
                step = self._share.batch_size
                shards = self._shards_of(seen, _BATCHES)
                with self._changed:
                    for names in shards:
                        if not self._may_plan(names):
                            break
                        self._seen += step
                        for shard in names:
                            if shard not in self._last_use:
                                self._wanted.append(shard)
                            self._last_use[shard] = self._seen
                    self._forget()
                    self._changed.notify_all()

    def _divide(self) -> None:
        """Update this stream's part of the cache, and warn if a window does not fit into it."""
        cache = self._source.cache
        if cache.limit is None or time.monotonic() < self._divided + _DIVIDE_S:
            return
        self._divided = time.monotonic()
        self._budget, num_users = cache.share()
        if num_users == self._num_users:
            return
        self._num_users = num_users
        num_batches = -(-self._order.window_span // self._share.batch_size)
        needed = {
            shard for names in self._shards_of(self._position, num_batches) for shard in names
        }
        missing = self._bytes_of(needed) - self._budget
        if missing > 0:
            cache.warn(cache.limit + int(missing * num_users))

    def _may_plan(self, names: list[int]) -> bool:
        """Whether a batch with these shards may be planned.

        The next few always are; others only within the horizon and if there is space for them.
        """
        step = self._share.batch_size
        if self._seen < self._position + _BATCHES * step:
            return True
        if self._seen >= self._position + self._horizon:
            return False
        if len(self._last_use) >= _MOST_PLANNED:
            return False
        # Some space is left for indexes that are not fetched yet, and for urgent reads.
        return self._bytes_of(self._last_use.keys() | names) < 0.9 * self._budget

    def _forget(self) -> None:
        for shard, position in list(self._last_use.items()):
            if position <= self._position:
                del self._last_use[shard]
                self._held.pop(shard, None)

    def _fetch(self) -> None:
        stop_at(self._stop)
        while not self._stop.is_set():
            with self._changed:
                if not self._wanted:
                    self._changed.wait(_ASK_S)
                    continue
                shard = self._wanted.popleft()
                if shard not in self._last_use:
                    continue
            name = self._table.shards[shard].name
            try:
                self._table.index(shard)
                file = self._source.open_early(name)
            except (ShardsError, OSError) as error:
                # The reader that needs it tries again, and reports the error if that fails too.
                log.debug("%s was not prefetched: %s", name, error)
                continue
            with self._changed:
                if self._stop.is_set():
                    return
                if file is None:
                    self._wanted.appendleft(shard)
                    self._changed.wait(_ASK_S)
                elif self._may_be_evicted and shard in self._last_use:
                    self._held[shard] = file
            del file

    def _shards_of(self, start: int, num_batches: int) -> list[list[int]]:
        """Shards of each of some batches; only one thread at a time may use the order."""
        share = self._share
        part = (share.batch_size, share.rank, share.world_size, num_batches)
        return [np.unique(place.shard).tolist() for place in self._order.shares(start, *part)]

    def _bytes_of(self, shards: Set[int]) -> int:
        return sum(self._table.shards[shard].num_bytes for shard in shards)
