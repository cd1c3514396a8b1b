"""Running moments against numpy's, cut in any way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinogen.metrics.collect import Moments

ROWS = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3 + 100


@pytest.mark.parametrize("cut", [1, 7, 50])
def test_mean_and_covariance_are_numpys(cut):
    moments = Moments.empty(6)
    for part in ROWS.split(cut):
        moments.add(part)
    moments.add(ROWS[:0])
    exact = ROWS.double().numpy()
    assert moments.count == 50 and moments.mean().dtype == torch.float64
    np.testing.assert_allclose(moments.mean(), exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance(), np.cov(exact, rowvar=False), rtol=1e-9)
    whole = Moments.of(ROWS, block=11)
    torch.testing.assert_close(whole.outer, moments.outer, rtol=1e-13, atol=0)


def test_alone_they_merge_to_themselves_and_come_back_from_tensors():
    moments = Moments.of(ROWS)
    merged = moments.merged()
    assert merged.count == 50 and torch.equal(merged.outer, moments.outer)
    merged.add(ROWS)
    assert moments.count == 50 and not torch.equal(merged.total, moments.total)
    stored = Moments.from_tensors(moments.tensors())
    assert stored.count == 50 and torch.equal(stored.total, moments.total)


def test_too_few_rows_are_said():
    with pytest.raises(ValueError, match="no mean"):
        Moments.empty(3).mean()
    with pytest.raises(ValueError, match="1 rows have no covariance"):
        Moments.of(ROWS[:1]).covariance()
