"""The standard error over halves, against that of means over many independent draws."""

from __future__ import annotations

import pytest
import torch

from dinogen.metrics.value import halves, standard_deviation


def test_halves_are_halves_and_the_same_again():
    found = halves(31, 20, seed=3)
    assert len(found) == 20 and {len(rows) for rows in found} == {15}
    for rows in found:
        assert len(rows.unique()) == 15 and rows.min() >= 0 and rows.max() < 31
    assert all(torch.equal(a, b) for a, b in zip(found, halves(31, 20, seed=3), strict=True))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], halves(31, 20, seed=4)[0])
    # every row has its turn
    assert len(torch.cat(found).unique()) == 31


def test_nothing_is_said_of_too_little():
    assert halves(19, 10, seed=0) == [] and halves(100, 1, seed=0) == []
    assert standard_deviation([]) is None and standard_deviation([1.0]) is None


def test_their_deviation_is_the_standard_error_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    means = [float(values[rows].mean()) for rows in halves(400, 300, seed=0)]
    assert standard_deviation(means) == pytest.approx(float(values.std()) / 20, rel=0.15)
