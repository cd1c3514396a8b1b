"""A metric value in JSON and back, and metric values that are none."""

from __future__ import annotations

import json

import pytest

from dinogen.metrics.value import MetricValue


def test_it_comes_back_from_json():
    metric_value = MetricValue("fid768", 1.25, 0.5, "lower", 5000, 700, "0123456789ab")
    stored = json.loads(json.dumps(metric_value.to_dict(), allow_nan=False))
    assert stored["reason"] is None
    assert MetricValue.from_dict(stored) == metric_value
    assert MetricValue.from_dict(stored | {"added_later": 1}) == metric_value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_no_value(value):
    metric_value = MetricValue("kid", value, 1.0, "lower", 5000, 700, None)
    assert metric_value.value is None and metric_value.spread is None
    assert str(value) in metric_value.reason
    assert MetricValue("kid", 1.0, value, "lower", 5000, 700, None).spread is None


def test_a_missing_value_says_why():
    metric_value = MetricValue.missing("fid", "lower", "metrics.inception: no file")
    assert (metric_value.value, metric_value.reason) == (None, "metrics.inception: no file")
    with pytest.raises(ValueError, match="fid has no value and no reason"):
        MetricValue("fid", None, None, "lower", 0, None, None)
