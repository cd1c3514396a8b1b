"""The order of samples of one dataset or a mix: a pure function of seed and position."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
# Two windows are in use where one ends and the next begins; two more are for a batch that is
# read again, or that crosses into the next epoch.
_WINDOWS_KEPT = 4
Key = TypeVar("Key")
Value = TypeVar("Value")


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


@dataclass(frozen=True)
class _Epoch:
    """The ring of samples of one epoch.

    Attributes:
        shards: in their order on the ring before it is turned.
        begins: first sample of each of them on that ring.
        ends: the same of the sample behind its last one.
        turn: by how many samples the ring is turned.
        lane_starts: where each lane begins on the turned ring.
    """

    shards: Ints
    begins: Ints
    ends: Ints
    turn: int
    lane_starts: Ints


class _Window:
    """In which order one window shows the entries of each lane.

    A lane is sorted when it is first asked for: a rank of many needs a few of them, so its time and
    memory do not grow with the window.

    Args:
        words: gives the random words by which the entries are sorted, (entries, lanes).
        counts: entries of each lane.

    Attributes:
        entry: (lanes, entries); rows of lanes that were not asked for are undefined.
    """

    def __init__(self, words: Callable[[], npt.NDArray[np.uint64]], counts: Ints) -> None:
        self._words, self._counts = words, counts
        self._sorted = np.zeros(len(counts), np.bool_)
        self.entry = np.empty((len(counts), int(counts.max())), np.int32)

    def sort(self, lanes: Ints) -> None:
        """Make the rows of these lanes valid."""
        if self._sorted[lanes].all():
            return
        missing = np.unique(lanes[~self._sorted[lanes]])
        words = np.ascontiguousarray(self._words()[:, missing].T)
        for count in np.unique(self._counts[missing]).tolist():
            rows = self._counts[missing] == count
            found = np.argsort(words[rows, :count], axis=1, kind="stable")
            self.entry[missing[rows], :count] = found
        self._sorted[missing] = True


def _kept(cache: OrderedDict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
    """The value of a key, made if it is not among the newest ones."""
    if key in cache:
        cache.move_to_end(key)
    else:
        cache[key] = make()
        if len(cache) > _WINDOWS_KEPT:
            cache.popitem(last=False)
    return cache[key]


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
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    @property
    def window_span(self) -> int:
        """Positions that one window of all lanes takes: a shard is shown within two of them."""
        return self._window * self.num_lanes

    def places(self, start: int, count: int) -> Place:
        """Places of the `count` global positions that follow `start`, in ascending order."""
        if start < 0 or count < 0:
            raise ValueError(f"positions begin at 0; requested: {count} from {start}")
        return self.at(np.arange(start, start + count))

    def at(self, positions: Ints) -> Place:
        """Places of these global positions, 0 or above, of any shape and in any order."""
        epochs, places = np.divmod(positions, self.num_samples)
        windows, inside = np.divmod(places, self.window_span)
        num_windows = self.num_samples // self.window_span + 1
        which = epochs * num_windows + windows
        shard, sample = np.empty_like(positions), np.empty_like(positions)
        # Nearly always they are all in one window, for which a set is faster than np.unique.
        for number in set(which.ravel().tolist()):
            rows = which == number
            epoch, window = divmod(number, num_windows)
            shard[rows], sample[rows] = self._locate(epoch, window, inside[rows])
        return Place(positions, shard, sample, self._starts[shard] + sample)

    def shares(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Place]:
        """Places of one rank's part of `num_batches` global batches that follow `start`.

        Each batch is sorted by lane and cut into contiguous runs, as equal as possible, the longer
        ones first: a rank stays with its own lanes, and so with their shards.
        """
        positions = np.arange(start, start + batch_size * num_batches).reshape(-1, batch_size)
        lanes = positions % self.num_samples % self.num_lanes
        mine = np.argsort(lanes, axis=1, kind="stable")[:, share_of(batch_size, rank, world_size)]
        mine += positions[:, :1]
        found = self.at(mine)
        arrays = (found.position, found.shard, found.sample, found.index)
        return [Place(*rows) for rows in zip(*arrays, strict=True)]

    def _locate(self, epoch: int, window: int, inside: Ints) -> tuple[Ints, Ints]:
        """(shard, sample) of some places, counted from the beginning of a window of all lanes."""
        entry, lane = np.divmod(inside, self.num_lanes)
        order = _kept(self._epochs, epoch, lambda: self._shuffled(epoch))
        entries = _kept(self._windows, (epoch, window), lambda: self._window_of(epoch, window))
        entries.sort(lane)
        ring = entries.entry[lane, entry] + (window * self._window) + order.lane_starts[lane]
        place = (ring + order.turn) % self.num_samples
        slot = np.searchsorted(order.ends, place, side="right")
        return order.shards[slot], place - order.begins[slot]

    def _shuffled(self, epoch: int) -> _Epoch:
        words = self._words("shards", epoch, len(self._sizes) + 1)
        shards = np.argsort(words[1:], kind="stable")
        ends = np.cumsum(self._sizes[shards])
        turn = int(words[0] % np.uint64(self.num_samples))
        # The lanes are on the ring in random order: a batch smaller than L takes neighbouring
        # lanes, which must not be neighbours in the data as well.
        along_ring = np.argsort(self._words("lanes", epoch, self.num_lanes), kind="stable")
        length, num_longer = divmod(self.num_samples, self.num_lanes)
        lengths = length + (along_ring < num_longer)
        starts = np.empty(self.num_lanes, np.int64)
        starts[along_ring] = np.cumsum(lengths) - lengths
        return _Epoch(shards, ends - self._sizes[shards], ends, turn, starts)

    def _window_of(self, epoch: int, window: int) -> _Window:
        length, num_longer = divmod(self.num_samples, self.num_lanes)
        # All lanes have `full` entries here; the longer ones may have one more.
        full = min(self._window, length - window * self._window)
        extra = num_longer if full < self._window else 0
        count = (full + 1) * self.num_lanes
        return _Window(
            lambda: self._words(f"window {window}", epoch, count).reshape(full + 1, -1),
            np.where(np.arange(self.num_lanes) < extra, full + 1, full),
        )

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
        keys = np.empty(len(number))
        batch = np.arange(len(number)) // batch_size
        for which, order in enumerate(self._orders):
            rows = np.flatnonzero(number == which)
            keys[rows] = _even(batch[rows], own[rows] % order.num_samples % order.num_lanes)
        dealt = np.lexsort((number, keys, batch)).reshape(-1, batch_size)
        mine = dealt[:, share_of(batch_size, rank, world_size)]
        found: list[list[Portion]] = [[] for _ in mine]
        for which, order in enumerate(self._orders):
            of_batch, rows = np.nonzero(number[mine] == which)
            places = order.at(own[mine[of_batch, rows]])
            ends = np.searchsorted(of_batch, np.arange(num_batches + 1))
            for portions, (begin, end) in zip(found, pairwise(ends.tolist()), strict=True):
                if begin < end:
                    part = slice(begin, end)
                    portions.append(Portion(which, _take(places, part), rows[part].tolist()))
        return [Plan(rows + start, portions) for rows, portions in zip(mine, found, strict=True)]

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


def _take(places: Place, part: slice) -> Place:
    return Place(*(a[part] for a in (places.position, places.shard, places.sample, places.index)))
