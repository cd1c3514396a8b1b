"""Moments keep their digits and do not care how the samples are cut into shards."""

from __future__ import annotations

import numpy as np
import pytest

from shards.format.statistics import Moments, Statistics


def moments(arrays) -> Moments:
    found = Moments()
    for array in arrays:
        found.add(array)
    return found


@pytest.mark.parametrize("cuts", [[], [1], [10, 11, 40]])
@pytest.mark.parametrize("mean, spread", [(0, 1), (1e4, 1e-3), (-60, 0.02)])
def test_equals_numpy_in_float64(cuts, mean, spread):
    values = np.random.default_rng(0).normal(mean, spread, (50, 4, 3)).astype(np.float32)
    statistics = Statistics()
    for part in np.split(values, cuts):
        statistics.merge({"p2": moments(part)})
    wide = values.astype(np.float64)
    np.testing.assert_allclose(statistics.arrays()["p2.mean"], wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.arrays()["p2.var"], wide.var(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.total_variances()["p2"], wide.var(0).mean(), rtol=1e-9)


def test_constant_features_have_no_variance():
    statistics = Statistics()
    statistics.merge({"p1": moments([np.full((1, 3), 0.1, np.float16)] * 7)})
    assert statistics.total_variances() == {"p1": 0.0}
