"""The order of samples: a pure function of (seed, epoch, position) to (shard, sample)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
# Two windows are in use where one ends and the next begins; two more serve a batch that is
# read again, or one that crosses into the next epoch.
_WINDOWS_KEPT = 4


@dataclass(frozen=True)
class Place:
    """Where a run of positions lies: all arrays have the shape of the positions asked for.

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

    Per epoch the shards are permuted and laid end to end, the ring of samples so made is turned by
    a random offset and cut into L equal lanes, numbered at random; within a lane, samples are
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
            raise ValueError(f"positions begin at 0; asked for {count} from {start}")
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

        Each batch is sorted by lane and cut into contiguous runs, as equal as can be, the longer
        ones first: a rank stays with its own lanes, and so with their shards.
        """
        whole = self.places(start, batch_size * num_batches)
        lane = (whole.position % self.num_samples % self.num_lanes).reshape(-1, batch_size)
        each, longer = divmod(batch_size, world_size)
        first = rank * each + min(rank, longer)
        mine = np.argsort(lane, axis=1, kind="stable")[:, first : first + each + (rank < longer)]
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

        The lanes lie on it in random order: a batch smaller than L takes neighbouring lanes, which
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
