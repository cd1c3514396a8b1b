"""The order: every sample once per epoch, alike for any ranks, any start, for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.read.order import Order, Place, share_of, share_sizes


def share(order: Order, start: int, batch_size: int, rank: int, world_size: int) -> Place:
    """One rank's part of a single batch."""
    (part,) = order.shares(start, batch_size, rank, world_size, num_batches=1)
    return part


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=9)


@settings(deadline=None)  # other work on the same cores is no error
@given(SIZES, st.integers(-3, 3), st.integers(1, 70), st.integers(1, 5), st.integers(0, 5))
def test_each_epoch_is_a_permutation(sizes, seed, lanes, window, epoch):
    order = Order(sizes, seed, lanes, window)
    n = sum(sizes)
    places = order.places(epoch * n, n)
    assert sorted(places.index.tolist()) == list(range(n))
    starts = np.concatenate(([0], np.cumsum(sizes)))
    np.testing.assert_array_equal(starts[places.shard] + places.sample, places.index)
    assert (places.sample < np.array(sizes)[places.shard]).all()


@settings(deadline=None)  # other work on the same cores is no error
@given(SIZES, st.integers(1, 70), st.integers(1, 3), st.integers(0, 500), st.integers(1, 200))
def test_any_start_gives_the_same_order(sizes, lanes, window, start, count):
    whole = Order(sizes, 1, lanes, window).places(0, start + count)
    part = Order(sizes, 1, lanes, window).places(start, count)
    np.testing.assert_array_equal(whole.index[start:], part.index)
    np.testing.assert_array_equal(whole.position[start:], part.position)


@settings(deadline=None)  # other work on the same cores is no error
@given(SIZES, st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 300))
def test_ranks_share_each_batch(sizes, extra, world_size, start):
    batch_size = world_size + extra
    order = Order(sizes, 2, 8)
    whole = share(order, start, batch_size, 0, 1)
    parts = [share(order, start, batch_size, rank, world_size) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate([p.index for p in parts]), whole.index)
    assert sorted(whole.position.tolist()) == list(range(start, start + batch_size))
    sizes_of_parts = [len(p.index) for p in parts]
    assert max(sizes_of_parts) - min(sizes_of_parts) <= 1
    assert sizes_of_parts == sorted(sizes_of_parts, reverse=True)


def test_a_rank_keeps_to_its_own_lanes():
    order = Order([100] * 64, 0, num_lanes=64)
    shards = [set[int](), set[int]()]
    for batch in range(100):
        for rank in (0, 1):
            shards[rank] |= set(share(order, batch * 64, 64, rank, 2).shard.tolist())
    # 32 lanes of exactly one shard's length each touch at most two shards apiece.
    assert all(len(mine) <= 64 for mine in shards)
    lanes = [{int(p) % 64 for p in share(order, 64 * 7, 64, rank, 2).position} for rank in (0, 1)]
    assert lanes == [set(range(32)), set(range(32, 64))]


