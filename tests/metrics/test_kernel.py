"""Kernel distance against torch-fidelity, torchmetrics and sums written out."""

from __future__ import annotations

import statistics

import pytest
import torch

from dinogen.metrics.kernel import kernel_distance
from dinogen.metrics.value import halves


def rows(num, seed, shift=0.0, channels=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randn(num, channels, generator=generator) + shift)


def written_out(a, b):
    def kernel(x, y):
        return (float(x.double() @ y.double()) / len(x) + 1) ** 3

    def within(x):
        pairs = [kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return statistics.fmean(pairs)

    across = statistics.fmean(kernel(x, y) for x in a for y in b)
    return within(a) + within(b) - 2 * across


@pytest.mark.parametrize("block", [5, 1000])
def test_the_sums_written_out(block):
    a, b = rows(23, 1), rows(31, 2, shift=0.2)
    found = kernel_distance(a, b, block=block)
    assert found.value == pytest.approx(written_out(a, b), rel=1e-10)
    assert found.spread is None


def test_it_is_torch_fidelitys():
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    a, b = rows(300, 1), rows(300, 2, shift=0.2)
    theirs = kid_features_to_metric(
        a.double(), b.double(), kid_subsets=1, kid_subset_size=300, verbose=False
    )
    assert kernel_distance(a, b).value == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_it_is_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = rows(300, 1), rows(300, 2, shift=0.2)
    theirs = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=300)
    theirs.update(a.double(), real=False)
    theirs.update(b.double(), real=True)
    assert kernel_distance(a, b).value == pytest.approx(float(theirs.compute()[0]), rel=1e-3)


def test_halves_are_measured_as_if_alone():
    a, b = rows(40, 1), rows(31, 2, shift=0.2)
    found = kernel_distance(a, b, num=6, seed=5, block=9)
    alone = [kernel_distance(a[half], b).value for half in halves(40, 6, 5)]
    assert found.value == pytest.approx(kernel_distance(a, b).value, rel=1e-12)
    assert found.spread == pytest.approx(statistics.stdev(alone), rel=1e-9)


def test_it_is_unbiased():
    """Sets of one distribution are 0 apart on average, though each set is small."""
    values = [kernel_distance(rows(30, 2 * i), rows(30, 2 * i + 1)).value for i in range(200)]
    assert min(values) < 0
    assert abs(statistics.fmean(values)) < 3 * statistics.stdev(values) / 200**0.5


def test_one_row_is_too_few():
    with pytest.raises(ValueError, match="1 against 5 rows"):
        kernel_distance(rows(1, 0), rows(5, 0))
