"""The Frechet distance against closed forms, torch-fidelity, torchmetrics, and itself: 0."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from dinogen.metrics.collect import Moments
from dinogen.metrics.frechet import frechet_distance, frechet_of, frechet_spread


def rows(num, channels, seed, shift=0.0):
    """Correlated, skewed features with a spectrum that falls as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99))
    mixing = mixing * torch.arange(1, channels + 1) ** -0.7
    plain = torch.randn(num, channels, generator=generator) @ mixing.T
    return torch.relu(plain + 0.5 + shift)


def between(a, b):
    return frechet_of(Moments.of(a), Moments.of(b))


def test_diagonal_covariances():
    generator = torch.Generator().manual_seed(0)
    mean_a, mean_b, var_a, var_b = torch.rand(4, 9, generator=generator, dtype=torch.float64)
    var_a[:3] = 0  # one side does not vary there
    var_b[2:5] = 0
    expected = (mean_a - mean_b).square().sum() + (var_a.sqrt() - var_b.sqrt()).square().sum()
    found = frechet_distance(mean_a, var_a.diag(), mean_b, var_b.diag())
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_two_by_two_covariances_that_do_not_commute():
    """There tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))."""
    a = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=torch.float64)
    b = torch.tensor([[0.3, -0.2], [-0.2, 4.0]], dtype=torch.float64)
    assert not torch.allclose(a @ b, b @ a)
    zero = torch.zeros(2, dtype=torch.float64)
    root = math.sqrt((a @ b).trace() + 2 * math.sqrt((a @ b).det()))
    expected = float(a.trace() + b.trace()) - 2 * root
    assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(zero, b, zero, a) == pytest.approx(expected, rel=1e-12)


def test_points_are_as_far_as_their_means():
    none = torch.zeros(3, 3, dtype=torch.float64)
    mean = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    assert frechet_distance(mean, none, torch.zeros_like(mean), none) == pytest.approx(9, rel=1e-15)


@pytest.mark.parametrize(("num_a", "num_b"), [(300, 200), (300, 20), (25, 20)])
def test_singular_covariances_against_singular_values_of_the_rows(num_a, num_b):
    a, b = rows(num_a, 48, 1), rows(num_b, 48, 2, shift=0.3)
    x, y = a.double().numpy(), b.double().numpy()
    centred_x = (x - x.mean(0)) / math.sqrt(num_a - 1)
    centred_y = (y - y.mean(0)) / math.sqrt(num_b - 1)
    roots = np.linalg.svd(centred_x @ centred_y.T, compute_uv=False).sum()
    traces = (centred_x**2).sum() + (centred_y**2).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * roots
    assert between(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("num_a", "num_b"), [(500, 400), (500, 40)])
def test_it_is_torch_fidelitys(num_a, num_b):
    from torch_fidelity.metric_fid import (
        KEY_METRIC_FID,
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )

    a, b = rows(num_a, 64, 1), rows(num_b, 64, 2, shift=0.3)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(a.double()), fid_features_to_statistics(b.double()), False
    )
    assert between(a, b) == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-4)


def test_it_is_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class AsTheyAre(torch.nn.Module):
        num_features = 64

        def forward(self, x):
            return x

    a, b = rows(500, 64, 1), rows(400, 64, 2, shift=0.3)
    theirs = FrechetInceptionDistance(feature=AsTheyAre())
    theirs.update(a, real=False)
    theirs.update(b, real=True)
    assert between(a, b) == pytest.approx(float(theirs.compute()), rel=1e-3)


@pytest.mark.parametrize("num", [30, 400])
def test_a_set_is_no_distance_from_itself(num):
    a = rows(num, 96, 1)
    size = float(Moments.of(a).covariance().trace())
    assert abs(between(a, a)) < 1e-11 * size
    # the same rows in another order and other blocks
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0))
    assert abs(frechet_of(Moments.of(a[order], block=7), Moments.of(a))) < 1e-9 * size


def test_its_spread_is_that_of_independent_draws():
    reference = Moments.of(rows(3000, 6, 0, shift=0.5))
    values = [frechet_of(Moments.of(rows(300, 6, seed)), reference) for seed in range(1, 101)]
    told = [frechet_spread(rows(300, 6, seed), reference, 40, 0) for seed in range(1, 6)]
    assert statistics.fmean(told) == pytest.approx(statistics.stdev(values), rel=0.25)
    assert frechet_spread(rows(300, 6, 1), reference, 0, 0) is None


def test_the_spread_is_over_the_distances_of_halves():
    from dinogen.metrics.value import halves

    generated, reference = rows(60, 20, 1), Moments.of(rows(15, 20, 2))
    values = [frechet_of(Moments.of(generated[half]), reference) for half in halves(60, 5, 7)]
    found = frechet_spread(generated, reference, 5, 7)
    assert found == pytest.approx(statistics.stdev(values), rel=1e-5)
