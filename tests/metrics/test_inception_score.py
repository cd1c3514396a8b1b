"""Inception Score on given logits against torch-fidelity, torchmetrics and closed forms."""

from __future__ import annotations

import pytest
import torch

from dinogen.metrics.inception_score import inception_score

LOGITS = torch.randn(503, 40, generator=torch.Generator().manual_seed(0)) * 3


def test_it_is_torch_fidelitys():
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    theirs = isc_features_to_metric(LOGITS, splits=10, shuffle=False)
    found = inception_score(LOGITS)
    assert found.value == pytest.approx(theirs[KEY_METRIC_ISC_MEAN], rel=1e-9)
    assert found.spread == pytest.approx(theirs[KEY_METRIC_ISC_STD], rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all")
@pytest.mark.filterwarnings("ignore:std")
def test_it_is_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    theirs = InceptionScore(feature=torch.nn.Identity(), splits=1)
    theirs.update(LOGITS)
    assert inception_score(LOGITS, 1).value == pytest.approx(float(theirs.compute()[0]), rel=1e-3)


def test_sure_and_varied_is_the_number_of_classes():
    sure = (1e4 * torch.eye(8)).repeat(20, 1)
    assert inception_score(sure).value == pytest.approx(8, rel=1e-12)
    assert inception_score(sure).spread == pytest.approx(0, abs=1e-12)


def test_neither_is_one():
    assert inception_score(torch.zeros(20, 8)).value == pytest.approx(1)
    same = torch.tensor([[1e4, 0.0, 0.0]]).repeat(20, 1)
    assert inception_score(same).value == pytest.approx(1)
    assert inception_score(same[:1]).spread is None
    with pytest.raises(ValueError, match="no rows"):
        inception_score(same[:0])