def test_epochs_seeds_and_lanes_mix():
    order = Order([50] * 8, 0)
    n = order.num_samples
    epochs = [order.places(e * n, n).index for e in range(20)]
    other = Order([50] * 8, 1).places(0, n).index
    assert len({tuple(e) for e in [*epochs, other]}) == 21
    # Neighbours in the data must not stay neighbours in the order, nor companions in a batch.
    together = np.zeros((n, n), bool)
    for order_of_epoch in epochs:
        assert (np.abs(np.diff(order_of_epoch)) == 1).mean() < 0.05
        for batch in np.array_split(order_of_epoch, n // 40):
            together[np.ix_(batch, batch)] = True
    # 20 epochs of 10 batches: two samples meet with probability 1 - 0.9**20 = 0.88.
    assert together.mean() > 0.8


@pytest.mark.parametrize("batch", [16, 64])
def test_a_small_batch_is_drawn_from_all_of_a_sorted_dataset(batch: int):
    n = 640
    order = Order([n], 3)
    means = [order.places(start, batch).index.mean() for start in range(0, 20 * n, batch)]
    # A batch from one stretch of the data would have a mean anywhere in it; n / sqrt(12) is the
    # spread of a single index, so of the mean of a random batch / sqrt(batch).
    assert np.std(means) < 1.3 * n / np.sqrt(12 * batch)


def test_samples_stay_within_their_window():
    # 2 lanes of 8 shards each, windows of one shard: entry i comes from within the same window.
    order = Order([10] * 16, 5, num_lanes=2, window_shards=1)
    places = order.places(0, 160)
    for lane in (0, 1):
        shards = places.shard[lane::2]
        for window in range(8):
            assert len(set(shards[window * 10 : window * 10 + 10].tolist())) <= 2


def test_the_order_never_changes():
    # Runs are resumed by position: another numpy or another release must not move a sample.
    order = Order([5, 3, 8], 7, num_lanes=4, window_shards=2)
    assert order.places(0, 16).index.tolist() == GOLDEN[0]
    assert order.places(16 * 1000, 16).index.tolist() == GOLDEN[1]


GOLDEN = [
    [6, 8, 12, 3, 5, 9, 15, 1, 7, 11, 14, 2, 4, 10, 13, 0],
    [5, 12, 11, 3, 6, 15, 8, 4, 7, 14, 9, 1, 0, 13, 10, 2],
]


@pytest.mark.parametrize("sizes", [[5, 3, 8], [1], [40, 40, 7], [9] * 7])
@pytest.mark.parametrize("num_lanes, window_shards", [(4, 1), (64, 4), (1, 2)])
def test_the_order_is_the_documented_one(sizes, num_lanes, window_shards):
    """docs/data-format.md followed step by step, one sample at a time."""
    n, seed, epoch = sum(sizes), 11, 3

    def words(purpose: str, count: int) -> list[int]:
        digest = hashlib.sha256(f"dinogen order {seed} {epoch} {purpose}".encode()).digest()
        key = int.from_bytes(digest[:16], "little")
        return [int(word) for word in np.random.Philox(key=key).random_raw(count)]

    def argsort(values: list[int]) -> list[int]:
        return sorted(range(len(values)), key=values.__getitem__)

    first, *rest = words("shards", len(sizes) + 1)
    ring = [(s, i) for s in argsort(rest) for i in range(sizes[s])]
    ring = ring[first % n :] + ring[: first % n]
    lanes = min(num_lanes, n)
    lane_entries: dict[int, list] = {}
    for lane in argsort(words("lanes", lanes)):
        length = n // lanes + (lane < n % lanes)
        lane_entries[lane], ring = ring[:length], ring[length:]
    size = window_shards * -(-n // len(sizes))
    for start in range(0, -(-n // lanes), size):
        full = min(size, n // lanes - start)
        table = words(f"window {start // size}", (full + 1) * lanes)
        for lane, entries in lane_entries.items():
            window = entries[start : start + size]
            column = [table[row * lanes + lane] for row in range(len(window))]
            entries[start : start + size] = [window[i] for i in argsort(column)]
    places = Order(sizes, seed, num_lanes, window_shards).places(epoch * n, n)
    found = list(zip(places.shard.tolist(), places.sample.tolist(), strict=True))
    assert found == [lane_entries[p % lanes][p // lanes] for p in range(n)]


def test_resuming_late_in_a_large_dataset_needs_no_walk():
    order = Order([1000] * 5000, 0)
    late = order.places(4_700_000, 64)
    assert len(set(late.shard.tolist())) > 30
    assert len(order._windows) == 1


def test_a_rank_of_many_sorts_its_own_lanes_alone():
    order = Order([1000] * 1000, 0)
    parts = order.shares(0, 4096, 700, 1024, num_batches=8)
    whole = order.places(0, 8 * 4096)
    for part in parts:
        np.testing.assert_array_equal(part.index, whole.index[part.position])
    alone = Order([1000] * 1000, 0)
    alone.shares(0, 4096, 700, 1024, num_batches=8)
    (window,) = alone._windows.values()
    lanes = {int(p) % 64 for part in parts for p in part.position}
    assert set(np.flatnonzero(window._sorted).tolist()) == lanes == {43}


@pytest.mark.parametrize("sizes", [[], [0], [3, 0]])
def test_empty_shards_are_refused(sizes):
    with pytest.raises(ValueError, match="at least one sample"):
        Order(sizes, 0)


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_numpys_and_those_of_batches(num, world_size):
    want = np.array_split(np.arange(num), world_size)
    slices = [share_of(num, rank, world_size) for rank in range(world_size)]
    assert [np.arange(num)[one].tolist() for one in slices] == [part.tolist() for part in want]
    assert share_sizes(num, world_size) == [len(part) for part in want]
    if num:
        order = Order([50], 0)
        parts = [share(order, 0, num, rank, world_size) for rank in range(world_size)]
        assert [len(part.position) for part in parts] == share_sizes(num, world_size)
