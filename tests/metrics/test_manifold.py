"""Precision, recall, density and coverage against loops over points, and torch-fidelity."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch

from dinogen.metrics import manifold as neighbours
from dinogen.metrics.manifold import manifold, nearest
from dinogen.metrics.memorisation import memorisation
from dinogen.metrics.value import halves


def rows(num, seed, shift=0.0, channels=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, channels, generator=generator) + shift


def by_loops(generated, real):
    """Straight from the papers' definitions, a point at a time."""
    g, r = generated.double().numpy(), real.double().numpy()

    def radius(points, index, k):
        return sorted(np.linalg.norm(points - points[index], axis=1))[k]  # 0 is itself

    def inside(point, centre, reach):
        return np.linalg.norm(point - centre) <= reach

    near = [radius(r, j, 3) for j in range(len(r))]
    far = [radius(r, j, 5) for j in range(len(r))]
    own = [radius(g, i, 3) for i in range(len(g))]
    real_balls, own_balls = list(zip(r, near, strict=True)), list(zip(g, own, strict=True))
    far_balls = list(zip(r, far, strict=True))
    return {
        "precision": np.mean([any(inside(p, c, d) for c, d in real_balls) for p in g]),
        "recall": np.mean([any(inside(p, c, d) for c, d in own_balls) for p in r]),
        "density": np.mean([sum(inside(p, c, d) for c, d in far_balls) for p in g]) / 5,
        "coverage": np.mean([any(inside(p, c, d) for p in g) for c, d in far_balls]),
    }


@pytest.mark.parametrize("block", [(7, 11), (1000, 1000)])
def test_all_four_and_their_spreads_are_those_of_loops(block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    generated, real = rows(60, 1, 0.8), rows(50, 2)
    found = manifold(generated, real, num=4, seed=3)
    expected = by_loops(generated, real)
    parts = [by_loops(generated[half], real) for half in halves(60, 4, 3)]
    assert 0 < expected["recall"] < expected["coverage"] < 1  # or it would say little
    assert 0 < expected["precision"] < 1 and expected["density"] < 1
    for name, value in expected.items():
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(value, rel=1e-12), name
        spread = statistics.stdev(float(part[name]) for part in parts)
        assert estimate.spread == pytest.approx(spread, rel=1e-9, abs=1e-12), name


def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated, real = rows(400, 1, 0.5, channels=16), rows(300, 2, channels=16)
    theirs = prc_features_to_metric(generated, real, verbose=False)
    found = manifold(generated, real)
    assert found.precision.value == pytest.approx(theirs["precision"], rel=1e-3)
    assert found.recall.value == pytest.approx(theirs["recall"], rel=1e-3)
    assert found.precision.spread is None


def test_sets_that_are_the_same_or_far_apart():
    real = rows(40, 1)
    same = manifold(real.clone(), real)
    assert (same.precision.value, same.recall.value, same.coverage.value) == (1, 1, 1)
    assert same.density.value >= 1
    apart = manifold(rows(40, 2, 100.0), real)
    assert {apart.precision.value, apart.recall.value, apart.density.value} == {0}
    one = manifold(real[:1].repeat(40, 1), real)  # a generator that makes one good image
    assert one.precision.value == 1 and one.recall.value < 0.1 and one.coverage.value < 0.5


def test_too_few_rows_are_said():
    with pytest.raises(ValueError, match="3 against 40 rows"):
        manifold(rows(3, 1), rows(40, 2))
    with pytest.raises(ValueError, match="40 against 5 rows"):
        manifold(rows(40, 1), rows(5, 2))


@pytest.mark.parametrize("block", [(7, 11), (1000, 1000)])
def test_nearest_is_a_full_sort(block, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    a, b = rows(30, 1), rows(40, 2)
    values, numbers = nearest(a, b, 13)
    full = torch.cdist(a.double(), b.double()).sort(1)
    torch.testing.assert_close(values, full.values[:, :13])
    assert torch.equal(numbers, full.indices[:, :13])
    values, numbers = nearest(a, a, 29, same=True)
    assert torch.isfinite(values).all()
    assert (
        numbers.sort(1).values
        == torch.arange(30).expand(30, -1)[~torch.eye(30).bool()].view(30, 29)
    ).all()


def test_near_rows_are_told_apart_far_from_zero():
    """In float32 their distance of 0.001 would drown in the squares of 1000."""
    a = rows(5, 1) + 1000
    values, _ = nearest(a.double() + 0.0005, a.double(), 1)
    torch.testing.assert_close(values, torch.full_like(values, 0.001), rtol=1e-3, atol=0)


def test_copies_are_found_and_new_images_are_not():
    train, held_out, fresh = rows(300, 1), rows(100, 2), rows(200, 3)
    assert memorisation(fresh, train, held_out).ratio.value == pytest.approx(1, abs=0.15)
    copies = train[torch.arange(100, 200)]
    found = memorisation(copies, train, held_out, num_pairs=3)
    assert found.ratio.value < 1e-5
    assert {pair.train - pair.sample for pair in found.pairs} == {100}
    assert memorisation(fresh + 50, train, held_out).ratio.value > 10
    mixed = fresh.clone()
    mixed[17] = train[250] + 0.001
    nearest_pair = memorisation(mixed, train, held_out).pairs[0]
    assert (nearest_pair.sample, nearest_pair.train) == (17, 250)
    assert nearest_pair.distance == pytest.approx(0.002, rel=1e-2)


def test_the_ratio_is_that_of_mean_distances():
    train, held_out, made = rows(80, 1), rows(30, 2), rows(60, 3, 0.5)
    found = memorisation(made, train, held_out, num=5, seed=2)
    mine = torch.cdist(made.double(), train.double()).min(1).values
    usual = torch.cdist(held_out.double(), train.double()).min(1).values.mean()
    assert found.ratio.value == pytest.approx(float(mine.mean() / usual), rel=1e-9)
    parts = [float(mine[half].mean() / usual) for half in halves(60, 5, 2)]
    assert found.ratio.spread == pytest.approx(statistics.stdev(parts), rel=1e-9)
    assert [pair.distance for pair in found.pairs] == pytest.approx(
        mine.sort().values[:16].tolist()
    )


def test_without_new_images_nothing_can_be_said():
    with pytest.raises(ValueError, match="every held-out image is in the training set"):
        memorisation(rows(9, 1), rows(80, 2), rows(80, 2)[:30])
    with pytest.raises(ValueError, match="takes samples"):
        memorisation(rows(9, 1), rows(80, 2), rows(0, 3))
