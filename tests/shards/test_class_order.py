"""Runs of one class: every class in each round, every sample in each pass, alike for any ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.format.index import NO_LABEL
from shards.read.classes import ClassOrder

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def order_of(labels, run=3, first=0, seed=0, shard=7):
    sizes = [len(labels[at : at + shard]) for at in range(0, len(labels), shard)]
    return ClassOrder(np.array(labels, np.int64), sizes, seed, run, first)


@settings(deadline=None)  # other work on the same cores is no error
@given(LABELS, st.integers(1, 5), st.integers(0, 9), st.integers(0, 3))
def test_each_run_is_of_one_class_and_each_round_of_all(labels, run, first, seed):
    order = order_of(labels, run, first, seed)
    num_classes = len(set(labels))
    places = order.places(first, 4 * num_classes * run)
    shown = np.array(labels)[places.index].reshape(4, num_classes, run)
    assert (shown == shown[:, :, :1]).all()
    assert all(sorted(each) == sorted(set(labels)) for each in shown[:, :, 0].tolist())


@settings(deadline=None)  # other work on the same cores is no error
@given(LABELS, st.integers(1, 5))
def test_each_pass_through_a_class_is_a_permutation(labels, run):
    order = order_of(labels, run)
    count = 3 * order.num_samples
    found = order.places(0, count).index
    assert set(found[: order.num_samples].tolist()) == set(range(len(labels)))
    for label in set(labels):
        own = np.flatnonzero(np.array(labels) == label)
        shown = found[np.array(labels)[found] == label]
        for start in range(0, len(shown) - len(own), len(own)):
            assert sorted(shown[start : start + len(own)]) == own.tolist()


@settings(deadline=None)  # other work on the same cores is no error
@given(LABELS, st.integers(0, 90), st.integers(1, 60))
def test_any_start_gives_the_same_order(labels, start, count):
    whole = order_of(labels).places(0, start + count)
    part = order_of(labels).places(start, count)
    np.testing.assert_array_equal(whole.index[start:], part.index)
    np.testing.assert_array_equal(whole.shard[start:] * 7 + whole.sample[start:], part.index)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_ranks_share_each_batch_in_order(num_ranks):
    labels = [0, 1, 2] * 9
    parts = [order_of(labels).plans(12, 12, rank, num_ranks, 2) for rank in range(num_ranks)]
    for batch in range(2):
        places = [part[batch].portions[0].places for part in parts]
        whole = order_of(labels).places(12 + 12 * batch, 12)
        np.testing.assert_array_equal(np.concatenate([p.position for p in places]), whole.position)
        np.testing.assert_array_equal(np.concatenate([p.index for p in places]), whole.index)


def test_what_replaces_a_sample_is_of_its_class():
    labels = [0, 1, 1, 2, 0, 1, 2, 2]
    order = order_of(labels, run=2)
    for position in range(24):
        label = labels[int(order.places(position, 1).index[0])]
        others = [int(order.following(position, step).index[0]) for step in range(1, 9)]
        assert {labels[other] for other in others} == {label}
        assert len(set(others)) == labels.count(label)


def test_samples_without_a_label_are_never_shown():
    order = order_of([0, NO_LABEL, 1, NO_LABEL, 1], run=2)
    assert set(order.places(0, 40).index.tolist()) == {0, 2, 4}
    with pytest.raises(ValueError, match="no sample has a label"):
        order_of([NO_LABEL])


def test_the_order_of_a_large_class_outlives_many_passes_through_small_ones(monkeypatch):
    drawn = []
    shuffled = ClassOrder._shuffled

    def counted(self, purpose, count):
        drawn.append((purpose, count))
        return shuffled(self, purpose, count)

    monkeypatch.setattr(ClassOrder, "_shuffled", counted)
    order = order_of([0, 1, 2] + [3] * 100, run=8)
    for start in range(0, 320, 32):
        order.places(start, 32)
    assert [purpose for purpose, count in drawn if count == 100] == ["class 3 0"]
    kept = order._passes.values()
    assert [len(each) for each in kept] == [2, 2, 2, 1]


def test_seeds_passes_and_rounds_differ():
    labels = [0, 1] * 20
    one, other = (order_of(labels, 10, seed=seed).places(0, 160).index for seed in (0, 1))
    assert one.tolist() != other.tolist()
    assert one[:80].tolist() != one[80:].tolist()


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        order_of([0, 1], run=0)
    with pytest.raises(ValueError, match="positions begin at 5"):
        order_of([0, 1], first=5).places(4, 2)
