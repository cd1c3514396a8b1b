"""The order of samples of one dataset or a mix: a pure function of seed and position."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
# Two windows are in use where one ends and the next begins; two more are for a batch that is
# read again, or that crosses into the next epoch.
_WINDOWS_KEPT = 4


def share_sizes(num: int, world_size: int) -> list[int]:
    """How many of ``num`` things each rank has: as equal as possible, the larger shares first."""
    each, longer = divmod(num, world_size)
    return [each + (rank < longer) for rank in range(world_size)]


def share_of(num: int, rank: int, world_size: int) -> slice:
    """Which of ``num`` things a rank has, see :func:`share_sizes`; its share may be empty."""
    each, longer = divmod(num, world_size)
    first = rank * each + min(rank, longer)
    return slice(first, first + each + (rank < longer))


@dataclass(frozen=True)
class Place:
    """Where a run of positions is; all arrays have the shape of the requested positions.

    Attributes:
        position: global positions.
        shard: number of the shard within the split.
        sample: number of the sample within the shard.
        index: number of the sample within the split, in packed order.
    """

    position: Ints
    shard: Ints
    sample: Ints
    index: Ints


class Order:
    """The endless order of a split's samples. Global position P is place P % N of epoch P // N.

    Per epoch the shards are permuted and laid end to end; the resulting ring of samples is rotated
    by a random offset and cut into L equal lanes, numbered at random; within a lane, samples are
    permuted inside windows; place p of the epoch is entry p // L of lane p % L. The first N % L
    lanes are one entry longer.

    Args:
        shard_sizes: samples of each shard of the split, in packed order.
        seed: any integer.
        num_lanes: L; fewer if there are fewer samples.
        window_shards: length of a window, in shards of mean size.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, num_lanes: int = 64, window_shards: int = 4
    ) -> None:
        if not shard_sizes or min(shard_sizes) < 1:
            raise ValueError("every shard must hold at least one sample")
        if num_lanes < 1 or window_shards < 1:
            raise ValueError("num_lanes and window_shards must be at least 1")
        self._sizes = np.array(shard_sizes, np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self._sizes)))
        self._seed = seed
        self.num_samples = int(self._starts[-1])
        self.num_lanes = min(num_lanes, self.num_samples)
        self._window = window_shards * -(-self.num_samples // len(shard_sizes))
        self._blocks: OrderedDict[tuple[int, int], tuple[Ints, Ints, Ints]] = OrderedDict()

    @property
    def window_span(self) -> int:
        """Positions that one window of all lanes takes: a shard is shown within two of them."""
        return self._window * self.num_lanes

    def places(self, start: int, count: int) -> Place:
        """Places of the `count` global positions that follow `start`, in ascending order."""
        if start < 0 or count < 0:
            raise ValueError(f"positions begin at 0; requested: {count} from {start}")
        parts: list[tuple[Ints, Ints, Ints]] = []
        position, end = start, start + count
        span = self._window * self.num_lanes
        while position < end:
            epoch, place = divmod(position, self.num_samples)
            window, inside = divmod(place, span)
            block = self._block(epoch, window)
            take = min(end - position, len(block[0]) - inside)
            parts.append(
                (block[0][inside:][:take], block[1][inside:][:take], block[2][inside:][:take])
            )
            position += take
        if len(parts) == 1:
            shard, sample, index = (array.copy() for array in parts[0])
        else:
            shard, sample, index = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Place(np.arange(start, end), shard, sample, index)

    def shares(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Place]:
        """Places of one rank's part of `num_batches` global batches that follow `start`.

        Each batch is sorted by lane and cut into contiguous runs, as equal as possible, the longer
        ones first: a rank stays with its own lanes, and so with their shards.
        """
        whole = self.places(start, batch_size * num_batches)
        lane = (whole.position % self.num_samples % self.num_lanes).reshape(-1, batch_size)
        mine = np.argsort(lane, axis=1, kind="stable")[:, share_of(batch_size, rank, world_size)]
        mine += np.arange(0, batch_size * num_batches, batch_size)[:, None]
        arrays = (whole.position, whole.shard, whole.sample, whole.index)
        return [Place(*rows) for rows in zip(*(array[mine] for array in arrays), strict=True)]

    def _block(self, epoch: int, window: int) -> tuple[Ints, Ints, Ints]:
        """(shard, sample, index) of all positions in one window of all lanes of an epoch."""
        found = self._blocks.get((epoch, window))
        if found is None:
            found = self._locate(epoch, self._shuffled(epoch, window))
            self._blocks[epoch, window] = found
            if len(self._blocks) > _WINDOWS_KEPT:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end((epoch, window))
        return found

    def _shuffled(self, epoch: int, window: int) -> Ints:
        """Places on the ring of the epoch, in the order in which one window shows them."""
        length, num_longer = divmod(self.num_samples, self.num_lanes)
        first = window * self._window
        # All lanes have `full` entries here; the longer ones may have one more.
        full = min(self._window, length - first)
        extra = num_longer if full < self._window else 0
        lane_starts = self._lane_starts(epoch, length, num_longer) + first
        words = self._words(f"window {window}", epoch, (full + 1) * self.num_lanes)
        sort_keys = words.reshape(full + 1, self.num_lanes)
        entries = np.empty((full + 1, self.num_lanes), np.int64)
        entries[:, :extra] = np.argsort(sort_keys[:, :extra], axis=0, kind="stable")
        entries[:full, extra:] = np.argsort(sort_keys[:full, extra:], axis=0, kind="stable")
        return (entries + lane_starts).ravel()[: full * self.num_lanes + extra]

    def _lane_starts(self, epoch: int, length: int, num_longer: int) -> Ints:
        """Where each lane begins on the ring.

        The lanes are on it in random order: a batch smaller than L takes neighbouring lanes, which
        must not be neighbours in the data as well.
        """
        along_ring = np.argsort(self._words("lanes", epoch, self.num_lanes), kind="stable")
        lengths = length + (along_ring < num_longer)
        starts = np.empty(self.num_lanes, np.int64)
        starts[along_ring] = np.cumsum(lengths) - lengths
        return starts

    def _locate(self, epoch: int, ring: Ints) -> tuple[Ints, Ints, Ints]:
        words = self._words("shards", epoch, len(self._sizes) + 1)
        shards = np.argsort(words[1:], kind="stable")
        turn = int(words[0] % np.uint64(self.num_samples))
        ends = np.cumsum(self._sizes[shards])
        place = (ring + turn) % self.num_samples
        slot = np.searchsorted(ends, place, side="right")
        shard = shards[slot]
        sample = place - (ends[slot] - self._sizes[shard])
        return shard, sample, self._starts[shard] + sample

    def _words(self, purpose: str, epoch: int, count: int) -> npt.NDArray[np.uint64]:
        """`count` random words; sorting by raw Philox output is the same in every numpy."""
        digest = hashlib.sha256(f"dinogen order {self._seed} {epoch} {purpose}".encode()).digest()
        return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


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
        portions: what fills the rows; each row is filled once.
    """

    position: Ints
    portions: list[Portion]


class Shares(Protocol):
    """What one dataset contributes to a run of batches.

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
_NONE = np.zeros(0, np.int64)
_NO_PLACES = Place(_NONE, _NONE, _NONE, _NONE)


class MixOrder:
    """The endless order of several datasets, each with its share of the positions.

    For two datasets, A with weight w and B with 1 - w: position p is A's if
    floor((p + 1) w) > floor(p w), and it is then A's own position floor(p w), else B's own
    position p - floor(p w). So among any n positions A has n w, to within one. For more datasets,
    the first one's positions are found in this way, and the remaining positions, counted from 0,
    are divided among the others in the same way.

    Args:
        orders: of the datasets, each endless.
        weights: positive; only their ratios count.

    Raises:
        ValueError: the number of weights is not that of the orders, or a weight is not positive or
            has too many digits.

    Attributes:
        num_samples: length of an epoch: the number of samples of all datasets.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[Fraction]) -> None:
        if len(orders) != len(weights) or not weights or min(weights) <= 0:
            raise ValueError("a mix needs one positive weight per dataset")
        self._orders = tuple(orders)
        left = [sum(weights[number:], Fraction(0)) for number in range(len(weights))]
        self._shares = [w / rest for w, rest in zip(weights, left, strict=True)]
        self._weights = [w / left[0] for w in weights]
        if max(share.denominator for share in self._shares) > _FINEST:
            raise ValueError("the weights have too many digits: use at most 6")
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

        Within a batch each dataset's samples are sorted by their lane, and the datasets are
        interleaved evenly: the i-th of n samples goes to place (2 i + 1) / 2 n. The sorted batch is
        cut into contiguous runs, as equal as possible, the longer ones first. So every rank has its
        part of every dataset, and stays with its own lanes there.
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
        share = share_of(batch_size, rank, world_size)
        plans = []
        for begin in range(0, batch_size * num_batches, batch_size):
            here = slice(begin, begin + batch_size)
            dealt = np.lexsort((number[here], keys[here])) + begin
            mine = dealt[share]
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
    """Seed of the order of one dataset of a mix; a single dataset has the mix's own.

    Otherwise two datasets of equal size would show samples of the same number at the same time,
    and these may come from the same photo.
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
        """Places in this dataset of one rank's part of each batch; some may be empty."""
        plans = self._mix.plans(start, batch_size, rank, world_size, num_batches)
        found = [
            [portion.places for portion in plan.portions if portion.number == self._which]
            for plan in plans
        ]
        return [places[0] if places else _NO_PLACES for places in found]


def _even(batch: Ints, lane: Ints) -> npt.NDArray[np.float64]:
    """Where in its batch each sample of one dataset is placed, 0 to 1, by its lane."""
    counts = np.bincount(batch)
    starts = np.cumsum(counts) - counts
    nth = np.arange(len(batch)) - starts[batch]
    key = np.empty(len(batch))
    key[np.lexsort((lane, batch))] = (2 * nth + 1) / (2 * counts[batch])
    return key


def _take(places: Place, at: Ints) -> Place:
    return Place(places.position[at], places.shard[at], places.sample[at], places.index[at])
