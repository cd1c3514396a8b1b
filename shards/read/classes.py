"""An order of samples in runs of one class each: a pure function of seed and position, too."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from shards.format.index import NO_LABEL
from shards.read.batch import Successor
from shards.read.order import Ints, Place, Plan, Portion, Shares, share_of

# Orders of classes, and those of the samples of each class, that are kept.
_KEPT_ROUNDS = 64
_KEPT_PASSES = 2


class ClassOrder:
    """The endless order of a split's samples in runs of n samples of one class.

    Positions from ``first`` on are cut into runs of n. Among each C runs in a row, C the number of
    classes, every class has one, in an order of that round's own. The k-th sample of a class since
    ``first`` is number k % S of a random order of its S samples that is drawn for pass k // S
    through them. So a class of few samples is shown as often as one of many.

    Args:
        labels: of the samples, in packed order; those without a label are never shown.
        shard_sizes: samples of each shard of the split, in packed order.
        seed: any integer.
        run: n.
        first: position at which the first run begins.

    Raises:
        ValueError: no sample has a label, or n or ``first`` is out of range.

    Attributes:
        num_samples: positions within which every sample is shown.
        window_span: the same: samples of a class come from all shards.
    """

    def __init__(
        self, labels: Ints, shard_sizes: list[int], seed: int, run: int, first: int = 0
    ) -> None:
        if run < 1 or first < 0:
            raise ValueError("a run needs at least one sample, and positions begin at 0")
        by_class = np.argsort(labels, kind="stable")
        by_class = by_class[labels[by_class] != NO_LABEL]
        if not len(by_class):
            raise ValueError("no sample has a label")
        _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
        self._by_class, self._class_starts, self._class_sizes = by_class, starts, sizes
        self._shard_ends = np.cumsum(shard_sizes)
        self._seed, self._run, self._first = seed, run, first
        rounds = -(-int(sizes.max()) // run)
        self.num_samples = rounds * run * len(sizes)
        self.window_span = self.num_samples
        self._rounds: OrderedDict[int, Ints] = OrderedDict()
        self._passes: dict[int, OrderedDict[int, Ints]] = {}

    def places(self, start: int, count: int) -> Place:
        """Places of the ``count`` global positions that follow ``start``."""
        return self.at(np.arange(start, start + count))

    def at(self, positions: Ints) -> Place:
        """Places of these global positions (n,), ``first`` or above, in any order."""
        number, nth = self._of_class(positions)
        return self._place(positions, number, nth)

    def following(self, position: int, steps: int) -> Place:
        """The sample that comes that many steps later among those of the position's class."""
        number, nth = self._of_class(np.array([position]))
        return self._place(np.array([position]), number, nth + steps)

    def shares(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Place]:
        """Places of one rank's part of ``num_batches`` global batches that follow ``start``.

        A part is a run of the batch: all ranks' parts in rank order are in order of position.
        """
        mine = share_of(batch_size, rank, world_size)
        count = mine.stop - mine.start
        starts = range(start + mine.start, start + batch_size * num_batches, batch_size)
        return [self.places(one, count) for one in starts]

    def plans(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Plan]:
        """One rank's part of ``num_batches`` global batches that follow position ``start``."""
        shares = self.shares(start, batch_size, rank, world_size, num_batches)
        return [
            Plan(place.position, [Portion(0, place, list(range(len(place.position))))])
            for place in shares
        ]

    def only(self, number: int) -> Shares:
        """The order itself."""
        return self

    def _of_class(self, positions: Ints) -> tuple[Ints, Ints]:
        """Number of the class, and how many of its samples came before, of each position."""
        if len(positions) and int(positions.min()) < self._first:
            raise ValueError(f"positions begin at {self._first}; requested: {positions.min()}")
        runs, within = np.divmod(positions - self._first, self._run)
        rounds, slots = np.divmod(runs, len(self._class_sizes))
        number = np.empty_like(positions)
        for one in np.unique(rounds).tolist():
            rows = rounds == one
            number[rows] = self._round(one)[slots[rows]]
        return number, rounds * self._run + within

    def _place(self, positions: Ints, number: Ints, nth: Ints) -> Place:
        passes, place = np.divmod(nth, self._class_sizes[number])
        index = np.empty_like(positions)
        pairs = np.stack([number, passes], 1)
        for which, one in np.unique(pairs, axis=0).tolist():
            rows = (number == which) & (passes == one)
            members = self._by_class[self._class_starts[which] :]
            index[rows] = members[self._pass(which, one)[place[rows]]]
        shard = np.searchsorted(self._shard_ends, index, side="right")
        sample = index - np.concatenate(([0], self._shard_ends))[shard]
        return Place(positions, shard, sample, index)

    def _round(self, number: int) -> Ints:
        """The order of the classes in a round."""
        if number not in self._rounds:
            self._rounds[number] = self._shuffled(f"round {number}", len(self._class_sizes))
            if len(self._rounds) > _KEPT_ROUNDS:
                self._rounds.popitem(last=False)
        return self._rounds[number]

    def _pass(self, which: int, number: int) -> Ints:
        """The order of the samples of a class in a pass through them."""
        # by class: the many passes through a small one would push out the order of a large one
        kept = self._passes.setdefault(which, OrderedDict())
        if number not in kept:
            size = int(self._class_sizes[which])
            kept[number] = self._shuffled(f"class {which} {number}", size)
            if len(kept) > _KEPT_PASSES:
                kept.popitem(last=False)
        return kept[number]

    def _shuffled(self, purpose: str, count: int) -> Ints:
        """0 to count - 1; sorting raw Philox output gives the same in every numpy."""
        digest = hashlib.sha256(f"dinogen classes {self._seed} {purpose}".encode()).digest()
        words: npt.NDArray[np.uint64] = np.random.Philox(
            key=int.from_bytes(digest[:16], "little")
        ).random_raw(count)
        return np.argsort(words, kind="stable")


def within_class(order: ClassOrder) -> Successor:
    """The order as a successor within classes, safe for several threads."""
    lock = threading.Lock()

    def following(position: int, step: int) -> Place:
        with lock:
            return order.following(position, step)

    return following
