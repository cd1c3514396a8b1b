"""What each batch consists of: samples of one or several datasets, and the rows they fill."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shards.read.order import Ints, Order, Place


@dataclass(frozen=True)
class Portion:
    """Samples of one dataset within a batch.

    Attributes:
        number: of the dataset.
        places: where its samples lie; `position` is that in its own order.
        rows: which rows of the batch they fill.
    """

    number: int
    places: Place
    rows: list[int]


@dataclass(frozen=True)
class Plan:
    """One batch, or a rank's part of it.

    Attributes:
        position: global positions, one per row.
        portions: who fills the rows; each row is filled once.
    """

    position: Ints
    portions: list[Portion]


class Shares(Protocol):
    """What one dataset has to give to a run of batches.

    Attributes:
        num_samples: positions within which all of it is shown.
    """

    num_samples: int

    @property
    def window_span(self) -> int:
        """Positions within which one window of its order is shown."""
        ...

    def shares(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Place]:
        """As `Order.shares`."""
        ...


class Planner(Protocol):
    """An endless order of samples of one or several datasets.

    Attributes:
        num_samples: length of an epoch.
    """

    num_samples: int

    def plans(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Plan]:
        """One rank's part of `num_batches` global batches that follow position `start`."""
        ...

    def only(self, number: int) -> Shares:
        """The part of one of the datasets."""
        ...


class Alone:
    """The order of one dataset."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self.num_samples = order.num_samples

    def plans(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Plan]:
        """One rank's part of `num_batches` global batches that follow position `start`."""
        shares = self._order.shares(start, batch_size, rank, world_size, num_batches)
        return [
            Plan(place.position, [Portion(0, place, list(range(len(place.position))))])
            for place in shares
        ]

    def only(self, number: int) -> Shares:
        """The order itself."""
        return self._order


# So that no product below leaves 64 bits.
_FINEST = 10**12
_NO_PLACES = Place(*(np.zeros(0, np.int64) for _ in range(4)))


class MixOrder:
    """The endless order of several datasets, each with its share of the positions.

    Of two, A with weight w and B with 1 - w: position p is A's if floor((p + 1) w) > floor(p w),
    and it is then A's own position floor(p w), else B's own position p - floor(p w). So among any
    n positions A has n w, but for less than one. Of more, the first one's positions are told in
    this way, and what is left of the positions, counted from 0, is shared by the others likewise.

    Args:
        orders: of the datasets, each endless.
        weights: positive; only their ratios count.

    Raises:
        ValueError: there are not as many weights as orders, or they are not positive, or too fine.

    Attributes:
        num_samples: what is called an epoch: as many positions as there are samples in all.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[Fraction]) -> None:
        if len(orders) != len(weights) or not weights or min(weights) <= 0:
            raise ValueError("a mix takes datasets with a positive weight each")
        self._orders = tuple(orders)
        left = [sum(weights[number:], Fraction(0)) for number in range(len(weights))]
        self._shares = [w / rest for w, rest in zip(weights, left, strict=True)]
        self._weights = [w / left[0] for w in weights]
        if max(share.denominator for share in self._shares) > _FINEST:
            raise ValueError("the weights have too many digits: write them with 6 at most")
        self.num_samples = sum(order.num_samples for order in orders)

    def owners(self, start: int, count: int) -> tuple[Ints, Ints]:
        """Number of the dataset, and the place in its own order, of `count` global positions."""
        number = np.zeros(count, np.int64)
        own = np.zeros(count, np.int64)
        rows = np.arange(count)
        for which, share in enumerate(self._shares):
            n, d = share.numerator, share.denominator
            before, part = divmod(start * n, d)
            # floor((start + i) w) - floor(start w)
            passed = (part + np.arange(len(rows) + 1) * n) // d
            mine = passed[1:] > passed[:-1]
            number[rows[mine]] = which
            own[rows[mine]] = before + passed[:-1][mine]
            rows = rows[~mine]
            start -= before
        return number, own

    def plans(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Plan]:
        """One rank's part of `num_batches` global batches that follow position `start`.

        Within a batch each dataset's samples are sorted by their lane, and the datasets are dealt
        evenly: of n samples the i-th goes to place (2 i + 1) / 2 n. The batch so sorted is cut
        into contiguous runs, as equal as can be, the longer ones first. So every rank has its part
        of every dataset, and stays with its own lanes there.
        """
        number, own = self.owners(start, batch_size * num_batches)
        places, keys = [], np.empty(len(number))
        batch = np.arange(len(number)) // batch_size
        for which, order in enumerate(self._orders):
            rows = np.flatnonzero(number == which)
            located = order.places(int(own[rows[0]]), len(rows)) if len(rows) else _NO_PLACES
            places.append(located)
            lane = located.position % order.num_samples % order.num_lanes
            keys[rows] = _even(batch[rows], lane)
        each, longer = divmod(batch_size, world_size)
        first = rank * each + min(rank, longer)
        plans = []
        for begin in range(0, batch_size * num_batches, batch_size):
            here = slice(begin, begin + batch_size)
            dealt = np.lexsort((number[here], keys[here])) + begin
            mine = dealt[first : first + each + (rank < longer)]
            portions = []
            for which, located in enumerate(places):
                rows = np.flatnonzero(number[mine] == which)
                if len(rows):
                    at = own[mine[rows]] - located.position[0]
                    portions.append(Portion(which, _take(located, at), rows.tolist()))
            plans.append(Plan(mine + start, portions))
        return plans

    def only(self, number: int) -> Shares:
        """What the mix shows of one of its datasets."""
        return _OneOfMix(self, number, self._orders[number], self._weights[number])


def planner_of(orders: Sequence[Order], weights: Sequence[Fraction]) -> Planner:
    """The order of one dataset, or of several mixed by weight.

    Raises:
        ValueError: as `MixOrder`.
    """
    return Alone(orders[0]) if len(orders) == 1 else MixOrder(orders, weights)


def seed_of(seed: int, number: int, num_sets: int) -> int:
    """Seed of the order of one of the datasets of a mix; alone it has the mix's own.

    Two of equal size would else show samples of the same number side by side, and these may be of
    the same photo.
    """
    if num_sets == 1:
        return seed
    digest = hashlib.sha256(f"dinogen mix {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


class _OneOfMix:
    """The places of one dataset of a mix by the global positions of the mix.

    Attributes:
        window_span: global positions within which one window of the dataset's order is shown.
        num_samples: global positions within which the dataset is shown once.
    """

    def __init__(self, mix: MixOrder, which: int, order: Order, weight: Fraction) -> None:
        self._mix, self._which = mix, which
        self.window_span = int(order.window_span / weight)
        self.num_samples = int(order.num_samples / weight)

    def shares(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Place]:
        """Places in this dataset of one rank's part of each batch; of some maybe none."""
        plans = self._mix.plans(start, batch_size, rank, world_size, num_batches)
        found = [
            [portion.places for portion in plan.portions if portion.number == self._which]
            for plan in plans
        ]
        return [places[0] if places else _NO_PLACES for places in found]


def _even(batch: Ints, lane: Ints) -> npt.NDArray[np.float64]:
    """Where in its batch each sample of one dataset is dealt, 0 to 1, by its lane."""
    counts = np.bincount(batch)
    starts = np.cumsum(counts) - counts
    nth = np.arange(len(batch)) - starts[batch]
    key = np.empty(len(batch))
    key[np.lexsort((lane, batch))] = (2 * nth + 1) / (2 * counts[batch])
    return key


def _take(places: Place, at: Ints) -> Place:
    return Place(places.position[at], places.shard[at], places.sample[at], places.index[at])
