"""The order of a mix against a walk by the rule, one position at a time."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.read.order import MixOrder, Order, seed_of

WEIGHTS = st.lists(
    st.builds(lambda n: Fraction(n, 1000), st.integers(1, 3000)), min_size=2, max_size=4
)


def walk(weights, count):
    """Dataset and own position of the first positions, by the rule as it is written down."""
    given = [0] * len(weights)
    found = []
    for _ in range(count):
        for number in range(len(weights)):
            # positions that reach this dataset are those that none before it took
            reached = sum(given[number:])
            share = weights[number] / sum(weights[number:])
            if floor((reached + 1) * share) > floor(reached * share):
                break
        found.append((number, given[number]))
        given[number] += 1
    return found


def make_order(weights, sizes=((5, 3), (4,), (7, 7, 2), (1,)), seed=3):
    orders = [
        Order(own, seed_of(seed, i, len(weights)), num_lanes=4, window_shards=1)
        for i, own in enumerate(sizes[: len(weights)])
    ]
    return MixOrder(orders, weights), orders


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 150), st.integers(1, 150))
def test_positions_belong_to_whom_the_rule_says(weights, start, count):
    number, own = make_order(weights)[0].owners(start, count)
    assert list(zip(number, own, strict=True)) == walk(weights, start + count)[start:]


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**15))
def test_far_out_the_rule_is_still_exact(weights, start):
    count = 50
    number, own = make_order(weights)[0].owners(start, count)
    first = weights[0] / sum(weights)
    for row, position in enumerate(range(start, start + count)):
        is_first = floor((position + 1) * first) > floor(position * first)
        assert (number[row] == 0) == is_first
        if is_first:
            assert own[row] == floor(position * first)
        elif len(weights) == 2:
            assert own[row] == position - floor(position * first)


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 500), st.integers(1, 500))
def test_every_run_of_positions_has_its_share_of_each(weights, start, count):
    number, _ = make_order(weights)[0].owners(start, count)
    counts = np.bincount(number, minlength=len(weights))
    for which, weight in enumerate(weights):
        # one position off for each time that the rest was divided
        assert abs(counts[which] - count * weight / sum(weights)) < which + 1 + (which == 0)
    whole = 1000 * int(1000 * sum(weights))
    if len(weights) == 2:
        number, _ = make_order(weights)[0].owners(start * 7, whole)
        wanted = [whole * weight / sum(weights) for weight in weights]
        assert np.bincount(number).tolist() == wanted


@settings(deadline=None)
@given(
    WEIGHTS,
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(0, 200),
    st.integers(1, 4),
)
def test_ranks_share_each_batch_of_the_mix(weights, world_size, extra, start, num_batches):
    batch_size = world_size + extra
    order, orders = make_order(weights)
    whole = order.plans(start, batch_size, 0, 1, num_batches)
    ranks = [order.plans(start, batch_size, r, world_size, num_batches) for r in range(world_size)]
    truth = walk(weights, start + batch_size * num_batches)
    for k, plan in enumerate(whole):
        begin = start + k * batch_size
        assert sorted(plan.position.tolist()) == list(range(begin, begin + batch_size))
        together = np.concatenate([mine[k].position for mine in ranks])
        np.testing.assert_array_equal(together, plan.position)
        sizes = [len(mine[k].position) for mine in ranks]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
        for part in [plan, *(mine[k] for mine in ranks)]:
            filled = {}
            for portion in part.portions:
                rows = zip(portion.rows, portion.places.position.tolist(), strict=True)
                for row, own in rows:
                    assert row not in filled
                    filled[row] = (portion.number, own)
                # and each place is where the dataset's own order has that position
                for i, own in enumerate(portion.places.position.tolist()):
                    alone = orders[portion.number].places(own, 1)
                    place = (portion.places.shard[i], portion.places.sample[i])
                    assert place == (alone.shard[0], alone.sample[0])
                    assert portion.places.index[i] == alone.index[0]
            assert [filled[row] for row in range(len(part.position))] == [
                truth[p] for p in part.position
            ]


@settings(deadline=None)
@given(WEIGHTS, st.sampled_from([1, 2, 3, 4]), st.integers(0, 300))
def test_every_rank_has_its_part_of_every_dataset(weights, world_size, start):
    batch_size = 24
    order, _ = make_order(weights)
    (whole,) = order.plans(start, batch_size, 0, 1, 1)
    total = {portion.number: len(portion.rows) for portion in whole.portions}
    for rank in range(world_size):
        (mine,) = order.plans(start, batch_size, rank, world_size, 1)
        counts = {portion.number: len(portion.rows) for portion in mine.portions}
        for number, count in total.items():
            # two datasets or four may each be off by one at either end of the run
            assert abs(counts.get(number, 0) - count / world_size) < len(weights)


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 60), st.integers(1, 20))
def test_what_is_prefetched_is_what_is_shown(weights, start, batch_size):
    order, orders = make_order(weights)
    plans = order.plans(start, batch_size, 0, 1, 3)
    for which, own in enumerate(orders):
        part = order.only(which)
        for plan, places in zip(plans, part.shares(start, batch_size, 0, 1, 3), strict=True):
            shown = [p.places.index.tolist() for p in plan.portions if p.number == which]
            assert places.index.tolist() == (shown[0] if shown else [])
        share = weights[which] / sum(weights)
        assert part.num_samples == floor(own.num_samples / share)
        assert part.window_span == floor(own.window_span / share)


def test_two_datasets_of_one_size_do_not_walk_side_by_side():
    order, orders = make_order([Fraction(1, 2)] * 2, sizes=((50, 50), (50, 50)))
    assert orders[0].places(0, 100).index.tolist() != orders[1].places(0, 100).index.tolist()
    assert order.num_samples == 200
    assert seed_of(3, 0, 1) == 3


def test_weights_that_make_no_mix_are_refused():
    orders = [Order([4], 0), Order([4], 1)]
    for weights in ([Fraction(1)], [Fraction(1), Fraction(0)], []):
        with pytest.raises(ValueError, match="positive weight"):
            MixOrder(orders, weights)
    with pytest.raises(ValueError, match="too many digits"):
        MixOrder(orders, [Fraction(1), Fraction(1, 10**13)])
